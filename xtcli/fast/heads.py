"""Queries, keys and values of one product, turned where they stand, and one gradient of all three.

    [q k v] = x W^T (+ b),  q and k turned        one kernel behind the product, in place; none without a rotation
    dp = [turned back dq, dk | dv],  db = sum dp  one kernel
    dx = dp W,  dW = dp^T x                       as in linear.py

q, k and v are views of one tensor (B, T, (H + 2 G) D), so that attention's output has the order that its projection
reads. The operators of `xt::` have a plain form in PyTorch, which is the specification and runs on a CPU, and one in
Triton (headkernels.py). Compiled code calls them as they are. Axes as in parts/context.py; N = B T rows, K their width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from xtcli.fast.stacked import slopes, stacked
from xtcli.parts.linear import widen
from xtcli.parts.rotary import turn_half, turn_interleaved

WIDEST = 256
"""A program has whole heads, up to this width."""


def apart(joint: Tensor, length: int, heads: int, groups: int) -> tuple[Tensor, Tensor, Tensor]:
    """Views of joint (B T, (H + 2 G) D): queries (B, H, T, D), keys and values (B, G, T, D)."""
    q, k, v = (
        joint.view(-1, length, heads + 2 * groups, joint.shape[1] // (heads + 2 * groups))
        .transpose(1, 2)
        .split((heads, groups, groups), 1)
    )
    return q, k, v


def _together(*parts: Tensor) -> Tensor:
    """(B, heads, T, D) each -> (B T, all heads D)."""
    return torch.cat([part.transpose(1, 2).flatten(2) for part in parts], 2).flatten(0, 1)


@torch.library.custom_op("xt::turned_product", mutates_args=(), device_types="cpu")
def turned_product(
    x: Tensor, weights: Sequence[Tensor], bias: Tensor | None, cos: Tensor, sin: Tensor, heads: int, groups: int,
    interleaved: bool,
) -> Tensor:  # fmt: skip
    """x (N, K), weights of (H + 2 G) D rows, bias or None, cos and sin (B|1, 1, T, r / 2) -> (N, (H + 2 G) D)."""
    q, k, v = apart(F.linear(x, stacked(weights), bias), cos.shape[2], heads, groups)
    turn = turn_interleaved if interleaved else turn_half
    return _together(turn(q, cos, sin).to(x.dtype), turn(k, cos, sin).to(x.dtype), v)


@turned_product.register_kernel("cuda")
def _turned_product(
    x: Tensor, weights: Sequence[Tensor], bias: Tensor | None, cos: Tensor, sin: Tensor, heads: int, groups: int,
    interleaved: bool,
) -> Tensor:  # fmt: skip
    from xtcli.fast import headkernels

    joint: Tensor = torch.ops.xt.product(x, stacked(weights), bias)
    headkernels.turn(joint, cos, sin, heads, groups, interleaved)
    return joint


@turned_product.register_fake
def _(
    x: Tensor, weights: Sequence[Tensor], bias: Tensor | None, cos: Tensor, sin: Tensor, heads: int, groups: int,
    interleaved: bool,
) -> Tensor:  # fmt: skip
    return x.new_empty(x.shape[0], sum(weight.shape[0] for weight in weights))


@torch.library.custom_op("xt::joint_slope", mutates_args=(), device_types="cpu")
def joint_slope(
    dq: Tensor, dk: Tensor, dv: Tensor, cos: Tensor | None, sin: Tensor | None, interleaved: bool, biased: bool
) -> tuple[Tensor, Tensor]:
    """dq (B, H, T, D), dk and dv (B, G, T, D) -> turned back and joined (N, (H + 2 G) D); its sums over the rows in
    float32, or nothing (0,)."""
    if cos is not None and sin is not None:
        turn = turn_interleaved if interleaved else turn_half
        dq, dk = turn(dq, cos, -sin).to(dv.dtype), turn(dk, cos, -sin).to(dv.dtype)
    joint = _together(dq, dk, dv)
    return joint, widen(joint).sum(0) if biased else _no_sums(joint)


@joint_slope.register_kernel("cuda")
def _joint_slope(
    dq: Tensor, dk: Tensor, dv: Tensor, cos: Tensor | None, sin: Tensor | None, interleaved: bool, biased: bool
) -> tuple[Tensor, Tensor]:
    from xtcli.fast import headkernels

    joint, sums = headkernels.join(dq, dk, dv, cos, sin, interleaved, biased)
    return joint, _no_sums(joint) if sums is None else sums


@joint_slope.register_fake
def _(
    dq: Tensor, dk: Tensor, dv: Tensor, cos: Tensor | None, sin: Tensor | None, interleaved: bool, biased: bool
) -> tuple[Tensor, Tensor]:
    batch, heads, length, width = dq.shape
    joint = dq.new_empty(batch * length, (heads + 2 * dk.shape[1]) * width)
    kind = torch.promote_types(dq.dtype, torch.float32)
    return joint, joint.new_empty(joint.shape[1], dtype=kind) if biased else _no_sums(joint)


def _no_sums(joint: Tensor) -> Tensor:
    return joint.new_empty(0, dtype=torch.promote_types(joint.dtype, torch.float32))


class _Heads(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, bias: Tensor | None, cos: Tensor | None, sin: Tensor | None, interleaved: bool,
        sizes: tuple[int, int, int], *weights: Tensor,
    ) -> Any:  # fmt: skip
        added = None if bias is None else bias.to(x.dtype)
        if cos is None:
            joint = torch.ops.xt.stacked_product(x, weights, added)
        else:
            joint = torch.ops.xt.turned_product(x, weights, added, cos, sin, *sizes[1:], interleaved)
        ctx.save_for_backward(x, cos, sin, *weights)
        ctx.interleaved = interleaved
        return apart(joint, *sizes)

    @staticmethod
    def backward(ctx: Any, dq: Tensor, dk: Tensor, dv: Tensor) -> Any:
        x, cos, sin, *weights = ctx.saved_tensors
        for_x, for_bias, _, _, _, _, *for_weights = ctx.needs_input_grad
        dp, sums = torch.ops.xt.joint_slope(dq, dk, dv, cos, sin, ctx.interleaved, for_bias)
        dx = torch.ops.xt.stacked_back(dp, weights) if for_x else None
        return dx, sums if for_bias else None, None, None, None, None, *slopes(dp, x, weights, for_weights)


def heads_of(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    turn: tuple[Tensor, Tensor, bool] | None,
    heads: int,
    groups: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """x (B, T, K), the weights of q, k and v (their width, K), their biases or none, cos and sin (B|1, 1, T, r / 2) and
    whether neighbours turn -> turned queries (B, H, T, D) and keys (B, G, T, D), values (B, G, T, D)."""
    bias = torch.cat(tuple(biases)) if biases else None
    rows = x.reshape(-1, x.shape[-1]).to(weights[0].dtype)
    sizes = (x.shape[1], heads, groups)
    q, k, v = _Heads.apply(rows, bias, *(turn or (None, None, False)), sizes, *weights)  # type: ignore[no-untyped-call]
    return q, k, v
