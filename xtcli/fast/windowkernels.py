"""The kernels of window.py: outputs, slopes of queries, slopes of keys and values.

Axes: B rows, H query heads, G key/value heads, T tokens, D head width, M queries and N keys of a tile.
"""

from __future__ import annotations

import triton
import triton.language as tl

FLOOR = tl.constexpr(-1e20)
"""The highest score before any key was seen: finite, so that a tile without any makes no NaN."""


@triton.jit
def _tile(  # type: ignore[no-untyped-def]
    x, b, h, first, sb, sh, st, T, N: tl.constexpr, D: tl.constexpr, EVEN: tl.constexpr
):  # fmt: skip
    """N tokens of one row and head from `first` on, (N, D); zeros behind the text."""
    places = first + tl.arange(0, N)
    at = x + b.to(tl.int64) * sb + h.to(tl.int64) * sh + places[:, None] * st + tl.arange(0, D)[None, :]
    if EVEN:
        return tl.load(at)
    return tl.load(at, mask=places[:, None] < T, other=0.0)


@triton.jit
def _put(  # type: ignore[no-untyped-def]
    x, y, b, h, first, sb, sh, st, T, N: tl.constexpr, D: tl.constexpr, EVEN: tl.constexpr
):  # fmt: skip
    places = first + tl.arange(0, N)
    at = x + b.to(tl.int64) * sb + h.to(tl.int64) * sh + places[:, None] * st + tl.arange(0, D)[None, :]
    if EVEN:
        tl.store(at, y.to(x.dtype.element_ty))
    else:
        tl.store(at, y.to(x.dtype.element_ty), mask=places[:, None] < T)


@triton.jit
def _row(x, at, t, T, other, EVEN: tl.constexpr):  # type: ignore[no-untyped-def]
    """One number of each token."""
    if EVEN:
        return tl.load(x + at + t)
    return tl.load(x + at + t, mask=t < T, other=other)


@triton.jit
def _turned(  # type: ignore[no-untyped-def]
    x, cos, sin, b, first, by_angle, T, N: tl.constexpr, D: tl.constexpr, EVEN: tl.constexpr, TURN: tl.constexpr
):  # fmt: skip
    """x (N, D) turned back by the angles of its tokens: halves (1) or neighbours (2) are pairs; 0 leaves it."""
    if TURN == 0:
        return x
    HALF: tl.constexpr = D // 2
    c = _tile(cos, b, b * 0, first, by_angle, 0, HALF, T, N, HALF, EVEN).to(tl.float32)
    s = _tile(sin, b, b * 0, first, by_angle, 0, HALF, T, N, HALF, EVEN).to(tl.float32)
    if TURN == 1:
        one, two = tl.split(tl.permute(tl.reshape(x, (N, 2, HALF)), (0, 2, 1)))
        return tl.reshape(tl.permute(tl.join(one * c + two * s, two * c - one * s), (0, 2, 1)), (N, D))
    one, two = tl.split(tl.reshape(x, (N, HALF, 2)))
    return tl.reshape(tl.join(one * c + two * s, two * c - one * s), (N, D))


