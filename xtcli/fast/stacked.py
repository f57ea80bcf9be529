"""Products with several weights as one.

    y = x [W1; W2; ...]^T (+ b)       dx = dy [W1; W2; ...]

Weights (F1, K), (F2, K), ... that follow one another in memory are read where they are; others are put together for
each product. Working copies are laid out so (train/working.py). The operators of `xt::` have a plain form in PyTorch,
which is the specification and runs on a CPU; on a GPU they are those of linear.py.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


def stacked(weights: Sequence[Tensor]) -> Tensor:
    """Weights (F_i, K) as one (sum of F_i, K): a view where they follow one another, else a copy."""
    first, place = weights[0], weights[0].data_ptr()
    for weight in weights:
        same = weight.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        if not (same and weight.is_contiguous() and weight.data_ptr() == place):
            return torch.cat(tuple(weights))
        place += weight.numel() * weight.element_size()
    return first.as_strided((sum(len(weight) for weight in weights), first.shape[1]), (first.shape[1], 1))


def laid_out(weights: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Copies of weights (F_i, K) in `dtype`, one behind the other."""
    whole = torch.cat([weight.detach().to(dtype) for weight in weights])
    return list(whole.split([len(weight) for weight in weights]))


@torch.library.custom_op("xt::stacked_product", mutates_args=(), device_types="cpu")
def stacked_product(x: Tensor, weights: Sequence[Tensor], bias: Tensor | None) -> Tensor:
    """x (N, K), weights (F_i, K), bias (sum of F_i,) or None -> (N, sum of F_i)."""
    return F.linear(x, stacked(weights), bias)


@stacked_product.register_kernel("cuda")
def _stacked_product(x: Tensor, weights: Sequence[Tensor], bias: Tensor | None) -> Tensor:
    return torch.ops.xt.product(x, stacked(weights), bias)  # type: ignore[no-any-return]


@stacked_product.register_fake
def _(x: Tensor, weights: Sequence[Tensor], bias: Tensor | None) -> Tensor:
    return x.new_empty(x.shape[0], sum(weight.shape[0] for weight in weights))


@torch.library.custom_op("xt::stacked_back", mutates_args=(), device_types="cpu")
def stacked_back(dy: Tensor, weights: Sequence[Tensor]) -> Tensor:
    """dy (N, sum of F_i), weights (F_i, K) -> (N, K)."""
    return dy @ stacked(weights)


@stacked_back.register_kernel("cuda")
def _stacked_back(dy: Tensor, weights: Sequence[Tensor]) -> Tensor:
    return torch.ops.xt.back(dy, stacked(weights))  # type: ignore[no-any-return]


@stacked_back.register_fake
def _(dy: Tensor, weights: Sequence[Tensor]) -> Tensor:
    return dy.new_empty(dy.shape[0], weights[0].shape[1])


def slopes(dy: Tensor, x: Tensor, weights: Sequence[Tensor], wanted: Sequence[bool]) -> list[Tensor | None]:
    """The gradients of weights (F_i, K) from dy (N, sum of F_i) and x (N, K), by one product; of those alone that are
    wanted."""
    if not any(wanted):
        return [None] * len(weights)
    each = torch.ops.xt.slope(dy, x).split([weight.shape[0] for weight in weights])
    return [slope if asked else None for slope, asked in zip(each, wanted, strict=True)]
