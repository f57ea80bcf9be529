"""A feed-forward block between the states and a head.

feed-forward   norm(down(act(up(h))) + h)
"""

from __future__ import annotations

from torch import Tensor, nn

from xtcli import registry
from xtcli.parts import norms
from xtcli.parts.activations import ACTIVATIONS, Activation
from xtcli.parts.linear import Linear
from xtcli.parts.norms import NormSlot, make_norm
from xtcli.parts.scope import Scope
from xtcli.registry import field, part


@part("transform", "feed-forward")
class FeedForwardTransform(nn.Module):
    """A feed-forward with its own residual and norm, as a layer has it."""

    class Config(registry.Config):
        """A feed-forward block."""

        hidden: int = field("inner width", gt=0, tiny=256, example=96)
        act: Activation = field("activation", "gelu")
        norm: NormSlot = field("norm of the sum", norms.INHERIT)
        dropout: float | None = field("dropout before and behind it; null = model.dropout", None, ge=0, lt=1)

    def __init__(self, config: Config, scope: Scope) -> None:
        super().__init__()
        self.dropout = nn.Dropout(scope.dropout if config.dropout is None else config.dropout)
        self.up = Linear(scope.dim, config.hidden, True)
        self.act = ACTIVATIONS[config.act]
        self.down = Linear(config.hidden, scope.dim, True)
        self.norm = make_norm(scope, "norm", config.norm)

    def forward(self, states: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        inner = self.down(self.act(self.up(self.dropout(states))))
        return self.norm(self.dropout(inner) + states)  # type: ignore[no-any-return]
