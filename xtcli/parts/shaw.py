"""Scores of queries and keys with learned vectors of their distance (Shaw et al. 2018, arXiv:1803.02155).

    score(i, j) = q_i k_j + f q_i a(j - i) (+ f k_j a(j - i))        f: the scale of the other scores, or 1

a is a table over distances, beyond the longest of which the last vector serves. Axes: B rows, H query heads, G
key/value heads, n heads of a group, T queries, S keys, d head width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from xtcli import registry
from xtcli.parts.context import Ctx
from xtcli.parts.linear import Table
from xtcli.parts.scope import Scope
from xtcli.parts.shared import slot_distance
from xtcli.registry import field, part


@part("position", "shaw")
class Relative(nn.Module):
    """Scores of a query (and a key) with a learned vector of their distance, one table for each layer."""

    reach = "relative"

    class Config(registry.Config):
        """Learned vectors of the distance, multiplied with queries."""

        distance: int = field(
            "longest distance that has its own vector; beyond it the last one serves", gt=0, tiny=127, example=5
        )
        key_term: bool = field("keys score with the vector too", False)
        scaled: bool = field("these scores are divided by sqrt(head width) like the others", True)

    def __init__(self, config: Config, scope: Scope, head_dim: int) -> None:
        super().__init__()
        self.distance, self.key_term = config.distance, config.key_term
        self.factor = head_dim**-0.5 if config.scaled else 1.0
        self.table = Table(2 * config.distance + 1, head_dim)

    def scores(self, q: Tensor, k: Tensor, ctx: Ctx) -> Tensor:
        """q (B, H, T, d), k (B, G, S, d) -> (B, H, T, S), already scaled."""
        steps = (-slot_distance(ctx, q.shape[2])).clamp(-self.distance, self.distance) + self.distance
        vectors = self.table(steps)  # (B|1, T, S, d)
        asked = _with_distances("bgntd", q.unflatten(1, (k.shape[1], -1)), vectors)
        if self.key_term:
            asked = asked + _with_distances("bgnsd", k[:, :, None], vectors)
        return asked.flatten(1, 2) * self.factor


def _with_distances(axes: str, x: Tensor, vectors: Tensor) -> Tensor:
    """x (B, G, n, T or S, d) times vectors (B|1, T, S, d) -> (B, G, n, T, S)."""
    if vectors.shape[0] == 1:
        return torch.einsum(f"{axes},tsd->bgnts", x, vectors[0])
    return torch.einsum(f"{axes},btsd->bgnts", x, vectors)
