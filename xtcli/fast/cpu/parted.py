"""Parts of what one product made, and on the way back one slope of all, without a copy where they lie together already.

    q, k, v = y[..., :a], y[..., a:b], y[..., b:]        dy = [dq dk dv]

The kernels for attention lay slopes out so (`abreast`). Plain twins: `split` and `cat`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def parted(y: Tensor, sizes: Sequence[int]) -> tuple[Tensor, ...]:
    """Views of y (..., sum of sizes) of the sizes asked for."""
    if torch.compiler.is_compiling() or not torch.is_grad_enabled() or type(y) is not Tensor:
        return _split(y, sizes)
    return _Parted.apply(y, sizes)  # type: ignore[no-any-return, no-untyped-call]


def _split(y: Tensor, sizes: Sequence[int]) -> tuple[Tensor, ...]:
    parts: tuple[Tensor, ...] = y.split(list(sizes), -1)
    return parts


class _Parted(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, sizes: Sequence[int]) -> tuple[Tensor, ...]:
        return _split(y, sizes)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *slopes: Tensor) -> Any:
        return together(slopes), None


def together(parts: Sequence[Tensor]) -> Tensor:
    """`torch.cat(parts, -1)`; where they are the neighbouring columns of one memory, that memory itself."""
    first, total, at = parts[0], sum(part.shape[-1] for part in parts), parts[0].storage_offset()
    strides = [1]
    for size in (total, *first.shape[-2:0:-1]):
        strides.insert(0, strides[0] * size)
    for part in parts:
        alike = part.shape[:-1] == first.shape[:-1] and part.stride() == tuple(strides)
        if not alike or part.storage_offset() != at or part.data_ptr() - first.data_ptr() != _bytes(part, first):
            return torch.cat(list(parts), -1)
        at += part.shape[-1]
    return first.as_strided((*first.shape[:-1], total), strides)


def _bytes(part: Tensor, first: Tensor) -> int:
    return int(part.storage_offset() - first.storage_offset()) * first.element_size()


def abreast(*like: Tensor) -> list[Tensor]:
    """Room for slopes of tensors (B, heads, T, D), the heads of all of them side by side at each token."""
    batch, _, tokens, width = like[0].shape
    heads = [one.shape[1] for one in like]
    room = like[0].new_empty(batch, tokens, sum(heads), width)
    return [one.transpose(1, 2) for one in room.split(heads, 2)]
