"""Linear layers, and feed-forwards with a GELU, whose biases and activations ride on the matrix products.

    y  = x W^T (+ b) (+ s)       dx = dy W       dW = dy^T x          in one kernel each
    h  = gelu(p),  p = x W^T + b                                      in one kernel, which gives both
    dp = (dy V) * gelu'(p)       for y = h V^T + c                    in one kernel

A bias' gradient, the sum of dy over its rows, is left to the compiler, which joins it to what makes dy, or to a norm's
kernel; so are sums with a residual stream s (passes.py).

The operators of `xt::` have a plain form in PyTorch, which is the specification and runs on a CPU, and one by cuBLASLt
(cublaslt.py). Compiled code calls them as they are. Gelu is the tanh form. Axes: N rows, K and F widths.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from xtcli.fast import cublaslt
from xtcli.fast.cublaslt import BIAS, DGELU, GELU_AUX_BIAS, PLAIN
from xtcli.parts.losses import PRODUCTS as PLAIN_PRODUCTS
from xtcli.parts.losses import Products

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


@torch.library.custom_op("xt::product_onto", mutates_args=(), device_types="cpu")
def product_onto(x: Tensor, weight: Tensor, bias: Tensor | None, onto: Tensor) -> Tensor:
    """x (N, K), weight (F, K), bias (F,) or None -> `onto` (N, F) and the product."""
    return F.linear(x, weight, bias) + onto


@product_onto.register_kernel("cuda")
def _product_onto(x: Tensor, weight: Tensor, bias: Tensor | None, onto: Tensor) -> Tensor:
    (rows, inner), outer = x.shape, weight.shape[0]
    y = x.new_empty(rows, outer)
    epilogue = PLAIN if bias is None else BIAS
    kernel = cublaslt.product(outer, rows, inner, True, False, epilogue, x.dtype, x.get_device(), True)
    kernel(weight, x, y, bias, onto=onto.contiguous())
    return y


@product_onto.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, onto: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


@torch.library.custom_op("xt::product_gelu", mutates_args=(), device_types="cpu")
def product_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """x (N, K), weight (F, K), bias (F,) -> gelu(p) and p, (N, F) each, with p = x weight^T + bias."""
    p = F.linear(x, weight, bias)
    return F.gelu(p, approximate="tanh"), p


@product_gelu.register_kernel("cuda")
def _product_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    (rows, inner), outer = x.shape, weight.shape[0]
    h, p = x.new_empty(rows, outer), x.new_empty(rows, outer)
    kernel = cublaslt.product(outer, rows, inner, True, False, GELU_AUX_BIAS, x.dtype, x.get_device())
    kernel(weight, x, h, bias, p)
    return h, p


@product_gelu.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape[0], weight.shape[0]), x.new_empty(x.shape[0], weight.shape[0])


@torch.library.custom_op("xt::slope_gelu", mutates_args=(), device_types="cpu")
def slope_gelu(dy: Tensor, weight: Tensor, p: Tensor) -> Tensor:
    """dy (N, K), weight (K, F), p (N, F) -> (dy weight) * gelu'(p), (N, F)."""
    return torch.ops.aten.gelu_backward(dy @ weight, p, approximate="tanh")  # type: ignore[no-any-return]


@slope_gelu.register_kernel("cuda")
def _slope_gelu(dy: Tensor, weight: Tensor, p: Tensor) -> Tensor:
    (rows, inner), outer = dy.shape, weight.shape[1]
    dp = dy.new_empty(rows, outer)
    kernel = cublaslt.product(outer, rows, inner, False, False, DGELU, dy.dtype, dy.get_device())
    kernel(weight, dy, dp, None, p)
    return dp


@slope_gelu.register_fake
def _(dy: Tensor, weight: Tensor, p: Tensor) -> Tensor:
    return torch.empty_like(p)


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


class _FeedForward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, up: Tensor, up_bias: Tensor, down: Tensor, down_bias: Tensor) -> Tensor:
        h, p = torch.ops.xt.product_gelu(x, up, up_bias)
        ctx.save_for_backward(x, up, down, h, p)
        return torch.ops.xt.product(h, down, down_bias)  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, up, down, h, p = ctx.saved_tensors
        dy = dy.contiguous()
        dp = torch.ops.xt.slope_gelu(dy, down, p)
        return torch.ops.xt.back(dp, up), torch.ops.xt.slope(dp, x), dp.sum(0), torch.ops.xt.slope(dy, h), dy.sum(0)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear` in the type of `weight`: x (..., K), weight (F, K), bias (F,) -> (..., F)."""
    rows = x.reshape(-1, x.shape[-1]).to(weight.dtype)
    y: Tensor = _Linear.apply(rows, weight, None if bias is None else bias.to(weight.dtype))  # type: ignore[no-untyped-call]
    return y.view(*x.shape[:-1], -1)


def feed_forward(x: Tensor, up: Tensor, up_bias: Tensor, down: Tensor, down_bias: Tensor) -> Tensor:
    """gelu(x up^T + up_bias) down^T + down_bias in the type of `up`: x (..., K), up (F, K), down (K, F) -> (..., K)."""
    rows = x.reshape(-1, x.shape[-1]).to(up.dtype)
    y: Tensor = _FeedForward.apply(rows, up, up_bias.to(up.dtype), down, down_bias.to(up.dtype))  # type: ignore[no-untyped-call]
    return y.view(*x.shape[:-1], -1)


def multiply(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`linear` where gradients are wanted; else PyTorch's own product, which waits for no trial of kernels."""
    return linear(x, weight, bias) if torch.is_grad_enabled() else F.linear(x, weight, bias)


def inner(mlp: Any, x: Tensor) -> Tensor:
    """What a feed-forward of two biased layers with a GELU between makes of x (..., K), by `feed_forward`."""
    if not torch.is_grad_enabled():
        return type(mlp).inner(mlp, x)  # type: ignore[no-any-return]
    return feed_forward(x, mlp.up.weight, mlp.up.bias, mlp.down.weight, mlp.down.bias)


def suits(*widths: int) -> bool:
    """Whether the kernels take matrices of these widths."""
    return all(width % ALIGN == 0 for width in widths)


def _by_library(dy: Tensor, x: Tensor) -> bool:
    return dy.dtype == x.dtype and dy.dtype in cublaslt.TYPES and suits(*dy.shape[1:], *x.shape[1:])


def _logits(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    known = _by_library(x, weight) and suits(weight.shape[0])
    return torch.ops.xt.product(x, weight, bias) if known else PLAIN_PRODUCTS.logits(x, weight, bias)


def _back_of(dy: Tensor, weight: Tensor) -> Tensor:
    return torch.ops.xt.back(dy, weight) if _by_library(dy, weight) else PLAIN_PRODUCTS.back(dy, weight)


def _slope_of(dy: Tensor, x: Tensor) -> Tensor:
    return torch.ops.xt.slope(dy, x) if _by_library(dy, x) else PLAIN_PRODUCTS.slope(dy, x)


PRODUCTS = Products(_logits, _back_of, _slope_of)
"""Those of a slab of a loss, by the kernels above where they take them."""
