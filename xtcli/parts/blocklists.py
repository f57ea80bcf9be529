"""Which blocks of a text see which, as lists: what block-sparse attention hands to a kernel of ours (fast/blocks.py).

Elsewhere, and in tests, `Listed.dense` gives the same as a stored mask.

Axes: B rows, H query heads, G key/value heads, T places, N blocks of C places, R random blocks of a row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from xtcli.parts.blockmasks import ordered, unlisted
from xtcli.parts.context import Visible
from xtcli.parts.linear import narrowed

Lists = tuple[Tensor, Tensor, Tensor, Tensor]
"""How many blocks of keys each block of queries sees (H|1, N), and which (H|1, N, N); the same from keys to queries."""


@lru_cache(maxsize=256)
def draws(layer: int, groups: int, count: int, number: int) -> Tensor:
    """Blocks (groups, count - 2, number) for the rows 1 to count - 2, none of which a row sees anyway."""
    random = np.random.default_rng((layer, count))
    found = np.empty((groups, count - 2, number), dtype=np.int64)
    for group in range(groups):
        for row in range(1, count - 1):
            others = [block for block in range(1, count - 1) if abs(block - row) > 1]
            found[group, row - 1] = random.permutation(others)[:number]
    return torch.from_numpy(found)


def shown(layer: int | None, heads: int, groups: int, count: int, random: int) -> Tensor:
    """Which blocks see which, (H|1, N, N); random ones for a layer, none without."""
    place = torch.arange(count)
    seen = (place[:, None] - place).abs() <= 1
    seen[[0, -1]] = True
    seen[:, [0, -1]] = True
    if layer is None:
        return seen[None]
    each = seen.repeat(groups, 1, 1)
    each[:, 1:-1].scatter_(2, draws(layer, groups, count, random), True)
    return each.repeat_interleave(heads // groups, 0)


@lru_cache(maxsize=64)
def lists(layer: int | None, heads: int, groups: int, count: int, random: int, device: torch.device) -> Lists:
    """`shown` as lists, which texts of one length share whatever their padding."""
    seen = shown(layer, heads, groups, count, random).to(device)
    return *ordered(seen), *ordered(seen.transpose(1, 2))


@dataclass(frozen=True)
class Listed:
    """The lists of one layer over the texts of a call, and the kernel. `labels` (B, T) int32 of queries and of keys: a
    pair counts where they are equal. `often` is added to the scores of the first block, but for the queries of both
    ends."""

    lists: Lists
    size: int
    labels: tuple[Tensor, Tensor] | None = None
    often: float = 0.0
    kernel: Callable[..., Tensor] | None = None

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """q (B, H, T, D), k and v (B, G, T, D) -> (B, H, T, D)."""
        q, k, v = narrowed(q, k, v)
        if self.kernel is not None:
            return self.kernel(q, k, v, self.lists, self.labels, self.size, scale, self.often)
        seen = self.dense(q.shape[2], q.dtype).mask
        return F.scaled_dot_product_attention(q, k, v, seen, scale=scale, enable_gqa=k.shape[1] != q.shape[1])

    def dense(self, length: int, dtype: torch.dtype) -> Visible:
        """The same as a stored mask (B|1, H|1, T, T); additive, in `dtype`, where the first block counts more."""
        seen = unlisted(*self.lists[:2], self.size, length)[None]
        if self.labels is not None:
            mine, theirs = self.labels
            seen = seen & (mine[:, None, :, None] == theirs[:, None, None, :])
        if not self.often:
            return Visible(seen)
        block = torch.arange(length, device=seen.device) // self.size
        between = (block > 0) & (block < block[-1])
        more = self.often * (between[:, None] & (block == 0)).to(dtype)
        return Visible(more.masked_fill(~seen, float("-inf")))
