"""Biases of a distance: one value for each distance, slid over the rows of the scores.

    bias[h, t, s] = row[h, T - 1 - t + s]        slope of row[h, d] = sum over the diagonal s - t = d - T + 1

Rows of a text hold S keys; laid out in rows of S + T - 1 and read again in rows one wider, its diagonals are columns.

Axes: H heads, T queries, S keys.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

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
        return torch.cat([_diagonals(some) for some in slope.split(size)]), None


def _diagonals(slope: Tensor) -> Tensor:
    """Sums along the diagonals of (h, T, S), from the lowest left to the upper right: (h, T + S - 1)."""
    heads, queries, keys = slope.shape
    width = queries + keys
    laid = slope.new_zeros(heads, queries * width)
    laid[:, : queries * (width - 1)].view(heads, queries, width - 1)[..., :keys] = slope
    wide = torch.promote_types(slope.dtype, torch.float32)
    sums = laid.view(heads, queries, width).sum(1, dtype=wide)
    # The diagonal s - t stands in column (s - t) mod width.
    return sums.roll(queries - 1, 1)[:, : width - 1].to(slope.dtype)
