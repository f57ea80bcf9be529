"""Heads over whole sequences, and the vectors that they read.

    pooler     act(dense(first state))                        BERT
    nsp        is the second text the next one?               Devlin et al. 2018
    sop        do two texts stand in their order?             Lan et al. 2019, arXiv:1909.11942
    sequence   one label (or number) for a text
    choice     which of several texts fits best
    summary    the same beside a language model, from one state of each text

Which vector stands for a text is the `pick` of picks.py.
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from xtcli import registry
from xtcli.parts.activations import ACTIVATIONS, Activation
from xtcli.parts.heads import Head, Hidden, Labels
from xtcli.parts.linear import Linear
from xtcli.parts.outputs import IGNORE, Term, cross_entropy
from xtcli.parts.picks import Pick, pick_vector
from xtcli.parts.scope import Impossible, Scope
from xtcli.parts.vocabulary import NoTransform
from xtcli.registry import Config, Slot, field, part


class PoolerConfig(Config):
    """A dense layer and an activation on the first state, or that state as it is."""

    act: Activation = field("activation", "tanh")
    dense: bool = field("false: the first state as it is", True)
    width: int | None = field("width of the dense layer; null = that of the states", None, gt=0, tiny=64)
    dropout: float = field("dropout of the first state", 0.0, ge=0, lt=1)


class Pooler(nn.Module):
    """(B, T, D) -> (B, width)."""

    def __init__(self, config: PoolerConfig, scope: Scope) -> None:
        super().__init__()
        self.dense = Linear(scope.dim, config.width or scope.dim, True) if config.dense else None
        self.act = ACTIVATIONS[config.act]
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, states: Tensor) -> Tensor:
        first: Tensor = self.dropout(states[:, 0])
        return first if self.dense is None else self.act(self.dense(first))


@part("head", "nsp")
class NextSentence(Head):
    """Two logits on the pooled vector: 0 the second text follows, 1 it does not."""

    label = "next_sentence_label"

    class Config(registry.Config):
        """Next-sentence prediction."""

        output: Literal["logits", "seq_relationship_logits"] = field("name of its output", "seq_relationship_logits")

    def __init__(self, config: Config, scope: Scope) -> None:
        super().__init__()
        self.classifier = Linear(scope.dim, 2, True, "head")
        self.output = config.output
        if config.output == "logits":
            self.more_labels = ("labels",)

    def outputs(self, hidden: Hidden) -> dict[str, Tensor]:
        return {self.output: self.classifier(pick_vector(hidden, "pooled", None))}

    def targets(self, labels: Labels, causal: bool) -> Tensor | None:
        found = (labels.get(name) for name in (self.label, *self.more_labels))
        return next((one for one in found if one is not None), None)

    def loss(self, hidden: Hidden, targets: Tensor) -> Term:
        return cross_entropy(self.outputs(hidden)[self.output], targets.reshape(-1))


@part("head", "sop")
class SentenceOrder(Head):
    """Logits on the pooled vector: 0 the two texts stand in their order, 1 they have changed places."""

    label = "sentence_order_label"

    class Config(registry.Config):
        """Sentence-order prediction."""

        labels: int = field("number of outputs", 2, ge=2)
        dropout: float | None = field("dropout before the classifier; null = model.dropout", None, ge=0, lt=1)

    def __init__(self, config: Config, scope: Scope) -> None:
        super().__init__()
        self.dropout = nn.Dropout(scope.dropout if config.dropout is None else config.dropout)
        self.classifier = Linear(scope.dim, config.labels, True, "head")

    def outputs(self, hidden: Hidden) -> dict[str, Tensor]:
        return {"sop_logits": self.classifier(self.dropout(pick_vector(hidden, "pooled", None)))}

    def loss(self, hidden: Hidden, targets: Tensor) -> Term:
        return cross_entropy(self.outputs(hidden)["sop_logits"], targets.reshape(-1))


@part("head", "sequence")
class SequenceLabels(Head):
    """A linear classifier, or dense - act - linear, on one vector of each text."""

    class Config(registry.Config):
        """Sequence classification."""

        labels: int = field("number of labels", 2, gt=0, tiny=4)
        pick: Pick = field("which vector stands for the text", "pooled")
        end: int = field("id of the end token, for `pick: end`", 1, ge=0)
        hidden: bool | int = field(
            "a dense layer and `act` come before the classifier; a number is that layer's width", False
        )
        act: Activation = field("activation of that layer", "tanh")
        bias: bool = field("adds biases", True)
        transform: Annotated[Config, Slot("transform")] = field(
            "what comes before the classifier in the place of that layer", NoTransform.Config()
        )
        dropout: float | None = field("dropout before each linear layer; null = model.dropout", None, ge=0, lt=1)
        first_dropout: float | None = field("dropout of the picked vector; null = as dropout", None, ge=0, lt=1)
        problem: Literal["one", "many", "number"] | None = field(
            "one label of several, any number of labels, or regression; null = by the targets: numbers for a single "
            "output, one label for whole numbers, else many",
            "one",
        )
        several: Literal["many", "shares"] = field(
            "a target for each label where `problem` is null: any number of them, or shares; then one is a label "
            "whatever its type, below 0 none",
            "many",
        )

    def __init__(self, config: Config, scope: Scope) -> None:
        super().__init__()
        self.pick, self.end, self.pad, self.problem = config.pick, config.end, scope.pad, config.problem
        self.several = "many" if config.problem is not None else config.several
        width = scope.dim if isinstance(config.hidden, bool) else config.hidden
        self.dense = Linear(scope.dim, width, config.bias) if config.hidden else None
        self.act = ACTIVATIONS[config.act]
        self.transform = None
        if config.transform.kind != "none":
            if config.hidden:
                raise Impossible("transform", "stands where the dense layer does", "set hidden: false")
            self.transform = scope.make("transform", config.transform, table=None)
        self.dropout = nn.Dropout(scope.dropout if config.dropout is None else config.dropout)
        self.first = nn.Dropout(self.dropout.p if config.first_dropout is None else config.first_dropout)
        self.classifier = Linear(width, config.labels, config.bias, "head")
        if config.problem == "number" or (config.problem is None and config.labels == 1):
            self.unit = "squared error"

    def outputs(self, hidden: Hidden) -> dict[str, Tensor]:
        x = self.first(pick_vector(hidden, self.pick, self.pad, self.end))
        if self.dense is not None:
            x = self.dropout(self.act(self.dense(x)))
        elif self.transform is not None:
            x = self.dropout(self.transform(x))
        return {"logits": self.classifier(x)}

    def loss(self, hidden: Hidden, targets: Tensor) -> Term:
        logits = self.outputs(hidden)["logits"].float()
        problem = self.problem or self.told(logits, targets)
        if problem == "shares":
            return Term(-(logits.log_softmax(-1) * targets).sum(), torch.tensor(len(logits), device=logits.device))
        if self.several == "shares" and problem == "one":
            targets = targets.long().masked_fill(targets < 0, IGNORE)
        if problem == "one":
            return cross_entropy(logits, targets.reshape(-1))
        wanted, count = targets.reshape(logits.shape).float(), torch.tensor(logits.numel(), device=logits.device)
        if problem == "number":
            return Term(F.mse_loss(logits, wanted, reduction="sum"), count)
        return Term(F.binary_cross_entropy_with_logits(logits, wanted, reduction="sum"), count)

    def told(self, logits: Tensor, targets: Tensor) -> str:
        """The problem that targets for logits (B, N) are of."""
        if logits.shape[-1] == 1:
            return "number"
        if self.several == "shares":
            return "one" if targets.dim() == 1 or targets.shape[-1] == 1 else "shares"
        return "many" if targets.is_floating_point() else "one"


@part("head", "choice")
class MultipleChoice(Head):
    """One score for each of several texts; inputs come as (B, choices, T)."""

    class Config(registry.Config):
        """Multiple choice."""

        pick: Literal["pooled", "first", "last", "mean"] = field(
            "the vector of a text: the pooled one, the first or last state, or the mean of all, padding included",
            "pooled",
        )
        first_dropout: float = field("dropout of that vector", 0.0, ge=0, lt=1)
        transform: Annotated[Config, Slot("transform")] = field(
            "what comes before the classifier", NoTransform.Config()
        )
        dropout: float | None = field("dropout before the classifier; null = model.dropout", None, ge=0, lt=1)

    def __init__(self, config: Config, scope: Scope) -> None:
        super().__init__()
        self.pick = config.pick
        self.first_dropout = nn.Dropout(config.first_dropout)
        self.transform = scope.make("transform", config.transform, table=None)
        self.dropout = nn.Dropout(scope.dropout if config.dropout is None else config.dropout)
        self.classifier = Linear(scope.dim, 1, True, "head")

    def outputs(self, hidden: Hidden) -> dict[str, Tensor]:
        x = self.transform(self.first_dropout(self.vector(hidden)))
        return {"logits": self.classifier(self.dropout(x)).reshape(-1, hidden.choices or 1)}

    def vector(self, hidden: Hidden) -> Tensor:
        """The vector (B, D) of each text."""
        if self.pick == "pooled":
            return pick_vector(hidden, "pooled", None)
        if self.pick == "mean":
            return hidden.states.mean(1)
        return hidden.states[:, 0 if self.pick == "first" else -1]

    def loss(self, hidden: Hidden, targets: Tensor) -> Term:
        return cross_entropy(self.outputs(hidden)["logits"], targets.reshape(-1))


@part("head", "summary")
class Summary(Head):
    """One score for each of several texts, from one state of each, beside a language model.

    Inputs come as (B, choices, T), or (B, T) for a score of each text. `pick` counts along the first axis after
    the batch, which is that of the choices where there are any; only `given` picks within each choice.
    """

    label = "mc_labels"
    loss_name = "mc_loss"

    class Config(registry.Config):
        """Multiple choice beside a language model."""

        pick: Literal["given", "first", "last", "mean"] = field(
            "the state at mc_token_ids (the last one without them), or by its place", "given"
        )
        project: Literal["score", "states", "none"] = field(
            "a linear layer to one score, to as many values as there were, or none", "score"
        )
        act: Activation = field("activation after it", "identity")
        dropout: float | None = field("dropout before it; null = model.dropout", None, ge=0, lt=1)
        last_dropout: float = field("dropout after the activation", 0.0, ge=0, lt=1)

    def __init__(self, config: Config, scope: Scope) -> None:
        super().__init__()
        self.pick = config.pick
        width = 1 if config.project == "score" else scope.dim
        self.dense = None if config.project == "none" else Linear(scope.dim, width, True, "head")
        self.act = ACTIVATIONS[config.act]
        self.dropout = nn.Dropout(scope.dropout if config.dropout is None else config.dropout)
        self.last_dropout = nn.Dropout(config.last_dropout)

    def vector(self, hidden: Hidden) -> Tensor:
        """The picked states, without the axis of places."""
        states = hidden.grouped(hidden.states)
        if self.pick == "mean":
            return states.mean(1)
        if self.pick != "given":
            return states[:, 0 if self.pick == "first" else -1]
        if hidden.picks is None:
            return states[..., -1, :]
        places = hidden.picks[..., None, None].expand(*hidden.picks.shape, 1, states.shape[-1])
        return states.gather(-2, places).squeeze(-2)

    def outputs(self, hidden: Hidden) -> dict[str, Tensor]:
        x = self.dropout(self.vector(hidden))
        if self.dense is not None:
            x = self.dense(x)
        return {"mc_logits": self.last_dropout(self.act(x)).squeeze(-1)}

    def loss(self, hidden: Hidden, targets: Tensor) -> Term:
        logits = self.outputs(hidden)["mc_logits"]
        return cross_entropy(logits.reshape(-1, logits.shape[-1]), targets.reshape(-1))


def needs_pooler(config: Config) -> bool:
    """Whether a head's config reads the pooled vector."""
    return config.kind in ("nsp", "sop") or getattr(config, "pick", None) == "pooled"


def refuse_without_pooler(name: str, config: Config, pooled: bool) -> None:
    """Raise where a head wants a pooled vector that the graph does not make."""
    if needs_pooler(config) and not pooled:
        raise Impossible(f"heads.{name}", "reads the pooled vector, but the model has no pooler", "add `pooler: {}`")
