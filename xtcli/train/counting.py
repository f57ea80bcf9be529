"""What runs of a model on the meta device cost: attention as real kernels do it, and bytes alive.

    Alive      bytes of the storages that an operator made and that are still in use, and their peak
    Kernels    attention as fused kernels cost it

PyTorch has no fused attention for meta tensors: there it writes the product of queries and keys out, (B, H, T, S),
which a real device never holds. Inside `Kernels` each call of scaled-dot-product attention costs what the fused
kernels cost: 4 B H T S D FLOPs, and for the backward pass its inputs, its output and one float32 number for each
query. On the CPU a call with dropout or a learned bias has no fused kernel: there the scores count as they are.

Autocast does not know meta tensors either. With a narrow type `Kernels` casts what it would: operands of matrix
products to that type, a weight once; operands of norms, softmax and powers to float32.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode


class Alive(TorchDispatchMode):
    """Follows the bytes of storages made while active; those that `there` are in were there before."""

    def __init__(self, there: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self.known: set[int] = {tensor.untyped_storage()._cdata for tensor in there}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, list | tuple) else (made,):
            if isinstance(tensor, Tensor):
                self._follow(tensor.untyped_storage())
        return made

    def _follow(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self.known:
            return
        self.known.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size


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


PRODUCTS = {F.linear, F.scaled_dot_product_attention, torch.matmul, torch.bmm, torch.mm, torch.einsum}
PRODUCTS |= {F.conv1d, F.conv2d, Tensor.matmul, Tensor.__matmul__, Tensor.bmm}
"""What autocast computes in the narrow type."""

WIDE = {F.layer_norm, F.softmax, F.log_softmax, torch.softmax, torch.log_softmax, torch.rsqrt, torch.exp, torch.pow}
WIDE |= {Tensor.softmax, Tensor.log_softmax, Tensor.rsqrt, Tensor.exp, Tensor.pow, Tensor.__pow__}
"""What autocast computes in float32."""


class Kernels(TorchFunctionMode):
    """While active, meta tensors cost what they cost on a device of this type, with matrix products in `dtype`.

    `casts` are the storages of narrow copies of parameters.
    """

    def __init__(self, device: str = "cuda", dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.device, self.dtype = device, dtype
        self.casts: dict[int, Tensor] = {}
        self.narrow: dict[int, Tensor] = {}

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self.dtype != torch.float32 and (func in PRODUCTS or func in WIDE):
            wanted = self.dtype if func in PRODUCTS else torch.float32
            args = [self._cast(value, wanted) for value in args]
            kwargs = {key: self._cast(value, wanted) for key, value in kwargs.items()}
        if func is F.scaled_dot_product_attention and args[0].is_meta:
            mask = kwargs.get("attn_mask")
            learned = mask is not None and mask.requires_grad
            written_out = self.device == "cpu" and (learned or kwargs.get("dropout_p", 0.0) > 0)
            if not written_out:
                return _Attention.apply(*args[:3], mask)  # type: ignore[no-untyped-call]
        return func(*args, **kwargs)

    def _cast(self, value: Any, dtype: torch.dtype) -> Any:
        if isinstance(value, list | tuple):
            return type(value)(self._cast(item, dtype) for item in value)
        if not isinstance(value, Tensor) or not value.is_floating_point() or value.dtype == dtype:
            return value
        if not (isinstance(value, torch.nn.Parameter) and dtype == self.dtype):
            return value.to(dtype)
        if id(value) not in self.narrow:
            self.narrow[id(value)] = narrow = value.to(dtype)
            self.casts[narrow.untyped_storage()._cdata] = narrow
        return self.narrow[id(value)]
