"""What holds for all rows of a batch: how tokens are chosen, which ids there are, what must come."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from xtcli.generate.sampling import Sampling


@dataclass(frozen=True)
class Rules:
    """What holds for all rows. `vocab` is the number of ids that have a text; `lens` alternatives are noted.

    `first` is the token that every text begins with, `last` the one that ends a text at its limit; None is any.
    """

    sampling: Sampling
    ends: frozenset[int]
    vocab: int
    seed: int = 0
    lens: int = 0
    first: int | None = None
    last: int | None = None

    def force(self, logits: Tensor, step: int, budgets: Sequence[int]) -> Tensor:
        """Logits (B, V) of token `step`, in which only the token that must come is left in the rows that have one."""
        for token, rows in (
            (self.first, [step == 0] * len(budgets)),
            (self.last, [step == budget - 1 for budget in budgets]),
        ):
            if token is not None and any(rows):
                only = torch.full_like(logits[:1], float("-inf"))
                only[0, token] = 0.0
                logits = torch.where(torch.tensor(rows, device=logits.device)[:, None], only, logits)
        return logits
