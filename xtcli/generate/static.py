"""A step of decoding by the model's own parts, whose operations are the same each time, so that a GPU can replay it.

Caches have a fixed size and are read whole, behind masks that are made on the device from the slot that a token takes.
Biases of all pairs of slots are made once. An encoder's memory is kept in a size that serves others as well.

Axes: B rows, C slots, H query heads, M slots of the memory.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from xtcli.fast.engine import Kernels, Step
from xtcli.fast.plan import Unplanned
from xtcli.parts import masks
from xtcli.parts.attention import Attention, CrossAttention
from xtcli.parts.context import Ctx, KeyValues, MemoryKeyValues, ModelState, Newest, Slots, Visible
from xtcli.parts.embed import Factorised, Tokens
from xtcli.parts.ffn import FeedForward
from xtcli.parts.graphs import Graph
from xtcli.parts.heads import Hidden, speaker
from xtcli.parts.moe import MixtureOfExperts
from xtcli.parts.seq2seq import EncoderDecoder
from xtcli.parts.stack import Stack

BIASES = 2**28
"""Bytes of biases that are kept, at most."""
MEMORY = 64
"""Slots of a memory are a multiple of this."""


class Static(Step):
    """A step of a decoder, alone or behind an encoder; raises Unplanned where a part must know more than the slot."""

    def __init__(
        self, model: Graph, rows: int, capacity: int, kernels: Kernels, memory: int | None, pads: bool
    ) -> None:
        """memory: slots of the encoder's memory; pads: whether rows have padding in front."""
        super().__init__(rows, capacity, model.device)
        whole: Any = model
        self.model, self.kernels = whole, kernels
        self.tower: Any = model.decoder if isinstance(model, EncoderDecoder) else model
        self.head = whole.heads[speaker(whole.heads) or "lm"]
        _check(self.tower)
        stack: Any = self.tower.stack
        place = torch.arange(capacity, device=model.device)
        self.place = place[None]
        biases = [_table(bias, capacity, model, pads) for bias in stack.shared.biases]
        if sum(bias.nbytes for bias in biases) > BIASES:
            raise Unplanned("the biases of all pairs of slots take too much memory")
        self.views = [(view.rule, None if view.bias is None else biases[view.bias]) for view in stack.shared.views]
        self.blocks = [
            {name: self._state(sublayer, memory) for name, sublayer in block.sublayers.items()} for block in stack.run
        ]
        self.memory = self.memory_seen = None
        if memory is not None:
            # Keys and values are all that is read of it; this says that there is one.
            self.memory = torch.zeros(rows, memory, 1, device=model.device, dtype=model.dtype)
            self.memory_seen = torch.zeros(rows, 1, 1, memory, dtype=torch.bool, device=model.device)

    def _state(self, sublayer: Any, memory: int | None) -> KeyValues | MemoryKeyValues | None:
        """The cache of one sublayer."""
        kind = type(sublayer)
        if isinstance(sublayer, Attention):
            usual = kind.forward is Attention.forward and kind.recall is Attention.recall
            if not usual or sublayer.relative is not None or sublayer.recurs:
                raise Unplanned(f"the mixer, {kind.__name__}, knows slots in a way of its own")
            made = KeyValues.new(self.rows, sublayer.groups, self.capacity, sublayer.head_dim, *self._like())
            return Slots(made.k, made.v, self.slots[:1])
        if kind is CrossAttention:
            if memory is None:
                return None
            made = KeyValues.new(self.rows, sublayer.groups, memory, sublayer.head_dim, *self._like())
            return MemoryKeyValues(made.k, made.v)
        if isinstance(sublayer, FeedForward):
            return None
        if kind is MixtureOfExperts and sublayer.new_state(1, 1, *self._like()) is None:
            return None
        raise Unplanned(f"a sublayer is a {kind.__name__}")

    def _like(self) -> tuple[torch.device, torch.dtype]:
        return self.model.device, self.model.dtype

    def begin(self, state: ModelState, tokens: Tensor, width: int, pads: Tensor | None) -> None:
        super().begin(state, tokens, width, pads)
        for mine, theirs in zip(self.blocks, state.blocks, strict=True):
            for name, cache in mine.items():
                read: Any = theirs[name]
                if isinstance(cache, Slots):
                    held = min(width, read.k.shape[2]) if isinstance(read, Newest) else width
                    # What stands behind the text is hidden, and must be numbers all the same.
                    cache.k[:, :, width:], cache.v[:, :, width:] = 0.0, 0.0
                    cache.k[:, :, width - held : width] = read.k[:, :, :held]
                    cache.v[:, :, width - held : width] = read.v[:, :, :held]
                elif isinstance(cache, MemoryKeyValues) and cache.k is not None and cache.v is not None:
                    slots = read.k.shape[2]
                    cache.k[:, :, :slots], cache.v[:, :, :slots] = read.k, read.v
                    cache.k[:, :, slots:], cache.v[:, :, slots:] = 0.0, 0.0

    def remember(self, memory: Tensor, mask: Tensor | None) -> None:
        """Which slots of a memory (B, M, D) are real: all, or those of a mask (B, M)."""
        assert self.memory_seen is not None, "the step was made for a memory"
        self.memory_seen.zero_()
        visible = masks.keys_only(mask).mask
        self.memory_seen[..., : memory.shape[1]] = True if visible is None else visible

    def logits(self) -> Tensor:
        slots, pads = self.slots[:, None], self.pads[:, None]
        places = (slots - pads).clamp(min=0)  # (B, 1)
        keys = torch.minimum(
            (self.place - pads).clamp(min=0), places
        )  # (B, C); slots not yet in use are no longer text
        model, tower, ids = self.model, self.tower, self.tokens[:, None]
        split = isinstance(model, EncoderDecoder)
        shared = model.shared_table() if split else None
        ctx = Ctx(
            positions=places,
            keys=keys,
            offset=self.capacity - 1,
            table=tower.table() if shared is None else shared,
            memory=self.memory,
            memory_visible=Visible(self.memory_seen),
            ids=ids,
            placed=True,
        )
        x = tower.embed(ids, None, None, ctx)
        stack = tower.stack
        turns = tuple(turn.tables(ctx, x.dtype) for turn in stack.shared.turns)
        ctx = replace(ctx, turns=turns, visible=tuple(self._visible(rule, bias, pads) for rule, bias in self.views))
        for block, state in zip(stack.run, self.blocks, strict=True):
            x = block(x, ctx.within(state))
        hidden = Hidden(stack.norm(x), model.output_table() if split else tower.table(), None, ids)
        scores: Tensor = self.head.outputs(hidden)["logits"]
        return scores[:, -1].float()

    def _visible(self, rule: Any, bias: Tensor | None, pads: Tensor) -> Visible:
        """What the token sees of the slots, (B, 1, 1, C) or, with a bias, (B, H, 1, C)."""
        slot = self.slots[:1, None]
        seen = (masks.allowed(rule, slot, self.place) & (self.place <= slot) & (self.place >= pads)) | (
            self.place == slot
        )
        seen = seen[:, None, None]
        if bias is None:
            return Visible(seen)
        return Visible(bias.index_select(1, self.slots[:1])[None].masked_fill(~seen, float("-inf")))

    def likeliest(self, logits: Tensor, vocab: int) -> None:
        self.kernels.likeliest(logits, vocab, self.tokens, self.slots, self.said)


def _check(tower: Any) -> None:
    """Raise Unplanned for a decoder that carries more from step to step than caches."""
    if type(tower.stack) is not Stack:
        raise Unplanned(f"the stack is a {type(tower.stack).__name__}")
    if tower.prefix is not None or tower.recurrence is not None or len(tower.stack.shared.layouts):
        raise Unplanned("there are memory tokens, recurrence or layouts of the text")
    if type(tower.embed) not in (Tokens, Factorised) or tower.embed.separator is not None:
        raise Unplanned(f"the embedding is a {type(tower.embed).__name__}")
    if hasattr(tower.embed.positions, "counted"):
        raise Unplanned("places are counted from the text")


def _table(bias: Any, capacity: int, model: Graph, pads: bool) -> Tensor:
    """What a bias adds to the scores of all pairs of slots, (H, C, C)."""
    if pads and not bias.slides:
        raise Unplanned("a bias depends on more than the distance of slots, and rows have padding")
    slots = torch.arange(capacity, device=model.device)[None]
    made: Tensor = bias.scores(Ctx(positions=slots, keys=slots), capacity)[0]
    return made.to(model.dtype)
