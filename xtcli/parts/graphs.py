"""Graphs of one stack: an embedding, blocks, heads.

    decoder    causal; predicts the next token; may read an encoder's memory
    encoder    sees both ways; masked language models, classifiers

`forward` takes and returns the names the field uses, so that a script written for transformers needs
only its import changed. Axes as in context.py; B batch, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from xtcli import registry
from xtcli.parts.auxiliary import Auxiliaries, Side, make_auxiliaries
from xtcli.parts.carried import carries, left_behind, taken_up
from xtcli.parts.context import Ledger, ModelState
from xtcli.parts.embed import Tokens
from xtcli.parts.heads import SPEAKING, Head, Hidden, collect
from xtcli.parts.init import Initialiser, NormalInit
from xtcli.parts.norms import LayerNorm, NormSlot
from xtcli.parts.outputs import Output, Term
from xtcli.parts.pooled import Pooler, PoolerConfig, needs_pooler, refuse_without_pooler
from xtcli.parts.recurrence import given, left, refuse_absolute
from xtcli.parts.scope import Impossible, Scope
from xtcli.parts.stack import StackSlot, applied
from xtcli.parts.tower import Tower, table_width
from xtcli.registry import Config, Kinds, Slot, field, part, part_of

MANNERS: Mapping[str, tuple[bool, str]] = {
    "return_dict": (True, "out.to_tuple() gives the outputs in order"),
    "use_cache": (False, "pass state=model.new_state(rows, tokens), which keeps what was read"),
    "output_attentions": (False, "weights are not kept by fused kernels"),
}
"""Arguments of the reference that say how it answers: the value that is ours, and what to do instead of another."""

EmbedSlot = Annotated[Config, Slot("embed")]


class Graph(nn.Module):
    """What every graph has: sizes, heads, initialisation, losses."""

    causal = True

    class Config(registry.Config):
        """Sizes and defaults that the whole model shares."""

        vocab: int = field("rows of the token table; 1 where no text is read or written", gt=0, tiny=512)
        dim: int = field("width of the residual stream", gt=0, tiny=64)
        context: int | None = field("longest text in tokens; null = no limit", None, gt=0, tiny=128)
        dropout: float = field("default of every dropout", 0.0, ge=0, lt=1)
        norm: NormSlot = field("default of every norm", LayerNorm.Config())
        init: Annotated[Config, Slot("init")] = field("how fresh weights are drawn", NormalInit.Config())
        pad: int | None = field("id of the padding token", None, ge=0, tiny=511)
        start: int | None = field("id that a decoder's text starts with; null = pad", None, ge=0, tiny=511)
        heads: Annotated[dict[str, Config], Kinds("head")] = field("outputs, by kind", {})
        auxiliary: Annotated[dict[str, Config], Kinds("auxiliary")] = field("losses of routers, by kind", {})

    config: Config
    heads: nn.ModuleDict
    auxiliary: Auxiliaries
    sides: tuple[Side, ...] = (Side("", "input_ids", "attention_mask"),)

    def begin(self, config: Config, scope: Scope | None) -> Scope:
        """The root scope."""
        if config.norm.kind == "inherit":
            raise Impossible("norm", "is the default that others inherit", "name a kind")
        self.config = config
        return scope or Scope(
            dim=config.dim,
            vocab=config.vocab,
            context=config.context,
            causal=self.causal,
            norm=config.norm,
            dropout=config.dropout,
            pad=config.pad,
        )

    def make_heads(self, scope: Scope, pooled: bool) -> nn.ModuleDict:
        """The heads, by kind; beside them the losses of routers."""
        self.auxiliary = make_auxiliaries(self.config.auxiliary, self, scope)
        for name, head in self.config.heads.items():
            try:
                refuse_without_pooler(name, head, pooled)
            except Impossible as mistake:
                scope.file(mistake)
        return nn.ModuleDict(
            {name: self.head_scope(name, scope).make(f"heads.{name}", head) for name, head in self.config.heads.items()}
        )

    def head_scope(self, name: str, scope: Scope) -> Scope:
        """The scope that one head is built in."""
        return scope

    @property
    def dim(self) -> int:
        """Width of the residual stream."""
        return self.config.dim

    @property
    def vocab(self) -> int:
        """Rows of the token table."""
        return self.config.vocab

    @property
    def context(self) -> int | None:
        """Longest text that the preset plans for."""
        return self.config.context

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Type of the parameters."""
        return next(self.parameters()).dtype

    def initialise(self, seed: int) -> None:
        """Draw fresh weights in place."""
        sublayers = sum(len(block.names) for block in applied(self))
        drawn: Initialiser = part_of(self.config.init)(self.config.init, sublayers)
        drawn.draw(self, self.config.dim, seed)

    @property
    def reads_text(self) -> bool:
        """Whether text enters or leaves the model."""
        return self.config.vocab > 1

    @property
    def accepts(self) -> tuple[str, ...]:
        """Inputs beyond the common ones that parts of this model read, by the field's names."""
        return tuple(sorted({name for module in self.modules() for name in getattr(module, "reads", ())}))

    def check_extras(self, extras: Mapping[str, Any]) -> None:
        """Raises TypeError for inputs that no part reads."""
        unread = sorted(set(extras) - set(self.accepts))
        if unread:
            also = f"; besides the common ones it reads {', '.join(self.accepts)}" if self.accepts else ""
            raise TypeError(f"this architecture has no input {', '.join(unread)}{also}")

    def parted(self, extras: Mapping[str, Tensor | None]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """What was given by name, as labels of heads and as inputs of parts; some are both.

        Manners of the reference that ask for what is done anyway are passed over; others raise TypeError.
        """
        given: dict[str, Any] = {name: value for name, value in extras.items() if value is not None}
        for name in MANNERS.keys() & given.keys():
            usual, instead = MANNERS[name]
            if given.pop(name) is not usual:
                raise TypeError(f"{name}: only {usual} is known; {instead}")
        wanted = {name for head in self.heads.values() for name in (head.label, *head.more_labels)}  # type: ignore[misc]
        labels = {name: value for name, value in given.items() if name in wanted}
        read = self.accepts if labels else ()
        return labels, {name: value for name, value in given.items() if name not in wanted or name in read}

    @staticmethod
    def members(config: Any) -> dict[str, tuple[registry.Config, str]]:
        """The models that a graph of several holds: name -> (config, what precedes the tensors it has alone)."""
        return {}

    def read_by(self, head: str, hidden: Hidden) -> Hidden:
        """What one head reads of what a call has made."""
        return hidden

    def answer(
        self, hidden: Hidden, labels: Mapping[str, Tensor | None], output_router_logits: bool | None = None
    ) -> Output:
        """Loss and outputs of all heads, and of routers where they are wanted."""
        heads: Any = self.heads
        out = collect(heads, hidden, labels, self.causal, self.read_by)
        self.auxiliary.report(out, hidden.ledger, self, output_router_logits)
        return out

    def losses(self, inputs: Mapping[str, Tensor], targets: Mapping[str, Tensor]) -> dict[str, Term]:
        """The loss terms of aligned targets, by head, and of routers, by kind; see data/batch.py."""
        hidden = self.hidden(**inputs)
        return self.terms(hidden, targets) | self.routed(hidden)

    def routed(self, hidden: Hidden) -> dict[str, Term]:
        """The loss terms of routers of states that are already there, by kind (and tower, where there are two)."""
        return self.auxiliary.terms(hidden.ledger, self.sides)

    def units(self, inputs: Mapping[str, Tensor]) -> dict[str, int]:
        """What the losses of routers are divided by, from the inputs of a whole step."""
        return self.auxiliary.units(inputs, self.sides)

    def terms(self, hidden: Hidden, targets: Mapping[str, Tensor]) -> dict[str, Term]:
        """`losses` of states that are already there."""
        terms = {}
        for name, wanted in targets.items():
            head: Head = self.heads[name]  # type: ignore[assignment]
            terms[name] = head.loss(self.read_by(name, hidden), wanted)
        return terms

    def blank(self, rows: int, length: int, device: torch.device | None = None) -> dict[str, Tensor]:
        """Inputs of the size of `rows` texts of `length` places, on the model's device unless said, for measuring."""
        raise AssertionError("a graph must know the sizes of its inputs")

    def hidden(self, **inputs: Any) -> Hidden:
        """What the heads read."""
        raise AssertionError("a graph must make hidden states")


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