@triton.jit
def _seen(t, s, label, its, left, right, T, LABELS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Whether queries t see keys s, which broadcast to one another; a query labelled -2 sees itself alone."""
    seen = (s >= t - left) & (s <= t + right) & (s < T)
    if LABELS:
        seen = seen & ((label == its) | ((label == -2) & (s == t)))
    return seen


@triton.jit
def forward(  # type: ignore[no-untyped-def]
    q, k, v, mine, theirs, o, ends, qb, qh, qt, kb, kh, kt, vb, vh, vt, ob, oh, ot, H, group, T, left, right, scale,
    LABELS: tl.constexpr, EVEN: tl.constexpr, D: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """Outputs of M queries, and log2 of the sum of their powers."""
    bh = tl.program_id(1)
    b, h = bh // H, bh % H
    g = h // group
    first = tl.program_id(0) * M
    t = first + tl.arange(0, M)
    asked = _tile(q, b, h, first, qb, qh, qt, T, M, D, EVEN)
    most = tl.full((M,), FLOOR, tl.float32)
    total = tl.zeros((M,), tl.float32)
    made = tl.zeros((M, D), tl.float32)
    words = b.to(tl.int64) * T
    label = _row(mine, words, t, T, -3, EVEN)[:, None] if LABELS else 0
    begin = tl.maximum(first - left, 0) // N * N
    end = tl.minimum(first + M + right, T)
    whole = first + M - 1 - left
    upto = tl.minimum(first + right, T - 1) - (N - 1)
    for start in range(begin, end, N):
        x = tl.dot(asked, tl.trans(_tile(k, b, g, start, kb, kh, kt, T, N, D, EVEN)))
        if LABELS or (start < whole) | (start > upto):
            s = start + tl.arange(0, N)
            its = _row(theirs, words, s, T, -4, EVEN)[None, :] if LABELS else label
            x = tl.where(_seen(t[:, None], s[None, :], label, its, left, right, T, LABELS), x, float("-inf"))
        higher = tl.maximum(most, tl.max(x, 1) * scale)
        weights = tl.exp2(x * scale - higher[:, None])
        shrink = tl.exp2(most - higher)
        total = total * shrink + tl.sum(weights, 1)
        made = made * shrink[:, None]
        values = _tile(v, b, g, start, vb, vh, vt, T, N, D, EVEN)
        made = tl.dot(weights.to(values.dtype), values, made)
        most = higher
    # Queries that see nothing, as those behind the text: no output, and no weight on the way back.
    none = total == 0.0
    most, total = tl.where(none, float("inf"), most), tl.where(none, 1.0, total)
    _put(o, made / total[:, None], b, h, first, ob, oh, ot, T, M, D, EVEN)
    tl.store(ends + bh.to(tl.int64) * T + t, most + tl.log2(total), mask=t < T)


@triton.jit
def queries(  # type: ignore[no-untyped-def]
    q, k, v, mine, theirs, o, dy, ends, deltas, dq,
    qb, qh, qt, kb, kh, kt, vb, vh, vt, ob, oh, ot, yb, yh, yt, db, dh, dt,
    cos, sin, by_angle, sums, H, group, T, left, right, scale, slope,
    LABELS: tl.constexpr, TURN: tl.constexpr, SUMS: tl.constexpr,
    EVEN: tl.constexpr, D: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """Slopes of M queries, and the products of what they made with its slope; the sums of the slopes over the tile."""
    bh = tl.program_id(1)
    b, h = bh // H, bh % H
    g = h // group
    first = tl.program_id(0) * M
    t = first + tl.arange(0, M)
    rows = bh.to(tl.int64) * T
    given = _tile(dy, b, h, first, yb, yh, yt, T, M, D, EVEN)
    out = _tile(o, b, h, first, ob, oh, ot, T, M, D, EVEN)
    delta = tl.sum(out.to(tl.float32) * given.to(tl.float32), 1)
    tl.store(deltas + rows + t, delta, mask=t < T)
    asked = _tile(q, b, h, first, qb, qh, qt, T, M, D, EVEN)
    top = _row(ends, rows, t, T, float("inf"), EVEN)
    made = tl.zeros((M, D), tl.float32)
    words = b.to(tl.int64) * T
    label = _row(mine, words, t, T, -3, EVEN)[:, None] if LABELS else 0
    begin = tl.maximum(first - left, 0) // N * N
    end = tl.minimum(first + M + right, T)
    whole = first + M - 1 - left
    upto = tl.minimum(first + right, T - 1) - (N - 1)
    for start in range(begin, end, N):
        keys = _tile(k, b, g, start, kb, kh, kt, T, N, D, EVEN)
        values = _tile(v, b, g, start, vb, vh, vt, T, N, D, EVEN)
        x = tl.dot(asked, tl.trans(keys))
        change = tl.dot(given, tl.trans(values))
        weights = tl.exp2(x * scale - top[:, None])
        if LABELS or (start < whole) | (start > upto):
            s = start + tl.arange(0, N)
            its = _row(theirs, words, s, T, -4, EVEN)[None, :] if LABELS else label
            weights = tl.where(_seen(t[:, None], s[None, :], label, its, left, right, T, LABELS), weights, 0.0)
        made = tl.dot((weights * (change - delta[:, None])).to(keys.dtype), keys, made)
    made = _turned(made * slope, cos, sin, b, first, by_angle, T, M, D, EVEN, TURN)
    _put(dq, made, b, h, first, db, dh, dt, T, M, D, EVEN)
    if SUMS:
        line = b * tl.num_programs(0) + tl.program_id(0)
        tl.store(sums + (line * (H + 2 * (H // group)) + h) * D + tl.arange(0, D), tl.sum(made, 0))


@triton.jit
def keys(  # type: ignore[no-untyped-def]
    q, k, v, mine, theirs, dy, ends, deltas, dk, dv,
    qb, qh, qt, kb, kh, kt, vb, vh, vt, yb, yh, yt, db, dh, dt, eb, eh, et,
    cos, sin, by_angle, sums, H, group, T, left, right, scale, slope,
    LABELS: tl.constexpr, TURN: tl.constexpr, SUMS: tl.constexpr,
    EVEN: tl.constexpr, D: tl.constexpr, M: tl.constexpr, N: tl.constexpr, ACROSS: tl.constexpr,
):  # fmt: skip
    """Slopes of N keys and values, from all heads of their group; their sums over the tile. ACROSS: the tiles with most
    queries of all rows and heads begin first."""
    bg = tl.program_id(0) if ACROSS else tl.program_id(1)
    G = H // group
    b, g = bg // G, bg % G
    tile = tl.program_id(1) if ACROSS else tl.program_id(0)
    first = tile * N
    s = first + tl.arange(0, N)
    keys = _tile(k, b, g, first, kb, kh, kt, T, N, D, EVEN)
    values = _tile(v, b, g, first, vb, vh, vt, T, N, D, EVEN)
    to_k = tl.zeros((N, D), tl.float32)
    to_v = tl.zeros((N, D), tl.float32)
    words = b.to(tl.int64) * T
    its = _row(theirs, words, s, T, -4, EVEN)[:, None] if LABELS else 0
    begin = tl.maximum(first - right, 0) // M * M
    end = tl.minimum(first + N + left, T)
    whole = first + N - 1 - right
    upto = tl.minimum(first + left, T - 1) - (M - 1)
    for member in range(group):
        h = g * group + member
        rows = (b * H + h).to(tl.int64) * T
        for start in range(begin, end, M):
            t = start + tl.arange(0, M)
            asked = _tile(q, b, h, start, qb, qh, qt, T, M, D, EVEN)
            given = _tile(dy, b, h, start, yb, yh, yt, T, M, D, EVEN)
            top = _row(ends, rows, t, T, float("inf"), EVEN)
            delta = _row(deltas, rows, t, T, 0.0, EVEN)
            x = tl.dot(keys, tl.trans(asked))
            change = tl.dot(values, tl.trans(given))
            weights = tl.exp2(x * scale - top[None, :])
            if LABELS or (start < whole) | (start > upto):
                label = _row(mine, words, t, T, -3, EVEN)[None, :] if LABELS else its
                weights = tl.where(_seen(t[None, :], s[:, None], label, its, left, right, T, LABELS), weights, 0.0)
            to_v = tl.dot(weights.to(given.dtype), given, to_v)
            to_k = tl.dot((weights * (change - delta[None, :])).to(asked.dtype), asked, to_k)
    to_k = _turned(to_k * slope, cos, sin, b, first, by_angle, T, N, D, EVEN, TURN)
    _put(dk, to_k, b, g, first, db, dh, dt, T, N, D, EVEN)
    _put(dv, to_v, b, g, first, eb, eh, et, T, N, D, EVEN)
    if SUMS:
        line = b * (tl.num_programs(1) if ACROSS else tl.num_programs(0)) + tile
        place = sums + (line * (H + 2 * G) + H + g) * D + tl.arange(0, D)
        tl.store(place, tl.sum(to_k, 0))
        tl.store(place + G * D, tl.sum(to_v, 0))
