"""Gated activations over rows in Triton, forward and backward; gated.py is the specification."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from xtcli.fast.lanes import bent, bent_and_slope


class Cut(NamedTuple):
    """Elements of a tile, at most so many columns of it, and warps."""

    tile: int
    columns: int
    warps: int


@triton.jit
def _gated(  # type: ignore[no-untyped-def]
    joint, h, count, WIDTH: tl.constexpr, ACT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    EVEN: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(1).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    k = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    gate, to = joint + row * (2 * WIDTH) + k, h + row * WIDTH + k
    if EVEN:
        a, b = tl.load(gate), tl.load(gate + WIDTH)
        tl.store(to, (bent(a.to(tl.float32), ACT) * b.to(tl.float32)).to(h.dtype.element_ty))
    else:
        real = (row < count) & (k < WIDTH)
        a, b = tl.load(gate, mask=real, other=0.0), tl.load(gate + WIDTH, mask=real, other=0.0)
        tl.store(to, (bent(a.to(tl.float32), ACT) * b.to(tl.float32)).to(h.dtype.element_ty), mask=real)


@triton.jit
def _gated_back(  # type: ignore[no-untyped-def]
    joint, dh, slope, h, count, WIDTH: tl.constexpr, ACT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    EVEN: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(1).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    k = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    wide, narrow = row * (2 * WIDTH) + k, row * WIDTH + k
    KIND: tl.constexpr = h.dtype.element_ty
    if EVEN:
        a, b, d = tl.load(joint + wide), tl.load(joint + wide + WIDTH), tl.load(dh + narrow)
    else:
        real = (row < count) & (k < WIDTH)
        a = tl.load(joint + wide, mask=real, other=0.0)
        b = tl.load(joint + wide + WIDTH, mask=real, other=0.0)
        d = tl.load(dh + narrow, mask=real, other=0.0)
    a, b, d = a.to(tl.float32), b.to(tl.float32), d.to(tl.float32)
    y, steep = bent_and_slope(a, ACT)
    if EVEN:
        tl.store(slope + wide, (d * b * steep).to(KIND))
        tl.store(slope + wide + WIDTH, (d * y).to(KIND))
        tl.store(h + narrow, (y * b).to(KIND))
    else:
        tl.store(slope + wide, (d * b * steep).to(KIND), mask=real)
        tl.store(slope + wide + WIDTH, (d * y).to(KIND), mask=real)
        tl.store(h + narrow, (y * b).to(KIND), mask=real)


def forward(joint: Tensor, act: str, cut: Cut | None = None) -> Tensor:
    """joint (N, 2 F), gates in front -> act(gate) * up, (N, F)."""
    count, width = joint.shape[0], joint.shape[1] // 2
    h = joint.new_empty(count, width)
    if count:
        rows, columns, grid, warps = _cut(count, width, cut or Cut(2048, 1024, 4))
        even = count % rows == 0 and width % columns == 0
        _gated[grid](joint, h, count, width, act, rows, columns, even, num_warps=warps)
    return h


def backward(joint: Tensor, dh: Tensor, act: str, cut: Cut | None = None) -> tuple[Tensor, Tensor]:
    """joint (N, 2 F), dh (N, F) -> the slope of joint, and act(gate) * up."""
    count, width = dh.shape
    slope, h = torch.empty_like(joint), torch.empty_like(dh)
    if count:
        rows, columns, grid, warps = _cut(count, width, cut or Cut(2048, 1024, 4))
        even = count % rows == 0 and width % columns == 0
        _gated_back[grid](joint, dh, slope, h, count, width, act, rows, columns, even, num_warps=warps)
    return slope, h


def _cut(count: int, width: int, cut: Cut) -> tuple[int, int, tuple[int, int], int]:
    """Rows and columns of a tile, the grid, warps. Columns that divide the width need no mask."""
    columns = min(width & -width, cut.columns)
    if columns < 64:
        columns = min(triton.next_power_of_2(width), 256)
    rows = max(cut.tile // columns, 1)
    # The second axis of a grid ends at 65,535.
    while triton.cdiv(count, rows) > 65535:
        rows *= 2
    return rows, columns, (triton.cdiv(width, columns), triton.cdiv(count, rows)), cut.warps
