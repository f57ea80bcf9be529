"""Changes to a built model that make its steps faster or smaller, never different.

ready             all that a run's config asks for
join_products     one product in place of several that read the same x: queries, keys and values; gate and up
compile_blocks    torch.compile of each block, the last norm and each head's loss; equal blocks share their code
fuse_products     biases and GELUs of blocks in the same kernels as the products
slab_kernels      the loss of a slab by a kernel of our own
checkpoint_blocks recompute a block's inside in the backward pass (Chen et al. 2016, arXiv:1604.06174)
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from xtcli import fast
from xtcli.config.train import TrainConfig
from xtcli.fast import cublaslt, linear
from xtcli.parts.activations import ACTIVATIONS
from xtcli.parts.attention import Attention
from xtcli.parts.context import Ctx
from xtcli.parts.ffn import GLU, MLP
from xtcli.parts.graphs import Graph
from xtcli.parts.heads import Head
from xtcli.parts.linear import Linear
from xtcli.parts.stack import Block, Stack
from xtcli.train.device import Place


def ready(model: Graph, config: TrainConfig, place: Place) -> Graph:
    """The model, changed in place as `config` says for training at `place`."""
    device = place.device
    own = fast.runs_on(device) and place.dtype.itemsize == 2
    if own and cublaslt.library() is not None:
        fuse_products(model)
    join_products(model)
    if config.checkpointing:
        checkpoint_blocks(model)
    if compiles(config, device):
        compile_blocks(model)
    if own:
        slab_kernels(model)
    return model


def compiles(config: TrainConfig, device: torch.device) -> bool:
    """Whether training compiles there."""
    return config.compile is True or (config.compile == "auto" and device.type == "cuda")


def join_products(model: nn.Module) -> int:
    """Join in place; returns how many modules were changed. Weights keep their names, and are put together at each use.

    That pays where there are many rows, as in training; a layer with an adapter is left as it is.
    """
    count = 0
    for module in model.modules():
        if isinstance(module, Attention) and module.reads_one and _bare(module.q, module.k, module.v):
            module.project = partial(_heads_at_once, module)  # type: ignore[method-assign]
            count += 1
        elif isinstance(module, GLU) and _bare(module.gate, module.up):
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


def _bare(*layers: nn.Module) -> bool:
    """Whether these are linear layers without adapters, with biases all or none."""
    plain = all(type(layer) is Linear for layer in layers)
    return plain and len({layer.bias is None for layer in layers}) == 1


def fuse_products(model: nn.Module) -> int:
    """Let the linear layers of blocks, and feed-forwards with a GELU in its tanh form, multiply by fast/linear.py.

    In place; returns how many modules were changed. For models in 16 bits on a GPU alone; layers of odd widths, or
    whose weights stay in float32, are left as they are.
    """
    count = 0
    for block in [module for module in model.modules() if isinstance(module, Block)]:
        for module in block.modules():
            if type(module) is Linear and module.products and linear.suits(*module.weight.shape):
                module.multiply = linear.multiply
                count += 1
            elif type(module) is MLP and _rides(module):
                module.inner = partial(linear.inner, module)  # type: ignore[method-assign]
                count += 1
    return count


def _rides(mlp: MLP) -> bool:
    """Whether a feed-forward is two biased products with a GELU between them and nothing else."""
    bare = _bare(mlp.up, mlp.down) and mlp.up.bias is not None and linear.suits(*mlp.up.weight.shape)
    return bare and mlp.act is ACTIVATIONS["gelu_tanh"] and mlp.dropout.p == 0


def compile_blocks(model: nn.Module, **options: Any) -> int:
    """Compile in place; returns how many modules were given to the compiler. Parameter names stay."""
    count = 0
    for module in model.modules():
        if isinstance(module, Block):
            module.compile(**options)
            count += 1
        elif isinstance(module, Stack) and list(module.norm.parameters()):
            module.norm.compile(**options)
            count += 1
        elif isinstance(module, Head) and module.terms is not None:
            module.terms = torch.compile(module.terms, **options)
            count += 1
        elif isinstance(module, Head):
            module.loss = torch.compile(module.loss, **options)  # type: ignore[method-assign]
            count += 1
    # What depends on the layer (scores carried from one to the next, routers) is compiled once for each; beyond its
    # limit the compiler would go on without a word to the user, uncompiled.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 2 * count + 8)
    return count


def slab_kernels(model: nn.Module) -> int:
    """Give heads whose loss is made by slabs the kernel for it; returns how many. For models on a GPU alone."""
    from xtcli.fast.crossentropy import slab_terms

    heads = [module for module in model.modules() if isinstance(module, Head) and module.terms is not None]
    for head in heads:
        head.terms = slab_terms
    return len(heads)


def checkpoint_blocks(model: nn.Module) -> int:
    """Recompute in place; dropout repeats its random numbers. Returns the number of blocks.

    Reversible blocks are left as they are: they keep nothing that could be computed again instead.
    """
    count = 0
    for module in model.modules():
        if isinstance(module, Block) and not module.reversible:
            module.forward = partial(checkpoint, module.forward, use_reentrant=False)  # type: ignore[method-assign]
            count += 1
    return count
