"""Vectors in and vectors out, in the place of tokens: signals, features, time series.

    embed `continuous`   x = dropout(norm(W values + b + positions))       values (B, T, width) -> (B, T, D)
    head `continuous`    y = W h + b, loss (y - target)^2                  (B, T, D) -> (B, T, width)

Without a width nothing is projected: the values are as wide as the model. There is no token table, so
that heads tied to one are refused.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from xtcli import registry
from xtcli.parts import norms
from xtcli.parts.context import Ctx
from xtcli.parts.embed import AbsoluteSlot, Embedding, NoPlaces
from xtcli.parts.heads import Head, Hidden, Labels
from xtcli.parts.linear import Linear, widen
from xtcli.parts.norms import NormSlot, make_norm
from xtcli.parts.outputs import IGNORE, Term
from xtcli.parts.scope import Scope
from xtcli.registry import field, part


@part("embed", "continuous")
class ContinuousInput(Embedding):
    """A projection of the vectors `input_values` (B, T, width), with absolute positions."""

    reads = ("input_values",)
    tokens = None

    class Config(registry.Config):
        """Vectors, projected to dim."""

        width: int | None = field("width of the vectors; null = dim, and no projection", None, gt=0, example=12)
        bias: bool = field("adds a bias to the projection", True)
        positions: AbsoluteSlot = field("absolute positions", NoPlaces.Config())
        norm: NormSlot = field("norm of the sum", norms.NONE)
        dropout: float | None = field("dropout of the sum; null = model.dropout", None, ge=0, lt=1)

    def __init__(self, config: Config, scope: Scope, shares: bool = False) -> None:
        super().__init__()
        self.given = config.width or scope.dim
        self.project = None if config.width is None else Linear(config.width, scope.dim, config.bias)
        self.positions = scope.make("positions", config.positions)
        self.norm = make_norm(scope, "norm", config.norm)
        self.dropout = nn.Dropout(scope.dropout if config.dropout is None else config.dropout)

    @property
    def limit(self) -> int | None:  # type: ignore[override]
        """The most places there are, or None."""
        return self.positions.limit  # type: ignore[return-value]

    def size(
        self, ids: Tensor | None, vectors: Tensor | None, extras: Mapping[str, Tensor]
    ) -> tuple[int, int, torch.device]:
        """Rows and places of `input_values`; raises ValueError without them or for another width."""
        values = extras.get("input_values")
        if values is None or ids is not None or vectors is not None:
            raise ValueError("this architecture reads input_values, neither input_ids nor inputs_embeds")
        if values.dim() != 3 or values.shape[-1] != self.given:
            raise ValueError(f"input_values has shape {tuple(values.shape)}, expected (rows, places, {self.given})")
        return values.shape[0], values.shape[1], values.device

    def blank(self, rows: int, length: int, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
        """Vectors of zeros."""
        return {"input_values": torch.zeros(rows, length, self.given, dtype=dtype, device=device)}

    def forward(self, ids: Tensor | None, vectors: Tensor | None, segments: Tensor | None, ctx: Ctx) -> Tensor:
        """input_values (B, T, width) -> (B, T, D)."""
        if segments is not None:
            raise ValueError("token_type_ids were given, but this architecture has no segments")
        values = ctx.extras["input_values"]
        x = values if self.project is None else self.project(values.to(self.project.weight.dtype))
        return self.dropout(self.norm(self.positions(x, ctx.positions)))  # type: ignore[no-any-return]


@part("head", "continuous")
class ContinuousOutput(Head):
    """Vectors (B, T, width) under `predictions`; the loss is the mean over their numbers.

    A target of -100 is left out, number by number.
    """

    unit = "squared error"

    class Config(registry.Config):
        """A vector for each place, with squared error."""

        width: int | None = field("width of the vectors; null = that of the states, and no projection", None, gt=0)
        bias: bool = field("adds a bias", True)
        shift: bool | None = field("labels are shifted to their successors; null = in a causal model", None)

    def __init__(self, config: Config, scope: Scope) -> None:
        super().__init__()
        self.width = config.width or scope.dim
        self.project = None if config.width is None else Linear(scope.dim, config.width, config.bias, "head")
        self.shift = config.shift

    def predict(self, states: Tensor) -> Tensor:
        """(..., D) -> (..., width)."""
        return states if self.project is None else self.project(states)

    def outputs(self, hidden: Hidden) -> dict[str, Tensor]:
        return {"predictions": self.predict(hidden.states)}

    def loss(self, hidden: Hidden, targets: Tensor) -> Term:
        """targets (B, T, width)."""
        wanted = targets != IGNORE
        apart = widen(self.predict(hidden.states)) - targets
        return Term(apart.masked_fill(~wanted, 0.0).square().sum(), wanted.sum())

    def targets(self, labels: Labels, causal: bool) -> Tensor | None:
        found = labels.get(self.label)
        if found is None or not (causal if self.shift is None else self.shift):
            return found
        return torch.cat((found[:, 1:], torch.full_like(found[:, :1], IGNORE)), dim=1)
