"""The slope of an activation over rows, and the sums of its columns, in one launch of Triton; feedforward.py is the
specification."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from xtcli.fast.lanes import bent_and_slope
from xtcli.fast.normkernels import processors, total


class Cut(NamedTuple):
    """Rows and columns of a tile, warps, and programs on each of a GPU's multiprocessors."""

    rows: int
    columns: int
    warps: int
    programs: int


USUAL = Cut(8, 512, 4, 4)


@triton.jit
def _slope(  # type: ignore[no-untyped-def]
    p, dh, dp, sums, count, tiles,
    WIDTH: tl.constexpr, ACT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Every so many tiles of some columns: dp (N, F), and the sum of their columns, a line of sums (lines, F)."""
    k = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    added = tl.zeros((ROWS, COLUMNS), tl.float32)
    for tile in range(tl.program_id(1), tiles, tl.num_programs(1)):
        row = tile * ROWS + tl.arange(0, ROWS)
        at = row.to(tl.int64)[:, None] * WIDTH + k[None, :]
        if EVEN:
            x, d = tl.load(p + at), tl.load(dh + at)
            _, steep = bent_and_slope(x.to(tl.float32), ACT)
            slope = d.to(tl.float32) * steep
            tl.store(dp + at, slope.to(dp.dtype.element_ty))
        else:
            real = (row < count)[:, None] & (k < WIDTH)[None, :]
            x, d = tl.load(p + at, mask=real, other=0.0), tl.load(dh + at, mask=real, other=0.0)
            _, steep = bent_and_slope(x.to(tl.float32), ACT)
            slope = d.to(tl.float32) * steep
            tl.store(dp + at, slope.to(dp.dtype.element_ty), mask=real)
        added += slope
    tl.store(sums + tl.program_id(1) * WIDTH + k, tl.sum(added, 0), mask=k < WIDTH)


def slope(p: Tensor, dh: Tensor, act: str, cut: Cut = USUAL) -> tuple[Tensor, Tensor]:
    """p, dh (N, F) -> dh act'(p), (N, F), and the sum of its rows, (F,) in float32."""
    count, width = p.shape
    dp = torch.empty_like(p)
    if not count:
        return dp, p.new_zeros(width, dtype=torch.float32)
    tiles, across = triton.cdiv(count, cut.rows), triton.cdiv(width, cut.columns)
    lines = min(tiles, max(cut.programs * processors(p.device) // across, 1))
    sums = p.new_empty(lines, width, dtype=torch.float32)
    even = count % cut.rows == 0 and width % cut.columns == 0
    _slope[(across, lines)](p, dh, dp, sums, count, tiles, width, act, cut.rows, cut.columns, even, num_warps=cut.warps)
    return dp, total(sums)
