"""The selective scan in chunks: a recurrence over T steps in about T / 32 + 64 steps over many chunks at once.

    s_t = exp(step_t A) s_(t-1) + step_t x_t b_t,   y_t = s_t c_t        Gu, Dao 2023, arXiv:2312.00752

T is cut into chunks of L tokens. Each chunk's end is found as if it began with nothing, the ends are carried from chunk
to chunk, then all chunks run at once from where they truly begin. No decay is ever divided by, so nothing overflows.
The backward pass is the same recurrence from the end to the beginning. It is given the inputs and the state at the
beginning of each chunk, and computes the states between again: what training keeps does not grow with N. Long texts go
through in pieces of some chunks. `selective_steps` is a plain loop over time, which the tests hold against this.

Axes: B rows, T tokens, L tokens of a chunk, K chunks, C channels, N states of a channel.
`opens` (B, T) is False where a document begins: nothing before is remembered there. Float32 or wider.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from xtcli.fast import runs_on
from xtcli.parts.wkv import chunked, whole

LENGTH = 32
"""Tokens of a chunk."""
BUDGET = 2**23
"""Numbers of the largest tensor that a piece makes."""


def selective(
    x: Tensor, step: Tensor, b: Tensor, c: Tensor, decay: Tensor, state: Tensor, opens: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """x, step (B, T, C), b, c (B, T, N), decay (C, N) below 0, state (B, C, N) -> y (B, T, C), last state."""
    y, last, _ = scan(x, step, b, c, decay, state, opens)
    return y, last


def selective_steps(
    x: Tensor, step: Tensor, b: Tensor, c: Tensor, decay: Tensor, state: Tensor, opens: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`selective` in a loop over time."""
    made = []
    for t in range(x.shape[1]):
        keep = torch.exp(step[:, t, :, None] * decay)
        if opens is not None:
            keep = keep * opens[:, t, None, None]
        state = keep * state + (step[:, t] * x[:, t])[..., None] * b[:, t, None, :]
        made.append((state * c[:, t, None, :]).sum(-1))
    return torch.stack(made, 1), state


