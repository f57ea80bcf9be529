"""How attended values leave attention: y (B, T, H d) and the sublayer's input x (B, T, D) -> (B, T, D).

plain             W y
gated             value * sigmoid(gate), both linear in [y ; x]      Huang et al. 2019, arXiv:1908.06954
gated-attended    the same, linear in y alone
"""

from __future__ import annotations

from typing import Annotated, ClassVar

import torch
from torch import Tensor, nn

from xtcli import registry
from xtcli.parts.linear import Linear
from xtcli.parts.scope import Scope
from xtcli.registry import Config, Slot, field, part


@part("out", "plain")
class PlainOut:
    """One matrix: a bare linear layer, so that tools for linear layers find it."""

    reads_input = False

    class Config(registry.Config):
        """An output projection."""

    def __new__(cls, config: Config, scope: Scope, wide: int, bias: bool) -> Linear:  # type: ignore[misc]
        return Linear(wide, scope.dim, bias, "output")


@part("out", "gated-attended")
class GatedOut(nn.Module):
    """Attended values open and close themselves."""

    reads_input: ClassVar[bool] = False

    class Config(registry.Config):
        """A gated output projection."""

        dropout: float = field("dropout on what value and gate read", 0.0, ge=0, lt=1)

    def __init__(self, config: Config, scope: Scope, wide: int, bias: bool) -> None:
        super().__init__()
        inner = wide + scope.dim if self.reads_input else wide
        self.value = Linear(inner, scope.dim, bias, "output")
        self.gate = Linear(inner, scope.dim, bias)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, y: Tensor) -> Tensor:
        y = self.dropout(y)
        return self.value(y) * torch.sigmoid(self.gate(y))  # type: ignore[no-any-return]


@part("out", "gated")
class QueryGatedOut(GatedOut):
    """Attention on attention: what a query found is weighed by the query itself."""

    reads_input = True

    def forward(self, y: Tensor, x: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(torch.cat((y, x), dim=-1))


OutSlot = Annotated[Config, Slot("out")]
