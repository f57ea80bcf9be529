"""Cross-entropy of states against a vocabulary, so many rows at a time that the logits are never whole.

    logits = x W^T + b, bent into (-cap, cap) where there is a cap
    loss   = sum over rows of  log sum exp(logits) - (1 - s) logits[target] - s mean(logits)        s: smoothing

The loss is a sum over rows, so the slope of the logits, softmax - (1 - s) one hot - s / V, is known as soon as they
are. It is multiplied with the weights and the states at once, while the logits are there, and the backward pass only
scales what was found: no product is made twice, and the memory is that of one slab.

Axes: N rows, D width, V vocabulary, n rows of a slab.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from xtcli.fast.cpu import crossentropy as oncpu
from xtcli.parts.linear import widen
from xtcli.parts.outputs import IGNORE, Term

SLAB_BYTES = {"cpu": 2**27}
"""Bytes of the logits of a slab by type of device: what fits a cache badly anyway, and feeds the cores well."""
USUAL_SLAB_BYTES = 2**30
SLAB_SHARE = 16
"""A slab takes no more than one part in so many of a GPU's memory: each slab has the gradient of the weight added."""
ALIGN = 64
"""Rows of the vocabulary come in multiples of this on a GPU, whose 16-bit products are slow at odd widths."""

Slope = tuple[Tensor, Tensor]
Terms = Callable[[Tensor, Tensor, "float | None", float, int], Slope]
Scaled = Callable[[Tensor, Tensor, torch.dtype], Tensor]


class Products(NamedTuple):
    """The products of a slab: x (n, D), W (V, D), b (V,) or None, the slope of logits dy (n, V)."""

    logits: Callable[[Tensor, Tensor, Tensor | None], Tensor] = F.linear
    """x, W, b -> x W^T + b."""
    back: Callable[[Tensor, Tensor], Tensor] = torch.mm
    """dy, W -> dy W."""
    slope: Callable[[Tensor, Tensor], Tensor] = lambda dy, x: dy.t() @ x
    """dy, x -> dy^T x."""


PRODUCTS = Products()


def slab_terms(logits: Tensor, targets: Tensor, cap: float | None, smoothing: float, vocab: int) -> Slope:
    """The summed loss of logits (n, V or more) and its slope by them, in their shape and type.

    Columns beyond `vocab` only fill up the width: no probability falls on them.
    """
    wide = widen(logits)
    if cap is not None:
        bent = torch.tanh(wide / cap)
        wide = bent * cap
    real = targets != IGNORE
    aims = targets.masked_fill(~real, 0)[:, None]
    if vocab < wide.shape[1]:
        # Over the whole width, since a slice of it is no multiple of what a GPU loads at once.
        wide = wide.masked_fill(torch.arange(wide.shape[1], device=wide.device) >= vocab, float("-inf"))
    logs = wide.log_softmax(-1)
    losses = logs.gather(1, aims)[:, 0] * (smoothing - 1.0)
    if smoothing:
        losses = losses - logs[:, :vocab].sum(-1) * (smoothing / vocab)
    # In place, from here on: each pass over a slab counts.
    slope = logs.exp_()
    slope.scatter_add_(1, aims, torch.full_like(slope[:, :1], smoothing - 1.0))
    if smoothing:
        slope[:, :vocab] -= smoothing / vocab
    if cap is not None:
        slope *= 1.0 - bent * bent
    slope.masked_fill_(~real[:, None], 0.0)
    return losses.masked_fill(~real, 0.0).sum(), slope.to(logits.dtype)


def usual_terms(logits: Tensor, targets: Tensor, cap: float | None, smoothing: float, vocab: int) -> Slope:
    """`slab_terms`, by the C kernel where that is for such logits."""
    if oncpu.takes(logits, targets, cap, vocab):
        return oncpu.terms(logits, targets, smoothing, IGNORE)
    return slab_terms(logits, targets, cap, smoothing, vocab)


