"""What every head reads and gives, and how their losses and outputs become one answer.

`targets` are aligned with positions; IGNORE leaves one out. The kinds stand in vocabulary.py (words), places.py (labels
and answers in a text), pooled.py (labels of whole texts) and files of their own.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from xtcli.parts.context import Ledger
from xtcli.parts.losses import PRODUCTS, Products, Scaled, Terms, scaled
from xtcli.parts.outputs import IGNORE, Output, Term


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
        self.slots: int | None = None  # at least as many as targets are asked of it, where the host knows

    def asked(self, slots: int | None) -> Hidden:
        """The same for a head of which at most so many targets are asked."""
        made = copy.copy(self)
        made.slots = slots
        return made

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


def supervised(states: Tensor, targets: Tensor, slots: int | None) -> tuple[Tensor, Tensor]:
    """The rows (n, D) of states (..., D) that have targets (...), and those targets (n,).

    On a CPU, and where `slots` is None, n is how many there are. Else n is `slots`, so that a GPU is not waited for and
    finds the same sizes in each step; rows beyond the last have the target IGNORE.
    """
    if slots is None or states.device.type == "cpu":
        real = targets != IGNORE
        return states[real], targets[real]
    return slotted(states, targets, slots)


def slotted(states: Tensor, targets: Tensor, slots: int) -> tuple[Tensor, Tensor]:
    """`supervised` in so many rows, at least as many as there are targets."""
    flat = targets.flatten()
    places = torch.nonzero_static(flat != IGNORE, size=slots, fill_value=-1)[:, 0]
    aims = flat.index_select(0, places.clamp(min=0)).masked_fill(places < 0, IGNORE)
    return states.flatten(0, -2).index_select(0, places.clamp(min=0)), aims


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
    scaled: Scaled = staticmethod(scaled)  # and its gradients from that
    slab_products: Products = PRODUCTS  # and what multiplies there

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
