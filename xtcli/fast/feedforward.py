"""Feed-forwards of two biased products with an activation between them.

    p = x W^T + b,  h = act(p),  y = h V^T + c
    dh = dy V,  dp = dh act'(p),  db = sum of the rows of dp         dp and db in one kernel
    dx = dp W,  dW = dp^T x,  dV = dy^T h                            as in linear.py

A GELU in its tanh form rides on the first product, which gives h and p at once. The operators of `xt::` have a plain
form in PyTorch, which is the specification and runs on a CPU. Axes: N rows, K and F widths.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from xtcli.fast import cublaslt
from xtcli.fast.cublaslt import GELU_AUX_BIAS
from xtcli.fast.gated import SLOPES
from xtcli.parts.activations import ACTIVATIONS
from xtcli.parts.linear import widen

RIDES = "gelu_tanh"
"""The activation that a product takes along."""


@torch.library.custom_op("xt::product_gelu", mutates_args=(), device_types="cpu")
def product_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """x (N, K), weight (F, K), bias (F,) -> gelu_tanh(p) and p, (N, F) each, with p = x weight^T + bias."""
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


@torch.library.custom_op("xt::act_slope", mutates_args=(), device_types="cpu")
def act_slope(p: Tensor, dh: Tensor, act: str) -> tuple[Tensor, Tensor]:
    """p, dh (N, F) -> dh act'(p), (N, F), and the sum of its rows, (F,) in at least float32."""
    slope = SLOPES[act](widen(dh), widen(p))
    return slope.to(p.dtype, copy=True), slope.sum(0)


@act_slope.register_kernel("cuda")
def _act_slope(p: Tensor, dh: Tensor, act: str) -> tuple[Tensor, Tensor]:
    from xtcli.fast import bends

    return bends.slope(p, dh, act)


@act_slope.register_fake
def _(p: Tensor, dh: Tensor, act: str) -> tuple[Tensor, Tensor]:
    return torch.empty_like(p), p.new_empty(p.shape[1], dtype=widen(p[:0]).dtype)


class _FeedForward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, up: Tensor, up_bias: Tensor, down: Tensor, down_bias: Tensor, act: str) -> Tensor:
        if act == RIDES:
            h, p = torch.ops.xt.product_gelu(x, up, up_bias)
        else:
            p = torch.ops.xt.product(x, up, up_bias)
            h = ACTIVATIONS[act](p)
        ctx.save_for_backward(x, up, down, h, p)
        ctx.act = act
        return torch.ops.xt.product(h, down, down_bias)  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, up, down, h, p = ctx.saved_tensors
        dy = dy.contiguous()
        dp, db = torch.ops.xt.act_slope(p, torch.ops.xt.back(dy, down), ctx.act)
        dx, dw = torch.ops.xt.back(dp, up), torch.ops.xt.slope(dp, x)
        return dx, dw, db.to(p.dtype), torch.ops.xt.slope(dy, h), dy.sum(0), None


def feed_forward(x: Tensor, up: Tensor, up_bias: Tensor, down: Tensor, down_bias: Tensor, act: str) -> Tensor:
    """act(x up^T + up_bias) down^T + down_bias in the type of `up`: x (..., K), up (F, K), down (K, F) -> (..., K).

    act: an activation of SLOPES, by its name in parts.activations.
    """
    rows = x.reshape(-1, x.shape[-1]).to(up.dtype)
    y: Tensor = _FeedForward.apply(rows, up, up_bias.to(up.dtype), down, down_bias.to(up.dtype), act)  # type: ignore[no-untyped-call]
    return y.view(*x.shape[:-1], -1)


def inner(mlp: Any, act: str, x: Tensor) -> Tensor:
    """What an MLP of two biased layers makes of x (..., K): by `feed_forward` in a training step, else its own."""
    if not torch.is_grad_enabled():
        return type(mlp).inner(mlp, x)  # type: ignore[no-any-return]
    return feed_forward(x, mlp.up.weight, mlp.up.bias, mlp.down.weight, mlp.down.bias, act)
