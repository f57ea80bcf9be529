"""Changes to a built model that make its steps faster or smaller, never different.

ready             all that a run's config asks for
join_products     one product in place of several that read the same x (joined.py)
compile_blocks    torch.compile of each block, the last norm and each head's loss; equal blocks share their code
fuse_products     biases and GELUs of blocks in the same kernels as the products (fused.py)
fuse_norms        norms with the sums of the residual stream beside them (fused.py); where blocks are compiled as well,
                  products start from the stream instead, and norms sum gradients of biases (fast/passes.py)
end_kernels       kernels of our own for the token tables and the loss of a slab
checkpoint_blocks recompute a block's inside in the backward pass (Chen et al. 2016, arXiv:1604.06174)
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from xtcli import fast
from xtcli.config.train import TrainConfig
from xtcli.fast import cublaslt, linear
from xtcli.parts.embed import Tokens
from xtcli.parts.graphs import Graph
from xtcli.parts.heads import Head
from xtcli.parts.stack import Block, Stack
from xtcli.train.device import Place
from xtcli.train.fused import fuse_norms, fuse_products
from xtcli.train.joined import join_products


def ready(model: Graph, config: TrainConfig, place: Place) -> Graph:
    """The model, changed in place as `config` says for training at `place`."""
    device = place.device
    own = fast.runs_on(device) and place.dtype.itemsize == 2
    if own and cublaslt.library() is not None:
        fuse_products(model)
    join_products(model)
    if own:
        fuse_norms(model)
    options = _joined_graphs() if own else {}
    if config.checkpointing:
        checkpoint_blocks(model, partial(torch.compile, **options) if compiles(config, device) else None)
    if compiles(config, device):
        compile_blocks(model, **options)
    if own:
        end_kernels(model)
    return model


def compiles(config: TrainConfig, device: torch.device) -> bool:
    """Whether training compiles there."""
    return config.compile is True or (config.compile == "auto" and device.type == "cuda")


def _joined_graphs() -> dict[str, Any]:
    """What the compiler is given to join kernels of our own where it sees that they belong together."""
    from xtcli.fast import passes

    return {"options": passes.options()}


def compile_blocks(model: nn.Module, **options: Any) -> int:
    """Compile in place; returns how many modules were given to the compiler. Parameter names stay.

    Blocks that are computed again are left to `checkpoint_blocks`.
    """
    count = 0
    for module in model.modules():
        if isinstance(module, Block) and "forward" not in vars(module):
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
    _room_for(count)
    return count


def _room_for(count: int) -> None:
    """What depends on the layer (scores carried from one to the next, routers) is compiled once for each; beyond its
    limit the compiler would go on without a word to the user, uncompiled."""
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 2 * count + 8)


def end_kernels(model: nn.Module) -> int:
    """Give both ends of a model kernels of our own: the losses that are made by slabs, and the token tables.

    In place; returns how many modules were changed. For models on a GPU alone.
    """
    from xtcli.fast import crossentropy, table

    count = 0
    for module in model.modules():
        if isinstance(module, Head) and module.terms is not None:
            module.terms, module.scaled = crossentropy.slab_terms, crossentropy.scaled
            # Where only some places are asked about, rows differ from batch to batch; nothing was measured there.
            if cublaslt.library() is not None and not module.sparse:
                module.slab_products = linear.PRODUCTS
            count += 1
        elif isinstance(module, Tokens):
            module.look_up = table.look_up
            count += 1
    return count


def checkpoint_blocks(model: nn.Module, compiled: Callable[[Any], Any] | None = None) -> int:
    """Recompute in place; dropout repeats its random numbers. Returns the number of blocks.

    `compiled` gives the compiler what is computed again: around it, the compiler would see nothing of a block.
    Reversible blocks are left as they are: they keep nothing that could be computed again instead.
    """
    count = 0
    for module in model.modules():
        if isinstance(module, Block) and not module.reversible:
            forward = module.forward if compiled is None else compiled(module.forward)
            module.forward = partial(checkpoint, forward, use_reentrant=False)  # type: ignore[method-assign]
            count += 1
    if compiled is not None:
        _room_for(count)
    return count
