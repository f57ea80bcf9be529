"""The kernels of windowaside.py: what a few keys add to the outputs of a window, and the slopes that they bring.

Axes: B rows, H query heads, G key/value heads, T tokens, D head width, M queries of a tile, E keys besides, filled up
to N.
"""

from __future__ import annotations

import triton
import triton.language as tl

from xtcli.fast.windowkernels import FLOOR, _put, _row, _tile
from xtcli.parts.windows import NOTHING

HIDDEN = tl.constexpr(NOTHING)
"""The label of queries that see nothing: no key has it."""


@triton.jit
def _places(places, b, T, E, N: tl.constexpr):  # type: ignore[no-untyped-def]
    """The places of a row, (N,); T for those that it has fewer."""
    e = tl.arange(0, N)
    return tl.load(places + b * E + e, mask=e < E, other=T)


@triton.jit
def _at(x, place, b, h, sb, sh, st, D: tl.constexpr):  # type: ignore[no-untyped-def]
    """Addresses of one row's and head's tokens at places (N,): (N, D)."""
    return x + b.to(tl.int64) * sb + h.to(tl.int64) * sh + place.to(tl.int64)[:, None] * st + tl.arange(0, D)[None, :]


@triton.jit
def _few(  # type: ignore[no-untyped-def]
    x, places, b, g, sb, sh, st, T, E, N: tl.constexpr, D: tl.constexpr
):  # fmt: skip
    """The keys besides of one row and head, (N, D); zeros for those that a row has fewer."""
    place = _places(places, b, T, E, N)
    return tl.load(_at(x, place, b, g, sb, sh, st, D), mask=(place < T)[:, None], other=0.0)


@triton.jit
def _scores(  # type: ignore[no-untyped-def]
    asked, keys, seen, b, t, T, E, seen_b, seen_t, scale, M: tl.constexpr, N: tl.constexpr
):  # fmt: skip
    """(M, N) in units of log 2; -inf for what is not seen."""
    e = tl.arange(0, N)
    at = seen + b.to(tl.int64) * seen_b + t.to(tl.int64)[:, None] * seen_t + e[None, :]
    real = tl.load(at, mask=(t < T)[:, None] & (e < E)[None, :], other=0) != 0
    return tl.where(real, tl.dot(asked, tl.trans(keys)) * scale, float("-inf"))


