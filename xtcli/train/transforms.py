"""Changes to a built model that make its steps faster or smaller, never different.

compile_blocks    torch.compile of each block and of each head's loss; equal blocks share their code
checkpoint_blocks recompute a block's inside in the backward pass (Chen et al. 2016, arXiv:1604.06174)
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from xtcli.parts.heads import Head
from xtcli.parts.stack import Block


def compile_blocks(model: nn.Module, **options: Any) -> int:
    """Compile in place; returns how many modules were given to the compiler. Parameter names stay."""
    count = 0
    for module in model.modules():
        if isinstance(module, Block):
            module.compile(**options)
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
