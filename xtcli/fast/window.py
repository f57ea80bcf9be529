"""Attention in a window around each query, with gradients.

    query t sees key s    where t - left <= s <= t + right, and both have the same label

The tiles of keys that a tile of queries sees follow by arithmetic, and those at the edges of the window alone are asked
pair by pair. Backwards, one kernel makes the slopes of queries and another those of keys and values; each makes the
weights anew from what the forward pass keeps (Dao 2023, arXiv:2307.08691), and adds in a fixed order.

Axes: B rows, H query heads, G key/value heads, T tokens, D head width, M queries and N keys of a tile. Scores are in
units of log 2 inside the kernels, as are the logarithms that the forward pass keeps.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2E = 1.4426950408889634
FLOOR = tl.constexpr(-1e20)
"""The highest score before any key was seen: finite, so that a tile without any makes no NaN."""

FORWARD = {16: (64, 64, 4, 3), 32: (64, 64, 4, 3), 64: (64, 64, 4, 3), 128: (64, 64, 4, 3)}
QUERIES = {16: (64, 64, 4, 3), 32: (64, 64, 4, 3), 64: (64, 32, 4, 3), 128: (64, 64, 4, 2)}
KEYS = {16: (32, 64, 4, 3), 32: (32, 64, 4, 3), 64: (32, 64, 4, 3), 128: (64, 64, 4, 2)}
KEYS_OF_GROUPS = {**KEYS, 64: (64, 64, 4, 3)}
"""By width of a head: queries and keys of a tile, warps, stages. Found by trial on an H200, at 8,192 tokens and a
window of 512, and for heads of 64 with the whole past of 1,024 and 2,048 tokens."""
REGISTERS = {64: 128}
"""Registers of a thread in the kernel for keys of heads that share none, so that four programs fit side by side."""


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
def _seen(t, s, label, its, left, right, T, LABELS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Whether queries t see keys s, which broadcast to one another; a query labelled -2 sees itself alone."""
    seen = (s >= t - left) & (s <= t + right) & (s < T)
    if LABELS:
        seen = seen & ((label == its) | ((label == -2) & (s == t)))
    return seen


