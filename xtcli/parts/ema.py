"""The damped moving average of each channel over the text, with N states (Ma et al. 2022, Mega, arXiv:2209.10655).

    s_t = p s_(t-1) + x_t,   ema_t = sum over N of w s_t        p = 1 - a sigmoid(decay),   a = sigmoid(damping)
    kernel_l = sum over N of w p^l                              w = a expand contract / sqrt(N)

It is a convolution with a kernel that falls away, and is done by Fourier transforms, which round over the whole text;
`packed` does the same in pieces of the text where documents end in it, `ema_steps` in a loop over time. Both ways there
are two kernels, one of which runs backward; the token itself counts in both.

Axes: B rows, T tokens, D channels, C kernels (D, or 2 D both ways), N states of a channel, L taps.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from xtcli.parts.linear import Draw, exactly, widen

PIECE = 32
"""Tokens that `packed` takes at a time."""


def powers(log_keep: Tensor, count: int) -> Tensor:
    """p^0 ... p^(count - 1) of log p (C, N): (C, N, count)."""
    return torch.exp(log_keep[..., None] * torch.arange(count, device=log_keep.device))


def taps_of(weight: Tensor, log_keep: Tensor, count: int) -> Tensor:
    """The first taps of the kernels of w, log p (C, N): (C, count)."""
    # Not a product of matrices, which autocast would make in few digits.
    return (weight[..., None] * powers(log_keep, count)).sum(1)


def convolved(x: Tensor, ahead: Tensor, back: Tensor | None = None) -> Tensor:
    """y_t = sum over l of ahead_l x_(t-l) + back_l x_(t+l); x (B, C, T), kernels (C, L) -> (B, C, T)."""
    y: Tensor = _convolved(x, ahead, back)
    return y


def _spectra(x: Tensor, ahead: Tensor, back: Tensor | None) -> tuple[int, Tensor, Tensor]:
    """The size of a transform in which no end meets the other, and the transforms of x and of both kernels together."""
    size = x.shape[-1] + ahead.shape[-1]
    spectrum = torch.fft.rfft(ahead, n=size)
    if back is not None:
        spectrum = spectrum + torch.conj_physical(torch.fft.rfft(back, n=size))
    return size, torch.fft.rfft(x, n=size), spectrum


# One operator each way: the compiler makes no code for complex numbers. Conjugates are written out, since a compiled
# program passes over those that are only noted.
@torch.library.custom_op("xt::convolved", mutates_args=())
def _convolved(x: Tensor, ahead: Tensor, back: Tensor | None) -> Tensor:
    size, of_x, spectrum = _spectra(x, ahead, back)
    y: Tensor = torch.fft.irfft(of_x * spectrum, n=size)[..., : x.shape[-1]].contiguous()
    return y


@torch.library.custom_op("xt::convolved_backward", mutates_args=())
def _convolved_backward(dy: Tensor, x: Tensor, ahead: Tensor, back: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x and of both kernels, which are those of a convolution turned around."""
    size, of_x, spectrum = _spectra(x, ahead, back)
    of_dy = torch.fft.rfft(dy, n=size)
    dx = torch.fft.irfft(of_dy * torch.conj_physical(spectrum), n=size)[..., : x.shape[-1]].contiguous()
    met = (of_dy * torch.conj_physical(of_x)).sum(0)
    taps = ahead.shape[-1]
    for_ahead = torch.fft.irfft(met, n=size)[..., :taps].contiguous()
    for_back = (
        dx.new_empty(0) if back is None else torch.fft.irfft(torch.conj_physical(met), n=size)[..., :taps].contiguous()
    )
    return dx, for_ahead, for_back


@_convolved.register_fake
def _(x: Tensor, ahead: Tensor, back: Tensor | None) -> Tensor:
    return x.new_empty(x.shape)


