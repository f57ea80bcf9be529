"""Blocks narrower than the stream that they read and write (Sun et al. 2020, arXiv:2004.02984).

    h = norm(narrow(x)); h = norm(h + f(h)) for each sublayer; y = norm(x + widen(h))

x is D wide, h and all sublayers T wide. Attention may read x in the place of h.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from xtcli.errors import refuse
from xtcli.parts import norms
from xtcli.parts.attention import Attention
from xtcli.parts.context import Ctx
from xtcli.parts.embed import Factorised
from xtcli.parts.linear import Linear
from xtcli.parts.norms import NormSlot, make_norm
from xtcli.parts.scope import Impossible, Scope
from xtcli.parts.wiring import Wiring, active, run
from xtcli.registry import field, part


@part("wiring", "bottleneck")
class Bottleneck(Wiring):
    """Post-norm sublayers in a narrow stream of their own; dropout falls on what goes back to the wide one."""

    irreversible = "norms over the sum change the stream that they would have to be undone on"

    class Config(Wiring.Config):
        """A narrow post-norm block."""

        width: int = field("T, the width of the sublayers", gt=0, tiny=32, example=32)

    def __init__(self, config: Config, scope: Scope, names: tuple[str, ...]) -> None:
        narrow = scope.at("", dim=config.width)
        super().__init__(config, narrow, names)
        self.narrow = Linear(scope.dim, config.width, True)
        self.narrow_norm = make_norm(narrow, "norm", config.norm)
        self.widen = Linear(config.width, scope.dim, True, "output")
        self.widen_norm = make_norm(scope, "norm", config.norm)

    @staticmethod
    def inside(config: Any, scope: Scope) -> Scope:
        return scope.at("", dim=config.width, outer=scope.dim)

    def forward(self, x: Tensor, sublayers: Mapping[str, nn.Module], ctx: Ctx) -> Tensor:
        h = self.narrow_norm(self.narrow(x))
        for name, sublayer, own in active(sublayers, ctx):
            read = x if getattr(sublayer, "reads_outer", False) else h
            h = self.norm[name](h + self.path(run(sublayer, read, own)))
        return self.widen_norm(x + self.dropout(self.widen(h)))  # type: ignore[no-any-return]


@part("mixer", "outer-attention")
class OuterAttention(Attention):
    """Self-attention over the stream outside a bottleneck that is no narrower than it."""

    reads_outer = True

    def __init__(self, config: Attention.Config, scope: Scope) -> None:
        super().__init__(config, scope)
        if scope.outer not in (None, scope.dim):
            raise Impossible(
                "", f"reads a stream {scope.outer} wide with projections of {scope.dim}", "use outer-values"
            )


@part("mixer", "outer-values")
class OuterValues(Attention):
    """Values from the stream outside the bottleneck; queries and keys share a bottleneck of their own."""

    reads_outer = True

    class Config(Attention.Config):
        """Self-attention with values from outside a bottleneck."""

        norm: NormSlot = field("norm of what queries and keys read", norms.INHERIT)

    def __init__(self, config: Config, scope: Scope) -> None:
        super().__init__(config, scope)
        outer = scope.outer or scope.dim
        self.v = Linear(outer, self.groups * self.head_dim, config.bias)
        self.shared = Linear(outer, scope.dim, True)
        self.shared_norm = make_norm(scope, "norm", config.norm)
        self.place = self.share

    def share(self, x: Tensor, ctx: Ctx) -> Tensor:
        """What queries and keys read: (B, T, outer) -> (B, T, dim)."""
        return self.shared_norm(self.shared(x))  # type: ignore[no-any-return]


@part("embed", "trigram")
class Trigram(Factorised):
    """Token vectors are projected together with those of both neighbours: next, own, previous; zeros at the ends."""

    hides = False  # neighbours may be padding

    class Config(Factorised.Config):
        """Narrow token vectors of three neighbours, projected to dim."""

        project_after: Literal["tokens"] = field("the projection joins the neighbours", "tokens")

    def __init__(self, config: Config, scope: Scope, shares: bool = False) -> None:
        super().__init__(config, scope, shares)
        if scope.causal:
            raise Impossible("", "neighbours on both sides: it sees both ways", "use it in an encoder")
        self.project = Linear(3 * self.width, scope.dim, config.project_bias)

    def read(self, ids: Tensor | None, vectors: Tensor | None, ctx: Ctx) -> Tensor:
        if ctx.documents is not None:
            raise refuse("a trigram mixes neighbours of different documents", "set objective.pack=stream")
        x = super().read(ids, vectors, ctx)
        return torch.cat((F.pad(x[:, 1:], (0, 0, 0, 1)), x, F.pad(x[:, :-1], (0, 0, 1, 0))), -1)
