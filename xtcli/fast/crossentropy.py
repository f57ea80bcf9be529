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

BLOCK = 4096
"""Columns that a program holds at once."""
WARPS = 16


@triton.jit
def _row(  # type: ignore[no-untyped-def]
    logits, targets, losses, stride, vocab, width, cap, smoothing,
    IGNORED: tl.constexpr, CAPPED: tl.constexpr, SMOOTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The loss of one row of logits, and its slope in their place."""
    row = tl.program_id(0).to(tl.int64)
    at = logits + row * stride
    target = tl.load(targets + row)
    columns = tl.arange(0, BLOCK)
    if target == IGNORED:
        tl.store(losses + row, 0.0)
        for start in range(0, width, BLOCK):
            place = start + columns
            tl.store(at + place, tl.zeros((BLOCK,), logits.dtype.element_ty), mask=place < width)
    else:
        most = tl.full((BLOCK,), float("-inf"), tl.float32)
        total = tl.zeros((BLOCK,), tl.float32)
        plain = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, vocab, BLOCK):
            place = start + columns
            x = tl.load(at + place, mask=place < vocab, other=float("-inf"), eviction_policy="evict_last")
            x = x.to(tl.float32)
            if CAPPED:
                x = tl.where(place < vocab, capped(x, cap), float("-inf"))
            higher = tl.maximum(most, x)
            # A lane that has seen nothing yet has -inf on both sides, which must not become NaN.
            safe = tl.where(higher == float("-inf"), 0.0, higher)
            total = total * tl.exp(most - safe) + tl.exp(x - safe)
            most = higher
            if SMOOTH:
                plain += tl.where(place < vocab, x, 0.0)
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
        for start in range(0, width, BLOCK):
            place = start + columns
            x = tl.load(at + place, mask=place < vocab, other=float("-inf"), eviction_policy="evict_first")
            x = x.to(tl.float32)
            bent = x
            if CAPPED:
                bent = tanh(x / cap)
                x = tl.where(place < vocab, cap * bent, float("-inf"))
            slope = tl.exp(x - log_sum) - tl.where(place == target, 1.0 - smoothing, 0.0)
            if SMOOTH:
                slope -= tl.where(place < vocab, smoothing / vocab, 0.0)
            if CAPPED:
                slope = tl.where(place < vocab, slope * (1.0 - bent * bent), 0.0)
            tl.store(at + place, slope.to(logits.dtype.element_ty), mask=place < width)


def slab_terms(
    logits: Tensor, targets: Tensor, cap: float | None, smoothing: float, vocab: int
) -> tuple[Tensor, Tensor]:
    """The summed loss of logits (n, V or more), and its slope by them, which is written over them."""
    if logits.stride(1) != 1:
        raise ValueError(f"logits with strides {logits.stride()}: a row must lie in one piece")
    rows, width = logits.shape
    losses = torch.empty(rows, dtype=torch.float32, device=logits.device)
    if rows:
        _row[(rows,)](
            logits, targets, losses, logits.stride(0), vocab, width, 1.0 if cap is None else cap, smoothing,
            IGNORE, cap is not None, smoothing > 0, BLOCK, num_warps=WARPS,
        )  # fmt: skip
    return losses.sum(), logits
