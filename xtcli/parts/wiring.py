"""Wirings: how a block joins its sublayers, norms and the residual stream.

    pre    x + f(norm(x))         post   norm(x + f(x))

Sublayers run in the order of the block's map. One that reads the encoder's memory is passed over when
there is none, so that a decoder can run alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any

from torch import Tensor, nn

from xtcli import registry
from xtcli.parts import norms
from xtcli.parts.context import Ctx
from xtcli.parts.norms import NormSlot, make_norm
from xtcli.parts.scope import Scope
from xtcli.registry import Config, Slot, field, part

WiringSlot = Annotated[Config, Slot("wiring")]


class Wiring(nn.Module):
    """One norm for each sublayer, and dropout on what it adds."""

    class Config(registry.Config):
        """Norms and residual dropout."""

        norm: NormSlot = field("norm of each sublayer", norms.INHERIT)
        dropout: float | None = field("dropout on what a sublayer adds; null = model.dropout", None, ge=0, lt=1)

    def __init__(self, config: Config, scope: Scope, names: tuple[str, ...]) -> None:
        super().__init__()
        self.norm = nn.ModuleDict({name: make_norm(scope, "norm", config.norm) for name in names})
        self.dropout = nn.Dropout(scope.dropout if config.dropout is None else config.dropout)


def active(sublayers: Mapping[str, nn.Module], ctx: Ctx) -> Iterator[tuple[str, nn.Module, Ctx]]:
    """The sublayers that take part in this call, each with its own state."""
    states: Mapping[str, Any] = ctx.state or {}
    for name, sublayer in sublayers.items():
        if ctx.memory is None and getattr(sublayer, "reads_memory", False):
            continue
        yield name, sublayer, ctx.within(states.get(name))


@part("wiring", "pre")
class PreNorm(Wiring):
    """Each sublayer reads a normed copy of the stream (Xiong et al. 2020, arXiv:2002.04745)."""

    def forward(self, x: Tensor, sublayers: Mapping[str, nn.Module], ctx: Ctx) -> Tensor:
        for name, sublayer, own in active(sublayers, ctx):
            x = x + self.dropout(sublayer(self.norm[name](x), own))
        return x


@part("wiring", "post")
class PostNorm(Wiring):
    """The sum is normed after each sublayer (Vaswani et al. 2017)."""

    def forward(self, x: Tensor, sublayers: Mapping[str, nn.Module], ctx: Ctx) -> Tensor:
        for name, sublayer, own in active(sublayers, ctx):
            x = self.norm[name](x + self.dropout(sublayer(x, own)))
        return x
