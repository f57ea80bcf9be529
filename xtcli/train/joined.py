"""Several products that read the same x as one: queries, keys and values; gate and up.

Where the products are those of fast/linear.py, what stands behind them joins in: the rotation (fast/heads.py), the
gated activation and the product after it (fast/gated.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from xtcli.fast import gated, heads, linear
from xtcli.fast.cpu.parted import parted
from xtcli.parts.attention import Attention
from xtcli.parts.context import Ctx
from xtcli.parts.ffn import GLU
from xtcli.parts.linear import Linear
from xtcli.parts.norms import NoNorm


def join_products(model: nn.Module) -> int:
    """Join in place; returns how many modules were changed. Weights keep their names, and are put together at each use.

    That pays where there are many rows, as in training; a layer with an adapter is left as it is.
    """
    count = 0
    for module in model.modules():
        if isinstance(module, Attention) and module.reads_one and bare(module.q, module.k, module.v):
            if _turns(module):
                module.prepare = partial(_prepare, module)  # type: ignore[method-assign]
                module.joined = (module.q, module.k, module.v)  # type: ignore[assignment]
            module.project = partial(_heads_at_once, module)  # type: ignore[method-assign]
            count += 1
        elif isinstance(module, GLU) and bare(module.gate, module.up):
            name = _gates(module)
            if name is not None:
                module.inner = partial(_inner, module, name)  # type: ignore[method-assign]
                module.joined = (module.gate, module.up)  # type: ignore[assignment]
            module.project = partial(at_once, (module.gate, module.up))  # type: ignore[method-assign, assignment]
            count += 1
    return count


def at_once(layers: Sequence[Linear], x: Tensor) -> tuple[Tensor, ...]:
    """What each of `layers` makes of x (..., in), by one product."""
    weights: list[Tensor] = [layer.weight for layer in layers]
    y = layers[0].multiply(x, torch.cat(weights), torch.cat(biases) if (biases := _biases(layers)) else None)
    sizes = [layer.out_features for layer in layers]
    made: tuple[Tensor, ...] = parted(y, sizes) if y.device.type == "cpu" else y.split(sizes, -1)
    return made


def _biases(layers: Sequence[Linear]) -> list[Tensor]:
    return [layer.bias for layer in layers if layer.bias is not None]


def _heads_at_once(attention: Attention, x: Tensor, ctx: Ctx) -> tuple[Tensor, Tensor, Tensor, Ctx]:
    q, k, v = at_once((attention.q, attention.k, attention.v), x)
    return q, k, v, ctx


def _turns(attention: Attention) -> bool:
    """Whether `_prepare` can stand in for an attention's own: nothing but a rotation follows the product."""
    usual = type(attention).prepare is Attention.prepare and type(attention).recall is Attention.recall
    plain = isinstance(attention.q_norm, NoNorm) and isinstance(attention.k_norm, NoNorm)
    quick = _quick(attention.q, attention.k, attention.v) and attention.head_dim <= heads.WIDEST
    return usual and plain and quick and attention.store_turned


def _prepare(attention: Attention, x: Tensor, ctx: Ctx) -> tuple[Tensor, Tensor, Tensor, Ctx]:
    """`Attention.prepare` by fast/heads.py in a training step; elsewhere its own."""
    if ctx.state is not None or ctx.fed is not None or not torch.is_grad_enabled():
        return Attention.prepare(attention, x, ctx)
    turn = None
    if attention.rotation is not None:
        number, layout = attention.rotation
        table = ctx.turns[number]
        turn = (table.cos, table.sin, layout == "interleaved")
    layers = (attention.q, attention.k, attention.v)
    weights = [layer.weight for layer in layers]
    q, k, v = heads.heads_of(x, weights, _biases(layers), turn, attention.heads, attention.groups)
    return q, k, v, ctx


def _gates(glu: GLU) -> str | None:
    """The name of a gated unit's activation where `_inner` can stand in for its own."""
    usual = type(glu).inner is GLU.inner and type(glu).project is GLU.project and type(glu.down) is Linear
    fits = usual and _quick(glu.gate, glu.up, glu.down) and glu.dropout.p == 0
    return gated.name_of(glu.act) if fits else None


def _inner(glu: GLU, act: str, x: Tensor) -> Tensor:
    """`GLU.inner` by fast/gated.py in a training step; elsewhere its own."""
    if not torch.is_grad_enabled():
        return GLU.inner(glu, x)
    layers = (glu.gate, glu.up)
    return gated.feed_forward(
        x, [layer.weight for layer in layers], _biases(layers), glu.down.weight, glu.down.bias, act
    )


def _quick(*layers: Linear) -> bool:
    """Whether the layers multiply by fast/linear.py."""
    return all(layer.multiply is linear.multiply for layer in layers)


def bare(*layers: nn.Module) -> bool:
    """Whether these are linear layers without adapters, with biases all or none."""
    plain = all(type(layer) is Linear for layer in layers)
    return plain and len({layer.bias is None for layer in layers}) == 1
