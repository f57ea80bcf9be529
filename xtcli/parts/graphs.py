"""What every graph has: sizes, heads, initialisation, losses; the kinds stand in onestack.py and seq2seq.py.

`forward` of a graph takes and returns the names the field uses, so that a script written for transformers needs only
its import changed. Axes as in context.py; B batch, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from xtcli import registry
from xtcli.parts.auxiliary import Auxiliaries, Side, make_auxiliaries
from xtcli.parts.heads import Head, Hidden, collect
from xtcli.parts.init import Initialiser, NormalInit
from xtcli.parts.norms import LayerNorm, NormSlot
from xtcli.parts.outputs import Output, Term
from xtcli.parts.pooled import refuse_without_pooler
from xtcli.parts.scope import Impossible, Scope
from xtcli.parts.stack import applied
from xtcli.registry import Config, Kinds, Slot, field, part_of

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

    @property
    def label_names(self) -> set[str]:
        """The names by which heads are told what is right."""
        return {name for head in self.heads.values() for name in (head.label, *head.more_labels)}  # type: ignore[misc]

    def parted(self, extras: Mapping[str, Tensor | None]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """What was given by name, as labels of heads and as inputs of parts; some are both.

        Manners of the reference that ask for what is done anyway are passed over; others raise TypeError.
        """
        given: dict[str, Any] = {name: value for name, value in extras.items() if value is not None}
        for name in MANNERS.keys() & given.keys():
            usual, instead = MANNERS[name]
            if given.pop(name) is not usual:
                raise TypeError(f"{name}: only {usual} is known; {instead}")
        wanted = self.label_names
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
        """Loss and outputs of all heads, and of routers where they are wanted. Raises TypeError for labels that none of
        them reads."""
        unread = sorted({name for name, value in labels.items() if value is not None} - self.label_names)
        if unread:
            raise TypeError(
                f"no head of this model reads {', '.join(unread)}; its heads: {', '.join(self.heads) or 'none'}"
            )
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

    def terms(
        self, hidden: Hidden, targets: Mapping[str, Tensor], slots: Mapping[str, int] | None = None
    ) -> dict[str, Term]:
        """`losses` of states that are already there; `slots`: at least as many as targets count, for each head."""
        terms = {}
        for name, wanted in targets.items():
            head: Head = self.heads[name]  # type: ignore[assignment]
            read = self.read_by(name, hidden)
            terms[name] = head.loss(read if slots is None else read.asked(slots.get(name)), wanted)
        return terms

    def blank(self, rows: int, length: int, device: torch.device | None = None) -> dict[str, Tensor]:
        """Inputs of the size of `rows` texts of `length` places, on the model's device unless said, for measuring."""
        raise AssertionError("a graph must know the sizes of its inputs")

    def hidden(self, **inputs: Any) -> Hidden:
        """What the heads read."""
        raise AssertionError("a graph must make hidden states")
