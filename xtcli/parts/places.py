"""Heads over the places of a text.

token  one label for each token
span   where an answer starts and ends
"""

from __future__ import annotations

from typing import Annotated

import torch
from torch import Tensor, nn

from xtcli import registry
from xtcli.parts.heads import Head, Hidden, Labels
from xtcli.parts.linear import Linear
from xtcli.parts.outputs import IGNORE, Term, cross_entropy
from xtcli.parts.scope import Scope
from xtcli.parts.segments import QUESTION, outside
from xtcli.parts.vocabulary import NoTransform
from xtcli.registry import Config, Slot, field, part


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

    label = "start_positions"
    more_labels = ("end_positions",)

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
