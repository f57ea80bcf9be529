"""Heads over tokens: hidden states -> logits, and the loss of targets.

    lm     logits = t(h) W^T (+ b), W tied to the token table or its own, t a slot: nothing, or norm(act(dense(h)))
    mlm    logits = norm(act(dense(h))) W^T + b          Devlin et al. 2018, arXiv:1810.04805
    token  one label for each token
    span   where an answer starts and ends

`targets` are aligned with positions; IGNORE leaves one out. Where few positions are supervised (masked
language models) only those are multiplied with the vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from xtcli import registry
from xtcli.parts import norms
from xtcli.parts.activations import ACTIVATIONS, Activation
from xtcli.parts.context import Ledger
from xtcli.parts.linear import Linear
from xtcli.parts.losses import Terms, linear_cross_entropy, slab_terms
from xtcli.parts.norms import NormSlot, make_norm
from xtcli.parts.outputs import IGNORE, Output, Term, cross_entropy, shifted
from xtcli.parts.scope import Impossible, Scope
from xtcli.parts.segments import QUESTION, outside
from xtcli.registry import Config, Slot, field, part


class Hidden:
    """What heads read: states (B, T, D), the pooled vector, the token table and the inputs.

    `choices` is set where the rows are texts among which one is chosen: B = questions x choices. `picks` (B,)
    are places that the caller chose, `source` (B, S) the ids that an encoder read before this decoder. `extras` are
    the inputs that only some parts read, `ledger` what parts left besides the states.
    """

    def __init__(
        self,
        states: Tensor,
        table: Tensor | None = None,
        pooled: Tensor | None = None,
        ids: Tensor | None = None,
        keep: Tensor | None = None,
        choices: int | None = None,
        picks: Tensor | None = None,
        source: Tensor | None = None,
        extras: Mapping[str, Tensor] | None = None,
        ledger: Ledger | None = None,
    ) -> None:
        self.states, self.table, self.pooled, self.ids = states, table, pooled, ids
        self.keep, self.choices, self.picks, self.source = keep, choices, picks, source
        self.extras, self.ledger = extras or {}, ledger or Ledger()
        self.others: dict[str, Hidden] = {}  # what further towers made, by name
        self.mems: list[Tensor] | None = None  # what the mixers remember, as the field has it
        self.further: Tensor | None = None  # (B, n, T, D) states of streams that know less and answer the same

    def grouped(self, rows: Tensor) -> Tensor:
        """Rows (B, ...) as (questions, choices, ...) where there are choices."""
        return rows if self.choices is None else rows.unflatten(0, (-1, self.choices))

    def few(self, places: int | Tensor) -> Hidden:
        """What heads read of the last `places` of a text alone, or of those that are numbered; 0 = of all."""
        if isinstance(places, int) and places == 0:
            return self
        where = slice(-places, None) if isinstance(places, int) else places
        made = copy.copy(self)
        made.states = self.states[:, where]
        made.further = None if self.further is None else self.further[:, :, where]
        return made


Labels = Mapping[str, Tensor | None]


class Head(nn.Module):
    """`forward` gives named outputs, `loss` a term, `targets` finds the head's targets among the labels."""

    label = "labels"
    more_labels: tuple[str, ...] = ()  # labels beside it that `targets` reads
    share = 1.0  # of this head in the loss
    loss_name = "loss"
    unit = "nats"  # of the loss
    sparse = False  # whether only supervised positions are computed in training
    apart = False  # whether the loss of each head of its model is an output of its own, `<head>_loss`
    terms: Terms | None = None  # what computes a slab of the loss, in a head whose logits are never whole in training

    def outputs(self, hidden: Hidden) -> dict[str, Tensor]:
        """Logits by output name."""
        raise AssertionError("a head must give outputs")

    def loss(self, hidden: Hidden, targets: Tensor) -> Term:
        """The loss of aligned targets."""
        raise AssertionError("a head must give a loss")

    def measured(self, hidden: Hidden, targets: Tensor) -> Tensor:
        """The loss of one batch by itself, as `forward` gives it."""
        return self.loss(hidden, targets).mean()

    def noted(self, hidden: Hidden, targets: Tensor) -> dict[str, Tensor]:
        """Outputs that exist only beside targets."""
        return {}

    def targets(self, labels: Labels, causal: bool) -> Tensor | None:
        """Aligned targets from what the caller named, or None."""
        return labels.get(self.label)


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

    terms = staticmethod(slab_terms)

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
        return linear_cross_entropy(states, weight, self.bias, targets, self.cap, self.smoothing, self.terms)

    def outputs(self, hidden: Hidden) -> dict[str, Tensor]:
        out = {"logits": hidden.grouped(self.logits(hidden.states, hidden.table))}
        if hidden.further is not None:
            out["logits_ngram"] = self.logits(hidden.further, hidden.table)
        return out

    def loss(self, hidden: Hidden, targets: Tensor) -> Term:
        """The mean over all streams that answer these targets, by weight."""
        term = self.summed(hidden.states, hidden.table, targets)
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
    terms = staticmethod(slab_terms)

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
        supervised = targets != IGNORE
        states, weight = self.operands(hidden.states[supervised], hidden.table)
        return linear_cross_entropy(states, weight, self.bias, targets[supervised], terms=self.terms)