@triton.jit
def _forward(  # type: ignore[no-untyped-def]
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
def _queries(  # type: ignore[no-untyped-def]
    q, k, v, mine, theirs, o, dy, ends, deltas, dq,
    qb, qh, qt, kb, kh, kt, vb, vh, vt, ob, oh, ot, yb, yh, yt, db, dh, dt,
    H, group, T, left, right, scale, slope,
    LABELS: tl.constexpr, EVEN: tl.constexpr, D: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """Slopes of M queries, and the products of what they made with its slope."""
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
    _put(dq, made * slope, b, h, first, db, dh, dt, T, M, D, EVEN)


@triton.jit
def _keys(  # type: ignore[no-untyped-def]
    q, k, v, mine, theirs, dy, ends, deltas, dk, dv,
    qb, qh, qt, kb, kh, kt, vb, vh, vt, yb, yh, yt, db, dh, dt, eb, eh, et,
    H, group, T, left, right, scale, slope,
    LABELS: tl.constexpr, EVEN: tl.constexpr, D: tl.constexpr, M: tl.constexpr, N: tl.constexpr, ACROSS: tl.constexpr,
):  # fmt: skip
    """Slopes of N keys and values, from all heads of their group. ACROSS: the tiles with most queries of all rows and
    heads begin first."""
    bg = tl.program_id(0) if ACROSS else tl.program_id(1)
    G = H // group
    b, g = bg // G, bg % G
    first = (tl.program_id(1) if ACROSS else tl.program_id(0)) * N
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
    _put(dk, to_k * slope, b, g, first, db, dh, dt, T, N, D, EVEN)
    _put(dv, to_v, b, g, first, eb, eh, et, T, N, D, EVEN)


def forward(
    q: Tensor, k: Tensor, v: Tensor, mine: Tensor | None, theirs: Tensor | None, left: int, right: int, scale: float
) -> tuple[Tensor, Tensor]:
    """y (B, H, T, D), and log2 of each query's sum of powers (B, H, T).

    q (B, H, T, D), k and v (B, G, T, D). Labels of queries and of keys int32 (B, T), or None: a pair counts where they
    are equal, and a query labelled -2 sees itself alone.
    """
    q, k, v = (_rows(x) for x in (q, k, v))
    y, ends = _like(q), q.new_empty(q.shape[:3], dtype=torch.float32)
    M, _, options = _cut(FORWARD, q)
    given = (q, k, v, *_labels(mine, theirs, ends), y, ends, *_steps(q, k, v, y))
    _forward[(triton.cdiv(q.shape[2], M), q.shape[0] * q.shape[1])](
        *given, *_sizes(q, k), left, right, scale * LOG2E, mine is not None, **options
    )
    return y, ends


def backward(
    dy: Tensor, q: Tensor, k: Tensor, v: Tensor, mine: Tensor | None, theirs: Tensor | None, y: Tensor, ends: Tensor,
    left: int, right: int, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The slopes of q, k and v."""
    dy, q, k, v = (_rows(x) for x in (dy, q, k, v))
    dq, dk, dv = (_like(x) for x in (q, k, v))
    deltas = torch.empty_like(ends)
    labels = _labels(mine, theirs, ends)
    numbers = (*_sizes(q, k), left, right, scale * LOG2E, scale, mine is not None)
    M, _, options = _cut(QUERIES, q)
    _queries[(triton.cdiv(q.shape[2], M), q.shape[0] * q.shape[1])](
        q, k, v, *labels, y, dy, ends, deltas, dq, *_steps(q, k, v, y, dy, dq), *numbers, **options
    )  # fmt: skip
    grouped = k.shape[1] < q.shape[1]
    _, N, options = _cut(KEYS_OF_GROUPS if grouped else KEYS, q)
    if not grouped and q.shape[3] in REGISTERS:
        options["maxnreg"] = REGISTERS[q.shape[3]]
    grid = (triton.cdiv(q.shape[2], N), k.shape[0] * k.shape[1])
    _keys[grid[::-1] if grouped else grid](
        q, k, v, *labels, dy, ends, deltas, dk, dv, *_steps(q, k, v, dy, dk, dv), *numbers, ACROSS=grouped, **options
    )  # fmt: skip
    return dq, dk, dv


def _cut(table: dict[int, tuple[int, int, int, int]], q: Tensor) -> tuple[int, int, dict[str, Any]]:
    """The tile of a kernel, and its constants."""
    M, N, warps, stages = table[q.shape[-1]]
    even = q.shape[2] % M == 0 and q.shape[2] % N == 0
    sizes = {"EVEN": even, "D": q.shape[-1], "M": M, "N": N}
    return M, N, sizes | {"num_warps": warps, "num_stages": stages}


def _labels(mine: Tensor | None, theirs: Tensor | None, other: Tensor) -> tuple[Tensor, Tensor]:
    """Something to hand over where there are none."""
    return (other, other) if mine is None or theirs is None else (mine, theirs)


def _sizes(q: Tensor, k: Tensor) -> tuple[int, int, int]:
    return q.shape[1], q.shape[1] // k.shape[1], q.shape[2]


def _rows(x: Tensor) -> Tensor:
    """With rows in one piece that begin at 16 bytes."""
    whole = x.stride(-1) == 1 and all(step * x.itemsize % 16 == 0 for step in x.stride()[:-1])
    return x if whole and x.data_ptr() % 16 == 0 else x.contiguous()


def _like(x: Tensor) -> Tensor:
    """(B, H, T, D) that lies as (B, T, H, D), so that heads join without a copy."""
    batch, heads, length, width = x.shape
    return x.new_empty(batch, length, heads, width).transpose(1, 2)


def _steps(*tensors: Tensor) -> tuple[int, ...]:
    return tuple(step for x in tensors for step in x.stride()[:3])


_LIBRARY = torch.library.Library("xt", "FRAGMENT")
_GIVEN = "Tensor q, Tensor k, Tensor v, Tensor? mine, Tensor? theirs"
_LIBRARY.define(f"attend_window({_GIVEN}, int left, int right, float scale) -> (Tensor, Tensor)")
_LIBRARY.define(
    f"attend_window_back(Tensor dy, {_GIVEN}, Tensor y, Tensor ends, int left, int right, float scale) "
    "-> (Tensor, Tensor, Tensor)"
)
# On a CPU they run in Triton's interpreter.
torch.library.impl("xt::attend_window", ("cuda", "cpu"))(forward)
torch.library.impl("xt::attend_window_back", ("cuda", "cpu"))(backward)


@torch.library.register_fake("xt::attend_window")
def _shapes(q: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return _like(q), q.new_empty(q.shape[:3], dtype=torch.float32)


@torch.library.register_fake("xt::attend_window_back")
def _slope_shapes(dy: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _like(q), _like(k), _like(v)


def _remember(ctx: Any, inputs: Any, output: Any) -> None:
    q, k, v, mine, theirs, *ctx.numbers = inputs
    ctx.save_for_backward(q, k, v, mine, theirs, *output)


def _slopes(ctx: Any, dy: Tensor, _: Tensor | None) -> Any:
    return *torch.ops.xt.attend_window_back(dy, *ctx.saved_tensors, *ctx.numbers), *(None,) * 5


torch.library.register_autograd("xt::attend_window", _slopes, setup_context=_remember)
