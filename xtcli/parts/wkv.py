"""WKV, the attention without queries of RWKV-4, in chunks: what a loop over T steps computes in about 2 sqrt(T).

    y_t = (n_(t-1) + e^(u + k_t) v_t) / (d_(t-1) + e^(u + k_t))        Peng et al. 2023, arXiv:2305.13048
    n_t = e^w n_(t-1) + e^(k_t) v_t,   d_t = e^w d_(t-1) + e^(k_t)

T is cut into chunks of L ~ sqrt(T). Each chunk's end is found as if it began with nothing, the ends are carried from
chunk to chunk, then all chunks run at once from where they truly begin. The largest exponent so far is taken out of n
and d, so nothing overflows, however large the keys. The backward pass is the same recurrence from the end to the
beginning, of the gradients of n and d, which have their own exponent; it computes the states between again, so that
training keeps nothing but what goes in. On a GPU both are kernels (fast/wkvkernels.py). `wkv_steps` is a plain loop
over time, which the tests hold against these.

Axes: B rows, T tokens, L tokens of a chunk, K chunks, C channels. `real` (B, T) is False where a token is padding,
which neither adds nor lets time pass, and whose y is 0; `opens` is False where a document begins, which remembers
nothing.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from xtcli.fast import runs_on

NOTHING = -1e38
"""The logarithm of nothing, still finite so that differences of it are."""

WkvState = tuple[Tensor, Tensor, Tensor]
"""n e^-m, d e^-m and m, each (B, C)."""


def chunked(x: Tensor, length: int, fill: float = 0.0) -> Tensor:
    """(B, T, ...) -> (L, B, K, ...), with `fill` behind the end."""
    missing = -x.shape[1] % length
    if missing:
        x = F.pad(x, (0, 0) * (x.dim() - 2) + (0, missing), value=fill)
    pieces: Tensor = x.unflatten(1, (-1, length))
    return pieces.movedim(2, 0).contiguous()


def whole(y: Tensor, tokens: int) -> Tensor:
    """(L, B, K, ...) -> (B, T, ...)."""
    return y.movedim(0, 2).flatten(1, 2)[:, :tokens]


def joined(state: WkvState, aged: Any, n: Any, d: Any, m: Tensor) -> WkvState:
    """A state that has aged by e^aged, and another of weight e^m, in one; the largest exponent is taken out."""
    before = state[2] + aged
    top = torch.maximum(before, m).detach()
    one, other = torch.exp(before - top), torch.exp(m - top)
    return one * state[0] + other * n, one * state[1] + other * d, top


def forgotten(state: WkvState, goes_on: Tensor) -> WkvState:
    """The state where a text goes on, nothing elsewhere."""
    return state[0], state[1], state[2].masked_fill(~goes_on, NOTHING)


def wkv(
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    bonus: Tensor,
    state: WkvState,
    real: Tensor | None = None,
    opens: Tensor | None = None,
) -> tuple[Tensor, WkvState]:
    """k, v (B, T, C), decay w below 0 and bonus u (C,) -> y (B, T, C), last state. Float32 or wider."""
    if k.shape[1] == 1 and not torch.is_grad_enabled():
        return wkv_steps(k, v, decay, bonus, state, real, opens)
    y, *last = _wkv(k, v, decay, bonus, *state, real, opens)
    return y, (last[0], last[1], last[2])


class _Chunks:
    """The inputs by chunks: (L, B, K, C), of which those of tokens alone (L, B, K, 1)."""

    def __init__(self, k: Tensor, v: Tensor, decay: Tensor, real: Tensor | None, opens: Tensor | None) -> None:
        tokens = k.shape[1]
        self.length, self.decay = math.isqrt(max(tokens - 1, 0)) + 1, decay
        there = torch.ones_like(k[..., :1], dtype=torch.bool) if real is None else real[..., None]
        self.there = chunked(there.to(k.dtype), self.length).bool()
        self.keys = chunked(k.masked_fill(~there, NOTHING), self.length, NOTHING)
        self.values = chunked(v, self.length)
        self.goes_on = None if opens is None else chunked(opens[..., None].to(k.dtype), self.length, 1.0).bool()
        time = self.there.to(k.dtype)
        self.before, self.after = time.cumsum(0) - time, time.sum(0) - time.cumsum(0)
        self.old = time.sum(0) * decay  # (B, K, C), by how much a whole chunk ages
        if self.goes_on is not None:
            self.old = self.old.masked_fill(~self.goes_on.all(0), NOTHING)

    def begins(self, state: WkvState) -> tuple[list[WkvState], WkvState]:
        """The state before each chunk, and the last one."""
        weights = self.keys + self.after * self.decay
        if self.goes_on is not None:
            begun = (~self.goes_on).flip(0).cumsum(0).flip(0)
            later = torch.cat((begun[1:], torch.zeros_like(begun[:1]))) > 0
            weights = weights.masked_fill(later, NOTHING)
        top = weights.amax(0)
        shares = torch.exp(weights - top)
        return self.carried(state, (shares * self.values).sum(0), shares.sum(0), top, range(self.old.shape[1]))

    def carried(self, state: WkvState, n: Tensor, d: Tensor, m: Tensor, order: Any) -> tuple[list[WkvState], WkvState]:
        """What each chunk is given in that order, of what each makes of nothing (B, K, C), and what the last leaves."""
        given = []
        for at in order:
            given.append(state)
            state = joined(state, self.old[:, at], n[:, at], d[:, at], m[:, at])
        return given, state

    def step(self, at: int) -> tuple[Tensor, Tensor, Tensor]:
        """Of the tokens at one place of all chunks: k, v and by how much they age."""
        return self.keys[at], self.values[at], self.there[at] * self.decay

    def opened(self, state: WkvState, at: int) -> WkvState:
        """What the tokens at one place of all chunks see of the state before them."""
        return state if self.goes_on is None else forgotten(state, self.goes_on[at])


def _side_by_side(states: list[WkvState]) -> WkvState:
    """K states (B, C) as one (B, K, C)."""
    n, d, m = (torch.stack(parts, 1) for parts in zip(*states, strict=True))
    return n, d, m


def forward(
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    bonus: Tensor,
    n: Tensor,
    d: Tensor,
    m: Tensor,
    real: Tensor | None,
    opens: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y (B, T, C) and the last state, in plain PyTorch."""
    chunks = _Chunks(k, v, decay, real, opens)
    begins, last = chunks.begins((n, d, m))
    now, made = _side_by_side(begins), []
    for at in range(chunks.length):
        key, value, aged = chunks.step(at)
        now = chunks.opened(now, at)
        n, d, _ = joined(now, 0.0, value, 1.0, key + bonus)
        made.append((n / d).masked_fill(~chunks.there[at], 0.0))
        now = joined(now, aged, value, 1.0, key)
    n, d, m = (one.clone(memory_format=torch.contiguous_format) for one in last)
    return whole(torch.stack(made), k.shape[1]).contiguous(), n, d, m


