"""Axial positions: a place is a cell of a grid, its vector the rows of its coordinates end to end.

    place p = (i_1, ..., i_n), digits in the mixed radix of `shape`, the last one fastest
    vector  = [rows_1[i_1] | ... | rows_n[i_n]],  widths adding up to dim       Kitaev et al. 2020, arXiv:2001.04451

The parameters of N places are those of the axes: sum of n_a w_a in the place of N D. Dropout drops a whole row of the
grid: all places of a text that have one second coordinate.
"""

from __future__ import annotations

import math
from typing import Annotated, Self

import torch
from pydantic import Field, Strict, model_validator
from pydantic_core import PydanticCustomError
from torch import Tensor, nn
from torch.nn import functional as F

from xtcli import registry
from xtcli.parts.linear import Draw
from xtcli.parts.scope import Impossible, Scope
from xtcli.registry import field, part

Sizes = Annotated[tuple[Annotated[int, Field(gt=0)], ...], Strict(False)]


@part("absolute", "axial")
class AxialPlaces(nn.Module):
    """Learned rows for each axis of a grid of places."""

    class Config(registry.Config):
        """Learned positions over the axes of a grid."""

        shape: Sizes = field("places along each axis; their product is the number of places", example=(4, 8))
        widths: Sizes = field("width of each axis' rows, adding up to dim", example=(16, 48))
        std: float = field("standard deviation of the rows at first", 1.0, gt=0)
        dropout: float = field("dropout of all places that share the second coordinate", 0.0, ge=0, lt=1)

        @model_validator(mode="after")
        def _axes(self) -> Self:
            if len(self.shape) < 2 or len(self.shape) != len(self.widths):
                raise PydanticCustomError("axes", "shape and widths need a number for each of two axes or more")
            return self

        def tiny(self) -> Self:
            """128 places or fewer, in the proportions of the axes; 64 numbers wide or less."""
            return self.model_copy(update={"shape": _within(self.shape, 128), "widths": _share(self.widths, 64)})

    def __init__(self, config: Config, scope: Scope) -> None:
        super().__init__()
        if sum(config.widths) != scope.dim:
            raise Impossible("widths", f"{' + '.join(map(str, config.widths))} is not dim {scope.dim}")
        self.shape, self.std, self.dropout = config.shape, config.std, config.dropout
        self.limit = math.prod(config.shape)
        self.names = [f"axis_{number}" for number in range(len(config.shape))]
        for name, rows, width in zip(self.names, config.shape, config.widths, strict=True):
            self.register_parameter(name, nn.Parameter(torch.empty(rows, width)))

    def draw(self, normal: Draw) -> None:
        for name in self.names:
            normal(self.get_parameter(name), self.std)

    def forward(self, x: Tensor, places: Tensor) -> Tensor:
        """x (B, T, dim), places (B|1, T)."""
        digits: list[Tensor] = []
        left = places
        for size in reversed(self.shape):
            digits.insert(0, left % size)
            left = left // size
        rows = [F.embedding(digit, self.get_parameter(name)) for digit, name in zip(digits, self.names, strict=True)]
        table = torch.cat(rows, -1)
        if self.training and self.dropout:
            kept = F.dropout2d(table.new_ones(x.shape[0], self.shape[1], 1, 1), self.dropout)[..., 0]
            table = table * kept.gather(1, digits[1].expand(x.shape[0], -1)[..., None])
        return x + table

    def extra_repr(self) -> str:
        return f"{' x '.join(map(str, self.shape))} places"


def _within(shape: tuple[int, ...], most: int) -> tuple[int, ...]:
    """The shape with its largest axis halved until the product is at most `most`."""
    sizes = list(shape)
    while math.prod(sizes) > most:
        at = sizes.index(max(sizes))
        sizes[at] = -(-sizes[at] // 2)
    return tuple(sizes)


def _share(widths: tuple[int, ...], most: int) -> tuple[int, ...]:
    """The widths shrunk in proportion to add up to `most`, at least 1 each."""
    total = sum(widths)
    if total <= most:
        return widths
    small = [max(width * most // total, 1) for width in widths]
    small[-1] += most - sum(small)
    return tuple(small)
