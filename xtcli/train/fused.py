"""What stands beside a block's products in the same kernels: biases and activations; sums beside norms."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from xtcli.fast import linear, norms
from xtcli.parts.activations import ACTIVATIONS
from xtcli.parts.context import Ctx
from xtcli.parts.ffn import MLP
from xtcli.parts.linear import Linear
from xtcli.parts.stack import Block, Stack
from xtcli.parts.wiring import Joining, PostNorm, PreNorm, Wiring, active
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


def fuse_norms(model: nn.Module) -> int:
    """Let wirings that norm before or behind each sublayer do so by fast/norms.py, with the sums of the stream.

    In place; returns how many wirings were changed. They take another class, which is the same for all: a function
    given to each would be compiled anew for each. For models in 16 bits on a GPU alone.
    """
    count = 0
    for stack in [module for module in model.modules() if isinstance(module, Stack) and module.recurrence is None]:
        for block in [module for module in stack.modules() if isinstance(module, Block)]:
            wiring: Any = block.wiring
            if type(wiring) in SWIFT and _normable(wiring, block):
                wiring.__class__ = SWIFT[type(wiring)]
                count += 1
    return count


def _normable(wiring: Wiring, block: Block) -> bool:
    """Whether the kernels take all norms of a wiring, and sublayers read nothing beside what is normed."""
    alone = not any(getattr(sublayer, "reads_stream", False) for sublayer in block.sublayers.values())
    return alone and all(norms.suits(norm) for norm in wiring.norm.values())


class SwiftPreNorm(PreNorm):
    """`PreNorm`; a sum and the norm of the next sublayer are one kernel."""

    def forward(self, x: Tensor, sublayers: Mapping[str, nn.Module], ctx: Ctx) -> Tensor:
        if not torch.is_grad_enabled():
            return super().forward(x, sublayers, ctx)
        y = None
        for name, sublayer, own in active(sublayers, ctx):
            norm = norms.norm_of(self.norm[name])
            x, n = norms.passed(x, norm) if y is None else norms.added(x, y, norm)
            y = sublayer(n, own)
            if not _plain(self, name):
                x, y = x + self.weigh(name, y), None
        return x if y is None else x + y


class SwiftPostNorm(PostNorm):
    """`PostNorm`; a sum and its norm are one kernel, which on the way back adds up what the stream brings and what the
    next sublayer does."""

    def forward(self, x: Tensor, sublayers: Mapping[str, nn.Module], ctx: Ctx) -> Tensor:
        if not torch.is_grad_enabled():
            return super().forward(x, sublayers, ctx)
        read, steps = x, list(active(sublayers, ctx))
        for number, (name, sublayer, own) in enumerate(steps, 1):
            y, norm = sublayer(read, own), norms.norm_of(self.norm[name])
            if not _plain(self, name):
                x, y = x + self.weigh(name, y), None
            if number == len(steps):
                return norms.normed(x, y, norm)
            x, read = norms.behind(x, y, norm)
        return x


def _plain(wiring: Joining, name: str) -> bool:
    """Whether a sublayer's output joins the stream as it is."""
    dropout: Any = wiring.dropouts[name] if name in wiring.dropouts else wiring.dropout  # noqa: SIM401
    dropped = wiring.training and (dropout.p > 0 or wiring.path.rate > 0)
    return not dropped and wiring.scale.get(name, 1.0) == 1.0


SWIFT: dict[type[nn.Module], type[Wiring]] = {PreNorm: SwiftPreNorm, PostNorm: SwiftPostNorm}
