"""WKV in Triton, forward and backward, in float32; parts/wkv.py is the specification.

A program has a row and some channels, and takes the text in tiles. Within a tile the states before all tokens are made
at once: what a token does to a state is a number by which it ages, and another state that is added to it, and two such
steps are one such step (`_join`). The backward pass first writes the states before each token down, then does the same
from the end to the beginning with gradients of n and d.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

TOKENS, CHANNELS = 64, 16
"""Of a tile."""

NOTHING = tl.constexpr(-1e38)

State = tuple[Tensor, Tensor, Tensor]


@triton.jit
def _join(a, n, d, m, aged, more_n, more_d, more_m):  # type: ignore[no-untyped-def]
    """Two steps as one; a step ages a state by e^a and adds n e^m and d e^m."""
    before = m + aged
    top = tl.maximum(before, more_m)
    one, other = tl.exp(before - top), tl.exp(more_m - top)
    return tl.maximum(a + aged, NOTHING), one * n + other * more_n, one * d + other * more_d, top


@triton.jit
def _onto(n, d, m, aged, more_n, more_d, more_m):  # type: ignore[no-untyped-def]
    """The states (TOKENS, CHANNELS) after steps from one state (CHANNELS,)."""
    _, n, d, m = _join(m[None, :], n[None, :], d[None, :], m[None, :], aged, more_n, more_d, more_m)
    return n, d, m


@triton.jit
def _row(x, at: tl.constexpr, TOKENS: tl.constexpr):  # type: ignore[no-untyped-def]
    """One row of a tile."""
    return tl.sum(tl.where((tl.arange(0, TOKENS) == at)[:, None], x, 0.0), 0)


@triton.jit
def _there(real, row, t, tokens, REAL: tl.constexpr):  # type: ignore[no-untyped-def]
    """Which of the places t are tokens of the text."""
    there = (t >= 0) & (t < tokens)
    if REAL:
        there = there & (tl.load(real + row * tokens + t, mask=there, other=0) != 0)
    return there[:, None]


@triton.jit
def _goes_on(opens, row, t, tokens, OPENS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Where no document begins."""
    inside = (t >= 0) & (t < tokens)
    goes_on = t == t
    if OPENS:
        goes_on = tl.load(opens + row * tokens + t, mask=inside, other=1) != 0
    return goes_on[:, None]


@triton.jit
def _pair(k, v, row, t, c, there, WIDTH: tl.constexpr):  # type: ignore[no-untyped-def]
    at, seen = (row + t)[:, None] * WIDTH + c[None, :], there & (c < WIDTH)[None, :]
    return tl.load(k + at, mask=seen, other=NOTHING), tl.load(v + at, mask=seen, other=0.0)


@triton.jit
def _steps(k, v, w, real, opens, row, t, tokens, c, WIDTH: tl.constexpr, REAL: tl.constexpr, OPENS: tl.constexpr):  # type: ignore[no-untyped-def]
    """What lies between the states before tokens t - 1 and t: token t - 1 itself, and that a document may begin."""
    there = _there(real, row, t - 1, tokens, REAL)
    key, value = _pair(k, v, row * tokens, t - 1, c, there, WIDTH)
    goes_on = _goes_on(opens, row, t, tokens, OPENS)
    there = there & goes_on
    aged = tl.where(goes_on, tl.where(there, w[None, :], 0.0), NOTHING)
    one = tl.zeros_like(key) + tl.where(there, 1.0, 0.0)
    return aged, tl.where(there, value, 0.0), one, tl.where(there, key, NOTHING)


