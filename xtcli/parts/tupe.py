"""Untied positional scores: places meet places through projections of their own (Ke et al. 2021, arXiv:2006.15595).

    s[i, j] = (x_i Wq) (x_j Wk) / sqrt(2 d)  +  reset((p_i Uq) (p_j Uk) / sqrt(2 d) + b[j - i])

p are learned and normed vectors of the places, b the bias of another kind of position (none, or buckets). Uq, Uk, p
and b belong to the whole stack, so the positional scores are computed once. `reset` takes the first place, where a
summary token stands, out of the order: whatever it looks at gets `theta_from`, whatever looks at it gets `theta_to`;
the place itself is of the first sort. One surprise: the content's own scores shrink by sqrt 2 too.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from xtcli import registry
from xtcli.parts import positions
from xtcli.parts.context import Ctx
from xtcli.parts.linear import Draw, Linear, Table
from xtcli.parts.norms import LayerNorm, NormSlot, make_norm
from xtcli.parts.positions import PositionSlot
from xtcli.parts.scope import Impossible, Scope
from xtcli.registry import Config, field, part, part_of


@part("position", "tupe")
class Untied(positions.Bias):
    """Scores of places with places, one set for the stack."""

    reads_width = True
    share = 2**-0.5

    class Config(registry.Config):
        """Untied positional scores."""

        relative: PositionSlot = field("a bias that is reset with them", positions.NONE)
        reset: bool | None = field("takes the first place out of the order; null = in encoders", None)
        norm: NormSlot = field("norm of the places' vectors", LayerNorm.Config())

    def __init__(self, config: Config, scope: Scope, heads: int) -> None:
        super().__init__()
        if scope.context is None:
            raise Impossible("", "untied positions need model.context, the number of places")
        if scope.recurrence is not None:
            raise Impossible("", "absolute places begin anew in each segment of a recurrence", "use t5 or rotary")
        if scope.causal and config.reset:
            raise Impossible("reset", "a decoder has no summary token at its first place", "use reset: false")
        if config.relative.kind != "none" and part_of(config.relative).reach != "bias":
            raise Impossible("relative", f"'{config.relative.kind}' is no bias", "use t5 or alibi, or leave it out")
        self.heads, self.width = heads, scope.head_dim or scope.dim // heads
        self.limit, self.both_sides = scope.context, not scope.causal
        self.table = Table(scope.context, scope.dim)
        self.norm = make_norm(scope, "norm", config.norm)
        self.q = Linear(scope.dim, heads * self.width, True, "query")
        self.k = Linear(scope.dim, heads * self.width, True)
        self.relative = None if config.relative.kind == "none" else scope.make("relative", config.relative, heads)
        self.theta_from = self.theta_to = None
        if not scope.causal if config.reset is None else config.reset:
            self.theta_from = nn.Parameter(torch.empty(heads))
            self.theta_to = nn.Parameter(torch.empty(heads))

    def draw(self, normal: Draw) -> None:
        for theta in self.parameters(recurse=False):
            theta.zero_()

    def scores(self, ctx: Ctx, queries: int) -> Tensor:
        """(B|1, H, T, S), scaled."""
        q = self._split(self.q(self._places(ctx.positions)))
        k = self._split(self.k(self._places(ctx.keys)))
        scores = q @ k.transpose(-1, -2) * (2 * self.width) ** -0.5
        if self.relative is not None:
            scores = scores + self.relative.scores(ctx, queries)  # type: ignore[operator]
        if self.theta_from is None or self.theta_to is None:
            return scores  # type: ignore[no-any-return]
        # Behind memory tokens the text begins at a later place.
        to, from_ = (ctx.keys == ctx.prefix)[:, None, None, :], (ctx.positions == ctx.prefix)[:, None, :, None]
        scores = torch.where(to, self.theta_to[None, :, None, None], scores)
        return torch.where(from_, self.theta_from[None, :, None, None], scores)

    def _places(self, places: Tensor) -> Tensor:
        return self.norm(self.table(places))  # type: ignore[no-any-return]

    def _split(self, x: Tensor) -> Tensor:
        """(B|1, T, H d) -> (B|1, H, T, d)."""
        apart: Tensor = x.unflatten(-1, (self.heads, self.width))
        return apart.transpose(1, 2)
