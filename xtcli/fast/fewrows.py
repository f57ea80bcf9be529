"""A few rows, each by the matrix of its expert, without a number that the host must know: what a recorded step takes.

    y[n] = W[e(n)] x[n],    e(n) the number of experts whose rows end at n or before

Each row reads its own matrix, those of one expert from the cache. Sums are in float32.

Axes: N rows sorted by expert, E experts, I width of what is read, O of what is made.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

MOST = 128
"""Rows for which this is worth while: beyond, experts have several rows each, and a product of matrices reads less."""
TILE = (16, 256)
"""Outputs and inputs that a program has at once."""
WARPS = 4


@triton.jit
def _rows(  # type: ignore[no-untyped-def]
    x, weight, ends, y, experts, inner, outer, by_row, by_expert, by_output, by_input,
    EXPERTS: tl.constexpr, OUTPUTS: tl.constexpr, INPUTS: tl.constexpr,
):  # fmt: skip
    """OUTPUTS numbers of one row; behind the last expert's rows, those that the last expert would make."""
    row = tl.program_id(1)
    numbers = tl.arange(0, EXPERTS)
    past = (tl.load(ends + numbers, mask=numbers < experts, other=row + 1) <= row) & (numbers < experts)
    expert = tl.minimum(tl.sum(past.to(tl.int32)), experts - 1)
    outputs = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    matrix = weight + expert.to(tl.int64) * by_expert + outputs.to(tl.int64)[:, None] * by_output
    total = tl.zeros((OUTPUTS, INPUTS), tl.float32)
    for start in range(0, inner, INPUTS):
        inputs = start + tl.arange(0, INPUTS)
        read = tl.load(x + row.to(tl.int64) * by_row + inputs, mask=inputs < inner, other=0.0).to(tl.float32)
        there = (outputs < outer)[:, None] & (inputs < inner)[None, :]
        held = tl.load(matrix + inputs.to(tl.int64)[None, :] * by_input, mask=there, other=0.0).to(tl.float32)
        total += held * read[None, :]
    made = tl.sum(total, 1)
    tl.store(y + row.to(tl.int64) * outer + outputs, made.to(y.dtype.element_ty), mask=outputs < outer)


def few_rows(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """Rows x (N, I), weights (E, O, I), counts (E,) of the rows of each -> (N, O)."""
    x, ends = x if x.stride(1) == 1 else x.contiguous(), counts.cumsum(0)
    (experts, outer, inner), y = weight.shape, x.new_empty(x.shape[0], weight.shape[1])
    outputs, inputs = TILE
    if y.numel():
        _rows[(triton.cdiv(outer, outputs), x.shape[0])](
            x, weight, ends, y, experts, inner, outer, x.stride(0), *weight.stride(),
            triton.next_power_of_2(experts), outputs, inputs, num_warps=WARPS,
        )  # fmt: skip
    return y


def suits(x: Tensor, weight: Tensor) -> bool:
    """Whether the kernel takes these rows."""
    known = x.dtype == weight.dtype and x.dtype in (torch.float32, torch.bfloat16, torch.float16)
    return known and x.shape[0] <= MOST
