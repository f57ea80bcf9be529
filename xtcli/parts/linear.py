"""Linear layers that say what they are for, so that initialisation can tell them apart, and tables.

Roles: `input` (most), `query` (scores are made from it), `output` (writes to the residual stream),
`head` (makes logits or labels).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Role = Literal["input", "query", "output", "head"]

Draw = Callable[[Tensor, float], None]
"""Fills a tensor from N(0, std) by the model's seed; what parts with parameters of their own kind are given."""


Multiply = Callable[[Tensor, Tensor, "Tensor | None"], Tensor]
"""x (..., in), weight (out, in), bias (out,) or None -> (..., out)."""


class Linear(nn.Linear):
    """`nn.Linear` with a role; weight (out, in). `products`: parameters that may be read in the products' type.

    `multiply` makes the product; another that gives the same may stand in its place.
    """

    products: tuple[str, ...] = ("weight",)
    multiply: Multiply = staticmethod(F.linear)

    def __init__(self, inner: int, outer: int, bias: bool, role: Role = "input") -> None:
        super().__init__(inner, outer, bias=bias)
        self.role = role

    def forward(self, x: Tensor) -> Tensor:
        return self.multiply(x, self.weight, self.bias)


def widen(x: Tensor) -> Tensor:
    """x in at least float32, for sums that 16 bits cannot hold."""
    return x if x.dtype == torch.float64 else x.float()


def narrowed(*tensors: Tensor) -> tuple[Tensor, ...]:
    """As products on their device read them: in autocast's type where that is in force."""
    kind = tensors[0].device.type
    return tuple(x.to(torch.get_autocast_dtype(kind)) for x in tensors) if torch.is_autocast_enabled(kind) else tensors


def exactly(x: Tensor) -> AbstractContextManager[Any]:
    """Inside, products on the device of x keep the type of what they are given, whatever autocast is in force."""
    # Asked of the library whether it has autocast, the compiler would break off here, and begin anew in each step.
    return torch.autocast("cpu" if x.is_meta else x.device.type, enabled=False)


class Table(nn.Embedding):
    """`nn.Embedding` without a first draw, which initialisation replaces: on the meta device it takes a second."""

    products = ("weight",)

    def reset_parameters(self) -> None:
        """Nothing: see init.py."""
