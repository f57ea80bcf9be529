"""One side of a model: an embedding and a stack, and the bookkeeping of places, padding and state between them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from xtcli.errors import refuse
from xtcli.parts import masks
from xtcli.parts.context import Ctx, Ledger, ModelState
from xtcli.parts.scope import Scope
from xtcli.registry import Config


class Tower(nn.Module):
    """An embedding and a stack, and the bookkeeping of places, padding and state between them."""

    embed: nn.Module
    stack: nn.Module

    def __init__(self, embed: Config, stack: Config, scope: Scope, shares: bool = False) -> None:
        super().__init__()
        self.embed = scope.make("embed", embed, shares)
        self.stack = scope.make("stack", stack)

    @property
    def limit(self) -> int | None:
        """The most tokens that the positions can tell apart, or None."""
        return getattr(self.embed, "limit", None)

    def table(self) -> Tensor | None:
        """The token table (V, D), where this tower owns one."""
        tokens = self.embed.tokens
        return None if tokens is None else tokens.weight  # type: ignore[union-attr, return-value]

    def new_state(self, batch: int, capacity: int, device: Any, dtype: Any) -> ModelState:
        """An empty state for `capacity` tokens."""
        if self.limit is not None and capacity > self.limit:
            raise refuse(f"{capacity} tokens do not fit into {self.limit} positions", "ask for fewer tokens")
        return ModelState(
            self.stack.new_state(batch, capacity, device, dtype),  # type: ignore[operator]
            torch.zeros(batch, capacity, dtype=torch.long, device=device),
            torch.ones(batch, capacity, dtype=torch.bool, device=device),
        )

    def forward(
        self,
        ids: Tensor | None,
        vectors: Tensor | None,
        *,
        mask: Tensor | None = None,
        segments: Tensor | None = None,
        places: Tensor | None = None,
        documents: Tensor | None = None,
        table: Tensor | None = None,
        memory: Tensor | None = None,
        memory_mask: Tensor | None = None,
        state: ModelState | None = None,
        trace: list[Tensor] | None = None,
        extras: Mapping[str, Tensor] | None = None,
        ledger: Ledger | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Ids (B, T) -> states (B, T, D), and which of the B x T tokens are real (None: all)."""
        extras = extras or {}
        batch, length, device = self.embed.size(ids, vectors, extras)  # type: ignore[operator]
        offset = 0 if state is None else state.length
        end = offset + length
        if places is None:
            if self.limit is not None and end > self.limit:
                raise refuse(f"the text has {end} tokens, the model's positions end at {self.limit}", "shorten it")
            places = torch.arange(offset, end, device=device)[None, :]
        elif places.dim() == 1:
            places = places[None, :]
        keep = None if mask is None else mask.to(device=device, dtype=torch.bool)
        if keep is not None and bool(keep.all()):
            keep = None
        if keep is not None and keep.shape != (batch, end):
            raise ValueError(f"attention_mask has shape {tuple(keep.shape)}, expected {(batch, end)}")
        keys, known = places, keep
        if state is not None:
            if end > state.capacity:
                raise ValueError(f"the state holds {state.capacity} tokens, {end} are needed")
            state.positions[:, offset:end] = places
            if keep is not None:
                state.keep[:, :end], state.padded = keep, True
            keys = state.positions[:, :end]
            known = state.keep[:, :end] if state.padded else None
        ctx = Ctx(
            positions=places,
            keys=keys,
            keep=known,
            documents=documents,
            offset=offset,
            table=self.table() if table is None else table,
            memory=memory,
            memory_visible=masks.keys_only(None if memory_mask is None else memory_mask.bool()),
            state=None if state is None else state.blocks,
            extras=extras,
            ledger=ledger or Ledger(),
        )
        x = self.stack(self.embed(ids, vectors, segments, ctx), ctx, trace)
        if state is not None:
            state.length = end
        return x, keep
