"""Several products that read the same x as one: queries, keys and values; gate and up."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from xtcli.parts.attention import Attention
from xtcli.parts.context import Ctx
from xtcli.parts.ffn import GLU
from xtcli.parts.linear import Linear


def join_products(model: nn.Module) -> int:
    """Join in place; returns how many modules were changed. Weights keep their names, and are put together at each use.

    That pays where there are many rows, as in training; a layer with an adapter is left as it is.
    """
    count = 0
    for module in model.modules():
        if isinstance(module, Attention) and module.reads_one and bare(module.q, module.k, module.v):
            module.project = partial(_heads_at_once, module)  # type: ignore[method-assign]
            count += 1
        elif isinstance(module, GLU) and bare(module.gate, module.up):
            module.project = partial(at_once, (module.gate, module.up))  # type: ignore[method-assign, assignment]
            count += 1
    return count


def at_once(layers: Sequence[Linear], x: Tensor) -> tuple[Tensor, ...]:
    """What each of `layers` makes of x (..., in), by one product."""
    weights: list[Tensor] = [layer.weight for layer in layers]
    biases: list[Tensor] = [layer.bias for layer in layers if layer.bias is not None]
    y = layers[0].multiply(x, torch.cat(weights), torch.cat(biases) if biases else None)
    made: tuple[Tensor, ...] = y.split([layer.out_features for layer in layers], -1)
    return made


def _heads_at_once(attention: Attention, x: Tensor, ctx: Ctx) -> tuple[Tensor, Tensor, Tensor, Ctx]:
    q, k, v = at_once((attention.q, attention.k, attention.v), x)
    return q, k, v, ctx


def bare(*layers: nn.Module) -> bool:
    """Whether these are linear layers without adapters, with biases all or none."""
    plain = all(type(layer) is Linear for layer in layers)
    return plain and len({layer.bias is None for layer in layers}) == 1