@triton.jit
def forward(  # type: ignore[no-untyped-def]
    q, k, v, places, seen, mine, o, ends, qb, qh, qt, kb, kh, kt, vb, vh, vt, ob, oh, ot, seen_b, seen_t,
    H, group, T, E, scale,
    EVEN: tl.constexpr, D: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """Join the keys besides to the outputs of M queries and to log2 of the sum of their powers, in place."""
    bh = tl.program_id(1)
    b, h = bh // H, bh % H
    g = h // group
    first = tl.program_id(0) * M
    t = first + tl.arange(0, M)
    asked = _tile(q, b, h, first, qb, qh, qt, T, M, D, EVEN)
    x = _scores(asked, _few(k, places, b, g, kb, kh, kt, T, E, N, D), seen, b, t, T, E, seen_b, seen_t, scale, M, N)
    row = bh.to(tl.int64) * T
    label = _row(mine, b.to(tl.int64) * T, t, T, HIDDEN, EVEN)
    x = tl.where((label == HIDDEN)[:, None], float("-inf"), x)
    near = _row(ends, row, t, T, float("inf"), EVEN)
    # A query whose window is empty is told by +inf, and one that sees nothing at all is to be told so as well.
    near = tl.where(near == float("inf"), float("-inf"), near)
    most = tl.maximum(tl.maximum(near, tl.max(x, 1)), FLOOR)
    weights = tl.exp2(x - most[:, None])
    shrink = tl.exp2(near - most)
    total = shrink + tl.sum(weights, 1)
    values = _few(v, places, b, g, vb, vh, vt, T, E, N, D)
    made = _tile(o, b, h, first, ob, oh, ot, T, M, D, EVEN).to(tl.float32) * shrink[:, None]
    made = tl.dot(weights.to(values.dtype), values, made)
    none = total == 0.0
    most, total = tl.where(none, float("inf"), most), tl.where(none, 1.0, total)
    _put(o, made / total[:, None], b, h, first, ob, oh, ot, T, M, D, EVEN)
    tl.store(ends + row + t, most + tl.log2(total), mask=t < T)


@triton.jit
def queries(  # type: ignore[no-untyped-def]
    q, k, v, places, seen, o, dy, ends, dq, parts,
    qb, qh, qt, kb, kh, kt, vb, vh, vt, ob, oh, ot, yb, yh, yt, db, dh, dt, seen_b, seen_t,
    H, group, T, E, scale, slope,
    EVEN: tl.constexpr, D: tl.constexpr, M: tl.constexpr, N: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """Add to the slopes of TILES times M queries what the keys besides bring; and the shares of those queries in the
    slopes of these keys and values, parts (B H, programs, 2, N, D)."""
    bh = tl.program_id(1)
    b, h = bh // H, bh % H
    g = h // group
    keys = _few(k, places, b, g, kb, kh, kt, T, E, N, D)
    values = _few(v, places, b, g, vb, vh, vt, T, E, N, D)
    for_keys = tl.zeros((N, D), tl.float32)
    for_values = tl.zeros((N, D), tl.float32)
    row = bh.to(tl.int64) * T
    begin = tl.program_id(0) * (TILES * M)
    for first in range(begin, tl.minimum(begin + TILES * M, T), M):
        t = first + tl.arange(0, M)
        asked = _tile(q, b, h, first, qb, qh, qt, T, M, D, EVEN)
        given = _tile(dy, b, h, first, yb, yh, yt, T, M, D, EVEN)
        made = _tile(o, b, h, first, ob, oh, ot, T, M, D, EVEN)
        total = _row(ends, row, t, T, float("inf"), EVEN)
        delta = tl.sum(given.to(tl.float32) * made.to(tl.float32), 1)
        x = _scores(asked, keys, seen, b, t, T, E, seen_b, seen_t, scale, M, N)
        weights = tl.exp2(x - total[:, None])
        steep = weights * (tl.dot(given, tl.trans(values)) - delta[:, None]) * slope
        steep = steep.to(keys.dtype)
        for_keys = tl.dot(tl.trans(steep), asked, for_keys)
        for_values = tl.dot(tl.trans(weights.to(given.dtype)), given, for_values)
        before = _tile(dq, b, h, first, db, dh, dt, T, M, D, EVEN).to(tl.float32)
        _put(dq, tl.dot(steep, keys, before), b, h, first, db, dh, dt, T, M, D, EVEN)
    n, d = tl.arange(0, N)[:, None], tl.arange(0, D)[None, :]
    at = parts + (bh.to(tl.int64) * tl.num_programs(0) + tl.program_id(0)) * (2 * N * D) + n * D + d
    tl.store(at, for_keys)
    tl.store(at + N * D, for_values)


@triton.jit
def keys(  # type: ignore[no-untyped-def]
    places, parts, dk, dv, kb, kh, kt, vb, vh, vt, G, group, T, E, lines,
    D: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """Add the parts of one row and key/value head to the slopes of its keys (program 0 of the first axis) or values."""
    side, bg = tl.program_id(0), tl.program_id(1)
    b, g = bg // G, bg % G
    e, d = tl.arange(0, N), tl.arange(0, D)
    total = tl.zeros((N, D), tl.float32)
    # The parts of a group's heads lie one behind the other.
    part = parts + (bg.to(tl.int64) * group * lines * 2 + side) * (N * D) + e[:, None] * D + d[None, :]
    for _ in range(group * lines):
        total += tl.load(part)
        part += 2 * N * D
    place = _places(places, b, T, E, N)
    real = (place < T)[:, None]
    if side == 0:  # noqa: SIM108 - the compiler's branches are statements
        at = _at(dk, place, b, g, kb, kh, kt, D)
    else:
        at = _at(dv, place, b, g, vb, vh, vt, D)
    before = tl.load(at, mask=real, other=0.0).to(tl.float32)
    tl.store(at, (before + total).to(dk.dtype.element_ty), mask=real)


@triton.jit
def rows(  # type: ignore[no-untyped-def]
    x, few, places, xb, xh, xt, fb, fh, fe, H, T, E, PUT: tl.constexpr, D: tl.constexpr, N: tl.constexpr
):  # fmt: skip
    """Put `few` (B, H, E, D) into x at the places of one row and head, or take from there; zeros where none is."""
    bh = tl.program_id(0)
    b, h = bh // H, bh % H
    e = tl.arange(0, N)
    place = _places(places, b, T, E, N)
    at, beside = _at(x, place, b, h, xb, xh, xt, D), _at(few, e, b, h, fb, fh, fe, D)
    real, known = (place < T)[:, None], (e < E)[:, None]
    if PUT:
        tl.store(at, tl.load(beside, mask=known, other=0.0).to(x.dtype.element_ty), mask=real)
    else:
        tl.store(beside, tl.load(at, mask=real, other=0.0).to(few.dtype.element_ty), mask=known)
