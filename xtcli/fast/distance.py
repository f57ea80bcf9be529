"""Attention whose scores get a bias of the distance, one value for each head and distance, with dropout and gradients.

    weights = softmax(scale q k^T + row[h, s - t + T - 1])  over the keys that are seen        y = dropped(weights) v

No bias of all pairs is stored, nor its gradient for each row of a batch: the slopes of scores are summed over the batch
first, which makes one (H, T, T), and then along its diagonals. Slopes of queries, of keys and values, and of the bias
are three kernels, each of which makes the scores anew (Dao 2023, arXiv:2307.08691) and adds in a fixed order.

A weight is dropped where a hash of its place and the seed is small, so that all kernels drop the same ones, and so does
the twin, `attend_plainly`. Exponentials are powers of two; `row` comes multiplied with log2(e).

Axes: B batch, H heads, T queries and as many keys, D head width.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from xtcli.fast.layout import alike, steps, whole_rows
from xtcli.parts.slides import LOG2E, diagonals, slide_plainly

FORWARD = (128, 64, 8, 3)
QUERIES = (64, 64, 4, 3)
KEYS = (64, 64, 4, 3)
BIAS = (64, 64, 4, 3)
"""Queries and keys of a tile, warps and stages, by kernel."""


@triton.jit
def _kept(bh, t, s, T, seed, least):  # type: ignore[no-untyped-def]
    """Which weights stay, for queries t and keys s that broadcast."""
    number = tl.load(seed)
    x = ((bh * T + t) * T + s).to(tl.uint32) ^ number.to(tl.uint32)
    x ^= x >> 16
    x *= 0x7FEB352D
    x ^= (number >> 32).to(tl.uint32)
    x ^= x >> 15
    x *= 0x846CA68B
    x ^= x >> 16
    return (x >> 1).to(tl.int32) >= least


@triton.jit
def _raw(product, row, code, b, h, t, s, T, scale, CAUSAL: tl.constexpr, CODED: tl.constexpr):  # type: ignore[no-untyped-def]
    """Scores as powers of two of q k^T, for queries t and keys s that broadcast to its shape."""
    inside = (t < T) & (s < T)
    bias = tl.load(row + h * (2 * T - 1) + (s - t + T - 1), mask=inside, other=0.0)
    seen = inside
    if CAUSAL:
        seen = seen & (s <= t)
    if CODED:
        real = tl.load(code + b * T + s, mask=s < T, other=0)
        alone = tl.load(code + b * T + t, mask=t < T, other=0)
        seen = (seen & ((real & 1) != 0)) | (inside & (s == t) & ((alone & 2) != 0))
    return tl.where(seen, product * scale + bias, float("-inf"))


@triton.jit
def _tile(x, at, places, T, step, D: tl.constexpr):  # type: ignore[no-untyped-def]
    """(places, D) of a tensor from address `at` on, zeros behind the end."""
    return tl.load(x + at + places[:, None] * step + tl.arange(0, D)[None, :], mask=places[:, None] < T, other=0.0)


@triton.jit
def _forward(  # type: ignore[no-untyped-def]
    q, k, v, row, code, seed, o, ends,
    qb, qh, qt, kb, kh, kt, vb, vh, vt, ob, oh, ot, H, T, scale, least, grow,
    CAUSAL: tl.constexpr, CODED: tl.constexpr, DROPS: tl.constexpr, D: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """Outputs of M queries, and log2 of the sum of their powers."""
    bh = tl.program_id(1)
    b, h = (bh // H).to(tl.int64), bh % H
    t = tl.program_id(0) * M + tl.arange(0, M)
    asked = _tile(q, b * qb + h * qh, t, T, qt, D)
    most = tl.full((M,), float("-inf"), tl.float32)
    total = tl.zeros((M,), tl.float32)
    made = tl.zeros((M, D), tl.float32)
    stop = tl.minimum(T, (tl.program_id(0) + 1) * M) if CAUSAL else T
    for start in range(0, stop, N):
        s = start + tl.arange(0, N)
        keys = _tile(k, b * kb + h * kh, s, T, kt, D)
        x = _raw(tl.dot(asked, tl.trans(keys)), row, code, b, h, t[:, None], s[None, :], T, scale, CAUSAL, CODED)
        higher = tl.maximum(most, tl.max(x, 1))
        # Where nothing has been seen so far, the highest is no number to subtract.
        level = tl.where(higher == float("-inf"), 0.0, higher)
        weights = tl.exp2(x - level[:, None])
        shrink = tl.exp2(most - level)
        total = total * shrink + tl.sum(weights, 1)
        if DROPS:
            weights = tl.where(_kept(bh, t[:, None], s[None, :], T, seed, least), weights, 0.0)
        values = _tile(v, b * vb + h * vh, s, T, vt, D)
        made = made * shrink[:, None] + tl.dot(weights.to(values.dtype), values)
        most = higher
    safe = tl.where(total == 0.0, 1.0, total)
    made = made * (grow / safe)[:, None]
    place = o + b * ob + h * oh + t[:, None] * ot + tl.arange(0, D)[None, :]
    tl.store(place, made.to(o.dtype.element_ty), mask=t[:, None] < T)
    tl.store(ends + bh.to(tl.int64) * T + t, most + tl.log2(safe), mask=t < T)


@triton.jit
def _queries(  # type: ignore[no-untyped-def]
    q, k, v, row, code, seed, o, dy, ends, deltas, dq,
    qb, qh, qt, kb, kh, kt, vb, vh, vt, ob, oh, ot, yb, yh, yt, H, T, scale, slope, least, grow,
    CAUSAL: tl.constexpr, CODED: tl.constexpr, DROPS: tl.constexpr, D: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """Slopes of M queries, and the products of what they made with its slope."""
    bh = tl.program_id(1)
    b, h = (bh // H).to(tl.int64), bh % H
    t = tl.program_id(0) * M + tl.arange(0, M)
    asked = _tile(q, b * qb + h * qh, t, T, qt, D)
    given = _tile(dy, b * yb + h * yh, t, T, yt, D)
    delta = tl.sum(_tile(o, b * ob + h * oh, t, T, ot, D).to(tl.float32) * given.to(tl.float32), 1)
    tl.store(deltas + bh.to(tl.int64) * T + t, delta, mask=t < T)
    end = tl.load(ends + bh.to(tl.int64) * T + t, mask=t < T, other=0.0)
    made = tl.zeros((M, D), tl.float32)
    stop = tl.minimum(T, (tl.program_id(0) + 1) * M) if CAUSAL else T
    for start in range(0, stop, N):
        s = start + tl.arange(0, N)
        keys = _tile(k, b * kb + h * kh, s, T, kt, D)
        values = _tile(v, b * vb + h * vh, s, T, vt, D)
        x = _raw(tl.dot(asked, tl.trans(keys)), row, code, b, h, t[:, None], s[None, :], T, scale, CAUSAL, CODED)
        weights = tl.exp2(x - end[:, None])
        change = tl.dot(given, tl.trans(values)) * grow
        if DROPS:
            change = tl.where(_kept(bh, t[:, None], s[None, :], T, seed, least), change, 0.0)
        made += tl.dot((weights * (change - delta[:, None])).to(keys.dtype), keys)
    place = dq + b * ob + h * oh + t[:, None] * ot + tl.arange(0, D)[None, :]
    tl.store(place, (made * slope).to(dq.dtype.element_ty), mask=t[:, None] < T)


@triton.jit
def _keys(  # type: ignore[no-untyped-def]
    q, k, v, row, code, seed, dy, ends, deltas, dk, dv,
    qb, qh, qt, kb, kh, kt, vb, vh, vt, ob, oh, ot, yb, yh, yt, H, T, scale, slope, least, grow,
    CAUSAL: tl.constexpr, CODED: tl.constexpr, DROPS: tl.constexpr, D: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """Slopes of N keys and values."""
    bh = tl.program_id(1)
    b, h = (bh // H).to(tl.int64), bh % H
    s = tl.program_id(0) * N + tl.arange(0, N)
    keys = _tile(k, b * kb + h * kh, s, T, kt, D)
    values = _tile(v, b * vb + h * vh, s, T, vt, D)
    for_keys = tl.zeros((N, D), tl.float32)
    for_values = tl.zeros((N, D), tl.float32)
    first = (tl.program_id(0) * N) // M * M if CAUSAL else 0
    for start in range(first, T, M):
        t = start + tl.arange(0, M)
        asked = _tile(q, b * qb + h * qh, t, T, qt, D)
        given = _tile(dy, b * yb + h * yh, t, T, yt, D)
        end = tl.load(ends + bh.to(tl.int64) * T + t, mask=t < T, other=0.0)
        delta = tl.load(deltas + bh.to(tl.int64) * T + t, mask=t < T, other=0.0)
        # Keys are the rows here, so that both products find their left side as it is.
        x = _raw(tl.dot(keys, tl.trans(asked)), row, code, b, h, t[None, :], s[:, None], T, scale, CAUSAL, CODED)
        weights = tl.exp2(x - end[None, :])
        change = tl.dot(values, tl.trans(given)) * grow
        left = weights * grow
        if DROPS:
            stays = _kept(bh, t[None, :], s[:, None], T, seed, least)
            left = tl.where(stays, left, 0.0)
            change = tl.where(stays, change, 0.0)
        for_values += tl.dot(left.to(given.dtype), given)
        for_keys += tl.dot((weights * (change - delta[None, :])).to(asked.dtype), asked)
    place = b * ob + h * oh + s[:, None] * ot + tl.arange(0, D)[None, :]
    tl.store(dk + place, (for_keys * slope).to(dk.dtype.element_ty), mask=s[:, None] < T)
    tl.store(dv + place, for_values.to(dv.dtype.element_ty), mask=s[:, None] < T)


@triton.jit
def _bias(  # type: ignore[no-untyped-def]
    q, k, v, row, code, seed, dy, ends, deltas, db,
    qb, qh, qt, kb, kh, kt, vb, vh, vt, yb, yh, yt, B, H, T, scale, least, grow,
    CAUSAL: tl.constexpr, CODED: tl.constexpr, DROPS: tl.constexpr, D: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """Slopes of the scores of M queries and N keys, summed over the batch."""
    across = tl.cdiv(T, N)
    h = tl.program_id(1)
    t = tl.program_id(0) // across * M + tl.arange(0, M)
    s = tl.program_id(0) % across * N + tl.arange(0, N)
    made = tl.zeros((M, N), tl.float32)
    rows = B
    if CAUSAL:
        rows = tl.where(tl.program_id(0) % across * N <= tl.program_id(0) // across * M + M - 1, B, 0)
    for number in range(rows):
        b = tl.cast(number, tl.int64)
        bh = number * H + h
        asked = _tile(q, b * qb + h * qh, t, T, qt, D)
        given = _tile(dy, b * yb + h * yh, t, T, yt, D)
        keys = _tile(k, b * kb + h * kh, s, T, kt, D)
        values = _tile(v, b * vb + h * vh, s, T, vt, D)
        end = tl.load(ends + b * H * T + h * T + t, mask=t < T, other=0.0)
        delta = tl.load(deltas + b * H * T + h * T + t, mask=t < T, other=0.0)
        x = _raw(tl.dot(asked, tl.trans(keys)), row, code, b, h, t[:, None], s[None, :], T, scale, CAUSAL, CODED)
        weights = tl.exp2(x - end[:, None])
        change = tl.dot(given, tl.trans(values)) * grow
        if DROPS:
            change = tl.where(_kept(bh, t[:, None], s[None, :], T, seed, least), change, 0.0)
        made += weights * (change - delta[:, None])
    place = db + (h * T + t[:, None]).to(tl.int64) * T + s[None, :]
    tl.store(place, made, mask=(t[:, None] < T) & (s[None, :] < T))


def forward(
    q: Tensor, k: Tensor, v: Tensor, row: Tensor, code: Tensor | None, seed: Tensor, causal: bool, scale: float,
    rate: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """y (B, H, T, D), and log2 of each query's sum of powers (B, H, T).

    q, k, v (B, H, T, D), row (H, 2 T - 1) float32, seed (1,) int64. code (B, T) int8: 1 at a key that is seen, and 2 at
    a query that sees itself alone.
    """
    q, k, v, row = *(whole_rows(x) for x in (q, k, v)), row.contiguous()
    batch, heads, length, width = q.shape
    y, ends = alike(q), q.new_empty(batch, heads, length, dtype=torch.float32)
    M, N, warps, stages = FORWARD
    _forward[(triton.cdiv(length, M), batch * heads)](
        q, k, v, row, seed if code is None else code, seed, y, ends,
        *steps(q, k, v, y), heads, length, scale * LOG2E, _least(rate), 1 / (1 - rate),
        causal, code is not None, rate > 0, width, M, N, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return y, ends


def backward(
    dy: Tensor, q: Tensor, k: Tensor, v: Tensor, row: Tensor, code: Tensor | None, seed: Tensor, y: Tensor,
    ends: Tensor, causal: bool, scale: float, rate: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The slopes of q, k, v and of the bias, (H, 2 T - 1)."""
    dy, q, k, v, y, row = *(whole_rows(x) for x in (dy, q, k, v, y)), row.contiguous()
    batch, heads, length, width = q.shape
    dq, dk, dv = alike(q), alike(q), alike(q)
    deltas = torch.empty_like(ends)
    db = q.new_empty(heads, length, length, dtype=torch.float32)
    codes = seed if code is None else code
    read = steps(q, k, v)
    numbers = (scale * LOG2E, scale, _least(rate), 1 / (1 - rate))
    kinds = (causal, code is not None, rate > 0, width)
    M, N, warps, stages = QUERIES
    _queries[(triton.cdiv(length, M), batch * heads)](
        q, k, v, row, codes, seed, y, dy, ends, deltas, dq, *read, *steps(dq), *steps(dy), heads, length, *numbers,
        *kinds, M, N, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    M, N, warps, stages = KEYS
    _keys[(triton.cdiv(length, N), batch * heads)](
        q, k, v, row, codes, seed, dy, ends, deltas, dk, dv, *read, *steps(dk), *steps(dy), heads, length, *numbers,
        *kinds, M, N, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    M, N, warps, stages = BIAS
    _bias[(triton.cdiv(length, M) * triton.cdiv(length, N), heads)](
        q, k, v, row, codes, seed, dy, ends, deltas, db, *read, *steps(dy), batch, heads, length,
        numbers[0], *numbers[2:], *kinds, M, N, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return dq, dk, dv, diagonals(db)


def _least(rate: float) -> int:
    """The hash, of 31 bits, from which a weight stays."""
    return int(rate * 2**31)


def kept(seed: Tensor, shape: tuple[int, int, int], rate: float) -> Tensor:
    """Which weights of (B, H, T) queries stay, (B, H, T, T), as the kernels choose them."""
    batch, heads, length = shape
    low = 2**32 - 1
    number = int(seed)
    x = torch.arange(batch * heads * length * length, device=seed.device) & low
    x = x ^ (number & low)
    x = x ^ (x >> 16)
    x = (x * 0x7FEB352D) & low
    x = x ^ ((number >> 32) & low)
    x = x ^ (x >> 15)
    x = (x * 0x846CA68B) & low
    x = x ^ (x >> 16)
    return ((x >> 1) >= _least(rate)).view(batch, heads, length, length)


def attend_plainly(
    q: Tensor, k: Tensor, v: Tensor, row: Tensor, code: Tensor | None, seed: Tensor, causal: bool, scale: float,
    rate: float,
) -> Tensor:  # fmt: skip
    """What `forward` makes, in tensors; `row` (H, 2 T - 1) as it is added to the scores."""
    length = q.shape[2]
    scores = q @ k.transpose(-1, -2) * scale + slide_plainly(row, length)
    seen = torch.ones(length, length, dtype=torch.bool, device=q.device)
    seen = (seen.tril() if causal else seen)[None, None]
    if code is not None:
        itself = torch.eye(length, dtype=torch.bool, device=q.device)
        seen = (seen & (code & 1).bool()[:, None, None, :]) | (itself & (code & 2).bool()[:, None, :, None])
    weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
    if rate:
        weights = weights * kept(seed, q.shape[:3], rate) / (1 - rate)  # type: ignore[arg-type]
    return weights @ v


_LIBRARY = torch.library.Library("xtcli", "FRAGMENT")
_LIBRARY.define(
    "distance(Tensor q, Tensor k, Tensor v, Tensor row, Tensor? code, Tensor seed, bool causal, float scale, "
    "float rate) -> (Tensor, Tensor)"
)
_LIBRARY.define(
    "distance_slopes(Tensor dy, Tensor q, Tensor k, Tensor v, Tensor row, Tensor? code, Tensor seed, Tensor y, "
    "Tensor ends, bool causal, float scale, float rate) -> (Tensor, Tensor, Tensor, Tensor)"
)
torch.library.impl("xtcli::distance", "cuda")(forward)
torch.library.impl("xtcli::distance_slopes", "cuda")(backward)


@torch.library.register_fake("xtcli::distance")
def _shapes(q: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return alike(q), q.new_empty(q.shape[:3], dtype=torch.float32)


@torch.library.register_fake("xtcli::distance_slopes")
def _slope_shapes(dy: Tensor, q: Tensor, k: Tensor, v: Tensor, row: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    return alike(q), alike(q), alike(q), row.new_empty(row.shape)


def _remember(ctx: Any, inputs: Any, output: Any) -> None:
    q, k, v, row, code, seed, ctx.causal, ctx.scale, ctx.rate = inputs
    ctx.save_for_backward(q, k, v, row, code, seed, *output)


def _slopes(ctx: Any, dy: Tensor, _: Tensor | None) -> Any:
    made = torch.ops.xtcli.distance_slopes(dy, *ctx.saved_tensors, ctx.causal, ctx.scale, ctx.rate)
    dq, dk, dv, along = made
    # The bias was multiplied with log2(e) on its way in, and its slope is that of the scores themselves.
    return dq, dk, dv, along / LOG2E, None, None, None, None, None


torch.library.register_autograd("xtcli::distance", _slopes, setup_context=_remember)
