"""What travels beside x: `Ctx`, and the states that decoding carries from step to step.

Axes: B batch, T queries (tokens fed now), S keys (tokens seen so far and now), H query heads,
G key/value heads, D head width.

Training and decoding are one path: without a state S = T; with one, the T new tokens take the next
slots of the caches and S counts all slots in use. States are written in place.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

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

    def __init__(self) -> None:
        self.left: dict[str, dict[int, Tensor]] = {}

    def leave(self, name: str, number: int, value: Tensor) -> None:
        """Leave one tensor."""
        self.left.setdefault(name, {})[number] = value

    def read(self, name: str) -> Sequence[Tensor]:
        """All tensors of a name, by number."""
        return [value for _, value in sorted(self.left.get(name, {}).items())]


@dataclass(frozen=True)
class Visible:
    """Which keys each query may see, ready for the kernel.

    `mask` is None (everything), bool (True = see) or additive, broadcastable to (B, H, T, S);
    `causal` says that the mask is exactly the lower triangle and need not be stored.
    """

    mask: Tensor | None = None
    causal: bool = False


@dataclass(frozen=True)
class Ctx:
    """The tensors and constants that parts share during one call."""

    positions: Tensor  # (B|1, T) place of each query token in its document
    keys: Tensor  # (B|1, S) place of each key slot
    keep: Tensor | None = None  # (B, S) True where a key slot holds a real token
    documents: Tensor | None = None  # (B, S) number of the document that a slot belongs to
    offset: int = 0  # slots in use before this call
    visible: tuple[Visible, ...] = ()
    turns: tuple[Any, ...] = ()  # rotary tables, one for each distinct rotation of the stack
    table: Tensor | None = None  # (V, E) the token table, for tied heads and shared embeddings
    memory: Tensor | None = None  # (B, M, D_m) encoder output
    memory_visible: Visible = field(default_factory=Visible)
    state: Any = None
    extras: Mapping[str, Tensor] = field(default_factory=dict)  # inputs that only some parts read, by name
    ledger: Ledger = field(default_factory=Ledger)

    def within(self, state: Any) -> Ctx:
        """This context with the state of one child."""
        return self if state is None and self.state is None else replace(self, state=state)


@dataclass
class KeyValues:
    """A cache of keys and values: (B, G, capacity, D) each, filled from slot 0 on."""

    k: Tensor
    v: Tensor

    @classmethod
    def new(cls, batch: int, heads: int, capacity: int, dim: int, device: Any, dtype: Any) -> KeyValues:
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
class MemoryKeyValues:
    """Keys and values of the encoder memory, made at the first step and kept."""

    k: Tensor | None = None
    v: Tensor | None = None

    def select(self, rows: Tensor) -> None:
        if self.k is not None and self.v is not None:
            self.k, self.v = self.k[rows], self.v[rows]


@dataclass
class ModelState:
    """The state of a whole model: caches of the parts, and what is known of each slot."""

    blocks: list[Mapping[str, State | None]]
    positions: Tensor  # (B, capacity)
    keep: Tensor  # (B, capacity)
    length: int = 0
    padded: bool = False  # whether any slot in use is padding

    @property
    def capacity(self) -> int:
        """Tokens that fit."""
        return self.keep.shape[1]

    def select(self, rows: Tensor) -> None:
        """Keep these batch rows, in this order; rows may repeat."""
        self.positions, self.keep = self.positions[rows], self.keep[rows]
        for block in self.blocks:
            for state in block.values():
                if state is not None:
                    state.select(rows)
