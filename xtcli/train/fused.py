"""Attention kernels as the meta device should count them.

PyTorch has no fused attention for meta tensors: there it writes the product of queries and keys out, (B, H, T, S),
which a real device never holds. Inside `Kernels` each call of scaled-dot-product attention costs what the fused
kernels cost: 4 B H T S D FLOPs, and for the backward pass its inputs, its output and one float32 number for each
query. On the CPU a call with dropout has no fused kernel, so there the scores are counted as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode


class _Attention(torch.autograd.Function):
    """Shapes, FLOPs and saved tensors of fused attention; q (B, H, T, D), k (B, G, S, D), v (B, G, S, E)."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        batch, heads, queries, width = q.shape
        groups, span = k.shape[1], k.shape[2]
        rows = heads // groups * queries
        empty = q.new_empty(1)
        weights = empty.expand(batch * groups, rows, span)
        out: Tensor | None = None
        # Two products over S stand for q k^T and for weights v; expanded operands take no memory.
        for inner in (width, v.shape[-1]):
            out = torch.bmm(weights, empty.expand(batch * groups, span, inner))
        assert out is not None
        out = out.view(batch, heads, queries, v.shape[-1])
        totals = q.new_empty(batch, heads, queries, dtype=torch.float32)
        ctx.save_for_backward(q, k, v, mask, out, totals)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        raise AssertionError("meta tensors have no gradients")


class Kernels(TorchFunctionMode):
    """While active, attention on meta tensors costs what it costs on a device of this type."""

    def __init__(self, device: str = "cuda") -> None:
        super().__init__()
        self.device = device

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention and args[0].is_meta:
            written_out = self.device == "cpu" and kwargs.get("dropout_p", 0.0) > 0
            if not written_out:
                return _Attention.apply(*args[:3], kwargs.get("attn_mask"))  # type: ignore[no-untyped-call]
        return func(*args, **kwargs)
