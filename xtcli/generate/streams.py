"""Feeding a model of two streams: the next token is a target behind the text, which only the query stream looks for.

    first step    text and a blank, which no token sees; the blank is the target
    next steps    the last two tokens and a blank, behind the memories of all tokens before them

Tokens of a prompt see one another. A token is remembered as it was when one token followed it: the last two are read
anew at each step, since the newer of them was not there when the older was first read. This is what the reference
does; reading the whole text at each step would let early tokens see late ones and is another model's answer.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from xtcli.generate.feed import Feed
from xtcli.generate.prompts import padded_left
from xtcli.parts.graphs import Graph
from xtcli.parts.twostream import in_streams

AGAIN = 2
"""Tokens that are read anew at each step."""
BLANK = 0
"""The id that stands at the target; no token sees it."""


class StreamFeed(Feed):
    """Rows of tokens and the memories of what the model has read."""

    def __init__(self, model: Graph, rows: list[list[int]], room: int, *rest: Any) -> None:
        self.model, self.memory, self.memory_mask = model, None, None
        self.width = self.longest = max(len(row) for row in rows)
        self.ids, self.pads = padded_left(rows, self.width + room + 1, model.device)
        self.head: Any = model.heads["lm"]
        self.steady, self.state = None, None
        self.mems: list[Tensor] | None = None
        recurrence: Any = model.recurrence
        self.remembers = recurrence is not None and recurrence.in_eval
        self.uncached = None if self.remembers else self.longest

    def start(self) -> Tensor:
        return self._read(0)

    def select(self, rows: Tensor) -> None:
        self.ids = self.ids[rows]
        self.pads = None if self.pads is None else self.pads[rows]
        self.mems = None if self.mems is None else [memory[:, rows] for memory in self.mems]

    def step(self, tokens: Tensor) -> Tensor:
        self.ids[:, self.width] = tokens
        self.width += 1
        self.longest += 1
        return self._read(0 if self.mems is None else max(self.width - AGAIN, 0))

    def _read(self, begin: int) -> Tensor:
        """Feed the tokens from `begin` on, and a blank behind them."""
        rows, device, model = self.ids.shape[0], self.ids.device, self.model
        blank = self.ids.new_full((rows, 1), BLANK)
        ids = torch.cat((self.ids[:, begin : self.width], blank), 1)
        length = ids.shape[1]
        order = torch.zeros(rows, length, length, device=device, dtype=model.dtype)
        order[:, :, -1] = 1
        target = torch.zeros(rows, 1, length, device=device, dtype=model.dtype)
        target[:, 0, -1] = 1
        given: dict[str, Any] = {"input_ids": ids, "perm_mask": order, "target_mapping": target}
        if "backwards" in model.accepts:
            given["backwards"] = torch.zeros(rows, dtype=torch.long, device=device)
        known = 0
        if self.mems is not None:
            given["mems"] = [memory[:-AGAIN] for memory in self.mems]
            known = given["mems"][0].shape[0]
        if self.pads is not None:
            slots = torch.arange(begin - known, self.width + 1, device=device)
            given["attention_mask"] = slots >= self.pads
        hidden = model.hidden(**given, use_mems=self.remembers)
        self.mems = hidden.mems
        return self.head.outputs(hidden)["logits"][:, -1].float()  # type: ignore[no-any-return]


def feed_for(model: Graph) -> type[Feed]:
    """How tokens are fed to this model."""
    return StreamFeed if in_streams(model) else Feed