def scaled(slope: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """slope times the number `scale`, in `dtype`."""
    return (slope * scale).to(dtype)


def slab_bytes(device: str) -> int:
    """The most bytes of the logits of a slab on a device of this type."""
    if device == "cuda" and torch.cuda.is_available():
        return int(torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory) // SLAB_SHARE
    return SLAB_BYTES.get(device, USUAL_SLAB_BYTES)


def slab_rows(rows: int, width: int, itemsize: int, device: str) -> int:
    """Rows of a slab, equal shares of `rows` whose logits of `width` entries stay within the limit."""
    most = max(slab_bytes(device) // max(width * itemsize, 1), 1)
    shares = max(-(-rows // most), 1)
    return max(-(-rows // shares), 1)


class SlabLoss(torch.autograd.Function):
    """The summed loss of states (N, D); gradients are made in the forward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        states: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        cap: float | None,
        smoothing: float,
        terms: Terms,
        scaled: Scaled,
        products: Products,
    ) -> Tensor:
        kind = states.device.type
        narrow = _working_type(states, weight)
        x, w = states.to(narrow), weight.to(narrow)
        vocab = weight.shape[0]
        filled = -vocab % ALIGN if kind == "cuda" and narrow.itemsize < 4 else 0
        w = F.pad(w, (0, 0, 0, filled)) if filled else w
        b = None if bias is None else F.pad(bias.to(narrow), (0, filled))
        for_states, for_weight, for_bias = ctx.needs_input_grad[:3]
        size = slab_rows(x.shape[0], w.shape[0], narrow.itemsize, kind)
        # Sums over slabs are kept in at least float32: 16 bits would lose what a slab adds to many before it.
        single = x.shape[0] <= size
        dx = torch.empty_like(x) if for_states and not single else None
        dw = torch.zeros_like(w, dtype=_at_least_single(narrow)) if for_weight and not single else None
        db = torch.zeros(w.shape[0], dtype=_at_least_single(narrow), device=w.device) if for_bias else None
        total = torch.zeros((), dtype=_at_least_single(narrow), device=x.device)
        for start in range(0, max(x.shape[0], 1), size):
            some = x[start : start + size]
            loss, slope = terms(products.logits(some, w, b), targets[start : start + size], cap, smoothing, vocab)
            total += loss
            if for_states:
                reached = products.back(slope, w)
                if dx is None:
                    dx = reached
                else:
                    dx[start : start + size] = reached
            if for_weight:
                share = products.slope(slope, some)
                dw = share if dw is None else dw.add_(share)
            if db is not None:
                db += slope.sum(0, dtype=db.dtype)
        ctx.scaled, ctx.types = scaled, (states.dtype, weight.dtype, None if bias is None else bias.dtype)
        ctx.save_for_backward(dx, None if dw is None else dw[:vocab], None if db is None else db[:vocab])
        return total

    @staticmethod
    def backward(ctx: Any, scale: Tensor) -> Any:
        found = zip(ctx.saved_tensors, ctx.types, strict=True)
        given = (None if slope is None else ctx.scaled(slope, scale, dtype) for slope, dtype in found)
        return (*given, None, None, None, None, None, None)


def linear_cross_entropy(
    states: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    cap: float | None = None,
    smoothing: float = 0.0,
    terms: Terms = usual_terms,
    scaled: Scaled = scaled,
    products: Products = PRODUCTS,
) -> Term:
    """`cross_entropy` of the logits of states (..., D) under weight (V, D) and bias (V,), without the logits.

    `cap` bends logits as `cap tanh(logits / cap)`. `terms`, `scaled` and `products` compute one slab, what the backward
    pass makes of it, and the products around it; others that give the same may stand in their place.
    """
    flat = targets.reshape(-1)
    rows = states.reshape(-1, states.shape[-1])
    total: Tensor = SlabLoss.apply(rows, weight, bias, flat, cap, smoothing, terms, scaled, products)  # type: ignore[no-untyped-call]
    return Term(total, (flat != IGNORE).sum())


def _working_type(states: Tensor, weight: Tensor) -> torch.dtype:
    kind = states.device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return weight.dtype


def _at_least_single(dtype: torch.dtype) -> torch.dtype:
    return dtype if dtype.itemsize >= 4 else torch.float32
