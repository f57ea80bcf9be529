"""Gated feed-forwards whose activation is one kernel each way between the products.

    p = [gate up] = x W^T (+ b),  h = act(gate) * up,  y = h V^T (+ c)
    dh = dy V,  dp = [dh * up * act'(gate), dh * act(gate)] and h once more, which is not kept
    dx = dp W,  dW = dp^T x,  dV = dy^T h          as in linear.py

The operators of `xt::` have a plain form in PyTorch, which is the specification and runs on a CPU, and one in Triton
(gatekernels.py). Compiled code calls them as they are. Axes: N rows, K and F widths.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from xtcli.fast.stacked import slopes
from xtcli.parts.activations import ACTIVATIONS
from xtcli.parts.linear import widen


def _quick_gelu_slope(dy: Tensor, x: Tensor) -> Tensor:
    open = torch.sigmoid(1.702 * x)
    return dy * (open + 1.702 * x * open * (1.0 - open))


_gelu_tanh_slope = partial(torch.ops.aten.gelu_backward, approximate="tanh")

SLOPES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "silu": torch.ops.aten.silu_backward,
    "gelu": torch.ops.aten.gelu_backward,
    "gelu_tanh": _gelu_tanh_slope,
    "gelu_fast": _gelu_tanh_slope,
    "quick_gelu": _quick_gelu_slope,
    "relu": lambda dy, x: dy * (x > 0),
    "relu2": lambda dy, x: dy * 2.0 * x.clamp(min=0.0),
    "identity": lambda dy, x: dy,
}
"""What of dy reaches x, by the activations that lanes.py knows."""


@torch.library.custom_op("xt::gated", mutates_args=(), device_types="cpu")
def gated(p: Tensor, act: str) -> Tensor:
    """p (N, 2 F), gates in front -> act(gate) * up, (N, F)."""
    gate, up = widen(p).chunk(2, 1)
    return (ACTIVATIONS[act](gate) * up).to(p.dtype)


@gated.register_kernel("cuda")
def _gated(p: Tensor, act: str) -> Tensor:
    from xtcli.fast import gatekernels

    return gatekernels.forward(p, act)


@gated.register_fake
def _(p: Tensor, act: str) -> Tensor:
    return p.new_empty(p.shape[0], p.shape[1] // 2)


@torch.library.custom_op("xt::gated_slope", mutates_args=(), device_types="cpu")
def gated_slope(p: Tensor, dh: Tensor, act: str) -> tuple[Tensor, Tensor]:
    """p (N, 2 F), dh (N, F) -> the gradient of p, and act(gate) * up."""
    gate, up = widen(p).chunk(2, 1)
    opened, wide = ACTIVATIONS[act](gate), widen(dh)
    slope = torch.cat((SLOPES[act](wide * up, gate), wide * opened), 1)
    return slope.to(p.dtype), (opened * up).to(p.dtype)


@gated_slope.register_kernel("cuda")
def _gated_slope(p: Tensor, dh: Tensor, act: str) -> tuple[Tensor, Tensor]:
    from xtcli.fast import gatekernels

    return gatekernels.backward(p, dh, act)


@gated_slope.register_fake
def _(p: Tensor, dh: Tensor, act: str) -> tuple[Tensor, Tensor]:
    return torch.empty_like(p), torch.empty_like(dh)


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, gate: Tensor, up: Tensor, bias: Tensor | None, down: Tensor, last: Tensor | None, act: str
    ) -> Tensor:
        p = torch.ops.xt.stacked_product(x, (gate, up), bias)
        ctx.save_for_backward(x, gate, up, down, p)
        ctx.act = act
        return torch.ops.xt.product(torch.ops.xt.gated(p, act), down, last)  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, gate, up, down, p = ctx.saved_tensors
        for_x, for_gate, for_up, for_bias, for_down, for_last, _ = ctx.needs_input_grad
        dy = dy.contiguous()
        dp, h = torch.ops.xt.gated_slope(p, torch.ops.xt.back(dy, down), ctx.act)
        return (
            torch.ops.xt.stacked_back(dp, (gate, up)) if for_x else None,
            *slopes(dp, x, (gate, up), (for_gate, for_up)),
            dp.sum(0) if for_bias else None,
            torch.ops.xt.slope(dy, h) if for_down else None,
            dy.sum(0) if for_last else None,
            None,
        )


def feed_forward(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], down: Tensor, down_bias: Tensor | None, act: str
) -> Tensor:
    """x (..., K), the weights of gate and up (F, K) and their biases or none, down (K, F) -> (..., K), in the type of
    the weights."""
    kind = down.dtype
    bias = torch.cat(tuple(biases)).to(kind) if biases else None
    last = None if down_bias is None else down_bias.to(kind)
    y: Tensor = _Gated.apply(x.reshape(-1, x.shape[-1]).to(kind), *weights, bias, down, last, act)  # type: ignore[no-untyped-call]
    return y.view(*x.shape[:-1], -1)


def name_of(act: Callable[[Tensor], Tensor]) -> str | None:
    """The name of an activation that the kernels know."""
    return next((name for name in SLOPES if ACTIVATIONS[name] is act), None)
