"""One side of a model: an embedding and a stack, and the bookkeeping of places, padding and state between them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from xtcli.errors import refuse
from xtcli.parts import masks, recurrence
from xtcli.parts.context import Ctx, Ledger, ModelState
from xtcli.parts.prefix import Prefix, behind, make_prefix, refuse_readers
from xtcli.parts.scope import Impossible, Scope
from xtcli.registry import Config


def table_width(embed: nn.Module, scope: Scope) -> int:
    """Width of the token table's rows; 0 where what enters has no table."""
    return getattr(embed, "width", scope.dim) if getattr(embed, "tokens", None) is not None else 0


def looks(keep: Tensor) -> bool:
    """Whether to look if a mask hides anything: a step of training must not wait for its device to know."""
    return keep.device.type == "cpu" or not torch.is_grad_enabled()


class Tower(nn.Module):
    """An embedding and a stack, and the bookkeeping of places, padding and state between them."""

    embed: nn.Module
    stack: nn.Module
    prefix: Prefix | None

    def __init__(
        self, embed: Config, stack: Config, scope: Scope, shares: bool = False, memory_tokens: int | None = None
    ) -> None:
        super().__init__()
        self.embed = scope.make("embed", embed, shares)
        self.make_stack(stack, scope, memory_tokens)

    def make_stack(self, stack: Config, scope: Scope, memory_tokens: int | None) -> None:
        """The stack, and the memory tokens in front of it."""
        self.prefix = make_prefix(memory_tokens, stack, scope)
        self.stack = behind(self.prefix, scope).make("stack", stack)
        if hasattr(self.stack, "enter"):
            try:
                self.stack.refuse(self.embed)  # type: ignore[operator]
            except Impossible as mistake:
                scope.file(mistake)
        refuse_readers(self.prefix, self.stack, scope)

    @property
    def limit(self) -> int | None:
        """The most tokens that the positions can tell apart, or None."""
        inner = getattr(getattr(self.stack, "shared", None), "limit", None)
        if inner is not None and self.prefix is not None:
            inner -= self.prefix.count
        outer = getattr(self.embed, "limit", None)
        if outer is not None:
            outer -= getattr(self.stack, "beyond", 0)
        limits = (outer, inner)
        return min((limit for limit in limits if limit is not None), default=None)

    def table(self) -> Tensor | None:
        """The token table (V, D), where this tower owns one."""
        tokens = self.embed.tokens
        return None if tokens is None else tokens.weight  # type: ignore[union-attr, return-value]

    @property
    def recurrence(self) -> recurrence.Recurrence | None:
        """What the stack remembers of earlier segments."""
        return getattr(self.stack, "recurrence", None)

    def new_state(self, batch: int, capacity: int, device: Any, dtype: Any) -> ModelState:
        """An empty state for `capacity` tokens."""
        if self.limit is not None and capacity > self.limit:
            raise refuse(f"{capacity} tokens do not fit into {self.limit} positions", "ask for fewer tokens")
        lead = 0 if self.recurrence is None else self.recurrence.lead
        slots = capacity + lead + (0 if self.prefix is None else self.prefix.count)
        blocks = self.stack.new_state(batch, slots, device, dtype)  # type: ignore[operator]
        if lead:
            width: Any = self.stack.width
            recurrence.begin(blocks, torch.zeros(batch, lead, width, device=device, dtype=dtype))
        return ModelState(
            blocks,
            torch.zeros(batch, lead + capacity, dtype=torch.long, device=device),
            torch.ones(batch, lead + capacity, dtype=torch.bool, device=device),
            lead=lead,
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
        old: Sequence[Tensor] | None = None,
        memories: list[Any] | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Ids (B, T) -> states (B, T, D), and which of the B x T tokens are real (None: all)."""
        extras = extras or {}
        batch, length, device = self.embed.size(ids, vectors, extras)  # type: ignore[operator]
        past = 0 if state is None else state.length
        end = past + length
        placed = places is not None
        if places is None:
            if self.limit is not None and end > self.limit:
                raise refuse(f"the text has {end} tokens, the model's positions end at {self.limit}", "shorten it")
            places = torch.arange(past, end, device=device)[None, :]
        elif places.dim() == 1:
            places = places[None, :]
        keep = None if mask is None else mask.to(device=device, dtype=torch.bool)
        if keep is not None and looks(keep) and bool(keep.all()):
            keep = None
        if keep is not None and self.prefix is not None and not placed and keep.shape == (batch, end):
            # Padding between the memory tokens and the words of a row must not count.
            places = (keep.cumsum(1) - 1).clamp(min=0)[:, past:]
        remembered = 0 if not old else old[0].shape[1]
        if keep is not None and keep.shape not in ((batch, end), (batch, remembered + end)):
            raise ValueError(f"attention_mask has shape {tuple(keep.shape)}, expected {(batch, end)}")
        keys, known, lead, blocks, fed = places, keep, 0, None, None
        if self.recurrence is not None:
            width: Any = self.stack.width
            call = recurrence.enter(self.stack, self.recurrence, (batch, width), places, keep, state, old)
            places, keys, known = call.places, call.keys, call.known
            lead, blocks, fed = call.lead, call.blocks, call.fed
            if documents is not None and lead:
                documents = torch.cat((documents[:, :1].expand(-1, lead), documents), 1)
            if memories is not None:
                memories.extend(blocks)
        if state is not None:
            if end > state.capacity:
                raise ValueError(f"the state holds {state.capacity} tokens, {end} are needed")
            begin, stop = state.lead + past, state.lead + end
            state.positions[:, stop - keys.shape[1] : stop] = keys
            if known is not None:
                state.keep[:, :stop], state.padded = known, True
            keys = state.positions[:, :stop]
            known = state.keep[:, :stop] if state.padded else None
            lead, blocks = begin, state.blocks
        ctx = Ctx(
            positions=places,
            keys=keys,
            keep=known,
            documents=documents,
            offset=lead,
            table=self.table() if table is None else table,
            memory=memory,
            memory_visible=masks.keys_only(None if memory_mask is None else memory_mask.bool()),
            state=blocks,
            extras=extras,
            ledger=ledger or Ledger(),
            ids=ids,
            placed=placed,
            mask=mask,
            segments=segments,
            fed=fed,
        )
        x = self.embed(ids, vectors, segments, ctx)
        if hasattr(self.stack, "enter"):
            x = self.stack.enter(x, self.embed, ctx)  # type: ignore[operator]
        if self.prefix is None:
            x = self.stack(x, ctx, trace)
        else:
            x = self.prefix.leave(self.stack(*self.prefix.enter(x, ctx), trace), ctx)
            if trace is not None:
                trace[:] = [self.prefix.leave(states, ctx) for states in trace]
        if state is not None:
            state.length = end
        return x, keep