def _pieces(chunks: int, width: int, length: int) -> Iterator[slice]:
    """Ranges of chunks; `width` numbers of a token."""
    size = max(1, BUDGET // (width * length))
    return (slice(begin, min(begin + size, chunks)) for begin in range(0, chunks, size))


class _Chunks:
    """The inputs by chunks: (L, B, K, ...)."""

    def __init__(self, x: Tensor, step: Tensor, b: Tensor, c: Tensor, decay: Tensor, opens: Tensor | None) -> None:
        self.tokens, self.decay = x.shape[1], decay
        self.length = min(LENGTH, max(self.tokens, 1))
        self.x, self.step, self.b, self.c = (chunked(value, self.length) for value in (x, step, b, c))
        self.opens = None if opens is None else chunked(opens.to(x.dtype), self.length, 1.0)
        self.count = self.x.shape[2]
        self.width = x.shape[0] * decay.numel()

    def pieces(self) -> Sequence[slice]:
        """Ranges of chunks that fit the budget."""
        return list(_pieces(self.count, self.width, self.length))

    def keeps(self, at: slice) -> Tensor:
        """exp(step A), 0 where a document begins: (L, B, K, C, N)."""
        keeps = (self.step[:, :, at, :, None] * self.decay).exp_()
        return keeps if self.opens is None else keeps.mul_(self.opens[:, :, at, None, None])

    def held(self, at: slice) -> Tensor:
        """What a whole chunk leaves of the state before it: (B, K, C, N)."""
        held = (self.step[:, :, at].sum(0)[..., None] * self.decay).exp_()
        return held if self.opens is None else held.mul_(self.opens[:, :, at].prod(0)[..., None, None])

    def adds(self, at: slice) -> Tensor:
        """step x b: (L, B, K, C, N)."""
        return (self.step[:, :, at] * self.x[:, :, at])[..., None] * self.b[:, :, at, None, :]


def forward(
    x: Tensor, step: Tensor, b: Tensor, c: Tensor, decay: Tensor, state: Tensor, opens: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """y (B, T, C), the last state, and the state before each chunk (B, K, C, N), in plain PyTorch."""
    chunks = _Chunks(x, step, b, c, decay, opens)
    made, all_begins, state = [], [], state.clone()
    for at in chunks.pieces():
        keeps, states, held = chunks.keeps(at), chunks.adds(at), chunks.held(at)
        begins = torch.empty_like(held)
        begins[:, 0] = state
        if held.shape[1] > 1:
            end = states[0].clone()
            for number in range(1, chunks.length):
                end.mul_(keeps[number]).add_(states[number])
            for number in range(1, held.shape[1]):
                state = torch.addcmul(end[:, number - 1], held[:, number - 1], state)
                begins[:, number] = state
        _run(keeps, states, begins)
        state = states[-1, :, -1].clone()
        made.append(torch.matmul(states, chunks.c[:, :, at, :, None])[..., 0])
        all_begins.append(begins)
    return whole(torch.cat(made, 2), chunks.tokens).contiguous(), state.contiguous(), torch.cat(all_begins, 1)


def _run(keeps: Tensor, adds: Tensor, begins: Tensor) -> None:
    """Turn what each token adds into the state after it, in place."""
    before = begins
    for keep, now in zip(keeps, adds, strict=True):
        now.addcmul_(keep, before)
        before = now


def backward(
    dy: Tensor,
    dlast: Tensor,
    x: Tensor,
    step: Tensor,
    b: Tensor,
    c: Tensor,
    decay: Tensor,
    begins: Tensor,
    opens: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, step, b, c, decay and the first state, in plain PyTorch."""
    chunks = _Chunks(x, step, b, c, decay, opens)
    dy = chunked(dy, chunks.length)
    dx, dstep, db, dc = (torch.empty_like(value) for value in (chunks.x, chunks.step, chunks.b, chunks.c))
    ddecay, after = decay.new_zeros(decay.shape), dlast.clone()
    for at in reversed(chunks.pieces()):
        keeps, states, held = chunks.keeps(at), chunks.adds(at), chunks.held(at)
        _run(keeps, states, begins[:, at])
        dstates = dy[:, :, at, :, None] * chunks.c[:, :, at, None, :]
        if held.shape[1] > 1:
            # The gradient of what came before each chunk, from its own tokens.
            local = torch.zeros_like(held)
            for number in reversed(range(chunks.length)):
                local.add_(dstates[number]).mul_(keeps[number])
            for number in reversed(range(1, held.shape[1])):
                dstates[-1, :, number].add_(after)
                after = torch.addcmul(local[:, number], held[:, number], after)
        dstates[-1, :, 0].add_(after)
        for number in reversed(range(chunks.length - 1)):
            dstates[number].addcmul_(keeps[number + 1], dstates[number + 1])
        after = keeps[0, :, 0] * dstates[0, :, 0]
        step_x = chunks.step[:, :, at] * chunks.x[:, :, at]
        dstep_x = torch.matmul(dstates, chunks.b[:, :, at, :, None])[..., 0]
        db[:, :, at] = torch.matmul(step_x[..., None, :], dstates)[..., 0, :]
        dc[:, :, at] = torch.matmul(dy[:, :, at, None, :], states)[..., 0, :]
        # From here `dstates` is the gradient of the exponents step A.
        dstates.mul_(keeps)
        dstates[1:].mul_(states[:-1])
        dstates[0].mul_(begins[:, at])
        rows = chunks.step[:, :, at].flatten(0, 2)
        exponents = dstates.flatten(0, 2)
        ddecay.add_(torch.bmm(rows.t()[:, None], exponents.transpose(0, 1))[:, 0])
        dx[:, :, at] = dstep_x * chunks.step[:, :, at]
        dstep[:, :, at] = dstates.mul_(decay).sum(-1).addcmul_(dstep_x, chunks.x[:, :, at])
    made = [whole(value, chunks.tokens).contiguous() for value in (dx, dstep, db, dc)]
    return made[0], made[1], made[2], made[3], ddecay, after.contiguous()


scan = torch.library.custom_op("xt::selective_scan", forward, mutates_args=())
scan_backward = torch.library.custom_op("xt::selective_scan_backward", backward, mutates_args=())


def _kernels(x: Tensor) -> Any:
    """The module of kernels, where it is for such inputs."""
    if not runs_on(x.device) or x.dtype != torch.float32:
        return None
    from xtcli.fast import scankernels

    return scankernels


@scan.register_kernel("cuda")
def _(x: Tensor, *given: Any) -> Any:
    kernels = _kernels(x)
    return kernels.forward(x, *given, LENGTH) if kernels else forward(x, *given)


@scan_backward.register_kernel("cuda")
def _(dy: Tensor, *given: Any) -> Any:
    kernels = _kernels(dy)
    return kernels.backward(dy, *given, LENGTH) if kernels else backward(dy, *given)


@scan.register_fake
def _(x: Tensor, step: Tensor, b: Tensor, c: Tensor, decay: Tensor, state: Tensor, opens: Any) -> tuple[Tensor, ...]:
    chunks = (x.shape[1] + LENGTH - 1) // LENGTH
    return x.new_empty(x.shape), state.new_empty(state.shape), x.new_empty(x.shape[0], chunks, *decay.shape)


@scan_backward.register_fake
def _(dy: Tensor, dlast: Tensor, *given: Any) -> tuple[Tensor, ...]:
    return tuple(value.new_empty(value.shape) for value in (*given[:5], dlast))


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, step, b, c, decay, _, opens = inputs
    ctx.save_for_backward(x, step, b, c, decay, output[2], opens)


def _backward(ctx: Any, dy: Tensor, dlast: Tensor, dbegins: Tensor) -> tuple[Tensor | None, ...]:
    return *scan_backward(dy, dlast, *ctx.saved_tensors), None


scan.register_autograd(_backward, setup_context=_keep)


@register_flop_formula(torch.ops.xt.selective_scan)
def _flops(
    x: Any,
    step: Any,
    b: Any,
    c: Any,
    decay: Any,
    state: Any,
    opens: Any = None,
    *,
    out_shape: Any = None,
    **kwargs: Any,
) -> int:
    """The exponents, two products and a sum for each state, and the contraction."""
    return int(7 * x[0] * x[1] * x[2] * b[2])
