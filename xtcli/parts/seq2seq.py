"""The encoder-decoder graph: a decoder that reads what an encoder made of another text.

Both sides embed from one token table unless `share_tokens` is false; then each may have a width of its own, and the
encoder may read something else than text, images for instance. Labels are aligned with the
decoder's inputs, which are the labels moved one place to the right behind the start token.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from xtcli.parts import norms
from xtcli.parts.auxiliary import Side
from xtcli.parts.context import Ledger, ModelState
from xtcli.parts.embed import Tokens
from xtcli.parts.graphs import EmbedSlot, Graph
from xtcli.parts.heads import Hidden
from xtcli.parts.linear import Linear, Table
from xtcli.parts.norms import NormSlot
from xtcli.parts.outputs import IGNORE, Output
from xtcli.parts.scope import Impossible, Scope
from xtcli.parts.stack import StackSlot
from xtcli.parts.tower import Tower, table_width
from xtcli.registry import Config, field, part


class TowerConfig(Config):
    """One side: an embedding and a stack."""

    dim: int | None = field("width of its residual stream; null = model.dim", None, gt=0, tiny=64)
    dropout: float | None = field("default of every dropout on this side; null = model.dropout", None, ge=0, lt=1)
    norm: NormSlot = field("default of every norm on this side", norms.INHERIT)
    pad: int | None = field("id of this side's padding; null = model.pad", None, ge=0, tiny=511)
    embed: EmbedSlot = field("what enters", Tokens.Config())
    stack: StackSlot = field("the blocks")
    memory_tokens: int | None = field("learned tokens in front of the text, through all layers", None, gt=0, tiny=4)


def _tower(config: TowerConfig, scope: Scope, shares: bool) -> Tower:
    if shares and config.dim not in (None, scope.dim):
        scope.file(Impossible("dim", f"is {config.dim}, the shared token table's rows are {scope.dim}", "leave it out"))
    scope = scope.at(
        "",
        dim=config.dim or scope.dim,
        dropout=scope.dropout if config.dropout is None else config.dropout,
        norm=scope.norm if config.norm.kind == "inherit" else config.norm,
        pad=scope.pad if config.pad is None else config.pad,
    )
    if getattr(config.stack, "recurrence", None) is not None:
        cause = "an encoder-decoder maps one whole text to another and carries nothing on to the next"
        scope.file(Impossible("stack.recurrence", cause, "leave it out, or use a decoder"))
    return Tower(config.embed, config.stack, scope, shares, config.memory_tokens)


@part("graph", "encoder-decoder")
class EncoderDecoder(Graph):
    """Two towers; the decoder's cross-attention reads the encoder's last states."""

    causal = False  # labels are aligned, not shifted inside
    sides = (
        Side("encoder", "input_ids", "attention_mask"),
        Side("decoder", "decoder_input_ids", "decoder_attention_mask"),
    )

    class Config(Graph.Config):
        """An encoder and a decoder."""

        encoder: TowerConfig = field("reads the source")
        decoder: TowerConfig = field("writes the target")
        share_tokens: bool = field("one token table for both sides", True)
        bridge: bool = field("a linear layer takes the encoder's states to the decoder's width", False)
        copies: bool = field("a call with neither decoder inputs nor labels decodes the source", False)
        first: int | None = field("id that every written text begins with, behind start", None, ge=0, tiny=511)
        last: int | None = field("id that ends a text which would go on beyond its limit", None, ge=0, tiny=511)

    def __init__(self, config: Config, scope: Scope | None = None) -> None:
        super().__init__()
        scope = self.begin(config, scope)
        self.tokens = Table(config.vocab, config.dim) if config.share_tokens else None
        shares = config.share_tokens
        self.encoder = _tower(config.encoder, scope.at("encoder", causal=False), shares)
        memory = getattr(self.encoder.stack, "width", config.encoder.dim or config.dim)
        written = config.decoder.dim or config.dim
        self.bridge = Linear(memory, written, True) if config.bridge else None
        inner = scope.at("decoder", causal=True, memory=written if config.bridge else memory)
        self.decoder = _tower(config.decoder, inner, shares)
        width = getattr(self.decoder.stack, "width", written)
        table = config.dim if shares else table_width(self.decoder.embed, scope.at("", dim=written))
        self.heads = self.make_heads(scope.at("", dim=width, table=table), pooled=False)
        scope.settle()

    @property
    def start(self) -> int | None:
        """The id that every decoded text starts with."""
        return self.config.pad if self.config.start is None else self.config.start

    def shared_table(self) -> Tensor | None:
        """The table of both sides, where they share one."""
        return None if self.tokens is None else self.tokens.weight

    def output_table(self) -> Tensor | None:
        """The table that a tied head multiplies with."""
        return self.decoder.table() if self.tokens is None else self.tokens.weight

    def new_state(self, batch: int, capacity: int, device: Any = None, dtype: Any = None) -> ModelState:
        """An empty decoder state for `capacity` target tokens."""
        return self.decoder.new_state(batch, capacity, device or self.device, dtype or self.dtype)

    def blank(self, rows: int, length: int, device: torch.device | None = None) -> dict[str, Tensor]:
        """Source and target, both of `length` places where they are texts."""
        at = device or self.device
        source: dict[str, Tensor] = self.encoder.embed.blank(rows, length, at, self.dtype)  # type: ignore[operator]
        return source | {"decoder_input_ids": torch.zeros(rows, length, dtype=torch.long, device=at)}

    def encode(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        trace: list[Tensor] | None = None,
        extras: Mapping[str, Tensor] | None = None,
        ledger: Ledger | None = None,
    ) -> Tensor:
        """Source ids (B, S), or other inputs of the encoder in `extras` -> memory (B, S, D)."""
        states, _ = self.encoder(
            input_ids,
            inputs_embeds,
            mask=attention_mask,
            table=self.shared_table(),
            trace=trace,
            extras=extras,
            ledger=None if ledger is None else ledger.side("encoder"),
        )
        return states  # type: ignore[no-any-return]

    def decode(
        self,
        decoder_input_ids: Tensor | None,
        memory: Tensor,
        attention_mask: Tensor | None = None,
        state: ModelState | None = None,
        decoder_attention_mask: Tensor | None = None,
        decoder_inputs_embeds: Tensor | None = None,
        trace: list[Tensor] | None = None,
        source: Tensor | None = None,
        extras: Mapping[str, Tensor] | None = None,
        ledger: Ledger | None = None,
        places: Tensor | None = None,
        segments: Tensor | None = None,
    ) -> Hidden:
        """Target ids (B, T) and the memory -> what the heads read; `attention_mask` (B, S) is the source's.

        `source` are the ids (B, S) that the memory was made of, for the heads that read the state at their end.
        """
        ledger = ledger or Ledger()
        if self.bridge is not None:
            memory = self.bridge(memory)
        states, keep = self.decoder(
            decoder_input_ids,
            decoder_inputs_embeds,
            mask=decoder_attention_mask,
            segments=segments,
            places=places,
            table=self.shared_table(),
            memory=memory,
            memory_mask=attention_mask,
            state=state,
            trace=trace,
            extras=extras,
            ledger=ledger.side("decoder"),
        )
        hidden = Hidden(
            states, self.output_table(), None, decoder_input_ids, keep, source=source, extras=extras, ledger=ledger
        )
        hidden.further = next(iter(ledger.side("decoder").read("further")), None)
        return hidden

    def hidden(
        self,
        input_ids: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        **extras: Tensor,
    ) -> Hidden:
        """Both sides at once, for training."""
        self.check_extras(extras)
        ledger = Ledger()
        memory = self.encode(input_ids, attention_mask, extras=extras, ledger=ledger)
        return self.decode(
            decoder_input_ids,
            memory,
            attention_mask,
            None,
            decoder_attention_mask,
            source=input_ids,
            extras=extras,
            ledger=ledger,
        )

    def shift_right(self, labels: Tensor) -> Tensor:
        """Decoder inputs (B, T) from labels (or the source): the start token in front, the last one dropped,
        -100 as padding."""
        if self.start is None or self.config.pad is None:
            raise ValueError("decoder inputs are made with model.pad (and model.start, if it differs): state them")
        moved = torch.cat((labels.new_full((labels.shape[0], 1), self.start), labels[:, :-1]), dim=1)
        return moved.masked_fill(moved == IGNORE, self.config.pad)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        inputs_embeds: Tensor | None = None,
        decoder_inputs_embeds: Tensor | None = None,
        decoder_position_ids: Tensor | None = None,
        decoder_token_type_ids: Tensor | None = None,
        encoder_outputs: Any = None,
        start_positions: Tensor | None = None,
        end_positions: Tensor | None = None,
        state: ModelState | None = None,
        output_hidden_states: bool = False,
        output_router_logits: bool | None = None,
        **extras: Tensor | None,
    ) -> Output:
        """Source and target -> loss, logits (B, T, V), last_hidden_state, encoder_last_hidden_state.

        encoder_outputs: the memory (B, S, D), or something whose first item it is, in place of input_ids.
        Without decoder inputs the labels, moved one place to the right, are decoded; heads that label texts
        decode the source in the same way. output_router_logits: as in a graph of one stack.
        """
        labels_by_name, given = self.parted(extras)
        self.check_extras(given)
        ledger = Ledger()
        source_trace: list[Tensor] | None = [] if output_hidden_states else None
        target_trace: list[Tensor] | None = [] if output_hidden_states else None
        if encoder_outputs is None:
            memory = self.encode(input_ids, attention_mask, inputs_embeds, source_trace, given, ledger)
        else:
            memory = encoder_outputs if isinstance(encoder_outputs, Tensor) else encoder_outputs[0]
        if decoder_input_ids is None and decoder_inputs_embeds is None:
            target = labels if not self.heads or "lm" in self.heads else input_ids
            if target is None and self.config.copies:  # type: ignore[attr-defined]
                target = input_ids
            if target is None:
                raise ValueError("neither decoder_input_ids nor decoder_inputs_embeds nor labels were given")
            decoder_input_ids = self.shift_right(target)
        hidden = self.decode(
            decoder_input_ids,
            memory,
            attention_mask,
            state,
            decoder_attention_mask,
            decoder_inputs_embeds,
            target_trace,
            input_ids,
            given,
            ledger,
            decoder_position_ids,
            decoder_token_type_ids,
        )
        labelled = {"labels": labels, "start_positions": start_positions, "end_positions": end_positions}
        labelled |= labels_by_name
        out = self.answer(hidden, labelled, output_router_logits)
        out["last_hidden_state"] = hidden.states
        out["encoder_last_hidden_state"] = memory
        if target_trace is not None and source_trace is not None:
            out["decoder_hidden_states"] = tuple(target_trace)
            out["encoder_hidden_states"] = tuple(source_trace)
        stack: Any = self.decoder.stack
        for name in getattr(stack, "gives", ()):
            out.update((name, made) for made in ledger.side("decoder").read(name))
        for name, sided in getattr(stack, "sided", {}).items():
            if target_trace is not None:
                out[sided] = tuple(ledger.side("decoder").read(name))
        return out
