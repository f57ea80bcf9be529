"""Memories of earlier segments between batches: row b of a batch is read behind what row b of the one before left.

Within a batch the rows of each micro-batch take their share of the memories and leave it behind. Where an epoch begins
nothing is remembered. What is carried is part of a run's state, so a resumed run reads what it would have read.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from xtcli.data.order import Lanes, Order
from xtcli.runs.state import Stateful


class Carried:
    """The memories (L, M, B, D) of all rows; with an order that does not go on, nothing."""

    def __init__(self, order: Order | Lanes | None, device: torch.device) -> None:
        self.order, self.device = order, device
        self.mems: Tensor | None = None
        self.old: Tensor | None = None
        self.parts: list[Tensor] = []
        self.at = 0

    @property
    def on(self) -> bool:
        """Whether anything is carried."""
        return isinstance(self.order, Lanes)

    @property
    def state(self) -> tuple[Stateful, ...]:
        """What a checkpoint holds of it."""
        return (Stateful("memories", lambda: {"mems": self.mems}, self._restore),) if self.on else ()

    def begin(self, cursor: int) -> None:
        """A batch that starts at sample number `cursor` is read next."""
        if isinstance(self.order, Lanes) and self.order.begins(cursor):
            self.mems = None
        self.again()

    def again(self) -> None:
        """The batch is read from its first row on, as it was or for the first time."""
        self.old, self.parts, self.at = self.mems, [], 0

    def join(self, inputs: Mapping[str, Tensor], rows: int) -> dict[str, Any]:
        """The inputs of the next `rows` rows, with what they remember."""
        if not self.on:
            return dict(inputs)
        mine = None if self.old is None else self.old[:, :, self.at : self.at + rows]
        self.at += rows
        return {**inputs, "mems": mine, "use_mems": True}

    def take(self, mems: list[Tensor] | None) -> None:
        """What rows have left."""
        if self.on:
            assert mems is not None
            self.parts.append(torch.stack(mems).detach())

    def end(self, finite: bool = True) -> None:
        """The batch has been read; memories that are no numbers are forgotten."""
        if self.on:
            self.mems = torch.cat(self.parts, 2) if finite else None

    def _restore(self, tree: Mapping[str, Tensor | None]) -> None:
        mems = tree["mems"]
        self.mems = None if mems is None else mems.to(self.device)
