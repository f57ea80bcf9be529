"""Block-sparse attention with random blocks (Zaheer et al. 2020, BigBird, arXiv:2007.14062).

    first and last block of queries      the whole text
    block i of the others                blocks 0, i - 1, i, i + 1, last and `random` more

A text of at most 5 + 2 random blocks is read in full. Random blocks are drawn for each layer and each key/value head,
always the same for the same number of blocks. One surprise: where a model is evaluated they are all block 0, as the
published models are used; its scores then enter the softmax 1 + random times, which is log(1 + random) added to each.
`drawn: always` evaluates with the drawn blocks.

Axes as in bands.py: N blocks of C places.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from xtcli.fast import runs_on
from xtcli.parts import masks, routes
from xtcli.parts.attention import Attention, Heads
from xtcli.parts.bands import additive, beside, blocks, by_blocks, in_slabs
from xtcli.parts.blocklists import Listed, draws, lists
from xtcli.parts.blockmasks import labels, lasting
from xtcli.parts.context import Ctx, Visible
from xtcli.parts.kernels import fused
from xtcli.parts.local import refuse_in_decoder
from xtcli.parts.masks import keys_only, render
from xtcli.parts.scope import Impossible, Scope
from xtcli.registry import field, part


@dataclass(frozen=True)
class Blocked:
    """A text in blocks. `full` is what the ordinary kernel needs where the text is short. Else `seen` (B|1, N - 2, C,
    5 C), bool or additive, are the keys of the rows between and `ends` those of the first and last block; `real`
    (B|1, N, C) and `documents` tell of each place; `drawn` (layers, G, N - 2, R) are random blocks, None where block
    0 stands for them. `whole` is all that for the kernel itself, for each layer, and then nothing else is there."""

    full: Visible | None = None
    whole: tuple[Listed, ...] = ()
    seen: Tensor | None = None
    ends: Visible | None = None
    real: Tensor | None = None
    documents: Tensor | None = None
    drawn: Tensor | None = None


class BlockLayout(nn.Module):
    """The blocks of a text, and what is drawn for each layer that has joined."""

    def __init__(self, size: int, random: int, heads: int, groups: int, always: bool, free: bool) -> None:
        super().__init__()
        self.size, self.random, self.heads, self.groups, self.always = size, random, heads, groups, always
        # Sizes that a tile of the kernel can have.
        self.free = free and size in (16, 32, 64, 128)
        self.layers: list[int] = []

    def join(self, layer: int) -> int:
        """The place of a layer's draws."""
        self.layers.append(layer)
        return len(self.layers) - 1

    def lay(self, x: Tensor, ctx: Ctx, biases: Any) -> Blocked:
        """The blocks for queries x (B, T, dim)."""
        length, size = x.shape[1], self.size
        if length <= (5 + 2 * self.random) * size:
            return Blocked(full=render(masks.FULL, ctx, length, None, dense=False))
        count = -(-length // size)
        if self.free and routes.suits(x) and runs_on(x.device):
            return Blocked(whole=tuple(self.whole(layer, x, ctx) for layer in self.layers))
        real = torch.ones(1, length, dtype=torch.bool, device=x.device) if ctx.keep is None else ctx.keep
        real = blocks(real[:, None, :, None].float(), size)[:, 0, :, :, 0].bool()
        documents = None
        if ctx.documents is not None:
            # The fill of the last block has number 0, and no document may have it.
            documents = blocks(ctx.documents[:, None, :, None] + 2, size)[:, 0, :, :, 0]
        drawn = None
        if self.random and (self.training or self.always):
            drawn = torch.stack([draws(layer, self.groups, count, self.random) for layer in self.layers]).to(x.device)
        seen = self.between(real, documents)
        if self.random and drawn is None:
            often = torch.zeros(5 * size, dtype=x.dtype, device=x.device)
            often[:size] = math.log(1 + self.random)
            seen = additive(seen, x.dtype) + often
        return Blocked(None, (), seen, self.at_ends(real, documents), real, documents, drawn)

    def whole(self, layer: int, x: Tensor, ctx: Ctx) -> Listed:
        """What a layer's heads see, for the kernel; padding sees what it may, for its output is not used."""
        from xtcli.fast.blocks import attend

        drawn = self.random > 0 and (self.training or self.always)
        count = -(-x.shape[1] // self.size)
        found = lists(layer if drawn else None, self.heads, self.groups, count, self.random, x.device)
        often = 0.0 if drawn else math.log(1 + self.random)
        keep, documents = (None if y is None else y.expand(x.shape[0], -1) for y in (ctx.keep, ctx.documents))
        return Listed(lasting(found), self.size, labels(keep, documents), often, attend)

    def between(self, real: Tensor, documents: Tensor | None) -> Tensor:
        """What the rows 1 to N - 2 see of blocks 0, i - 1, i, i + 1 and the last. A block in twice counts once."""
        size = real.shape[2]
        seen = five(real)
        seen[:, 0, size : 2 * size] = False
        seen[:, -1, 3 * size : 4 * size] = False
        seen = seen[:, :, None, :]
        if documents is not None:
            seen = seen & (documents[:, 1:-1, :, None] == five(documents)[:, :, None, :])
        itself = torch.zeros(1, 1, size, 5 * size, dtype=torch.bool, device=real.device)
        itself.diagonal(2 * size, 2, 3).fill_(True)
        return seen | (~seen.any(-1, keepdim=True) & itself)

    def at_ends(self, real: Tensor, documents: Tensor | None) -> Visible:
        """What the first and the last block see."""
        if documents is None:
            return keys_only(real.flatten(1))
        own = documents[:, [0, -1]].flatten(1)[:, None, :, None]
        seen = (own == documents.flatten(1)[:, None, None, :]) & real.flatten(1)[:, None, None, :]
        return Visible(seen | ~seen.any(-1, keepdim=True))


def five(x: Tensor) -> Tensor:
    """(B, N, C, ...) -> for each row 1 to N - 2 blocks 0, i - 1, i, i + 1 and the last: (B, N - 2, 5 C, ...)."""
    rows = x.shape[1] - 2
    first, last = (end.expand(-1, rows, *end.shape[2:]) for end in (x[:, :1], x[:, -1:]))
    return torch.cat((first, x[:, :-2], x[:, 1:-1], x[:, 2:], last), 2)


@part("mixer", "block-sparse")
class BlockSparse(Attention):
    """Self-attention between few blocks."""

    honours = ("out",)
    linear = True
    by_width = True  # what a token sees depends on how far its row is filled up
    rule_fields = ("block",)

    class Config(Heads.Config):
        """Blocks that see the ends of the text, their neighbours and random others."""

        block: int = field("places of a block", 64, gt=0, tiny=8)
        random: int = field("random blocks that a block sees", 3, ge=0, tiny=1)
        drawn: Literal["training", "always"] = field("when they are drawn; else block 0 stands for them", "training")

    def __init__(self, config: Config, scope: Scope) -> None:
        refuse_in_decoder(config.kind, scope)
        Heads.__init__(self, config, scope, scope.dim)
        position = scope.position
        if position is not None and position.kind != "none":
            raise Impossible("", f"block-sparse attention has no positions of kind '{position.kind}'", "use none")
        self.size, self.random = config.block, config.random
        sizes = (config.block, config.random, self.heads, self.groups, config.drawn == "always", self.rate == 0.0)
        self.layout: int = scope.shared.layout(("block-sparse", *sizes), lambda: BlockLayout(*sizes))
        self.number = scope.shared.layouts[self.layout].join(scope.layer)
        # What a picture shows is this part of the config, read as the rule of a mask.
        self.rule = type(config)(heads=config.heads, block=config.block, random=config.random, drawn=config.drawn)
        number = f"{config.random} random block{'s' * (config.random != 1)} of each row"
        usual = "" if config.drawn == "always" else " in training, all block 0 where the model is used"
        self.sees = f"{number} {'are' if config.random != 1 else 'is'} seen as well{usual}" if config.random else ""

    @staticmethod
    def allowed(rule: Any, q: Tensor, k: Tensor) -> Tensor:
        """True where a query in slot `q` (T, 1) sees a key in slot `k` (1, S), without random blocks."""
        length = int(k.max()) + 1
        if length <= (5 + 2 * rule.random) * rule.block:
            return masks.allowed(masks.FULL, q, k)
        last = (length - 1) // rule.block
        mine, other = q // rule.block, k // rule.block
        ends = (mine == 0) | (mine == last) | (other == 0) | (other == last)
        return ends | ((mine - other).abs() <= 1)  # type: ignore[no-any-return]

    def new_state(self, batch: int, capacity: int, device: Any, dtype: Any) -> None:  # type: ignore[override]
        """None: a text is read at once."""
        return None

    def kernel(self, q: Tensor, k: Tensor, v: Tensor, visible: Visible) -> Tensor:
        """(B, H, T, D) and keys, values -> (B, H, T, D)."""
        return fused(q, k, v, visible, self.scale, self.rate if self.training else 0.0)

    def forward(self, x: Tensor, ctx: Ctx) -> Tensor:
        """x (B, T, dim) -> (B, T, dim)."""
        q = self.q_norm(self.split(self.q(x), self.heads))
        k = self.k_norm(self.split(self.k(x), self.groups))
        v = self.split(self.v(x), self.groups)
        found: Blocked = ctx.layouts[self.layout]
        if found.full is not None:
            y = self.kernel(q, k, v, found.full)
        else:
            y = found.whole[self.number].attend(q, k, v, self.scale) if found.whole else self.sparse(q, k, v, found)
            if ctx.keep is not None:
                y = y * ctx.keep[:, None, :, None]
        y = y.transpose(1, 2).flatten(-2)
        return self.o(y, x) if self.out_reads_input else self.o(y)  # type: ignore[no-any-return]

    def sparse(self, q: Tensor, k: Tensor, v: Tensor, found: Blocked) -> Tensor:
        """q (B, H, T, D), k and v (B, G, T, D) -> (B, H, T, D), block by block."""
        assert found.seen is not None and found.ends is not None
        length, size, seen = q.shape[2], self.size, found.seen
        q, k, v = (blocks(x, size) for x in (q, k, v))
        ends = self.kernel(q[:, :, [0, -1]].flatten(2, 3), k.flatten(2, 3), v.flatten(2, 3), found.ends)
        keys, values = (five(x.flatten(0, 1)).unflatten(0, x.shape[:2]) for x in (k, v))
        mask = seen[:, None]
        if found.drawn is not None:
            index = found.drawn[self.number]
            keys, values = torch.cat((keys, picked(k, index)), 3), torch.cat((values, picked(v, index)), 3)
            mask = beside(mask, self.seen_of(index, found))
        rows = q.shape[0]

        def step(first: int, last: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return by_blocks(self.kernel, q, k, v, mask[:, :, first:last])

        between = in_slabs(step, q[:, :, 1:-1], keys, values, rows * self.heads * size * keys.shape[3])
        first, last = ends.split(size, 2)
        return torch.cat((first[:, :, None], between, last[:, :, None]), 2).flatten(2, 3)[:, :, :length]

    def seen_of(self, index: Tensor, found: Blocked) -> Tensor:
        """What is seen of random blocks (G, N - 2, R): (B|1, H|1, N - 2, C|1, R C)."""
        assert found.real is not None
        seen = found.real[:, index].flatten(-2)[..., None, :]
        if found.documents is not None:
            theirs = found.documents[:, index].flatten(-2)[..., None, :]
            seen = seen & (found.documents[:, None, 1:-1, :, None] == theirs)
        return seen.repeat_interleave(self.heads // self.groups, 1)


def picked(x: Tensor, index: Tensor) -> Tensor:
    """Blocks of x (B, G, N, C, D) at `index` (G, M, R): (B, G, M, R C, D)."""
    groups, count = x.shape[1:3]
    flat = index + torch.arange(groups, device=x.device)[:, None, None] * count
    found = x.flatten(1, 2).index_select(1, flat.flatten())
    return found.unflatten(1, index.shape).flatten(3, 4)  # type: ignore[no-any-return]