@part("head", "token")
class TokenLabels(Head):
    """One label for each token."""

    class Config(registry.Config):
        """Token classification."""

        labels: int = field("number of labels", 2, gt=0)
        dropout: float | None = field("dropout before the classifier; null = model.dropout", None, ge=0, lt=1)
        bias: bool = field("adds a bias", True)

    def __init__(self, config: Config, scope: Scope) -> None:
        super().__init__()
        self.dropout = nn.Dropout(scope.dropout if config.dropout is None else config.dropout)
        self.classifier = Linear(scope.dim, config.labels, config.bias, "head")

    def outputs(self, hidden: Hidden) -> dict[str, Tensor]:
        return {"logits": self.classifier(self.dropout(hidden.states))}

    def loss(self, hidden: Hidden, targets: Tensor) -> Term:
        return cross_entropy(self.outputs(hidden)["logits"], targets)


@part("head", "span")
class Span(Head):
    """Start and end of an answer: cross-entropy over the places, the mean of both ends."""

    label = "span"

    class Config(registry.Config):
        """Extractive question answering."""

        transform: Annotated[Config, Slot("transform")] = field("what comes before it", NoTransform.Config())
        separator: int | None = field(
            "id of the token that ends the question, where the answer is never in it: its places get -1e6",
            None,
            ge=0,
            tiny=511,
        )

    def __init__(self, config: Config, scope: Scope) -> None:
        super().__init__()
        self.transform = scope.make("transform", config.transform)
        self.classifier = Linear(scope.dim, 2, True, "head")
        self.separator = config.separator
        if config.separator is not None:
            self.reads = (QUESTION,)

    def outputs(self, hidden: Hidden) -> dict[str, Tensor]:
        logits = self.classifier(self.transform(hidden.states))
        if self.separator is not None:
            logits = outside(logits, hidden.ids, hidden.extras, self.separator)
        start, end = logits.unbind(-1)
        return {"start_logits": start, "end_logits": end}

    def loss(self, hidden: Hidden, targets: Tensor) -> Term:
        """targets (B, 2): first and last place of the answer; a place beyond the text is left out."""
        start, end = self.ends(hidden, targets)
        return Term(start.sum + end.sum, start.count + end.count)

    def measured(self, hidden: Hidden, targets: Tensor) -> Tensor:
        """The mean of both ends' means, which weighs them alike though more of one are left out."""
        start, end = self.ends(hidden, targets)
        return (start.mean() + end.mean()) / 2

    def ends(self, hidden: Hidden, targets: Tensor) -> tuple[Term, Term]:
        """The losses of first and last places."""
        out = self.outputs(hidden)
        places = targets.masked_fill(targets >= hidden.states.shape[1], IGNORE)
        return cross_entropy(out["start_logits"], places[:, 0]), cross_entropy(out["end_logits"], places[:, 1])

    def targets(self, labels: Labels, causal: bool) -> Tensor | None:
        start, end = labels.get("start_positions"), labels.get("end_positions")
        if start is None or end is None:
            return None
        # The reference takes a place before the text for its first.
        return torch.stack((start.reshape(-1), end.reshape(-1)), dim=-1).clamp(min=0)


SPEAKING = ("lm", "adaptive")
"""Kinds of heads that give the next token."""


def speaker(heads: Iterable[str]) -> str | None:
    """The head among these that gives the next token."""
    return next((name for name in heads if name in SPEAKING), None)


def collect(
    heads: Mapping[str, Head],
    hidden: Hidden,
    labels: Labels,
    causal: bool,
    read_by: Callable[[str, Hidden], Hidden] = lambda name, hidden: hidden,
) -> Output:
    """Loss first, then every head's outputs; `read_by` says what a head reads of what was made."""
    out = Output()
    losses: dict[str, Any] = {}
    made: dict[str, Tensor] = {}
    alone: dict[str, Tensor] = {}
    for name, head in heads.items():
        read = read_by(name, hidden)
        made |= head.outputs(read)
        targets = head.targets(labels, causal)
        if targets is not None:
            alone[f"{name}_loss"] = loss = head.share * head.measured(read, targets)
            losses[head.loss_name] = losses.get(head.loss_name, 0.0) + loss
            made |= head.noted(read, targets)
    out.update(losses | (alone if any(head.apart for head in heads.values()) else {}) | made)
    return out
