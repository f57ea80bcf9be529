"""Two encoders: a generator replaces tokens, a discriminator tells which (Clark et al. 2020, arXiv:2003.10555).

    g = generator(masked text)                    p = softmax(mlm(g)) at the chosen places
    y_t ~ p_t where t was chosen, else x_t        z = replaced(discriminator(y))
    loss = cross-entropy of p with the truth + weight x mean over tokens of BCE(z_t, y_t differs from the truth)

Both read one embedding: token, position and segment tables, their norm and its dropout are shared, and each side
projects what comes out to its own width. No gradient flows through the draw of y. The draw is no matter of any random
state: input `draws` (B, T) has a whole number in [0, 2^31) for each chosen place and -1 elsewhere, and

    y_t = the first v with  sum_{u <= v} floor(2^31 p_u)  >  floor(draws_t x total / 2^31)

in whole numbers, so that equal weights and draws give equal tokens in any split of a batch. Without `draws` both sides
read the text as it is. The graph itself is the discriminator; `generator` is the tower beside it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from xtcli import registry
from xtcli.errors import refuse
from xtcli.parts import norms
from xtcli.parts.context import Ctx, Ledger
from xtcli.parts.embed import STAGES, Factorised, NoPlaces, Tokens
from xtcli.parts.heads import Hidden
from xtcli.parts.linear import widen
from xtcli.parts.onestack import Encoder, OneStack
from xtcli.parts.outputs import IGNORE, Term
from xtcli.parts.scope import Impossible, Scope
from xtcli.parts.stack import StackSlot
from xtcli.parts.tower import Tower
from xtcli.registry import Config, field, part

BITS = 31
ELEMENTS = 2**24
"""Probabilities that are added up at once."""
FILLS, DETECTS = "mlm", "replaced"
"""The head of the generator, and that of the discriminator."""


class GeneratorConfig(Config):
    """The tower that makes replacements."""

    dim: int = field("width of its residual stream", gt=0, tiny=48)
    stack: StackSlot = field("its blocks")


@part("graph", "replaced-token")
class ReplacedToken(OneStack):
    """A discriminator with the generator whose replacements it is to find."""

    causal = False
    reads = ("draws",)

    class Config(OneStack.Config):
        """Two encoders over one embedding; sizes, `stack` and `heads` but `mlm` are the discriminator's."""

        generator: GeneratorConfig = field("the smaller encoder that replaces tokens")
        weight: float = field("weight of the discriminator's loss; the generator's has 1", 50.0, gt=0)

    def make_heads(self, scope: Scope, pooled: bool) -> Any:
        """The generator, then the heads of both."""
        config: Any = self.config
        for name in (FILLS, DETECTS):
            if name not in config.heads:
                scope.file(Impossible("heads", f"have no '{name}', which this graph is trained with", "add it"))
        if not isinstance(self.embed, Tokens) or getattr(self.embed, "stage", len(STAGES) - 1) != len(STAGES) - 1:
            cause = "is shared up to its projection, which must come last"
            scope.file(Impossible("embed", cause, "use tokens or factorised"))
        width = scope.table or config.dim
        own = scope.at("generator", dim=config.generator.dim, table=width)
        self.generator = Tower(_projection(width, config.generator.dim), config.generator.stack, own, shares=True)
        heads = super().make_heads(scope, pooled)
        if FILLS in heads:
            own_head: Any = heads[FILLS]
            own_head.label = "generator_labels"
        return heads

    def head_scope(self, name: str, scope: Scope) -> Scope:
        """The generator's head reads the generator's states."""
        if name != FILLS:
            return scope
        config: Any = self.config
        return scope.at("", dim=getattr(self.generator.stack, "width", config.generator.dim))

    def read_by(self, head: str, hidden: Hidden) -> Hidden:
        """The generator's states for its head, the discriminator's for all others."""
        return hidden.others["generator"] if head == FILLS else hidden

    def hidden(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        document_ids: Tensor | None = None,
        *more: Any,
        draws: Tensor | None = None,
        **extras: Any,
    ) -> Hidden:
        """Both sides; with `draws` the discriminator reads what the generator makes of the text."""
        given = (attention_mask, token_type_ids, position_ids, inputs_embeds, document_ids)
        made = self.generate(input_ids, *given, **extras)
        shown = input_ids
        if input_ids is not None and draws is not None and not input_ids.is_meta:
            shown = self.replaced(input_ids, made, draws)
        hidden = super().hidden(shown, *given, *more, **extras)
        hidden.others["generator"] = made
        return hidden

    def generate(
        self,
        input_ids: Tensor | None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        document_ids: Tensor | None = None,
        **extras: Tensor,
    ) -> Hidden:
        """What the generator makes of a text."""
        _, length, device = self.embed.size(input_ids, inputs_embeds, extras)  # type: ignore[operator]
        if input_ids is not None and input_ids.dim() != 2:
            raise ValueError(f"a generator reads texts (B, T), and input_ids has shape {tuple(input_ids.shape)}")
        if position_ids is None and self.limit is not None and length > self.limit:
            raise refuse(f"the text has {length} tokens, the model's positions end at {self.limit}", "shorten it")
        places = torch.arange(length, device=device)[None] if position_ids is None else position_ids
        ctx = Ctx(places, places, table=self.table(), extras=extras, ids=input_ids, segments=token_type_ids)
        x = self.embed.unprojected(input_ids, inputs_embeds, token_type_ids, ctx)  # type: ignore[operator]
        ledger = Ledger()
        states, keep = self.generator(
            None,
            x,
            mask=attention_mask,
            places=position_ids,
            documents=document_ids,
            table=self.table(),
            extras=extras,
            ledger=ledger,
        )
        return Hidden(states, self.table(), None, input_ids, keep, extras=extras, ledger=ledger)

    def replaced(self, ids: Tensor, made: Hidden, draws: Tensor) -> Tensor:
        """The ids (B, T) with tokens of the generator in the places that have a draw."""
        chosen = draws >= 0
        with torch.no_grad():
            logits = self.heads[FILLS].logits(made.states[chosen], made.table)  # type: ignore[operator]
        shown = ids.clone()
        shown[chosen] = drawn(logits, draws[chosen])
        return shown

    def terms(
        self, hidden: Hidden, targets: Mapping[str, Tensor], slots: Mapping[str, int] | None = None
    ) -> dict[str, Term]:
        """Targets of `replaced` (B, T) are the tokens that truly stand there; one that is not shown was replaced."""
        told = dict(targets)
        if DETECTS in told and hidden.ids is not None:
            truth = told[DETECTS]
            told[DETECTS] = (hidden.ids != truth).long().masked_fill(truth == IGNORE, IGNORE)
        terms = super().terms(hidden, told, slots)
        if DETECTS in terms:
            terms[DETECTS] = replace(terms[DETECTS], weight=self.config.weight)  # type: ignore[attr-defined]
        return terms

    @staticmethod
    def members(config: Any) -> dict[str, tuple[registry.Config, str]]:
        """Each side as an encoder of its own, and what precedes the names of its tensors where it has them alone."""
        whole = {name: getattr(config, name) for name in OneStack.Config.model_fields}
        shared = {name: getattr(config.embed, name) for name in Tokens.Config.model_fields}
        width = getattr(config.embed, "width", config.dim)
        dim = config.generator.dim
        fills = config.heads[FILLS].model_copy(update={"output": "logits"})
        generator = whole | {
            "dim": dim,
            "stack": config.generator.stack,
            "embed": Tokens.Config(**shared) if width == dim else Factorised.Config(width=width, **shared),
            "heads": {FILLS: fills},
            "pooler": None,
            "memory_tokens": None,
            "auxiliary": {},
        }
        heads = {name: head for name, head in config.heads.items() if name != FILLS}
        return {
            "generator": (Encoder.Config.model_validate(generator), "generator."),
            "discriminator": (Encoder.Config.model_validate(whole | {"heads": heads}), ""),
        }


def _projection(width: int, dim: int) -> Config:
    """What enters the generator: vectors that the shared embedding has made, in its own width."""
    nothing: Any = {"positions": NoPlaces.Config(), "norm": norms.NONE, "dropout": 0.0}
    return Tokens.Config(**nothing) if width == dim else Factorised.Config(width=width, **nothing)


def drawn(logits: Tensor, draws: Tensor) -> Tensor:
    """A token (N,) for each row of logits (N, V), by whole numbers (N,) in [0, 2^31)."""
    rows = max(1, ELEMENTS // logits.shape[-1])
    found = [draws.new_empty(0)]
    for some, numbers in zip(logits.split(rows), draws.split(rows), strict=True):
        bounds = (widen(some).softmax(-1) * 2**BITS).long().cumsum(-1)
        aims = numbers[:, None] * bounds[:, -1:] >> BITS
        found.append(torch.searchsorted(bounds, aims, right=True).squeeze(-1))
    # Logits that are not numbers add up to nothing, and the loss is where that is to be seen.
    return torch.cat(found).clamp(max=logits.shape[-1] - 1)