@triton.jit
def _forward(  # type: ignore[no-untyped-def]
    k, v, decay, bonus, n, d, m, real, opens, y, last_n, last_d, last_m, all_n, all_d, all_m, tokens,
    WIDTH: tl.constexpr, REAL: tl.constexpr, OPENS: tl.constexpr, KEEP: tl.constexpr, TOKENS: tl.constexpr,
    CHANNELS: tl.constexpr,
):  # fmt: skip
    """y and the last state; or, to KEEP, the states before all tokens and the last one."""
    row = tl.program_id(1).to(tl.int64)
    c = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    inside = c < WIDTH
    own = row * WIDTH + c
    w, u = tl.load(decay + c, mask=inside, other=0.0), tl.load(bonus + c, mask=inside, other=0.0)
    on = tl.load(n + own, mask=inside, other=0.0)
    off = tl.load(d + own, mask=inside, other=0.0)
    top = tl.load(m + own, mask=inside, other=NOTHING)
    for begin in range(0, tokens + 1, TOKENS):
        t = begin + tl.arange(0, TOKENS)
        steps = _steps(k, v, w, real, opens, row, t, tokens, c, WIDTH, REAL, OPENS)
        aged, now_n, now_d, now_m = tl.associative_scan(steps, 0, _join)
        now_n, now_d, now_m = _onto(on, off, top, aged, now_n, now_d, now_m)
        at, seen = (row * tokens + t)[:, None] * WIDTH + c[None, :], (t < tokens)[:, None] & inside[None, :]
        if KEEP:
            tl.store(all_n + at, now_n, mask=seen)
            tl.store(all_d + at, now_d, mask=seen)
            tl.store(all_m + at, now_m, mask=seen)
        else:
            there = _there(real, row, t, tokens, REAL)
            key, value = _pair(k, v, row * tokens, t, c, there, WIDTH)
            _, above, below, _ = _join(now_m, now_n, now_d, now_m, 0.0, value, 1.0, key + u[None, :])
            tl.store(y + at, tl.where(there, above / below, 0.0), mask=seen)
        on, off, top = _row(now_n, TOKENS - 1, TOKENS), _row(now_d, TOKENS - 1, TOKENS), _row(now_m, TOKENS - 1, TOKENS)
    tl.store(last_n + own, on, mask=inside)
    tl.store(last_d + own, off, mask=inside)
    tl.store(last_m + own, top, mask=inside)


@triton.jit
def _slopes(  # type: ignore[no-untyped-def]
    dy, k, v, u, all_n, all_d, all_m, real, row, t, tokens, c, WIDTH: tl.constexpr, REAL: tl.constexpr
):  # fmt: skip
    """Of tokens t: k, v, the state before, and the gradients of y's numerator and denominator with their exponent."""
    there = _there(real, row, t, tokens, REAL)
    key, value = _pair(k, v, row * tokens, t, c, there, WIDTH)
    at, seen = (row * tokens + t)[:, None] * WIDTH + c[None, :], there & (c < WIDTH)[None, :]
    n = tl.load(all_n + at, mask=seen, other=0.0)
    d = tl.load(all_d + at, mask=seen, other=0.0)
    m = tl.load(all_m + at, mask=seen, other=NOTHING)
    _, above, below, exponent = _join(m, n, d, m, 0.0, value, 1.0, key + u[None, :])
    on = tl.load(dy + at, mask=seen, other=0.0) / below
    off = -on * above / below
    return there, key, value, n, d, m, on, off, tl.where(there, -exponent, NOTHING)


