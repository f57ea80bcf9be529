"""Rows of a table by number, whose gradient is made by sums over the places of each number.

    x = W[ids]        dW[v] = sum of dy over the places where ids = v

Places are sorted by number. A program begins at each place whose number is new, and adds up the places that follow it
in float32 and in order, so that the sums are the same each time.

Axes: N places, D width, V rows of the table.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

FEW, MANY = 4, 32
"""Places that are added at once: of a number that has just begun, of one that goes on."""
COLUMNS = 128
WARPS = 2


@triton.jit
def _piece(numbers, order, dy, number, place, count, columns, width, ROWS: tl.constexpr):  # type: ignore[no-untyped-def]
    """The sum over the next ROWS places as far as they are of this number, and how many of them are."""
    rows = place + tl.arange(0, ROWS)
    same = tl.load(numbers + rows, mask=rows < count, other=-1) == number
    source = tl.load(order + rows, mask=same, other=0)
    seen = same[:, None] & (columns < width)[None, :]
    x = tl.load(dy + source[:, None] * width + columns[None, :], mask=seen, other=0.0)
    return tl.sum(x.to(tl.float32), 0), tl.sum(same.to(tl.int32))


@triton.jit
def _rows(  # type: ignore[no-untyped-def]
    numbers, order, dy, dw, count, width,
    FEW: tl.constexpr, MANY: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """One row of the gradient, COLUMNS of it."""
    start = tl.program_id(0)
    number = tl.load(numbers + start)
    if (start == 0) | (tl.load(numbers + start - 1, mask=start > 0, other=-1) != number):
        columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
        total, same = _piece(numbers, order, dy, number, start, count, columns, width, FEW)
        place = start + FEW
        going = same == FEW
        while going:
            more, same = _piece(numbers, order, dy, number, place, count, columns, width, MANY)
            total += more
            place += MANY
            going = same == MANY
        at = dw + number.to(tl.int64) * width + columns
        tl.store(at, total.to(dw.dtype.element_ty), mask=columns < width)


def summed(ids: Tensor, dy: Tensor, rows: int) -> Tensor:
    """The gradient (rows, D) of a table from that of what was read, dy (N, D), by the numbers ids (N,)."""
    count, width = dy.shape
    dw = dy.new_zeros(rows, width)
    if count:
        numbers, order = ids.to(torch.int32).sort(stable=True)
        grid = (count, triton.cdiv(width, COLUMNS))
        _rows[grid](numbers, order, dy, dw, count, width, FEW, MANY, COLUMNS, num_warps=WARPS)
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
    return _LookUp.apply(ids, weight) if torch.is_grad_enabled() else F.embedding(ids, weight)  # type: ignore[no-any-return, no-untyped-call]