@_convolved_backward.register_fake
def _(dy: Tensor, x: Tensor, ahead: Tensor, back: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), ahead.new_empty(ahead.shape), ahead.new_empty((0,) if back is None else back.shape)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _slopes(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    x, ahead, back = ctx.saved_tensors
    dx, for_ahead, for_back = _convolved_backward(dy, x, ahead, back)
    return dx, for_ahead, None if back is None else for_back


_convolved.register_autograd(_slopes, setup_context=_keep)


def ema_steps(
    x: Tensor, weight: Tensor, log_keep: Tensor, state: Tensor, documents: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """x (B, C, T), w, log p (C, N), state (B, C, N), documents (B, T) -> y (B, C, T), last state; a loop over time."""
    made = []
    for t in range(x.shape[-1]):
        if documents is not None and t:
            state = state * (documents[:, t] == documents[:, t - 1])[:, None, None]
        state = torch.exp(log_keep) * state + x[..., t, None]
        made.append((weight * state).sum(-1))
    return torch.stack(made, -1), state


def packed(x: Tensor, weight: Tensor, log_keep: Tensor, state: Tensor, documents: Tensor) -> tuple[Tensor, Tensor]:
    """`ema_steps` in pieces of the text."""
    length = min(PIECE, x.shape[-1])
    falls = powers(log_keep, length + 1)
    kernel = taps_of(weight, log_keep, length)
    lags = torch.arange(length, device=x.device)[:, None] - torch.arange(length, device=x.device)
    table = kernel[:, lags.clamp(min=0)] * (lags >= 0)  # (C, L, L)
    before, made = documents[:, :1], []
    for piece, own in zip(x.split(length, -1), documents.split(length, -1), strict=True):
        count = own.shape[1]
        same = (own[:, :, None] == own[:, None, :]).to(x.dtype)
        goes_on = (own == before).to(x.dtype)
        y = ((table[:, :count, :count] * same[:, None]) @ piece[..., None])[..., 0]
        made.append(y + torch.einsum("bcn,cnl,bl->bcl", state * weight, falls[..., 1 : count + 1], goes_on))
        kept = torch.einsum("bcl,cnl->bcn", piece * same[:, None, -1], falls[..., :count].flip(-1))
        state = falls[..., count] * state * goes_on[:, -1, None, None] + kept
        before = own[:, -1:]
    return torch.cat(made, -1), state


def cut_short(x: Tensor, weight: Tensor, log_keep: Tensor, taps: int | None, documents: Tensor) -> Tensor:
    """`packed` from nothing, with the first `taps` taps of the kernel (None: all): (B, C, T)."""
    nothing = x.new_zeros(x.shape[0], *log_keep.shape)
    y, _ = packed(x, weight, log_keep, nothing, documents)
    if taps is None or taps >= x.shape[-1]:
        return y
    rest, _ = packed(x, weight * torch.exp(log_keep * taps), log_keep, nothing, documents)
    same = documents[:, taps:] == documents[:, :-taps]
    return y - F.pad(rest[..., :-taps] * same[:, None], (taps, 0))


@dataclass(frozen=True)
class Spread:
    """Standard deviations of the EMA's parameters at the start."""

    decay: float
    expand: float
    contract: float


class DampedEma(nn.Module):
    """The moving average of each channel; `taps` cuts the kernel short."""

    rounds = True  # over the whole text, the future too

    def __init__(self, dim: int, states: int, both: bool, taps: int | None, spread: Spread) -> None:
        super().__init__()
        self.both, self.taps, self.spread = both, taps, spread
        shape = (2 * dim if both else dim, states)
        self.damping, self.decay = nn.Parameter(torch.empty(shape)), nn.Parameter(torch.empty(shape))
        self.expand, self.contract = nn.Parameter(torch.empty(shape)), nn.Parameter(torch.empty(shape))
        self.skip = nn.Parameter(torch.empty(dim))

    def draw(self, normal: Draw) -> None:
        """Normal numbers; `expand` around 1, -1, 1 ... from state to state."""
        normal(self.damping, self.spread.decay)
        normal(self.decay, self.spread.decay)
        normal(self.expand, self.spread.expand)
        self.expand[:, ::2] += 1.0
        self.expand[:, 1::2] -= 1.0
        normal(self.contract, self.spread.contract)
        normal(self.skip, self.spread.contract)

    def coefficients(self) -> tuple[Tensor, Tensor]:
        """w and log p, (C, N) each, C twice as many both ways."""
        a = widen(self.damping).sigmoid()
        weight = a * self.expand * self.contract / math.sqrt(self.expand.shape[1])
        return weight, torch.log1p(-a * widen(self.decay).sigmoid())

    def new_state(self, batch: int, device: Any, dtype: Any) -> Tensor:
        """The states (B, C, N), or where the kernel is cut short the inputs that it still sees (B, C, taps - 1)."""
        channels, states = self.expand.shape
        wide = dtype if dtype == torch.float64 else torch.float32
        return torch.zeros(batch, channels, states if self.taps is None else self.taps - 1, device=device, dtype=wide)

    def forward(
        self, x: Tensor, real: Tensor | None, documents: Tensor | None, state: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """x (B, T, D), real, documents (B, T) -> silu(ema + skip x) (B, T, D), and the next state if there was one.

        With a state of inputs, `documents` begins with theirs.
        """
        line = widen(x if real is None else x * real[..., None]).transpose(1, 2)
        with exactly(x):
            y, next_state = self.average(line, documents, state)
        return F.silu(y.transpose(1, 2).to(x.dtype) + x * self.skip), next_state

    def average(self, line: Tensor, documents: Tensor | None, state: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """line, y (B, D, T) in at least float32."""
        weight, log_keep = self.coefficients()
        if state is None:
            return self.whole(line, weight, log_keep, documents), None
        if self.taps is None:
            y, last = self.go_on(line, weight, log_keep, documents, state)
            return y, last.detach()
        tokens, line = line.shape[-1], torch.cat((state, line), -1)
        y = self.whole(line, weight, log_keep, documents)[..., -tokens:]
        return y, line[..., line.shape[-1] - state.shape[-1] :].detach()

    def whole(self, x: Tensor, weight: Tensor, log_keep: Tensor, documents: Tensor | None) -> Tensor:
        """A text from its beginning: x, y (B, D, T)."""
        channels, tokens = x.shape[1:]
        if documents is not None:
            y = cut_short(x, weight[:channels], log_keep[:channels], self.taps, documents)
            if self.both:
                turned = x.flip(-1), weight[channels:], log_keep[channels:], self.taps, documents.flip(-1)
                y = y + cut_short(*turned).flip(-1)
            return y
        count = tokens if self.taps is None else min(self.taps, tokens)
        kernel = taps_of(weight, log_keep, count)
        return convolved(x, kernel[:channels], kernel[channels:] if self.both else None)

    def go_on(
        self, x: Tensor, weight: Tensor, log_keep: Tensor, documents: Tensor | None, state: Tensor
    ) -> tuple[Tensor, Tensor]:
        """More of a text behind its state."""
        tokens = x.shape[-1]
        if tokens == 1:
            return ema_steps(x, weight, log_keep, state)
        if documents is not None:
            return packed(x, weight, log_keep, state, documents)
        falls = powers(log_keep, tokens + 1)
        y = convolved(x, taps_of(weight, log_keep, tokens))
        y = y + torch.einsum("bcn,cnl->bcl", state * weight, falls[..., 1:])
        return y, falls[..., tokens] * state + torch.einsum("bcl,cnl->bcn", x, falls[..., :tokens].flip(-1))

    def extra_repr(self) -> str:
        return f"states={self.expand.shape[1]}, {'both ways' if self.both else 'left to right'}, taps={self.taps}"
