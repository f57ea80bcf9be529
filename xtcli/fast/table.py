"""Rows of a table by number, whose gradient is made by sums over the places of each number.

    x = W[ids]        dW[v] = sum of dy over the places where ids = v

Places are sorted by number and taken TILE at a time. In a tile, all sums of places that share a number are one small
product with a matrix of zeros and ones, in float32. A number that stands in several tiles leaves a part in each, which
a second launch adds up in order. So sums are the same each time, and a number that fills half a text costs no more.

Axes: N places, D width, V rows of the table.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

TILE = 64
COLUMNS = 128
PARTS = 16
"""Parts of a number that are added at once."""
NONE = tl.constexpr(-1)
"""No number: what stands before the first place and behind the last."""


@triton.jit
def _number(numbers, place, count):  # type: ignore[no-untyped-def]
    return tl.load(numbers + place, mask=(place >= 0) & (place < count), other=NONE)


@triton.jit
def _tiles(  # type: ignore[no-untyped-def]
    numbers, order, dy, dw, parts, count, width, TILE: tl.constexpr, COLUMNS: tl.constexpr, WIDE: tl.constexpr
):
    """Sums within a tile: rows of dw (V, D) where a number stands in this tile alone, else parts (tiles, 2, D): of a
    number that stood in the tile before, and of one that goes on behind this tile."""
    tile = tl.program_id(0)
    place = tile * TILE + tl.arange(0, TILE)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (columns < width)[None, :]
    number = _number(numbers, place, count)
    source = tl.load(order + place, mask=place < count, other=0)
    x = tl.load(dy + source[:, None] * width + columns[None, :], mask=(place < count)[:, None] & inside, other=0.0)
    if WIDE:
        x = x.to(tl.float32)
    same = (number[:, None] == number[None, :]).to(x.dtype)
    total = tl.dot(same, x, input_precision="ieee")
    earlier, later = _number(numbers, tile * TILE - 1, count), _number(numbers, (tile + 1) * TILE, count)
    first = (number != _number(numbers, place - 1, count)) | (place == tile * TILE)
    first = first & (number != NONE)
    alone = first & (number != earlier) & (number != later)
    row = tl.where(alone, number, 0).to(tl.int64)
    tl.store(dw + row[:, None] * width + columns[None, :], total.to(dw.dtype.element_ty), mask=alone[:, None] & inside)
    apart = first & (number == earlier)
    beyond = first & (number == later) & (number != earlier)
    at = parts + (tile * 2 + tl.where(apart, 0, 1)).to(tl.int64)[:, None] * width + columns[None, :]
    tl.store(at, total, mask=(apart | beyond)[:, None] & inside)


@triton.jit
def _spans(  # type: ignore[no-untyped-def]
    numbers, dw, parts, count, width, TILE: tl.constexpr, COLUMNS: tl.constexpr, PARTS: tl.constexpr
):
    """The row of dw of a number that begins in a tile and goes on behind it."""
    tile = tl.program_id(0)
    number = _number(numbers, (tile + 1) * TILE - 1, count)
    begins = (number != NONE) & (number == _number(numbers, (tile + 1) * TILE, count))
    if begins & (number != _number(numbers, tile * TILE - 1, count)):
        columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
        total = tl.load(parts + (tile * 2 + 1).to(tl.int64) * width + columns, mask=columns < width, other=0.0)
        start = tile + 1
        going = True
        while going:
            several = start + tl.arange(0, PARTS)
            # A tile adds to the number with which the tile before it ended.
            of_it = _number(numbers, several * TILE, count) == number
            at = parts + (several * 2).to(tl.int64)[:, None] * width + columns[None, :]
            total += tl.sum(tl.load(at, mask=of_it[:, None] & (columns < width)[None, :], other=0.0), 0)
            going = tl.sum(of_it.to(tl.int32)) == PARTS
            start += PARTS
        tl.store(dw + number.to(tl.int64) * width + columns, total.to(dw.dtype.element_ty), mask=columns < width)


def summed(ids: Tensor, dy: Tensor, rows: int) -> Tensor:
    """The gradient (rows, D) of a table from that of what was read, dy (N, D), by the numbers ids (N,)."""
    count, width = dy.shape
    dw = dy.new_zeros(rows, width)
    if count:
        numbers, order = ids.to(torch.int32).sort(stable=True)
        grid = (triton.cdiv(count, TILE), triton.cdiv(width, COLUMNS))
        parts = dy.new_empty(grid[0], 2, width, dtype=torch.float32)
        # Triton's interpreter, which is what runs this on a CPU, cannot multiply bfloat16.
        wide = dy.device.type == "cpu"
        _tiles[grid](numbers, order, dy, dw, parts, count, width, TILE, COLUMNS, wide, num_warps=4)
        _spans[grid](numbers, dw, parts, count, width, TILE, COLUMNS, PARTS, num_warps=4)
    return dw


class _LookUp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ids: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.rows = weight.shape[0]
        return F.embedding(ids, weight)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        (ids,) = ctx.saved_tensors
        return None, summed(ids.reshape(-1), dy.reshape(-1, dy.shape[-1]).contiguous(), ctx.rows)


def look_up(ids: Tensor, weight: Tensor) -> Tensor:
    """`F.embedding`: ids (...,), weight (V, D) -> (..., D)."""
    return _LookUp.apply(ids, weight) if torch.is_grad_enabled() else F.embedding(ids, weight)  # type: ignore[no-untyped-call]
