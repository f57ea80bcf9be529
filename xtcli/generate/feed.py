"""Feeding tokens to a model: each row's next-token logits, from a cache wherever a cache is exact.

A cache keeps what earlier tokens looked like. Parts of which `static` is False (rotations whose frequencies
change with the length, hashed attention) change that look once a row is longer than `steady`; from there on
the whole text is read at every step, which is slow but right. `uncached` says since which length.

Axes: B rows, T tokens fed now, V vocabulary.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from xtcli.generate.prompts import padded_left, padded_right
from xtcli.parts.chance import settled
from xtcli.parts.graphs import Graph
from xtcli.parts.heads import speaker
from xtcli.parts.seq2seq import EncoderDecoder

LENGTHS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
"""Kernels of attention for texts of ever new lengths: cuDNN makes a plan for each, which takes longer than the step."""


def steady(tower: nn.Module) -> int | None:
    """The longest text that every part reads alike when more follows; None is any length."""
    lengths = [module.steady for module in tower.modules() if getattr(module, "static", True) is False]
    return min((int(length) for length in lengths), default=None)  # type: ignore[arg-type]


def aligned(model: nn.Module) -> bool:
    """Whether what a token sees depends on its slot: then padding in front of a row would change what it says."""
    return any(getattr(module, "aligned", False) for module in model.modules())


class Feed:
    """Rows of tokens and the state of the model that has read them.

    eager: every step runs as the first one did, none is recorded. slow: why that is so where it need not have been.
    """

    eager = False
    slow: str | None = None

    def __init__(
        self,
        model: Graph,
        rows: list[list[int]],
        room: int,
        sources: list[list[int]] | None = None,
        images: Tensor | None = None,
    ) -> None:
        """`room` tokens may follow the longest row; `sources` are the texts (or images) that an encoder reads."""
        self.model, self.sources, self.images = model, sources, images
        self.memory: Tensor | None = None
        self.memory_mask: Tensor | None = None
        self.width = max(len(row) for row in rows)
        self.longest = self.width
        self.ids, self.pads = padded_left(rows, self.width + room, model.device)
        tower = model.decoder if isinstance(model, EncoderDecoder) else model
        self.steady = steady(tower)
        self.head: Any = model.heads[speaker(model.heads) or "lm"]
        self.uncached: int | None = None
        self.state: Any = None
        if self.steady is None or self.longest <= self.steady:
            self.state = model.new_state(len(rows), self.width + room)  # type: ignore[operator]
        else:
            self.uncached = self.longest

    def start(self) -> Tensor:
        """Read the prompts; the logits of the tokens after them, float32 (B, V)."""
        if self.sources is not None:
            ids, self.memory_mask = padded_right(self.sources, self.model.device)
            self.memory = self.model.encode(ids, self.memory_mask)  # type: ignore[operator]
        elif self.images is not None:
            self.memory = self.model.encode(extras={"pixel_values": self.images})  # type: ignore[operator]
        return self._read(0)

    def step(self, tokens: Tensor) -> Tensor:
        """Read one more token of each row, (B,) -> logits float32 (B, V)."""
        self.ids[:, self.width] = tokens
        self.width += 1
        self.longest += 1
        if self.state is not None and self.steady is not None and self.longest > self.steady:
            self.state, self.uncached = None, self.longest
        return self._read(0 if self.state is None else self.width - 1)

    def select(self, rows: Tensor) -> None:
        """Keep these rows, in this order; rows may repeat."""
        self.ids = self.ids[rows]
        self.pads = None if self.pads is None else self.pads[rows]
        self.memory = None if self.memory is None else self.memory[rows]
        self.memory_mask = None if self.memory_mask is None else self.memory_mask[rows]
        if self.state is not None:
            self.state.select(rows)

    def seen(self, vocab: int) -> Tensor:
        """Which tokens each row holds so far, bool (B, V)."""
        ids = self.ids[:, : self.width]
        real = torch.ones_like(ids, dtype=torch.bool)
        if self.pads is not None:
            real = torch.arange(self.width, device=ids.device) >= self.pads
        counts = torch.zeros(ids.shape[0], vocab, dtype=torch.long, device=ids.device)
        return counts.scatter_add_(1, ids.clamp(max=vocab - 1), (real & (ids < vocab)).long()) > 0

    def _read(self, begin: int) -> Tensor:
        """Feed the slots from `begin` on."""
        ids = self.ids[:, begin : self.width]
        places = mask = None
        if self.pads is not None:
            slots = torch.arange(begin, self.width, device=ids.device)
            places = (slots - self.pads).clamp(min=0)
            mask = slots >= self.pads if begin == 0 else None
        model: Any = self.model
        with settled(model), sdpa_kernel(LENGTHS) if ids.is_cuda else nullcontext():
            if self.memory is not None:
                hidden = model.decode(ids, self.memory, self.memory_mask, self.state)
            else:
                hidden = model.hidden(input_ids=ids, attention_mask=mask, position_ids=places, state=self.state)
        hidden.states, hidden.further = hidden.states[:, -1:], None
        return self.head.outputs(hidden)["logits"][:, -1].float()  # type: ignore[no-any-return]
