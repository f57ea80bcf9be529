"""Segment recurrence: attention over what a layer saw in the segments before (Dai et al. 2019, arXiv:1901.02860).

    k, v from norm([memory | x]), q from norm(x);   memory' = the newest `length` of [memory | x], without gradient

The memory of a mixer is its un-normed input, so that gains and biases of the norm act on it as they are now. It
takes the slots before those of the segment; all of it is visible but for what the mask rule hides. Outside the model
memories are what the field calls `mems`: (M, B, D) for each recurrent mixer, in the order they run.

With `start: zeros` a text without a memory begins behind `length` zero vectors, which are seen like any other key.
Padding on the left then stands for such vectors, and as many of the memory's are hidden: a row is what it is alone.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from xtcli import registry
from xtcli.parts.context import Ctx, Memory, ModelState
from xtcli.parts.embed import NoPlaces
from xtcli.parts.scope import Impossible, Scope
from xtcli.registry import field


class Recurrence(registry.Config):
    """How much of a segment is remembered in the next."""

    length: int | None = field("inputs that each attention keeps, the newest; null = all", None, ge=0, tiny=17)
    start: Literal["empty", "zeros"] = field("what stands before a text: nothing, or `length` zero vectors", "empty")
    reuse: int | None = field(
        "places of a segment that are remembered, from its first; null = all", None, gt=0, tiny=16
    )
    in_eval: bool = field("memories are given out in evaluation, unless use_mems says otherwise", True)
    in_training: bool = field("memories are given out in training, unless use_mems says otherwise", True)

    @property
    def lead(self) -> int:
        """Slots in front of a text that begins."""
        return (self.length or 0) if self.start == "zeros" else 0

    def gives(self, training: bool, asked: bool | None, mems: object) -> bool:
        """Whether a call gives its memories out."""
        if self.length == 0 and mems is None:
            return False
        return asked if asked is not None else self.in_training if training else self.in_eval


def refuse_absolute(tower: Any, scope: Scope) -> None:
    """File absolute positions before a recurrent stack: they begin anew in each segment, memory would lie in it."""
    positions = getattr(tower.embed, "positions", None)
    if getattr(tower.stack, "recurrence", None) is not None and not isinstance(positions, NoPlaces | None):
        cause = "absolute positions begin anew in each segment, so remembered places would stand beside the new ones"
        scope.file(Impossible("embed.positions", cause, "use relative ones: stack.position"))


def check(block: Any, config: Any, scope: Scope) -> None:
    """File what in a block cannot carry memories."""
    for name, sublayer in block.sublayers.items():
        mixes = config.sublayers[name].slot == "mixer" and not getattr(sublayer, "reads_memory", False)
        if mixes and not getattr(sublayer, "recurs", False):
            scope.file(Impossible(f"sublayers.{name}", "keeps no memory of earlier segments", "leave out recurrence"))
    if not getattr(block.wiring, "recurs", False):
        scope.file(Impossible("wiring", "does not carry memories of earlier segments", "use pre or post"))


def mixers(stack: Any) -> list[dict[str, bool]]:
    """Which sublayers of each block keep memories."""
    return [
        {name: bool(getattr(sublayer, "recurs", False)) for name, sublayer in block.sublayers.items()}
        for block in stack.blocks
    ]


def given(mems: Sequence[Tensor | None] | Tensor, stack: Any) -> list[Tensor] | None:
    """Memories as the field has them, (M, B, D) each, as (B, M, D); raises ValueError for a wrong number of them."""
    wanted = sum(sum(block.values()) for block in mixers(stack))
    if len(mems) != wanted:
        raise ValueError(f"{len(mems)} mems were given, the model has {wanted} attentions that remember")
    if any(one is None for one in mems):
        return None
    return [one.transpose(0, 1) for one in mems]  # type: ignore[union-attr]


@dataclass(frozen=True)
class Call:
    """One call of a recurrent stack: places of its queries (B|1, T), which begin behind the memory, and of the keys it
    makes (B|1, M + T); which keys are seen, slots of memory in front, the states of the blocks, and the places of the
    keys again where memory is among them."""

    places: Tensor
    keys: Tensor
    known: Tensor | None
    lead: int
    blocks: list[Any]
    fed: Tensor | None


def begin(blocks: Sequence[Any], old: Tensor) -> None:
    """Let fresh states of a stack begin behind `old` (B, M, D)."""
    for block in blocks:
        for state in block.values():
            if isinstance(state, Memory):
                state.old = old


def enter(
    stack: Any,
    config: Recurrence,
    size: tuple[int, int],
    places: Tensor,
    keep: Tensor | None,
    state: ModelState | None,
    old: Sequence[Tensor] | None,
) -> Call:
    """What the memories are in a call of (rows, width) with tokens at `places` (B|1, T), of which `keep` are text.

    old: what was remembered, (B, M, D) for each mixer; None for a text that begins. With a state it is in there.
    """
    batch, width = size
    length, device = places.shape[1], places.device
    weights = next(stack.parameters())
    starts = config.start == "zeros" and old is None
    if state is not None:
        lead, enters = state.lead, state.lead if state.length == 0 else 0
    else:
        lead = enters = config.lead if starts else old[0].shape[1] if old else 0
    known, blank, pads = keep, None, None
    if keep is not None and starts:
        known, blank, pads = behind(keep, lead)
        blank = blank[:, -length:]
    elif keep is not None and keep.shape[1] == length and lead:
        known = torch.cat((keep.new_ones(batch, lead), keep), 1)
    places = places + lead
    keys = places
    if enters:
        keys = torch.cat((places[:, :1] - enters + torch.arange(enters, device=device), places), 1)
        if pads is not None:
            slots = torch.arange(enters + length, device=device)
            keys = torch.where(slots < enters + pads, slots - pads, keys)
    if state is not None:
        for block in state.blocks:
            for one in block.values():
                if isinstance(one, Memory):
                    one.blank = blank
        blocks: list[Any] = list(state.blocks)
    else:
        if old is None:
            empty = torch.zeros(batch, lead, width, device=device, dtype=weights.dtype) if lead else None
            rest: Any = itertools.repeat(empty)
        else:
            rest = iter(old)
        reuse = length if config.reuse is None else min(config.reuse, length)
        blocks = [
            {name: Memory(next(rest), config.length, reuse, blank) if keeps else None for name, keeps in block.items()}
            for block in mixers(stack)
        ]
    return Call(places, keys, known, lead, blocks, keys if enters else None)


def left(states: Sequence[Any]) -> list[Tensor]:
    """What the memories hold after a call, as the field has it: (M, B, D) each."""
    memories = [state for block in states for state in block.values() if isinstance(state, Memory)]
    return [memory.new.transpose(0, 1) for memory in memories if memory.new is not None]


def remembered(model: Any, rows: int) -> Tensor:
    """Full memories of `rows` rows on the meta device, as the field has them: (L, M, rows, D)."""
    stack = model.stack
    count = sum(sum(block.values()) for block in mixers(stack))
    return torch.empty(count, stack.recurrence.length or 0, rows, stack.width, dtype=model.dtype, device="meta")


def joined(x: Tensor, ctx: Ctx) -> tuple[Tensor, Ctx]:
    """In a mixer: what keys and values are made of, (B, M + T, D), and the context with the mixer's own state."""
    memory = ctx.state
    if not isinstance(memory, Memory):
        return x, ctx
    return (x if memory.read is None else torch.cat((memory.read, x), 1)), ctx.own(memory.cache)


def behind(keep: Tensor, lead: int) -> tuple[Tensor, Tensor, Tensor]:
    """`keep` (B, T) behind `lead` zero vectors: what is seen (B, lead + T), what is real text or padding on the right
    (B, T), and how much padding is on the left (B, 1)."""
    pads = (keep.cumsum(1) == 0).sum(1, keepdim=True)
    pads = pads * (pads < keep.shape[1])
    slots = torch.arange(lead + keep.shape[1], device=keep.device)[None]
    text = torch.cat((torch.ones_like(keep[:, :1]).expand(-1, lead), keep), 1)
    return (slots >= pads) & (text | (slots < lead + pads)), slots[:, lead:] >= lead + pads, pads
