"""Loss and slope of a slab of logits in one launch; `parts.losses.slab_terms` is the specification.

A program has a row. It reads the row twice, the second time from the cache, since the rows under way in the machine are
few megabytes together, and writes the slope over the logits: memory is read once and written once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from xtcli.fast.lanes import capped, tanh
from xtcli.parts.outputs import IGNORE

BLOCK = 8192
"""Columns that a program holds at once, or as many as the vocabulary has, in powers of two from LEAST on."""
LEAST = 1024
EACH = 256
"""Columns of a warp."""
HELD = 8
"""Columns of a block that one lane holds: 16 bytes of 16-bit logits."""


@triton.jit
def _gathered(x, most, total, LANES: tl.constexpr, HELD: tl.constexpr):  # type: ignore[no-untyped-def]
    """Each lane's highest logit and sum of exp(x - highest) with a block more."""
    x = tl.reshape(x, (LANES, HELD))
    higher = tl.maximum(most, tl.max(x, 1))
    total = total * tl.exp(most - higher) + tl.sum(tl.exp(x - higher[:, None]), 1)
    return higher, total


@triton.jit
def _row(  # type: ignore[no-untyped-def]
    logits, targets, losses, stride, vocab, width, cap, smoothing,
    IGNORED: tl.constexpr, CAPPED: tl.constexpr, SMOOTH: tl.constexpr, BLOCK: tl.constexpr, HELD: tl.constexpr,
):  # fmt: skip
    """The loss of one row of logits, and its slope in their place."""
    LANES: tl.constexpr = BLOCK // HELD
    row = tl.program_id(0).to(tl.int64)
    at = logits + row * stride
    target = tl.load(targets + row)
    columns = tl.arange(0, BLOCK)
    whole = vocab // BLOCK * BLOCK
    if target == IGNORED:
        tl.store(losses + row, 0.0)
        for start in range(0, width, BLOCK):
            place = start + columns
            tl.store(at + place, tl.zeros((BLOCK,), logits.dtype.element_ty), mask=place < width)
    else:
        # Lower than any logit, and finite, so that lanes which have seen nothing give no NaN.
        most = tl.full((LANES,), -1e38, tl.float32)
        total = tl.zeros((LANES,), tl.float32)
        plain = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, whole, BLOCK):
            x = tl.load(at + start + columns, eviction_policy="evict_last").to(tl.float32)
            if CAPPED:
                x = capped(x, cap)
            if SMOOTH:
                plain += x
            most, total = _gathered(x, most, total, LANES, HELD)
        if whole < vocab:
            inside = whole + columns < vocab
            x = tl.load(at + whole + columns, mask=inside, other=0.0).to(tl.float32)
            if CAPPED:
                x = capped(x, cap)
            if SMOOTH:
                plain += x
            most, total = _gathered(tl.where(inside, x, float("-inf")), most, total, LANES, HELD)
        top = tl.max(most)
        log_sum = top + tl.log(tl.sum(total * tl.exp(most - top)))
        wanted = tl.load(at + target).to(tl.float32)
        if CAPPED:
            wanted = capped(wanted, cap)
        loss = log_sum - wanted * (1.0 - smoothing)
        if SMOOTH:
            loss -= tl.sum(plain) * (smoothing / vocab)
        tl.store(losses + row, loss)
        # Every thread has read its part of the row, the target too, before any writes.
        tl.debug_barrier()
        for start in range(0, whole, BLOCK):
            x = tl.load(at + start + columns, eviction_policy="evict_first").to(tl.float32)
            slope = _slope(x, log_sum, cap, smoothing / vocab, CAPPED, SMOOTH)
            tl.store(at + start + columns, slope.to(logits.dtype.element_ty))
        if whole < width:
            place = whole + columns
            x = tl.load(at + place, mask=place < vocab, other=0.0).to(tl.float32)
            slope = tl.where(place < vocab, _slope(x, log_sum, cap, smoothing / vocab, CAPPED, SMOOTH), 0.0)
            tl.store(at + place, slope.to(logits.dtype.element_ty), mask=place < width)
        tl.debug_barrier()
        aim = tl.exp(wanted - log_sum) - (1.0 - smoothing)
        if SMOOTH:
            aim -= smoothing / vocab
        if CAPPED:
            aim *= 1.0 - (wanted / cap) * (wanted / cap)
        tl.store(at + target, aim.to(logits.dtype.element_ty))


@triton.jit
def _slope(x, log_sum, cap, share, CAPPED: tl.constexpr, SMOOTH: tl.constexpr):  # type: ignore[no-untyped-def]
    """The slope of the loss by logits that are not the target's."""
    bent = x
    if CAPPED:
        bent = tanh(x / cap)
        x = cap * bent
    slope = tl.exp(x - log_sum)
    if SMOOTH:
        slope -= share
    if CAPPED:
        slope *= 1.0 - bent * bent
    return slope


def slab_terms(
    logits: Tensor, targets: Tensor, cap: float | None, smoothing: float, vocab: int
) -> tuple[Tensor, Tensor]:
    """The summed loss of logits (n, V or more), and its slope by them, which is written over them."""
    if logits.stride(1) != 1:
        raise ValueError(f"logits with strides {logits.stride()}: a row must lie in one piece")
    rows, width = logits.shape
    losses = torch.empty(rows, dtype=torch.float32, device=logits.device)
    block = min(BLOCK, max(triton.next_power_of_2(vocab), LEAST))
    if rows:
        _row[(rows,)](
            logits, targets, losses, logits.stride(0), vocab, width, 1.0 if cap is None else cap, smoothing,
            IGNORE, cap is not None, smoothing > 0, block, HELD, num_warps=block // EACH,
        )  # fmt: skip
    return losses.sum(), logits


@triton.jit
def _scaled(slope, scale, out, count, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    start = tl.program_id(0).to(tl.int64) * BLOCK
    factor = tl.load(scale).to(tl.float32)
    place = start + tl.arange(0, BLOCK)
    if start + BLOCK <= count:
        tl.store(out + place, (tl.load(slope + place).to(tl.float32) * factor).to(out.dtype.element_ty))
    else:
        x = tl.load(slope + place, mask=place < count, other=0.0).to(tl.float32)
        tl.store(out + place, (x * factor).to(out.dtype.element_ty), mask=place < count)


def scaled(slope: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """slope times the number `scale`, in `dtype`; `parts.losses.scaled` is the specification."""
    slope = slope.contiguous()
    out = torch.empty_like(slope, dtype=dtype)
    if slope.numel():
        _scaled[(triton.cdiv(slope.numel(), BLOCK),)](slope, scale, out, slope.numel(), BLOCK, num_warps=8)
    return out
