"""Heads over the vocabulary: hidden states -> logits of words, and the loss of targets.

    lm     logits = t(h) W^T (+ b), W tied to the token table or its own, t a slot: nothing, or norm(act(dense(h)))
    mlm    logits = norm(act(dense(h))) W^T + b          Devlin et al. 2018, arXiv:1810.04805

Where few positions are supervised (masked language models) only those are multiplied with the vocabulary.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from xtcli import registry
from xtcli.parts import norms
from xtcli.parts.activations import ACTIVATIONS, Activation
from xtcli.parts.heads import Head, Hidden, Labels, supervised
from xtcli.parts.linear import Linear
from xtcli.parts.losses import linear_cross_entropy, usual_terms
from xtcli.parts.norms import NormSlot, make_norm
from xtcli.parts.outputs import Term, shifted
from xtcli.parts.scope import Impossible, Scope
from xtcli.registry import Config, Slot, field, part

FEW = 2
"""Where at most one position in so many is supervised, taking them out costs less than it saves."""


def refuse_without_table(tied: bool, scope: Scope) -> None:
    """Raises Impossible where a head is tied to a token table that is not there."""
    if tied and scope.table == 0:
        raise Impossible("tied", "there is no token table to be tied to: what enters are no tokens", "set tied: false")


@part("transform", "none")
class NoTransform(nn.Identity):
    """The states as they are; `width` is that of what comes out."""

    class Config(registry.Config):
        """No transform."""

    def __init__(self, config: Config, scope: Scope) -> None:
        super().__init__()
        self.width = scope.dim


@part("transform", "dense")
class DenseTransform(nn.Module):
    """norm(act(dense(h))), as BERT's heads have it; what comes out is as wide as the token table's rows."""

    class Config(registry.Config):
        """A dense layer, an activation and a norm."""

        act: Activation = field("activation", "gelu")
        norm: NormSlot = field("norm", norms.INHERIT)

    def __init__(self, config: Config, scope: Scope) -> None:
        super().__init__()
        self.width = scope.table or scope.dim
        self.dense = Linear(scope.dim, self.width, True)
        self.act = ACTIVATIONS[config.act]
        self.norm = make_norm(scope, "norm", config.norm, dim=self.width)

    def forward(self, states: Tensor) -> Tensor:
        return self.norm(self.act(self.dense(states)))  # type: ignore[no-any-return]


@part("transform", "activation")
class ActivationTransform(nn.Module):
    """act(h)."""

    class Config(registry.Config):
        """An activation alone."""

        act: Activation = field("activation", "gelu")

    def __init__(self, config: Config, scope: Scope) -> None:
        super().__init__()
        self.width, self.act = scope.dim, ACTIVATIONS[config.act]

    def forward(self, states: Tensor) -> Tensor:
        return self.act(states)


@part("head", "lm")
class LanguageModel(Head):
    """Next-token (or aligned) prediction."""

    terms = staticmethod(usual_terms)

    class Config(registry.Config):
        """Language-model head."""

        tied: bool = field("uses the token table as its matrix", True)
        bias: bool | Literal["fixed"] = field("adds a bias; fixed: one that training leaves as it is", False)
        scale: float | Literal["inverse-sqrt-dim"] = field("multiplies the hidden states", 1.0)
        softcap: float | None = field("bends logits into (-cap, cap)", None, gt=0)
        transform: Annotated[Config, Slot("transform")] = field("what comes before the matrix", NoTransform.Config())
        shift: bool | None = field("labels are shifted to their successors; null = in a causal model", None)
        smoothing: float = field("share of each target that is spread over the vocabulary", 0.0, ge=0, lt=1)
        further: float = field(
            "weight in the loss of each stream that predicts further ahead, beside the first", 1.0, ge=0
        )

    def __init__(self, config: Config, scope: Scope) -> None:
        super().__init__()
        self.transform = scope.make("transform", config.transform)
        width = getattr(self.transform, "width", scope.dim)
        refuse_without_table(config.tied, scope)
        if config.tied and width != (scope.table or scope.dim):
            raise Impossible(
                "tied",
                f"the states are {width} wide, the token table's rows {scope.table}",
                "set transform: dense, or tied: false",
            )
        self.decoder = None if config.tied else Linear(width, scope.vocab, False, "head")
        if config.bias == "fixed":
            self.register_buffer("bias", torch.zeros(scope.vocab))
        else:
            self.bias = nn.Parameter(torch.zeros(scope.vocab)) if config.bias else None
        self.scale = scope.dim**-0.5 if config.scale == "inverse-sqrt-dim" else float(config.scale)
        self.cap, self.shift = config.softcap, config.shift
        self.smoothing, self.further = config.smoothing, config.further

    def operands(self, states: Tensor, table: Tensor | None) -> tuple[Tensor, Tensor]:
        """What is multiplied: states (..., D) behind the transform, and the matrix (V, D)."""
        weight: Any = table if self.decoder is None else self.decoder.weight
        states = self.transform(states)
        return states * self.scale if self.scale != 1.0 else states, weight

    def logits(self, states: Tensor, table: Tensor | None) -> Tensor:
        """(..., D) -> (..., V)."""
        states, weight = self.operands(states, table)
        # A stream may be wider than the weights.
        logits = F.linear(states.to(weight.dtype), weight, self.bias)
        return logits if self.cap is None else self.cap * torch.tanh(logits / self.cap)

    def summed(self, states: Tensor, table: Tensor | None, targets: Tensor) -> Term:
        """The loss of targets (...) for states (..., D)."""
        states, weight = self.operands(states, table)
        return linear_cross_entropy(
            states, weight, self.bias, targets, self.cap, self.smoothing, self.terms, self.scaled, self.slab_products
        )

    def outputs(self, hidden: Hidden) -> dict[str, Tensor]:
        out = {"logits": hidden.grouped(self.logits(hidden.states, hidden.table))}
        if hidden.further is not None:
            out["logits_ngram"] = self.logits(hidden.further, hidden.table)
        return out

    def loss(self, hidden: Hidden, targets: Tensor) -> Term:
        """The mean over all streams that answer these targets, by weight."""
        states, wanted = hidden.states, targets
        if hidden.slots is not None and FEW * hidden.slots <= targets.numel():
            states, wanted = supervised(states, targets, hidden.slots)
        term = self.summed(states, hidden.table, wanted)
        if hidden.further is None or self.further == 0.0:
            return term
        streams = hidden.further.shape[1]
        wanted = targets[:, None].expand(-1, streams, -1)
        more = self.summed(hidden.further, hidden.table, wanted)
        return Term((term.sum + self.further * more.sum) / (1.0 + self.further * streams), term.count)

    def targets(self, labels: Labels, causal: bool) -> Tensor | None:
        found = labels.get(self.label)
        shift = causal if self.shift is None else self.shift
        return shifted(found) if shift and found is not None else found


@part("head", "mlm")
class MaskedLanguageModel(Head):
    """A transform and a decoder tied to the token table, with a bias."""

    sparse = True
    terms = staticmethod(usual_terms)

    class Config(registry.Config):
        """Masked-language-model head."""

        dense: bool = field("begins with a linear layer, as it must where the token table is narrower", True)
        act: Activation = field("activation of the transform", "gelu")
        norm: NormSlot = field("norm of the transform", norms.INHERIT)
        tied: bool = field("uses the token table as its matrix", True)
        extended: bool = field(
            "as wide as the states: columns of its own stand beside those of a narrower table", False
        )
        output: Literal["logits", "prediction_logits"] = field("name of its output", "logits")

    def __init__(self, config: Config, scope: Scope) -> None:
        super().__init__()
        refuse_without_table(config.tied, scope)
        narrow = scope.table or scope.dim
        if config.extended and narrow > scope.dim:
            cause = f"the token table's rows are {narrow} wide, the states {scope.dim}: nothing is left for columns"
            raise Impossible("extended", cause, "leave it out")
        width = scope.dim if config.extended else narrow
        self.dense = Linear(scope.dim, width, True) if config.dense or width != scope.dim else nn.Identity()
        self.act = ACTIVATIONS[config.act]
        self.norm = make_norm(scope, "norm", config.norm, dim=width)
        self.decoder = None if config.tied else Linear(narrow, scope.vocab, False, "head")
        self.extra = Linear(scope.vocab, width - narrow, False, "head") if config.extended else None
        self.bias = nn.Parameter(torch.zeros(scope.vocab))
        self.output = config.output

    def operands(self, states: Tensor, table: Tensor | None) -> tuple[Tensor, Tensor]:
        """What is multiplied: states (..., D) behind the transform, and the matrix (V, D)."""
        weight: Any = table if self.decoder is None else self.decoder.weight
        whole = weight if self.extra is None else torch.cat((weight, self.extra.weight.t()), 1)
        return self.norm(self.act(self.dense(states))), whole

    def logits(self, states: Tensor, table: Tensor | None) -> Tensor:
        """(..., D) -> (..., V)."""
        return F.linear(*self.operands(states, table), self.bias)

    def outputs(self, hidden: Hidden) -> dict[str, Tensor]:
        return {self.output: self.logits(hidden.states, hidden.table)}

    def loss(self, hidden: Hidden, targets: Tensor) -> Term:
        states, wanted = supervised(hidden.states, targets, hidden.slots)
        states, weight = self.operands(states, hidden.table)
        return linear_cross_entropy(
            states, weight, self.bias, wanted, terms=self.terms, scaled=self.scaled, products=self.slab_products
        )
