"""How tensors of heads (B, H, T, D) lie, for kernels that take addresses and steps."""

from __future__ import annotations

from torch import Tensor


def whole_rows(x: Tensor) -> Tensor:
    """With rows in one piece that begin at 16 bytes."""
    whole = x.stride(-1) == 1 and all(step * x.itemsize % 16 == 0 for step in x.stride()[:-1])
    return x if whole and x.data_ptr() % 16 == 0 else x.contiguous()


def alike(x: Tensor) -> Tensor:
    """(B, H, T, D) that lies as (B, T, H, D), so that heads join without a copy."""
    batch, heads, length, width = x.shape
    return x.new_empty(batch, length, heads, width).transpose(1, 2)


def steps(*tensors: Tensor) -> tuple[int, ...]:
    """From row to row, head to head and token to token, of one tensor after another."""
    return tuple(step for x in tensors for step in x.stride()[:3])
