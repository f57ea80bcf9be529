"""Biases and activations in the same kernels as the products."""

from __future__ import annotations

from functools import partial

from torch import nn

from xtcli.fast import linear
from xtcli.parts.activations import ACTIVATIONS
from xtcli.parts.ffn import MLP
from xtcli.parts.linear import Linear
from xtcli.parts.stack import Block
from xtcli.train.joined import bare


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
    biased = bare(mlp.up, mlp.down) and mlp.up.bias is not None and linear.suits(*mlp.up.weight.shape)
    return biased and mlp.act is ACTIVATIONS["gelu_tanh"] and mlp.dropout.p == 0
