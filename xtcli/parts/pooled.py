"""Heads over whole sequences, and the vectors that they read.

    pooler     act(dense(first state))                        BERT
    nsp        is the second text the next one?               Devlin et al. 2018
    sequence   one label (or number) for a text
    choice     which of several texts fits best

`pick` says which vector stands for the text: the pooled one, the first state, the last real token's, or
the mean of the real ones.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from xtcli.parts.activations import ACTIVATIONS, Activation
from xtcli.parts.heads import Head, Hidden
from xtcli.parts.linear import Linear
from xtcli.parts.outputs import Term, cross_entropy
from xtcli.parts.scope import Impossible, Scope
from xtcli.registry import Config, field, part

Pick = Literal["pooled", "first", "last", "mean"]


class PoolerConfig(Config):
    """A dense layer and an activation on the first state."""

    act: Activation = field("activation", "tanh")


class Pooler(nn.Module):
    """(B, T, D) -> (B, D)."""

    def __init__(self, config: PoolerConfig, scope: Scope) -> None:
        super().__init__()
        self.dense = Linear(scope.dim, scope.dim, True)
        self.act = ACTIVATIONS[config.act]

    def forward(self, states: Tensor) -> Tensor:
        return self.act(self.dense(states[:, 0]))


def last_real(hidden: Hidden, pad: int | None) -> Tensor:
    """The place (B,) of the last token that is not padding, on whichever side the padding is."""
    length = hidden.states.shape[1]
    places = torch.arange(length, device=hidden.states.device)
    if hidden.ids is not None and pad is not None:
        real = hidden.ids != pad
    elif hidden.keep is not None:
        real = hidden.keep
    else:
        return places[-1].expand(hidden.states.shape[0])
    return (places * real).argmax(-1)


def pick_vector(hidden: Hidden, pick: Pick, pad: int | None) -> Tensor:
    """The vector (B, D) that stands for each text."""
    if pick == "pooled":
        if hidden.pooled is None:
            raise AssertionError("checked when built")
        return hidden.pooled
    if pick == "first":
        return hidden.states[:, 0]
    if pick == "last":
        rows = torch.arange(hidden.states.shape[0], device=hidden.states.device)
        return hidden.states[rows, last_real(hidden, pad)]
    if hidden.keep is None:
        return hidden.states.mean(1)
    keep = hidden.keep[..., None].to(hidden.states.dtype)
    return (hidden.states * keep).sum(1) / keep.sum(1).clamp(min=1)


@part("head", "nsp")
class NextSentence(Head):
    """Two logits on the pooled vector: 0 the second text follows, 1 it does not."""

    label = "next_sentence_label"

    class Config(Config):
        """Next-sentence prediction."""

        output: Literal["logits", "seq_relationship_logits"] = field("name of its output", "seq_relationship_logits")

    def __init__(self, config: Config, scope: Scope) -> None:
        super().__init__()
        self.classifier = Linear(scope.dim, 2, True, "head")
        self.output = config.output

    def outputs(self, hidden: Hidden) -> dict[str, Tensor]:
        return {self.output: self.classifier(pick_vector(hidden, "pooled", None))}

    def loss(self, hidden: Hidden, targets: Tensor) -> Term:
        return cross_entropy(self.outputs(hidden)[self.output], targets.reshape(-1))


@part("head", "sequence")
class SequenceLabels(Head):
    """A linear classifier, or dense - act - linear, on one vector of each text."""

    class Config(Config):
        """Sequence classification."""

        labels: int = field("number of labels", 2, gt=0)
        pick: Pick = field("which vector stands for the text", "pooled")
        hidden: bool = field("a dense layer and `act` come before the classifier", False)
        act: Activation = field("activation of that layer", "tanh")
        bias: bool = field("adds biases", True)
        dropout: float | None = field("dropout before each linear layer; null = model.dropout", None, ge=0, lt=1)
        problem: Literal["one", "many", "number"] = field(
            "one label of several, any number of labels, or regression", "one"
        )

    def __init__(self, config: Config, scope: Scope) -> None:
        super().__init__()
        self.pick, self.pad, self.problem = config.pick, scope.pad, config.problem
        self.dense = Linear(scope.dim, scope.dim, config.bias) if config.hidden else None
        self.act = ACTIVATIONS[config.act]
        self.dropout = nn.Dropout(scope.dropout if config.dropout is None else config.dropout)
        self.classifier = Linear(scope.dim, config.labels, config.bias, "head")

    def outputs(self, hidden: Hidden) -> dict[str, Tensor]:
        x = self.dropout(pick_vector(hidden, self.pick, self.pad))
        if self.dense is not None:
            x = self.dropout(self.act(self.dense(x)))
        return {"logits": self.classifier(x)}

    def loss(self, hidden: Hidden, targets: Tensor) -> Term:
        logits = self.outputs(hidden)["logits"].float()
        if self.problem == "one":
            return cross_entropy(logits, targets.reshape(-1))
        wanted = targets.reshape(logits.shape).float()
        count = torch.tensor(logits.numel(), device=logits.device)
        if self.problem == "number":
            return Term(F.mse_loss(logits, wanted, reduction="sum"), count)
        return Term(F.binary_cross_entropy_with_logits(logits, wanted, reduction="sum"), count)


@part("head", "choice")
class MultipleChoice(Head):
    """One score for each of several texts; inputs come as (B, choices, T)."""

    class Config(Config):
        """Multiple choice."""

        dropout: float | None = field("dropout before the classifier; null = model.dropout", None, ge=0, lt=1)

    def __init__(self, config: Config, scope: Scope) -> None:
        super().__init__()
        self.dropout = nn.Dropout(scope.dropout if config.dropout is None else config.dropout)
        self.classifier = Linear(scope.dim, 1, True, "head")

    def outputs(self, hidden: Hidden) -> dict[str, Tensor]:
        scores = self.classifier(self.dropout(pick_vector(hidden, "pooled", None)))
        return {"logits": scores.reshape(-1, hidden.choices or 1)}

    def loss(self, hidden: Hidden, targets: Tensor) -> Term:
        return cross_entropy(self.outputs(hidden)["logits"], targets.reshape(-1))


def needs_pooler(config: Config) -> bool:
    """Whether a head's config reads the pooled vector."""
    return config.kind in ("nsp", "choice") or getattr(config, "pick", None) == "pooled"


def refuse_without_pooler(name: str, config: Config, pooled: bool) -> None:
    """Raise where a head wants a pooled vector that the graph does not make."""
    if needs_pooler(config) and not pooled:
        raise Impossible(f"heads.{name}", "reads the pooled vector, but the model has no pooler", "add `pooler: {}`")
