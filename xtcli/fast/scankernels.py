"""The selective scan in Triton, forward and backward, in float32; parts/scans.py is the specification.

A program has a row and some channels, and takes the text chunk by chunk. Within a chunk the states of all tokens are
made at once: a token is a number by which it multiplies a state and what it adds, and two tokens are one such pair.
The backward pass goes from the last chunk to the first: the states of a chunk are made again and wait in memory, and
gradients of states are made alike, from the last token to the first. Gradients of b and c are summed over channels:
each program leaves a part.

Axes: L tokens of a chunk, C channels of a program, N states, a power of two, of which the last may be padding.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

CHANNELS, CHANNELS_BACK = 8, 8
"""Of a program."""
PIECE, REGISTERS = 16, 168
"""Tokens that the backward pass takes at once, and the most registers of a thread, so that three programs fit."""


@triton.jit
def _then(keep, add, more_keep, more_add):  # type: ignore[no-untyped-def]
    """Two tokens as one."""
    return keep * more_keep, more_keep * add + more_add


@triton.jit
def _token(  # type: ignore[no-untyped-def]
    step, opens, row, t, last, c, a, WIDTH: tl.constexpr, OPENS: tl.constexpr
):  # fmt: skip
    """Steps of tokens t below `last` (L, C), and what they keep of the state before them (L, C, N); else 0 and 1."""
    there = (t >= 0) & (t < last)
    now = tl.load(step + (row + t)[:, None] * WIDTH + c[None, :], mask=there[:, None] & (c < WIDTH)[None, :], other=0.0)
    keep = tl.exp(now[:, :, None] * a[None, :, :])
    if OPENS:
        goes_on = tl.load(opens + row + t, mask=there, other=1) != 0
        keep = tl.where(goes_on[:, None, None], keep, 0.0)
    return now, keep


@triton.jit
def _of_channels(x, row, t, tokens, c, WIDTH: tl.constexpr):  # type: ignore[no-untyped-def]
    """x (T, WIDTH) of a row: (L, C)."""
    there = (t >= 0) & (t < tokens)
    return tl.load(x + (row + t)[:, None] * WIDTH + c[None, :], mask=there[:, None] & (c < WIDTH)[None, :], other=0.0)


@triton.jit
def _of_states(x, row, t, tokens, s, STATES: tl.constexpr):  # type: ignore[no-untyped-def]
    """x (T, STATES) of a row: (L, N)."""
    there = (t >= 0) & (t < tokens)
    return tl.load(x + (row + t)[:, None] * STATES + s[None, :], mask=there[:, None] & (s < STATES)[None, :], other=0.0)


@triton.jit
def _one(x, at, LENGTH: tl.constexpr):  # type: ignore[no-untyped-def]
    """One token of a chunk (L, C, N): (C, N)."""
    return tl.sum(tl.where((tl.arange(0, LENGTH) == at)[:, None, None], x, 0.0), 0)


@triton.jit
def _forward(  # type: ignore[no-untyped-def]
    x, step, b, c, decay, state, opens, y, last, begins, tokens, chunks, WIDTH: tl.constexpr, STATES: tl.constexpr,
    OPENS: tl.constexpr, LENGTH: tl.constexpr, CHANNELS: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    batch = tl.program_id(1).to(tl.int64)
    row = batch * tokens
    k, s = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS), tl.arange(0, PADDED)
    inside = (k < WIDTH)[:, None] & (s < STATES)[None, :]
    own = k[:, None] * STATES + s[None, :]
    a = tl.load(decay + own, mask=inside, other=0.0)
    now = tl.load(state + batch * WIDTH * STATES + own, mask=inside, other=0.0)
    for chunk in range(chunks):
        tl.store(begins + (batch * chunks + chunk) * WIDTH * STATES + own, now, mask=inside)
        t = chunk * LENGTH + tl.arange(0, LENGTH)
        steps, keep = _token(step, opens, row, t, tokens, k, a, WIDTH, OPENS)
        given = _of_channels(x, row, t, tokens, k, WIDTH)
        add = (steps * given)[:, :, None] * _of_states(b, row, t, tokens, s, STATES)[:, None, :]
        kept, added = tl.associative_scan((keep, add), 0, _then)
        states = kept * now[None, :, :] + added
        out = tl.sum(states * _of_states(c, row, t, tokens, s, STATES)[:, None, :], 2)
        to = (row + t)[:, None] * WIDTH + k[None, :]
        tl.store(y + to, out, mask=(t < tokens)[:, None] & (k < WIDTH)[None, :])
        now = _one(states, LENGTH - 1, LENGTH)
    tl.store(last + batch * WIDTH * STATES + own, now, mask=inside)


@triton.jit
def _backward(  # type: ignore[no-untyped-def]
    dy, dlast, x, step, b, c, decay, begins, opens, scratch, dx, dstep, db, dc, ddecay, dstate, tokens, chunks,
    WIDTH: tl.constexpr, STATES: tl.constexpr, OPENS: tl.constexpr, LENGTH: tl.constexpr, CHANNELS: tl.constexpr,
    PADDED: tl.constexpr, PIECE: tl.constexpr,
):  # fmt: skip
    batch = tl.program_id(1).to(tl.int64)
    row = batch * tokens
    # Sums over the channels of this program: of parts (blocks of channels, B, T, N).
    part = (tl.program_id(0).to(tl.int64) * tl.num_programs(1) + batch) * tokens
    k, s = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS), tl.arange(0, PADDED)
    inside = (k < WIDTH)[:, None] & (s < STATES)[None, :]
    own = k[:, None] * STATES + s[None, :]
    a = tl.load(decay + own, mask=inside, other=0.0)
    after = tl.load(dlast + batch * WIDTH * STATES + own, mask=inside, other=0.0)
    for_decay = tl.zeros((CHANNELS, PADDED), tl.float32)
    place = tl.arange(0, PIECE)
    held = scratch + (tl.program_id(0).to(tl.int64) * tl.num_programs(1) + batch) * LENGTH * CHANNELS * PADDED
    held += tl.arange(0, CHANNELS)[None, :, None] * PADDED + s[None, None, :]
    for turn in range(chunks):
        begin = (chunks - 1 - turn) * LENGTH
        now = tl.load(begins + (batch * chunks + chunks - 1 - turn) * WIDTH * STATES + own, mask=inside, other=0.0)
        # The states before each token, piece by piece.
        for piece in range(LENGTH // PIECE):
            at = piece * PIECE + place
            t = begin + at
            steps, keep = _token(step, opens, row, t, tokens, k, a, WIDTH, OPENS)
            given = _of_channels(x, row, t, tokens, k, WIDTH)
            add = (steps * given)[:, :, None] * _of_states(b, row, t, tokens, s, STATES)[:, None, :]
            kept, added = tl.associative_scan((keep, add), 0, _then)
            states = kept * now[None, :, :] + added
            tl.store(held + at[:, None, None] * (CHANNELS * PADDED), states)
            now = _one(states, PIECE - 1, PIECE)
        tl.debug_barrier()
        # From the last token to the first: gradients of the states after each, of its own y and of what the next keeps.
        for piece in range(LENGTH // PIECE):
            at = LENGTH - 1 - piece * PIECE - place
            t = begin + at
            slopes = _of_channels(dy, row, t, tokens, k, WIDTH)
            seen = _of_states(c, row, t, tokens, s, STATES)
            _, keep = _token(step, opens, row, t + 1, tokens, k, a, WIDTH, OPENS)
            kept, added = tl.associative_scan((keep, slopes[:, :, None] * seen[:, None, :]), 0, _then)
            d = kept * after[None, :, :] + added
            after = _one(d, PIECE - 1, PIECE)
            to = (part + t)[:, None] * STATES + s[None, :]
            there = (t < tokens)[:, None] & (s < STATES)[None, :]
            states = tl.load(held + at[:, None, None] * (CHANNELS * PADDED))
            tl.store(dc + to, tl.sum(slopes[:, :, None] * states, 1), mask=there)
            steps = _of_channels(step, row, t, tokens, k, WIDTH)
            given = _of_channels(x, row, t, tokens, k, WIDTH)
            tl.store(db + to, tl.sum((steps * given)[:, :, None] * d, 1), mask=there)
            weight = _of_states(b, row, t, tokens, s, STATES)
            # What is left of the state before the token: the state after it but for what the token adds.
            states = (states - (steps * given)[:, :, None] * weight[:, None, :]) * d
            for_decay += tl.sum(states * steps[:, :, None], 0)
            of_both = tl.sum(d * weight[:, None, :], 2)
            there = (t < tokens)[:, None] & (k < WIDTH)[None, :]
            to = (row + t)[:, None] * WIDTH + k[None, :]
            tl.store(dx + to, of_both * steps, mask=there)
            tl.store(dstep + to, of_both * given + tl.sum(states * a[None, :, :], 2), mask=there)
        tl.debug_barrier()
    _, keep = _token(step, opens, row, tl.arange(0, LENGTH), tokens, k, a, WIDTH, OPENS)
    tl.store(dstate + batch * WIDTH * STATES + own, after * _one(keep, 0, LENGTH), mask=inside)
    tl.store(ddecay + batch * WIDTH * STATES + own, for_decay, mask=inside)


def forward(
    x: Tensor, step: Tensor, b: Tensor, c: Tensor, decay: Tensor, state: Tensor, opens: Tensor | None, length: int
) -> tuple[Tensor, Tensor, Tensor]:
    """`scan` of parts/scans.py, by chunks of `length` tokens."""
    x, step, b, c, decay, state = (one.contiguous() for one in (x, step, b, c, decay, state))
    opens = None if opens is None else opens.contiguous()
    (batch, tokens, width), states = x.shape, decay.shape[1]
    chunks = triton.cdiv(tokens, length)
    y, last, begins = torch.empty_like(x), torch.empty_like(state), x.new_empty(batch, chunks, width, states)
    _forward[(triton.cdiv(width, CHANNELS), batch)](
        x, step, b, c, decay, state, opens, y, last, begins, tokens, chunks, WIDTH=width, STATES=states,
        OPENS=opens is not None, LENGTH=length, CHANNELS=CHANNELS, PADDED=triton.next_power_of_2(states),
    )  # fmt: skip
    return y, last, begins


def backward(
    dy: Tensor, dlast: Tensor, x: Tensor, step: Tensor, b: Tensor, c: Tensor, decay: Tensor, begins: Tensor,
    opens: Tensor | None, length: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """`scan_backward` of parts/scans.py, by chunks of `length` tokens."""
    given = [one.contiguous() for one in (dy, dlast, x, step, b, c, decay, begins)]
    opens = None if opens is None else opens.contiguous()
    (batch, tokens, width), states = x.shape, decay.shape[1]
    blocks = triton.cdiv(width, CHANNELS_BACK)
    dx, dstep, dstate = (x.new_empty(one.shape) for one in (x, step, dlast))
    db, dc = (x.new_empty(blocks, batch, tokens, states) for _ in range(2))
    ddecay, padded = x.new_empty(batch, width, states), triton.next_power_of_2(states)
    scratch = x.new_empty(blocks * batch * length * CHANNELS_BACK * padded)
    _backward[(blocks, batch)](
        *given, opens, scratch, dx, dstep, db, dc, ddecay, dstate, tokens, begins.shape[1], WIDTH=width,
        STATES=states, OPENS=opens is not None, LENGTH=length, CHANNELS=CHANNELS_BACK, PADDED=padded,
        PIECE=min(PIECE, length), maxnreg=REGISTERS,
    )  # fmt: skip
    return dx, dstep, db.sum(0), dc.sum(0), ddecay.sum(0), dstate
