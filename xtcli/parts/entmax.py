"""1.5-entmax: a softmax that gives exact zeros.

    p = max(z / 2 - tau, 0)^2,   tau such that p sums to 1      Peters et al. 2019, arXiv:1905.05702
    dz = s (g - sum(s g) / sum(s)),   s = sqrt(p)               Correia et al. 2019, arXiv:1909.00015

With the k largest z kept, tau solves a quadratic in their mean and variance; k is the largest count whose
own smallest z stays above its tau. Two scores become one-hot from a gap of 2 on.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class Entmax15(torch.autograd.Function):
    """z (..., S), -inf for what is hidden, to weights that sum to 1; a row must show at least one key."""

    @staticmethod
    def forward(ctx: Any, z: Tensor) -> Tensor:
        # A key two below the best weighs nothing, so the scores can be cut there: -inf and 1e30 squared never occur.
        half = ((z - z.amax(-1, keepdim=True)) / 2).clamp(min=-1)
        best = half.sort(-1, descending=True).values
        count = torch.arange(1, z.shape[-1] + 1, device=z.device, dtype=z.dtype)
        mean = best.cumsum(-1) / count
        spread = best.square().cumsum(-1) - count * mean.square()
        tau = mean - ((1 - spread) / count).clamp(min=0).sqrt()
        kept = (tau <= best).sum(-1, keepdim=True)
        weights = (half - tau.gather(-1, kept - 1)).clamp(min=0).square()
        weights = weights.masked_fill(half <= -1, 0.0)
        ctx.save_for_backward(weights)
        return weights

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (weights,) = ctx.saved_tensors
        root = weights.sqrt()
        pulled = root * gradient
        found: Tensor = pulled - root * (pulled.sum(-1, keepdim=True) / root.sum(-1, keepdim=True))
        return found


def entmax15(z: Tensor) -> Tensor:
    """Weights (..., S) of scores z (..., S), in the type of z."""
    return Entmax15.apply(z)  # type: ignore[no-any-return, no-untyped-call]
