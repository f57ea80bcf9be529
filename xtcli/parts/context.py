"""What travels beside x: `Ctx`, and the states that decoding carries from step to step.

Axes: B batch, T queries (tokens fed now), S keys (tokens seen so far and now), H query heads,
G key/value heads, D head width.

Training and decoding are one path: without a state S = T; with one, the T new tokens take the next
slots of the caches and S counts all slots in use. States are written in place.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, Self

import torch
from torch import Tensor


class State(Protocol):
    """What one part remembers between calls."""

    def select(self, rows: Tensor) -> None:
        """Keep these batch rows, in this order; rows may repeat (beams)."""


class Ledger:
    """What parts leave for the graph besides x: router scores, memories, losses of their own.

    An entry has a name and a number (that of the layer), and is written over when a block is computed again.
    """

    def __init__(self, left: dict[str, dict[int, Tensor]] | None = None, side: str = "") -> None:
        self.left: dict[str, dict[int, Tensor]] = {} if left is None else left
        self.prefix = side

    def side(self, name: str) -> Ledger:
        """This ledger as one of several towers sees it, whose layers have the same numbers."""
        return Ledger(self.left, f"{self.prefix}{name}.")

    def leave(self, name: str, number: int, value: Tensor) -> None:
        """Leave one tensor."""
        self.left.setdefault(self.prefix + name, {})[number] = value

    def read(self, name: str) -> Sequence[Tensor]:
        """All tensors of a name, by number."""
        return [value for _, value in self.numbered(name)]

    def numbered(self, name: str) -> Sequence[tuple[int, Tensor]]:
        """All tensors of a name with their numbers."""
        return sorted(self.left.get(self.prefix + name, {}).items(), key=lambda entry: entry[0])


class Decisions:
    """Choices that rounding may tip (hash buckets, routes), to be repeated where a part is computed again.

    Without `made` they are recorded; with it they are played back in the order they were made.
    """

    def __init__(self, made: Sequence[Tensor] | None = None) -> None:
        self.replays = made is not None
        self.made: list[Tensor] = list(made or ())

    def settle(self, make: Callable[[], Tensor]) -> Tensor:
        """What `make` gives, or gave at the first time."""
        if self.replays:
            return self.made.pop(0)
        chosen = make()
        self.made.append(chosen)
        return chosen


@dataclass(frozen=True)
class Visible:
    """Which keys each query may see, ready for the kernel.

    `mask` is None (everything), bool (True = see) or additive, broadcastable to (B, H, T, S);
    `causal` says that the mask is exactly the lower triangle and need not be stored. `blocks` (blockmasks.py) or
    `sliding` (slides.py), in place of both, is for those alone that asked for it.
    """

    mask: Tensor | None = None
    causal: bool = False
    blocks: Any = None
    sliding: Any = None


@dataclass(frozen=True)
class Ctx:
    """The tensors and constants that parts share during one call."""

    positions: Tensor  # (B|1, T) place of each query token in its document
    keys: Tensor  # (B|1, S) place of each key slot
    keep: Tensor | None = None  # (B, S) True where a key slot holds a real token
    documents: Tensor | None = None  # (B, S) number of the document that a slot belongs to
    offset: int = 0  # slots in use before this call
    prefix: int = 0  # slots in front that every later one sees (memory tokens)
    prefix_reads: bool = False  # whether those see everything too
    behind: int = 0  # slots behind the text that are no words of it (entities)
    visible: tuple[Visible, ...] = ()
    turns: tuple[Any, ...] = ()  # rotary tables, one for each distinct rotation of the stack
    layouts: tuple[Any, ...] = ()  # what attentions over few keys know of the text, one for each distinct layout
    ids: Tensor | None = None  # (B, T) the tokens themselves, where they were given as ids
    placed: bool = False  # whether the caller said the positions
    mask: Tensor | None = None  # (B, S) the attention mask as it was given, which may say more than real or not
    table: Tensor | None = None  # (V, E) the token table, for tied heads and shared embeddings
    memory: Tensor | None = None  # (B, M, D_m) encoder output
    memory_visible: Visible = field(default_factory=Visible)
    state: Any = None
    extras: Mapping[str, Tensor] = field(default_factory=dict)  # inputs that only some parts read, by name
    ledger: Ledger = field(default_factory=Ledger)
    decisions: Decisions | None = None  # set where a computation is recorded or repeated
    segments: Tensor | None = None  # (B, T) number of the segment that a query token belongs to
    fed: Tensor | None = None  # (B|1, M + T) places of the keys of this call, where they are not those of its queries

    def within(self, state: Any) -> Ctx:
        """This context with the state of one child."""
        return self if state is None and self.state is None else replace(self, state=state)

    def own(self, state: Any) -> Ctx:
        """This context with another state."""
        return replace(self, state=state)

    def own_places(self) -> Ctx:
        """This context with the keys of this call, memory first, in the place of its queries."""
        return self if self.fed is None else replace(self, positions=self.fed)


@dataclass
class KeyValues:
    """A cache of keys and values: (B, G, capacity, D) each, filled from slot 0 on."""

    k: Tensor
    v: Tensor

    @classmethod
    def new(cls, batch: int, heads: int, capacity: int, dim: int, device: Any, dtype: Any) -> Self:
        shape = (batch, heads, capacity, dim)
        return cls(torch.zeros(shape, device=device, dtype=dtype), torch.zeros(shape, device=device, dtype=dtype))

    def append(self, k: Tensor, v: Tensor, offset: int) -> tuple[Tensor, Tensor]:
        """Write T new keys and values behind `offset`; return all S of them."""
        end = offset + k.shape[2]
        self.k[:, :, offset:end] = k
        self.v[:, :, offset:end] = v
        return self.k[:, :, :end], self.v[:, :, :end]

    def select(self, rows: Tensor) -> None:
        self.k, self.v = self.k[rows], self.v[rows]


@dataclass
class Newest(KeyValues):
    """A cache of the newest keys and values alone, as many as it has slots for: all that a window looks back to."""

    def append(self, k: Tensor, v: Tensor, offset: int) -> tuple[Tensor, Tensor]:
        """Put T new keys and values behind those that are kept; return both, and keep the newest of them."""
        slots = self.k.shape[2]
        held = min(offset, slots)
        k, v = torch.cat((self.k[:, :, :held], k), 2), torch.cat((self.v[:, :, :held], v), 2)
        count = min(k.shape[2], slots)
        first = k.shape[2] - count
        self.k[:, :, :count], self.v[:, :, :count] = k[:, :, first:], v[:, :, first:]
        return k, v


@dataclass
class Slots(KeyValues):
    """A cache for steps of one token that are the same operations each time: the slot is said by a tensor, at (1,)."""

    at: Tensor

    def append(self, k: Tensor, v: Tensor, offset: int) -> tuple[Tensor, Tensor]:
        """Write one new key and value into the slot; return all slots, those that are not in use too."""
        self.k.index_copy_(2, self.at, k)
        self.v.index_copy_(2, self.at, v)
        return self.k, self.v


@dataclass
class MemoryKeyValues:
    """Keys and values of the encoder memory, made at the first step and kept."""

    k: Tensor | None = None
    v: Tensor | None = None

    def select(self, rows: Tensor) -> None:
        if self.k is not None and self.v is not None:
            self.k, self.v = self.k[rows], self.v[rows]


@dataclass
class Memory:
    """Un-normed inputs of one mixer from segments before: `old` (B, M, D) is read by this call, `new` is left by it.

    keep: the newest places that are kept, None for all. reuse: how many places of a segment are remembered, from its
    first. blank (B, T): False where padding stands for a zero vector. cache: keys and values of text read before, in
    decoding; then `old` is what comes before the first of it.
    """

    old: Tensor | None = None
    keep: int | None = None
    reuse: int | None = None
    blank: Tensor | None = None
    cache: Any = None
    read: Tensor | None = None  # `old` as the mixer reads it
    new: Tensor | None = None

    def take(self, x: Tensor, norm: Callable[[Tensor], Tensor] | None) -> Tensor:
        """Remember the inputs x (B, T, D) of a call; returns them with what is blank set to zero."""
        if self.blank is not None:
            x = x * self.blank[:, : x.shape[1], None].to(x.dtype)
        self.read = self.old if self.old is None or norm is None else norm(self.old.to(x.dtype))
        if self.cache is not None:
            self.old = None
            return x
        fresh = x.detach()[:, : self.reuse]
        both = fresh if self.old is None else torch.cat((self.old.to(x.dtype), fresh), 1)
        self.new = both if self.keep is None else both[:, max(both.shape[1] - self.keep, 0) :]
        return x

    def select(self, rows: Tensor) -> None:
        self.old = None if self.old is None else self.old[rows]
        if self.cache is not None:
            self.cache.select(rows)


@dataclass
class ModelState:
    """The state of a whole model: caches of the parts, and what is known of each slot."""

    blocks: list[Mapping[str, State | None]]
    positions: Tensor  # (B, capacity)
    keep: Tensor  # (B, capacity)
    length: int = 0
    padded: bool = False  # whether any slot in use is padding
    lead: int = 0  # slots of memory in front of the text

    @property
    def capacity(self) -> int:
        """Tokens that fit."""
        return self.keep.shape[1] - self.lead

    def select(self, rows: Tensor) -> None:
        """Keep these batch rows, in this order; rows may repeat."""
        self.positions, self.keep = self.positions[rows], self.keep[rows]
        for block in self.blocks:
            for state in block.values():
                if state is not None:
                    state.select(rows)
