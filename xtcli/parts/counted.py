"""Absolute places that are counted from the ids: padding has no place.

    counted   row pad + n for the n-th token of a row that is not padding, n from 1; row pad for padding

(Liu et al. 2019, RoBERTa, arXiv:1907.11692.) So text may be padded on either side, and the count depends on the ids,
not on the mask. Vectors given in place of ids cannot be told from padding: all of them count. Positions that the
caller states are rows of the table. Where documents share a row each is counted from its own start, and where text
goes on from a state the count goes on.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from xtcli import registry
from xtcli.parts.context import Ctx
from xtcli.parts.linear import Table
from xtcli.parts.scope import Impossible, Scope
from xtcli.registry import part


@part("absolute", "counted")
class CountedPlaces(nn.Module):
    """A learned vector for each place among the tokens that are not padding; `limit` is how many there are."""

    class Config(registry.Config):
        """Learned absolute positions of the tokens that are not padding."""

    def __init__(self, config: Config, scope: Scope) -> None:
        super().__init__()
        if scope.context is None:
            raise Impossible("", "counted positions need model.context, the number of places")
        if scope.pad is None:
            raise Impossible("", "counted positions pass padding over, and model.pad names none", "state model.pad")
        self.pad, self.limit = scope.pad, scope.context
        self.table = Table(scope.context + scope.pad + 1, scope.dim)

    def counted(self, ctx: Ctx) -> Tensor:
        """The row (B|1, T) of each token."""
        places, past = ctx.positions, ctx.offset
        if ctx.placed and ctx.documents is None and ctx.state is None:
            return places
        length, device = places.shape[1], places.device
        if ctx.ids is None:
            return torch.arange(past, past + length, device=device)[None] + self.pad + 1
        real = ctx.ids != self.pad
        if ctx.state is not None and ctx.keep is not None:
            real = real & ctx.keep[:, past : past + length]
        number = real.long().cumsum(-1)
        if ctx.documents is not None:
            begins = torch.ones_like(ctx.documents, dtype=torch.bool)
            begins[:, 1:] = ctx.documents[:, 1:] != ctx.documents[:, :-1]
            number = number - torch.where(begins, number - real.long(), 0).cummax(-1).values
        if past:
            number = number + (past if ctx.keep is None else ctx.keep[:, :past].sum(-1, keepdim=True))
        return number * real + self.pad

    def forward(self, x: Tensor, places: Tensor) -> Tensor:
        """x (B, T, D) and rows of the table (B|1, T) -> (B, T, D)."""
        return x + self.table(places)  # type: ignore[no-any-return]
