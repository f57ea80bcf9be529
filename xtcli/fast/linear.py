"""Linear layers whose biases ride on the matrix products.

    y  = x W^T (+ b)             dx = dy W       dW = dy^T x          in one kernel each

A bias' gradient, the sum of dy over its rows, is left to the compiler, which joins it to what makes dy.

The operators of `xt::` have a plain form in PyTorch, which is the specification and runs on a CPU, and one by cuBLASLt
(cublaslt.py). Compiled code calls them as they are. Axes: N rows, K and F widths.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from xtcli.fast import cublaslt
from xtcli.fast.cublaslt import BIAS, PLAIN

ALIGN = 8
"""Widths that the kernels load well are multiples of this."""


@torch.library.custom_op("xt::product", mutates_args=(), device_types="cpu")
def product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x (N, K), weight (F, K), bias (F,) or None -> (N, F)."""
    return F.linear(x, weight, bias)


@product.register_kernel("cuda")
def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    (rows, inner), outer = x.shape, weight.shape[0]
    y = x.new_empty(rows, outer)
    epilogue = PLAIN if bias is None else BIAS
    kernel = cublaslt.product(outer, rows, inner, True, False, epilogue, x.dtype, x.get_device())
    kernel(weight, x, y, bias)
    return y


@product.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


@torch.library.custom_op("xt::back", mutates_args=(), device_types="cpu")
def back(dy: Tensor, weight: Tensor) -> Tensor:
    """dy (N, F), weight (F, K) -> (N, K)."""
    return dy @ weight


@back.register_kernel("cuda")
def _back(dy: Tensor, weight: Tensor) -> Tensor:
    rows, (outer, inner) = dy.shape[0], weight.shape
    dx = dy.new_empty(rows, inner)
    cublaslt.product(inner, rows, outer, False, False, PLAIN, dy.dtype, dy.get_device())(weight, dy, dx)
    return dx


@back.register_fake
def _(dy: Tensor, weight: Tensor) -> Tensor:
    return dy.new_empty(dy.shape[0], weight.shape[1])


@torch.library.custom_op("xt::slope", mutates_args=(), device_types="cpu")
def slope(dy: Tensor, x: Tensor) -> Tensor:
    """dy (N, F), x (N, K) -> the gradient of a weight (F, K)."""
    return dy.t() @ x


@slope.register_kernel("cuda")
def _slope(dy: Tensor, x: Tensor) -> Tensor:
    (rows, outer), inner = dy.shape, x.shape[1]
    dw = x.new_empty(outer, inner)
    cublaslt.product(inner, outer, rows, False, True, PLAIN, x.dtype, x.get_device())(x, dy, dw)
    return dw


@slope.register_fake
def _(dy: Tensor, x: Tensor) -> Tensor:
    return x.new_empty(dy.shape[1], x.shape[1])


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return torch.ops.xt.product(x, weight, bias)  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        for_x, for_weight, for_bias = ctx.needs_input_grad
        dy = dy.contiguous()
        dx = torch.ops.xt.back(dy, weight) if for_x else None
        return dx, torch.ops.xt.slope(dy, x) if for_weight else None, dy.sum(0) if for_bias else None


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear` in the type of `weight`: x (..., K), weight (F, K), bias (F,) -> (..., F)."""
    rows = x.reshape(-1, x.shape[-1]).to(weight.dtype)
    y: Tensor = _Linear.apply(rows, weight, None if bias is None else bias.to(weight.dtype))  # type: ignore[no-untyped-call]
    return y.view(*x.shape[:-1], -1)


def multiply(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`linear` where gradients are wanted; else PyTorch's own product, which waits for no trial of kernels."""
    return linear(x, weight, bias) if torch.is_grad_enabled() else F.linear(x, weight, bias)


def suits(*widths: int) -> bool:
    """Whether the kernels take matrices of these widths."""
    return all(width % ALIGN == 0 for width in widths)
