"""Attention of one new token of each row over its cached past: norm and rotation of q and k, cache, softmax, values.

`twins.attend` is the specification. The new key and value are taken from what was just computed and written behind the
past, so that no program reads what another writes. Keys of earlier steps are asked for before the launch waits.

Where one row has few keys, a program has a query head and all its keys. Where rows share key/value heads, a program has
all queries of one, in the tensor cores. A long past is split among `parts` programs, whose results are merged.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from xtcli.fast.lanes import early, late
from xtcli.fast.plan import Heads

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _turned(  # type: ignore[no-untyped-def]
    at, d, cos, sin, place, gain, eps, offset,
    D: tl.constexpr, TURNED: tl.constexpr, PAIRS: tl.constexpr, NORMED: tl.constexpr, ROUND: tl.constexpr,
):  # fmt: skip
    """Heads at pointers (R, 1), lanes d (1, P): normed, then turned by the angle of a place; float32 (R, P)."""
    real = d < D
    x = tl.load(at + d, mask=real, other=0.0).to(tl.float32)
    size = 1.0
    if NORMED:
        size = tl.rsqrt(tl.sum(x * x, 1, keep_dims=True) / D + eps)
        g = tl.load(gain + d, mask=real, other=0.0).to(tl.float32) + offset
        x = ((x * size).to(ROUND).to(tl.float32) * g).to(ROUND).to(tl.float32)
    if TURNED > 0:
        # Lanes 2i and 2i + 1 make a pair, or i and i + r/2.
        half: tl.constexpr = TURNED // 2
        turning = d < TURNED
        if PAIRS:
            other, angle, first = d ^ 1, d // 2, d % 2 == 0
        else:
            first = d < half
            other = tl.where(first, d + half, d - half)
            angle = tl.where(first, d, d - half)
        y = tl.load(at + other, mask=turning, other=0.0).to(tl.float32)
        if NORMED:
            g = tl.load(gain + other, mask=turning, other=0.0).to(tl.float32) + offset
            y = ((y * size).to(ROUND).to(tl.float32) * g).to(ROUND).to(tl.float32)
        c = tl.load(cos + place * half + angle, mask=turning, other=1.0)
        s = tl.load(sin + place * half + angle, mask=turning, other=0.0)
        x = (x * c + tl.where(first, -y, y) * s).to(ROUND).to(tl.float32)
    return x


@triton.jit
def _one(  # type: ignore[no-untyped-def]
    qkv, keys, values, slots, pads, cos, sin, q_gain, k_gain, q_eps, k_eps, q_offset, k_offset, y, most, total, scale,
    left, capacity,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, P: tl.constexpr, TURNED: tl.constexpr, PAIRS: tl.constexpr,
    NORMED: tl.constexpr, BLOCK: tl.constexpr, SPLITS: tl.constexpr, ROUND: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """A program has one query head."""
    early(PDL)
    b, h, split = tl.program_id(0) // H, tl.program_id(0) % H, tl.program_id(1)
    g = h // (H // G)
    slot = tl.load(slots + b).to(tl.int32)
    pad = tl.load(pads + b).to(tl.int32)
    begin = tl.maximum(pad, slot - left)
    share = tl.cdiv(tl.maximum(slot - begin, 0), SPLITS)
    begin += split * share
    end = tl.minimum(begin + share, slot)
    d = tl.arange(0, P)[None, :]
    n = tl.arange(0, BLOCK)
    cache = (b * G + g).to(tl.int64) * capacity * D
    at = cache + (begin + n).to(tl.int64)[:, None] * D + d
    seen = (begin + n < end)[:, None] & (d < D)
    k = tl.load(keys + at, mask=seen, other=0.0)
    v = tl.load(values + at, mask=seen, other=0.0)
    late(PDL)
    place = tl.maximum(slot - pad, 0)
    row = qkv + b.to(tl.int64) * ((H + 2 * G) * D)
    head = tl.zeros((1, 1), tl.int32)
    q = _turned(row + head + h * D, d, cos, sin, place, q_gain, q_eps, q_offset, D, TURNED, PAIRS, NORMED, ROUND)
    best = tl.full((1,), float("-inf"), tl.float32)
    weight = tl.zeros((1,), tl.float32)
    mixed = tl.zeros((P,), tl.float32)
    if split == 0:
        new = _turned(
            row + head + (H + g) * D, d, cos, sin, place, k_gain, k_eps, k_offset, D, TURNED, PAIRS, NORMED, ROUND
        )
        newer = tl.load(row + head + (H + G + g) * D + d, mask=d < D, other=0.0)
        if h % (H // G) == 0:
            put = cache + slot.to(tl.int64) * D + d
            tl.store(keys + put, new.to(ROUND), mask=d < D)
            tl.store(values + put, newer, mask=d < D)
        best = tl.sum(q * new, 1) * scale
        weight += 1.0
        mixed = tl.sum(newer.to(tl.float32), 0)
    for start in range(begin, end, BLOCK):
        # The next keys are on their way while these are multiplied.
        after = start + BLOCK + n
        at = cache + after.to(tl.int64)[:, None] * D + d
        seen = (after < end)[:, None] & (d < D)
        later_k = tl.load(keys + at, mask=seen, other=0.0)
        later_v = tl.load(values + at, mask=seen, other=0.0)
        scores = tl.where(start + n < end, tl.sum(k.to(tl.float32) * q, 1) * scale, float("-inf"))
        higher = tl.maximum(best, tl.max(scores))
        p = tl.exp2((scores - higher) * LOG2E)
        old = tl.exp2((best - higher) * LOG2E)
        weight = weight * old + tl.sum(p)
        mixed = mixed * old + tl.sum(p[:, None] * v.to(tl.float32), 0)
        best, k, v = higher, later_k, later_v
    lane = tl.arange(0, P)
    if SPLITS == 1:
        tl.store(y + (b * H + h) * D + lane, (mixed / weight).to(ROUND), mask=lane < D)
    else:
        part = (b * H + h) * SPLITS + split
        tl.store(y + part * P + lane, mixed)
        tl.store(most + part + tl.zeros((1,), tl.int32), best)
        tl.store(total + part + tl.zeros((1,), tl.int32), weight)


@triton.jit
def _group(  # type: ignore[no-untyped-def]
    qkv, keys, values, slots, pads, cos, sin, q_gain, k_gain, q_eps, k_eps, q_offset, k_offset, y, most, total, scale,
    left, capacity,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, P: tl.constexpr, TURNED: tl.constexpr, PAIRS: tl.constexpr,
    NORMED: tl.constexpr, BLOCK: tl.constexpr, SPLITS: tl.constexpr, ROUND: tl.constexpr, PDL: tl.constexpr,
    R: tl.constexpr,
):  # fmt: skip
    """A program has the query heads of one key/value head, R lanes of them."""
    early(PDL)
    b, g, split = tl.program_id(0) // G, tl.program_id(0) % G, tl.program_id(1)
    slot = tl.load(slots + b).to(tl.int32)
    pad = tl.load(pads + b).to(tl.int32)
    begin = tl.maximum(pad, slot - left)
    share = tl.cdiv(tl.maximum(slot - begin, 0), SPLITS)
    begin += split * share
    end = tl.minimum(begin + share, slot)
    d = tl.arange(0, P)[None, :]
    n = tl.arange(0, BLOCK)
    r = tl.arange(0, R)[:, None]
    shared: tl.constexpr = H // G
    cache = (b * G + g).to(tl.int64) * capacity * D
    at = cache + (begin + n).to(tl.int64)[:, None] * D + d
    seen = (begin + n < end)[:, None] & (d < D)
    k = tl.load(keys + at, mask=seen, other=0.0)
    v = tl.load(values + at, mask=seen, other=0.0)
    late(PDL)
    place = tl.maximum(slot - pad, 0)
    row = qkv + b.to(tl.int64) * ((H + 2 * G) * D)
    # Lanes beyond the heads repeat the last one and are not written.
    head = g * shared + tl.minimum(r, shared - 1)
    q = _turned(row + head * D, d, cos, sin, place, q_gain, q_eps, q_offset, D, TURNED, PAIRS, NORMED, ROUND)
    best = tl.full((R,), float("-inf"), tl.float32)
    weight = tl.zeros((R,), tl.float32)
    mixed = tl.zeros((R, P), tl.float32)
    if split == 0:
        zero = tl.zeros((1, 1), tl.int32)
        new = _turned(
            row + zero + (H + g) * D, d, cos, sin, place, k_gain, k_eps, k_offset, D, TURNED, PAIRS, NORMED, ROUND
        )
        newer = tl.load(row + zero + (H + G + g) * D + d, mask=d < D, other=0.0)
        put = cache + slot.to(tl.int64) * D + d
        tl.store(keys + put, new.to(ROUND), mask=d < D)
        tl.store(values + put, newer, mask=d < D)
        best = tl.sum(q * new, 1) * scale
        weight += 1.0
        mixed += newer.to(tl.float32)
    asked = q.to(ROUND)
    for start in range(begin, end, BLOCK):
        # The next keys are on their way while these are multiplied.
        after = start + BLOCK + n
        at = cache + after.to(tl.int64)[:, None] * D + d
        seen = (after < end)[:, None] & (d < D)
        later_k = tl.load(keys + at, mask=seen, other=0.0)
        later_v = tl.load(values + at, mask=seen, other=0.0)
        scores = tl.dot(asked, tl.trans(k), input_precision="ieee") * scale
        scores = tl.where((start + n < end)[None, :], scores, float("-inf"))
        higher = tl.maximum(best, tl.max(scores, 1))
        p = tl.exp2((scores - higher[:, None]) * LOG2E)
        old = tl.exp2((best - higher) * LOG2E)
        weight = weight * old + tl.sum(p, 1)
        mixed = tl.dot(p.to(ROUND), v, mixed * old[:, None], input_precision="ieee")
        best, k, v = higher, later_k, later_v
    lane = tl.arange(0, R)
    own = b * H + g * shared + lane
    if SPLITS == 1:
        kept = (lane < shared)[:, None] & (d < D)
        tl.store(y + own[:, None] * D + d, (mixed / weight[:, None]).to(ROUND), mask=kept)
    else:
        part = own * SPLITS + split
        tl.store(y + part[:, None] * P + d, mixed, mask=(lane < shared)[:, None])
        tl.store(most + part, best, mask=lane < shared)
        tl.store(total + part, weight, mask=lane < shared)


@triton.jit
def _merge(  # type: ignore[no-untyped-def]
    parts, most, total, y, D: tl.constexpr, P: tl.constexpr, SPLITS: tl.constexpr, WIDE: tl.constexpr,
    ROUND: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """The parts of one head's past, (SPLITS, P), as one."""
    early(PDL)
    late(PDL)
    own = tl.program_id(0)
    s, d = tl.arange(0, WIDE), tl.arange(0, P)
    at = own * SPLITS + s
    best = tl.load(most + at, mask=s < SPLITS, other=float("-inf"))
    share = tl.exp2((best - tl.max(best)) * LOG2E)
    weight = tl.sum(tl.load(total + at, mask=s < SPLITS, other=0.0) * share)
    mixed = tl.load(parts + at[:, None] * P + d[None, :], mask=(s < SPLITS)[:, None], other=0.0)
    mixed = tl.sum(mixed * share[:, None], 0) / weight
    tl.store(y + own * D + d, mixed.to(ROUND), mask=d < D)


TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
LONG = 1024
"""Slots from which on a past is split."""
PROGRAMS = 264
"""Programs that fill a GPU."""


def attend(
    qkv: Tensor,
    heads: Heads,
    keys: Tensor,
    values: Tensor,
    slots: Tensor,
    pads: Tensor,
    out: Tensor,
    *,
    pdl: bool = False,
    single: bool | None = None,
    splits: int | None = None,
    block: int | None = None,
    warps: int | None = None,
) -> None:
    """qkv (B, (H + 2 G) D) over caches (B, G, C, D), into out (B, H D); as in `twins.attend`."""
    rows, capacity = qkv.shape[0], keys.shape[2]
    if not (qkv.is_contiguous() and keys.is_contiguous() and values.is_contiguous() and out.is_contiguous()):
        raise ValueError("queries, caches and outputs must lie in one piece each")
    h, g, width = heads.heads, heads.groups, heads.width
    alone = (rows * g < PROGRAMS // 4 or h == g) if single is None else single
    programs = rows * (h if alone else g)
    if splits is None:
        splits = 1 if capacity <= LONG else max(1, min(triton.cdiv(capacity, 256), PROGRAMS // programs, 64))
    lanes = max(triton.next_power_of_2(width), 16)
    fits = max(16, 16384 // lanes if alone else 8192 // lanes)
    block = block or min(max(triton.next_power_of_2(triton.cdiv(capacity, splits)), 16), fits)
    target, most, total = out, out, out
    if splits > 1:
        target = torch.empty(rows * h * splits, lanes, device=out.device)
        most, total = (torch.empty(rows * h * splits, device=out.device) for _ in range(2))
    turn, q_norm, k_norm = heads.turn, heads.q_norm, heads.k_norm
    given = (
        qkv, keys, values, slots, pads, None if turn is None else turn.cos, None if turn is None else turn.sin,
        None if q_norm is None else q_norm.gain, None if k_norm is None else k_norm.gain,
        *(0.0 if norm is None else norm.eps for norm in (q_norm, k_norm)),
        *(0.0 if norm is None else norm.offset for norm in (q_norm, k_norm)),
        target, most, total, heads.scale, capacity if heads.left is None else heads.left, capacity,
    )  # fmt: skip
    dtype = TYPES[qkv.dtype]
    sizes = (
        h, g, width, lanes, 0 if turn is None else 2 * turn.cos.shape[1], turn is not None and turn.interleaved,
        q_norm is not None, block, splits, dtype, pdl,
    )  # fmt: skip
    launch = {"launch_pdl": True} if pdl else {}
    if alone:
        _one[(programs, splits)](*given, *sizes, num_warps=warps or (8 if block * lanes >= 8192 else 4), **launch)
    else:
        shared = max(16, triton.next_power_of_2(h // g))
        _group[(programs, splits)](*given, *sizes, shared, num_warps=warps or 4, **launch)
    if splits > 1:
        wide = triton.next_power_of_2(splits)
        _merge[(rows * h,)](target, most, total, out, width, lanes, splits, wide, dtype, pdl, num_warps=4, **launch)