def backward(
    dy: Tensor,
    dn: Tensor,
    dd: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    bonus: Tensor,
    n: Tensor,
    d: Tensor,
    m: Tensor,
    real: Tensor | None,
    opens: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of k, v, w, u and the first n and d, in plain PyTorch; dn, dd (B, C) are those of the last ones.

    Of y_t's numerator and denominator they are a_t e^-o_t and -a_t y_t e^-o_t, with o_t their exponent; those of n and
    d are sums of these, which age as n and d do, and have the exponent g.
    """
    chunks = _Chunks(k, v, decay, real, opens)
    dys = chunked(dy, chunks.length)
    begins, last = chunks.begins((n, d, m))
    now = _side_by_side(begins)
    states, ons, offs, exponents = [], [], [], []
    for at in range(chunks.length):
        key, value, aged = chunks.step(at)
        now = chunks.opened(now, at)
        states.append(now)
        top, bottom, exponent = joined(now, 0.0, value, 1.0, key + bonus)
        ons.append((dys[at] / bottom).masked_fill(~chunks.there[at], 0.0))
        offs.append(-ons[-1] * top / bottom)
        exponents.append((-exponent).masked_fill(~chunks.there[at], NOTHING))
        now = joined(now, aged, value, 1.0, key)
    weights = torch.stack(exponents) + chunks.before * decay
    if chunks.goes_on is not None:
        weights = weights.masked_fill((~chunks.goes_on).cumsum(0) > 0, NOTHING)
    largest = weights.amax(0)
    shares = torch.exp(weights - largest)
    local = (shares * torch.stack(ons)).sum(0), (shares * torch.stack(offs)).sum(0), largest
    order = range(chunks.old.shape[1])
    ends, first = chunks.carried((dn, dd, -last[2]), *local, reversed(order))
    after = _side_by_side(ends[::-1])
    dk, dv = torch.empty_like(chunks.keys), torch.empty_like(chunks.values)
    ddecay, dbonus = torch.zeros_like(now[0]), torch.zeros_like(now[0])
    for at in reversed(range(chunks.length)):
        key, value, aged = chunks.step(at)
        now_n, now_d, now_m = states[at]
        self_weight, weight = torch.exp(key + bonus + exponents[at]), torch.exp(key + after[2])
        here = self_weight * (value * ons[at] + offs[at])
        dk[at] = here + weight * (value * after[0] + after[1])
        dv[at] = self_weight * ons[at] + weight * after[0]
        dbonus += here
        ddecay += torch.exp(now_m + aged + after[2]) * (now_n * after[0] + now_d * after[1]) * chunks.there[at]
        after = chunks.opened(joined(after, aged, ons[at], offs[at], exponents[at]), at)
    tokens, scale = k.shape[1], torch.exp(first[2] + m)
    dk, dv = (whole(value, tokens).contiguous() for value in (dk, dv))
    dn, dd = (first[0] * scale).contiguous(), (first[1] * scale).contiguous()
    return dk, dv, ddecay.sum((0, 1)), dbonus.sum((0, 1)), dn, dd


_wkv = torch.library.custom_op("xt::wkv", forward, mutates_args=())
_wkv_backward = torch.library.custom_op("xt::wkv_backward", backward, mutates_args=())


def _kernels(k: Tensor) -> Any:
    """The module of kernels, where it is for such keys."""
    if not runs_on(k.device) or k.dtype != torch.float32:
        return None
    from xtcli.fast import wkvkernels

    return wkvkernels


@_wkv.register_kernel("cuda")
def _(k: Tensor, *given: Any) -> Any:
    return (kernels.forward if (kernels := _kernels(k)) else forward)(k, *given)


@_wkv_backward.register_kernel("cuda")
def _(dy: Tensor, *given: Any) -> Any:
    return (kernels.backward if (kernels := _kernels(dy)) else backward)(dy, *given)


@_wkv.register_fake
def _(k: Tensor, v: Tensor, decay: Tensor, bonus: Tensor, *state: Any) -> tuple[Tensor, ...]:
    return tuple(value.new_empty(value.shape) for value in (k, *state[:3]))


@_wkv_backward.register_fake
def _(dy: Tensor, dn: Tensor, dd: Tensor, *given: Any) -> tuple[Tensor, ...]:
    return tuple(value.new_empty(value.shape) for value in given[:6])


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.mark_non_differentiable(output[3])
    ctx.save_for_backward(*inputs)


def _slopes(ctx: Any, dy: Tensor, dn: Tensor, dd: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    return *_wkv_backward(dy, dn, dd, *ctx.saved_tensors), None, None, None


_wkv.register_autograd(_slopes, setup_context=_keep)


def wkv_steps(
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    bonus: Tensor,
    state: WkvState,
    real: Tensor | None = None,
    opens: Tensor | None = None,
) -> tuple[Tensor, WkvState]:
    """`wkv` in a loop over time."""
    made = []
    for t in range(k.shape[1]):
        key, value = k[:, t], v[:, t]
        if opens is not None:
            state = forgotten(state, opens[:, t, None])
        n, d, _ = joined(state, 0.0, value, 1.0, key + bonus)
        y, after = n / d, joined(state, decay, value, 1.0, key)
        if real is not None:
            there = real[:, t, None]
            y = y.masked_fill(~there, 0.0)
            after = tuple(torch.where(there, a, b) for a, b in zip(after, state, strict=True))  # type: ignore[assignment]
        made.append(y)
        state = after
    return torch.stack(made, 1), state
