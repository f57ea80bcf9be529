"""Biases of a distance: one value for each distance, slid over the rows of the scores, or left as they are.

    bias[h, t, s] = row[h, T - 1 - t + s]        slope of row[h, d] = sum over the diagonal s - t = d - T + 1

Rows of a text hold S keys; laid out in rows of S + T - 1 and read again in rows one wider, its diagonals are columns.

Axes: H heads, T queries, S keys.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

LOG2E = 1.4426950408889634
WIDTHS = (16, 32, 64, 128)
"""Widths of a head that the kernels of fast/distance.py take."""
MOST = 2**28
"""Elements that are laid out anew at a time."""


def slide(row: Tensor, keys: int) -> Tensor:
    """Values of all distances (H, T + S - 1), from 1 - T to S - 1 -> (H, T, S)."""
    return Slid.apply(row, keys)  # type: ignore[no-any-return, no-untyped-call]


def slide_plainly(row: Tensor, keys: int) -> Tensor:
    """`slide` without a backward pass of its own."""
    # Head by head: turning all at once is an illegal access on a GPU where the whole passes 2^31 bytes.
    return torch.stack([head.unfold(0, keys, 1).flip(0) for head in row.unbind(0)])


class Slid(torch.autograd.Function):
    """`slide`; the gradient of `unfold` would read each diagonal in one thread, one element after the other."""

    @staticmethod
    def forward(ctx: Any, row: Tensor, keys: int) -> Tensor:
        return slide_plainly(row, keys)

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> Any:
        _, queries, keys = slope.shape
        size = max(MOST // (queries * (queries + keys)), 1)
        return torch.cat([diagonals(some) for some in slope.split(size)]), None


def diagonals(slope: Tensor) -> Tensor:
    """Sums along the diagonals of (h, T, S), from the lowest left to the upper right: (h, T + S - 1)."""
    heads, queries, keys = slope.shape
    width = queries + keys
    laid = slope.new_zeros(heads, queries * width)
    laid[:, : queries * (width - 1)].view(heads, queries, width - 1)[..., :keys] = slope
    wide = torch.promote_types(slope.dtype, torch.float32)
    sums = laid.view(heads, queries, width).sum(1, dtype=wide)
    # The diagonal s - t stands in column (s - t) mod width.
    return sums.roll(queries - 1, 1)[:, : width - 1].contiguous().to(slope.dtype)


@dataclass(frozen=True)
class Sliding:
    """A bias of the distance as fast/distance.py reads it, and what is seen.

    row (H, 2 T - 1): float32, times log2(e). code (B, T): 1 at a key that is seen, and 2 at a query that sees itself
    alone; None where there is no padding. causal: only the past and oneself.
    """

    row: Tensor
    code: Tensor | None
    causal: bool

    @classmethod
    def of(cls, row: Tensor, keep: Tensor | None, causal: bool) -> Sliding:
        """From the bias as it is added, (H, 2 T - 1), and which of (B, T) tokens are real."""
        # The kernels enter the operators that `attend` calls.
        from xtcli.fast import distance  # noqa: F401

        return cls(row.float() * LOG2E, None if keep is None else coded(keep, causal), causal)


def coded(keep: Tensor, causal: bool) -> Tensor:
    """1 at a key that is seen, and 2 at a query that would see nothing and so sees itself; int8 (B, T)."""
    alone = keep.cumsum(1) == 0 if causal else (~keep.any(1, keepdim=True)).expand_as(keep)
    return (keep.to(torch.int8) + 2 * alone.to(torch.int8)).contiguous()


def attend(q: Tensor, k: Tensor, v: Tensor, sliding: Sliding, scale: float, dropout: float) -> Tensor:
    """Attention of q, k, v (B, H, T, D) on a GPU."""
    row = sliding.row
    if dropout:
        seed = torch.randint(0, 2**31 - 1, (1,), device=q.device)
    else:
        seed = torch.zeros(1, dtype=torch.int64, device=q.device)
    given = (row, sliding.code, seed, sliding.causal, scale, dropout)
    y: Tensor = torch.ops.xtcli.distance(q, k.to(q.dtype), v.to(q.dtype), *given)[0]
    return y
