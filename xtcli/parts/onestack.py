"""Graphs of one stack: an embedding, blocks, heads.

    decoder    causal; predicts the next token; may read an encoder's memory
    encoder    sees both ways; masked language models, classifiers

Axes as in context.py; B batch, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from xtcli.parts.carried import carries, left_behind, taken_up
from xtcli.parts.context import Ledger, ModelState
from xtcli.parts.embed import Tokens
from xtcli.parts.graphs import EmbedSlot, Graph
from xtcli.parts.heads import SPEAKING, Hidden
from xtcli.parts.outputs import Output
from xtcli.parts.pooled import Pooler, PoolerConfig, needs_pooler
from xtcli.parts.recurrence import given, left, refuse_absolute
from xtcli.parts.scope import Impossible, Scope
from xtcli.parts.stack import StackSlot
from xtcli.parts.tower import Tower, table_width
from xtcli.registry import Config, field, part


class OneStack(Graph, Tower):
    """An embedding, a stack and heads."""

    class Config(Graph.Config):
        """A model of one stack."""

        embed: EmbedSlot = field("what enters", Tokens.Config())
        stack: StackSlot = field("the blocks")
        memory_tokens: int | None = field("learned tokens in front of the text, through all layers", None, gt=0, tiny=4)
        pooler: PoolerConfig | None = field("a vector for the whole text, from its first state", None)
        memory: int | None = field("width of an encoder's memory that cross-attention reads", None, gt=0, tiny=64)

    def __init__(self, config: Config, scope: Scope | None = None) -> None:
        nn.Module.__init__(self)
        scope = self.begin(config, scope)
        if config.memory is not None:
            scope = scope.at("", memory=config.memory)
        self.embed = scope.make("embed", config.embed)
        self.make_stack(config.stack, scope, config.memory_tokens)
        refuse_absolute(self, scope)
        self.carries = carries(self)
        above = scope.at(
            "",
            dim=getattr(self.stack, "width", scope.dim),
            table=table_width(self.embed, scope),
            entities=getattr(self.stack, "entity_table", None),
            bands=getattr(self.embed, "bands", None),
        )
        self.pooler = None if config.pooler is None else Pooler(config.pooler, above)
        if config.pooler is not None and config.pooler.width not in (None, above.dim):
            for name, head in config.heads.items():
                if needs_pooler(head):
                    cause = f"is {config.pooler.width}, and the head '{name}' reads vectors of {above.dim}"
                    above.file(Impossible("pooler.width", cause, "leave it out"))
        self.heads = self.make_heads(above, self.pooler is not None)
        scope.settle()

    def blank(self, rows: int, length: int, device: torch.device | None = None) -> dict[str, Tensor]:
        at = device or self.device
        made: dict[str, Tensor] = self.embed.blank(rows, length, at, self.dtype)  # type: ignore[operator]
        for module in (self.stack, *self.heads.values()):
            if hasattr(module, "blank"):
                made |= module.blank(rows, at)  # type: ignore[operator]
        return made

    def new_state(self, batch: int, capacity: int, device: Any = None, dtype: Any = None) -> ModelState:
        """An empty state for `capacity` tokens, on the model's device and in its type unless said."""
        return Tower.new_state(self, batch, capacity, device or self.device, dtype or self.dtype)

    def hidden(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        document_ids: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        state: ModelState | None = None,
        trace: list[Tensor] | None = None,
        mc_token_ids: Tensor | None = None,
        mems: Sequence[Tensor] | Tensor | None = None,
        use_mems: bool | None = None,
        **extras: Tensor,
    ) -> Hidden:
        """Run embedding and stack; inputs as in `forward`."""
        if self.recurrence is None and (mems is not None or use_mems):
            extras["mems"] = mems  # type: ignore[assignment]
        self.check_extras(extras)
        choices = None
        rows = input_ids if input_ids is not None else inputs_embeds
        if rows is not None and rows.dim() == (3 if input_ids is not None else 4):
            choices = rows.shape[1]
            inputs_embeds = None if inputs_embeds is None else inputs_embeds.flatten(0, 1)
            input_ids, attention_mask, token_type_ids, position_ids = (
                value.flatten(0, 1) if value is not None and value.dim() == 3 else value
                for value in (input_ids, attention_mask, token_type_ids, position_ids)
            )
            grouped = rows.shape[:2]
            extras = {
                name: value.flatten(0, 1) if value.dim() > 2 and value.shape[:2] == grouped else value
                for name, value in extras.items()
            }
        ledger = Ledger()
        memories: list[Any] = []
        states, keep = Tower.forward(
            self,
            input_ids,
            inputs_embeds,
            mask=attention_mask,
            segments=token_type_ids,
            places=position_ids,
            documents=document_ids,
            memory=encoder_hidden_states,
            memory_mask=encoder_attention_mask,
            state=state,
            trace=trace,
            extras=extras,
            ledger=ledger,
            old=None if mems is None else given(mems, self.stack),
            memories=memories,
        )
        pooled = None if self.pooler is None else self.pooler(states)
        hidden = Hidden(
            states, self.table(), pooled, input_ids, keep, choices, mc_token_ids, extras=extras, ledger=ledger
        )
        hidden.further = next(iter(ledger.read("further")), None)
        if state is None and self.recurrence is not None and self.recurrence.gives(self.training, use_mems, mems):
            hidden.mems = left(memories)
        return hidden

    def forward(  # type: ignore[override]
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        next_sentence_label: Tensor | None = None,
        start_positions: Tensor | None = None,
        end_positions: Tensor | None = None,
        mc_token_ids: Tensor | None = None,
        mc_labels: Tensor | None = None,
        document_ids: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        state: ModelState | Sequence[Tensor] | Tensor | None = None,
        output_hidden_states: bool = False,
        output_router_logits: bool | None = None,
        mems: Sequence[Tensor] | Tensor | None = None,
        use_mems: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **extras: Tensor | None,
    ) -> Output:
        """Inputs (B, T) -> loss, the heads' outputs, last_hidden_state (B, T, D), pooler_output (B, D).

        Several texts to choose from come as (B, choices, T).
        attention_mask: 1 = real token. position_ids: places, from 0 unless given. document_ids: tokens of
        other documents stay unseen. labels: as transformers has them, -100 ignored, shifted inside for a
        causal model. state: from `new_state`; then attention_mask covers past and new tokens. Models whose states have
        one size take the `state` that an earlier call returned as well, and return it in evaluation (`use_cache`).
        Without encoder_hidden_states, cross-attention is passed over and the decoder runs alone.
        output_router_logits: whether scores and losses of routers are returned, and the losses added to `loss`; None:
        as `auxiliary` says. logits_to_keep: language models score only so many of the last places, or those numbered.
        extras: inputs that only some architectures read (`self.accepts`); labels of heads by their own names.
        """
        kept, carried = (state, None) if isinstance(state, ModelState) else (None, state)
        rows = input_ids if input_ids is not None else inputs_embeds
        if self.carries and kept is None and rows is not None:
            wanted = extras.pop("use_cache", not self.training and document_ids is None)
            kept = taken_up(self, carried, *rows.shape[:2]) if wanted or carried is not None else None
        elif carried is not None:
            raise TypeError("state: this model takes none but what new_state returned")
        labels_by_name, inputs = self.parted(extras)
        trace: list[Tensor] | None = [] if output_hidden_states else None
        hidden = self.hidden(
            input_ids,
            attention_mask,
            token_type_ids,
            position_ids,
            inputs_embeds,
            document_ids,
            encoder_hidden_states,
            encoder_attention_mask,
            kept,
            trace,
            mc_token_ids,
            mems,
            use_mems,
            **inputs,
        )
        labelled = {
            "labels": labels,
            "mc_labels": mc_labels,
            "next_sentence_label": next_sentence_label,
            "start_positions": start_positions,
            "end_positions": end_positions,
            **labels_by_name,
        }
        spoken = hidden.few(logits_to_keep)
        if spoken is not hidden and (not set(self.heads) <= set(SPEAKING) or labels is not None):
            raise ValueError("logits_to_keep: only a language model without labels can leave places out; leave it out")
        out = self.answer(spoken, labelled, output_router_logits)
        out["last_hidden_state"] = hidden.grouped(hidden.states)
        if hidden.pooled is not None:
            out["pooler_output"] = hidden.pooled
        if hidden.mems is not None:
            out["mems"] = hidden.mems
        if kept is not None and kept is not state:
            out["state"] = left_behind(kept)
        if trace is not None:
            out["hidden_states"] = tuple(trace)
        for name in (*getattr(self.stack, "gives", ()), *getattr(self.stack, "traces", ())):
            found = hidden.ledger.read(name)
            if found:
                out[name] = tuple(found) if name in self.stack.traces else hidden.grouped(found[-1])  # type: ignore[operator]
        return out


@part("graph", "decoder")
class Decoder(OneStack):
    """Causal: each token sees the ones before it."""

    causal = True


@part("graph", "encoder")
class Encoder(OneStack):
    """Every token sees every other."""

    causal = False