@triton.jit
def _backward(  # type: ignore[no-untyped-def]
    dy, dn, dd, k, v, decay, bonus, n, d, m, real, opens, all_n, all_d, all_m, last_m, dk, dv, ddecay, dbonus, first_n,
    first_d, tokens, WIDTH: tl.constexpr, REAL: tl.constexpr, OPENS: tl.constexpr, TOKENS: tl.constexpr,
    CHANNELS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(1).to(tl.int64)
    c = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    inside = c < WIDTH
    own = row * WIDTH + c
    w, u = tl.load(decay + c, mask=inside, other=0.0), tl.load(bonus + c, mask=inside, other=0.0)
    on = tl.load(dn + own, mask=inside, other=0.0)
    off = tl.load(dd + own, mask=inside, other=0.0)
    top = -tl.load(last_m + own, mask=inside, other=0.0)
    for_w, for_u = tl.zeros((CHANNELS,), tl.float32), tl.zeros((CHANNELS,), tl.float32)
    count = tl.cdiv(tokens + 1, TOKENS)
    for tile in range(count):
        # Gradients of the states after tokens t, from -1 on: what comes before the first token.
        t = (count - 1 - tile) * TOKENS - 1 + tl.arange(0, TOKENS)
        there, key, value, now_n, now_d, now_m, a, b, exponent = _slopes(
            dy, k, v, u, all_n, all_d, all_m, real, row, t + 1, tokens, c, WIDTH, REAL
        )
        goes_on = _goes_on(opens, row, t + 1, tokens, OPENS)
        stays = goes_on & there
        aged = tl.where(goes_on, tl.where(there, w[None, :], 0.0), NOTHING)
        steps = (aged, tl.where(stays, a, 0.0), tl.where(stays, b, 0.0), tl.where(stays, exponent, NOTHING))
        aged, after_n, after_d, after_m = tl.associative_scan(steps, 0, _join, reverse=True)
        after_n, after_d, after_m = _onto(on, off, top, aged, after_n, after_d, after_m)
        there, key, value, now_n, now_d, now_m, a, b, exponent = _slopes(
            dy, k, v, u, all_n, all_d, all_m, real, row, t, tokens, c, WIDTH, REAL
        )
        alone, weight = tl.exp(key + u[None, :] + exponent), tl.exp(key + after_m)
        here = alone * (value * a + b)
        inner = (t >= 0)[:, None] & (t < tokens)[:, None] & inside[None, :]
        at = (row * tokens + t)[:, None] * WIDTH + c[None, :]
        tl.store(dk + at, tl.where(there, here + weight * (value * after_n + after_d), 0.0), mask=inner)
        tl.store(dv + at, tl.where(there, alone * a + weight * after_n, 0.0), mask=inner)
        for_u += tl.sum(tl.where(there, here, 0.0), 0)
        kept = tl.exp(now_m + w[None, :] + after_m) * (now_n * after_n + now_d * after_d)
        for_w += tl.sum(tl.where(there, kept, 0.0), 0)
        on, off, top = _row(after_n, 0, TOKENS), _row(after_d, 0, TOKENS), _row(after_m, 0, TOKENS)
    scale = tl.exp(top + tl.load(m + own, mask=inside, other=NOTHING))
    tl.store(first_n + own, on * scale, mask=inside)
    tl.store(first_d + own, off * scale, mask=inside)
    tl.store(ddecay + own, for_w, mask=inside)
    tl.store(dbonus + own, for_u, mask=inside)


def _run(
    k: Tensor, v: Tensor, decay: Tensor, bonus: Tensor, state: State, real: Tensor | None, opens: Tensor | None,
    keep: bool,
) -> tuple[list[Tensor], list[Tensor]]:  # fmt: skip
    """y, or to keep them the numerators, denominators and exponents before all tokens; and the last state."""
    batch, tokens, width = k.shape
    made, last = [torch.empty_like(k) for _ in range(3 if keep else 1)], [torch.empty_like(one) for one in state]
    _forward[(triton.cdiv(width, CHANNELS), batch)](
        k, v, decay, bonus, *state, real, opens, made[0], *last, *(made if keep else 3 * made), tokens, WIDTH=width,
        REAL=real is not None, OPENS=opens is not None, KEEP=keep, TOKENS=TOKENS, CHANNELS=CHANNELS,
    )  # fmt: skip
    return made, last


def forward(
    k: Tensor, v: Tensor, decay: Tensor, bonus: Tensor, n: Tensor, d: Tensor, m: Tensor, real: Tensor | None,
    opens: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """`forward` of parts/wkv.py."""
    k, v, decay, bonus, n, d, m = (x.contiguous() for x in (k, v, decay, bonus, n, d, m))
    real, opens = (None if x is None else x.contiguous() for x in (real, opens))
    (y,), (n, d, m) = _run(k, v, decay, bonus, (n, d, m), real, opens, False)
    return y, n, d, m


def backward(
    dy: Tensor, dn: Tensor, dd: Tensor, k: Tensor, v: Tensor, decay: Tensor, bonus: Tensor, n: Tensor,
    d: Tensor, m: Tensor, real: Tensor | None, opens: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """`backward` of parts/wkv.py."""
    dy, dn, dd, k, v, decay, bonus, n, d, m = (x.contiguous() for x in (dy, dn, dd, k, v, decay, bonus, n, d, m))
    real, opens = (None if x is None else x.contiguous() for x in (real, opens))
    states, (_, _, last_m) = _run(k, v, decay, bonus, (n, d, m), real, opens, True)
    batch, tokens, width = k.shape
    dk, dv, first_n, first_d = (torch.empty_like(x) for x in (k, v, n, d))
    ddecay, dbonus = k.new_empty(batch, width), k.new_empty(batch, width)
    _backward[(triton.cdiv(width, CHANNELS), batch)](
        dy, dn, dd, k, v, decay, bonus, n, d, m, real, opens, *states, last_m, dk, dv, ddecay, dbonus, first_n,
        first_d, tokens, WIDTH=width, REAL=real is not None, OPENS=opens is not None, TOKENS=TOKENS,
        CHANNELS=CHANNELS,
    )  # fmt: skip
    return dk, dv, ddecay.sum(0), dbonus.sum(0), first_n, first_d
