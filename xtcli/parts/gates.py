"""Gates in the place of residual sums: a recurrent unit decides how much of a branch enters the stream.

    gated           y = act(f(norm(x)));  r = s(Wr y + Ur x),  z = s(Wz y + Uz x - b),
                    c = tanh(Wc y + Uc (r * x)),  x' = (1 - z) x + z c     Parisotto et al. 2019, arXiv:1910.06764
    gated-cell   y = f(norm(x));  r, z as above with biases of their own,
                    c = tanh(Wc y + bc + r * (Uc x + uc)),  x' = z x + (1 - z) c      torch.nn.GRUCell(y, x)

x is the stream, y the branch. b starts at 2, so that the paper's gate is nearly shut at first; the
library's starts half open, and its z counts the other way.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from xtcli.parts.activations import ACTIVATIONS, Activation
from xtcli.parts.context import Ctx
from xtcli.parts.linear import Linear
from xtcli.parts.scope import Scope
from xtcli.parts.wiring import Wiring, active, run
from xtcli.registry import field, part


class Gate(nn.Module):
    """The paper's gate; `of_branch` and `of_stream` hold W and U of reset, update and candidate, one below another."""

    def __init__(self, dim: int, start: float) -> None:
        super().__init__()
        self.start = start
        self.of_branch = Linear(dim, 3 * dim, False)
        self.of_stream = Linear(dim, 2 * dim, False)
        self.of_reset = Linear(dim, dim, False)
        self.shut = nn.Parameter(torch.empty(dim))

    def draw(self, normal: Any) -> None:
        """Nearly shut."""
        self.shut.fill_(self.start)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Stream and branch (B, T, D) -> the new stream."""
        reset, update, new = self.of_branch(y).chunk(3, -1)
        reset_x, update_x = self.of_stream(x).chunk(2, -1)
        opened = torch.sigmoid(update + update_x - self.shut)
        candidate = torch.tanh(new + self.of_reset(torch.sigmoid(reset + reset_x) * x))
        return x + opened * (candidate - x)


class Cell(nn.Module):
    """A GRU cell whose input is the branch and whose state is the stream."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.of_branch = Linear(dim, 3 * dim, True)
        self.of_stream = Linear(dim, 3 * dim, True)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Stream and branch (B, T, D) -> the new stream."""
        reset, keep, new = self.of_branch(y).chunk(3, -1)
        reset_x, keep_x, new_x = self.of_stream(x).chunk(3, -1)
        candidate = torch.tanh(new + torch.sigmoid(reset + reset_x) * new_x)
        return candidate + torch.sigmoid(keep + keep_x) * (x - candidate)


class GatedWiring(Wiring):
    """One norm and one gate for each sublayer."""

    irreversible = "a gate mixes the stream with its branch, which a reversible sum cannot undo"

    gate: nn.ModuleDict

    def bent(self, y: Tensor) -> Tensor:
        """The branch as the gate reads it."""
        return y

    def forward(self, x: Tensor, sublayers: Mapping[str, nn.Module], ctx: Ctx) -> Tensor:
        for name, sublayer, own in active(sublayers, ctx):
            x = self.gate[name](x, self.bent(self.weigh(name, run(sublayer, x, own, self.norm[name]))))
        return x


@part("wiring", "gated")
class Gated(GatedWiring):
    """The gate of the paper, nearly shut at first."""

    class Config(Wiring.Config):
        """Norms, and a gate for each sublayer."""

        act: Activation = field("bends the branch before the gate", "relu")
        shut: float = field("start of what is taken from the update gate; the larger, the less a branch enters", 2.0)

    def __init__(self, config: Config, scope: Scope, names: tuple[str, ...]) -> None:
        super().__init__(config, scope, names)
        self.act = ACTIVATIONS[config.act]
        self.gate = nn.ModuleDict({name: Gate(scope.dim, config.shut) for name in names})

    def bent(self, y: Tensor) -> Tensor:
        return self.act(y)


@part("wiring", "gated-cell")
class GatedByCell(GatedWiring):
    """A plain GRU cell, half open at first."""

    class Config(Wiring.Config):
        """Norms, and a recurrent cell for each sublayer."""

    def __init__(self, config: Config, scope: Scope, names: tuple[str, ...]) -> None:
        super().__init__(config, scope, names)
        self.gate = nn.ModuleDict({name: Cell(scope.dim) for name in names})
