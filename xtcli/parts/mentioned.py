"""Heads over the entities that a text mentions (entities.py).

    mep           which entity is hidden: logits = norm(act(dense(e))) W^T + b, W tied to the entity table
    entity        a label for the first entity, or for the first few together
    entity-span   a label for each entity, from the states of its first word, its last word and itself

Yamada et al. 2020, arXiv:2010.01057. A text without entities gets no outputs of these heads. Labels that are numbers of
labels are told apart from several labels at once by their shape: those have one more axis, and each label is judged by
itself. Axes: B batch, E entities, D width, C labels.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from xtcli import registry
from xtcli.parts import norms
from xtcli.parts.activations import ACTIVATIONS, Activation
from xtcli.parts.entities import LAST, TABLE
from xtcli.parts.heads import Head, Hidden
from xtcli.parts.linear import Linear, widen
from xtcli.parts.norms import NormSlot, make_norm
from xtcli.parts.outputs import IGNORE, Term, cross_entropy
from xtcli.parts.scope import Impossible, Scope
from xtcli.registry import field, part

STARTS, ENDS = "entity_start_positions", "entity_end_positions"


def entities_of(hidden: Hidden) -> Tensor | None:
    """The states (B, E, D) of the entities, None where the text came without."""
    left = hidden.ledger.read(LAST)
    return left[-1] if left else None


def size_of(scope: Scope) -> tuple[int, int]:
    """Rows and width of the entity table; raises Impossible where there is none."""
    if scope.entities is None:
        raise Impossible("", "it reads entities, and the model has none", "set model.stack.kind: entities")
    return scope.entities


@part("head", "mep")
class MaskedEntities(Head):
    """A transform and a decoder tied to the entity table, with a bias."""

    label = "entity_labels"
    sparse = True
    apart = True

    class Config(registry.Config):
        """Masked-entity prediction."""

        act: Activation = field("activation of the transform", "gelu")
        norm: NormSlot = field("norm of the transform", norms.INHERIT)

    def __init__(self, config: Config, scope: Scope) -> None:
        super().__init__()
        rows, width = size_of(scope)
        self.dense = Linear(scope.dim, width, True)
        self.act = ACTIVATIONS[config.act]
        self.norm = make_norm(scope, "norm", config.norm, dim=width)
        self.bias = nn.Parameter(torch.zeros(rows))

    def logits(self, states: Tensor, hidden: Hidden) -> Tensor:
        """(..., D) -> (..., rows of the entity table)."""
        table = hidden.ledger.read(TABLE)[-1]
        return F.linear(self.norm(self.act(self.dense(states))), table, self.bias)

    def outputs(self, hidden: Hidden) -> dict[str, Tensor]:
        states = entities_of(hidden)
        return {} if states is None else {"entity_logits": self.logits(states, hidden)}

    def loss(self, hidden: Hidden, targets: Tensor) -> Term:
        """targets (B, E)."""
        states, supervised = _needed(hidden), targets != IGNORE
        return cross_entropy(self.logits(states[supervised], hidden), targets[supervised])


class Labelled(Head):
    """A linear layer on vectors of entities."""

    class Config(registry.Config):
        """Labels of entities."""

        labels: int = field("number of labels", 2, gt=0)
        bias: bool = field("adds a bias", True)
        dropout: float | None = field("dropout before the classifier; null = model.dropout", None, ge=0, lt=1)

    def __init__(self, config: Config, scope: Scope, vectors: int) -> None:
        super().__init__()
        size_of(scope)
        self.dropout = nn.Dropout(scope.dropout if config.dropout is None else config.dropout)
        self.classifier = Linear(vectors * scope.dim, config.labels, config.bias, "head")

    def vectors(self, hidden: Hidden, entities: Tensor) -> Tensor:
        """What the classifier reads: (B, ..., vectors D)."""
        raise AssertionError("a head must say what it reads")

    def outputs(self, hidden: Hidden) -> dict[str, Tensor]:
        entities = entities_of(hidden)
        if entities is None:
            return {}
        return {"logits": self.classifier(self.dropout(self.vectors(hidden, entities)))}

    def loss(self, hidden: Hidden, targets: Tensor) -> Term:
        """targets (B, ...) numbers of labels, or (B, ..., C) of 0 and 1."""
        _needed(hidden)
        logits = self.outputs(hidden)["logits"]
        if targets.dim() < logits.dim():
            return cross_entropy(logits, targets)
        wanted = targets.reshape(logits.shape).to(widen(logits).dtype)
        total = F.binary_cross_entropy_with_logits(widen(logits), wanted, reduction="sum")
        return Term(total, torch.tensor(logits.numel(), device=logits.device))


@part("head", "entity")
class EntityLabels(Labelled):
    """One label for the first `entities` entities of a text: (B, C)."""

    class Config(Labelled.Config):
        """Entity classification, of one or of several together."""

        entities: int = field("how many of the first entities are read, end to end", 1, gt=0)

    def __init__(self, config: Config, scope: Scope) -> None:
        super().__init__(config, scope, config.entities)
        self.entities = config.entities

    def vectors(self, hidden: Hidden, entities: Tensor) -> Tensor:
        if entities.shape[1] < self.entities:
            raise ValueError(f"{entities.shape[1]} entities were given, the classifier reads {self.entities}")
        return entities[:, : self.entities].flatten(1)


@part("head", "entity-span")
class SpanLabels(Labelled):
    """A label for each entity, (B, E, C); `entity_start_positions` and `entity_end_positions` (B, E) are its words."""

    reads = (STARTS, ENDS)

    class Config(Labelled.Config):
        """Classification of the spans that entities stand for."""

    def __init__(self, config: Config, scope: Scope) -> None:
        super().__init__(config, scope, 3)

    def blank(self, rows: int, device: torch.device) -> dict[str, Tensor]:
        """Two spans a row, for measuring."""
        return {name: torch.zeros(rows, 2, dtype=torch.long, device=device) for name in self.reads}

    def vectors(self, hidden: Hidden, entities: Tensor) -> Tensor:
        missing = [name for name in self.reads if name not in hidden.extras]
        if missing:
            raise ValueError(f"the classifier of spans reads {' and '.join(missing)}")
        ends = [hidden.extras[name][..., None].expand(-1, -1, hidden.states.shape[-1]) for name in self.reads]
        return torch.cat([*(hidden.states.gather(1, places) for places in ends), entities], -1)


def _needed(hidden: Hidden) -> Tensor:
    """The states of the entities; raises ValueError without any."""
    states = entities_of(hidden)
    if states is None:
        raise ValueError("labels of entities were given, but no entity_ids")
    return states
