"""Attention over what and where apart (He et al. 2020, arXiv:2006.03654), and what stands around it: a convolution
beside the first layer, embeddings that are zero at padding.

    score(i, j) = (q_i k_j + q_i K(r_ij) + k_j Q(r_ij)) / sqrt(d (1 + terms)),   r_ij a vector for the distance i - j

The table of distance vectors is one for the stack. K and Q are projections of their own, or those of the content.
Distances beyond half the buckets share them logarithmically (arXiv:2111.09543). A query at padding sees all keys alike.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import torch
from pydantic import Strict
from torch import Tensor, nn
from torch.nn import functional as F

from xtcli import registry
from xtcli.errors import refuse
from xtcli.parts import norms
from xtcli.parts.activations import ACTIVATIONS, Activation
from xtcli.parts.attention import Attention
from xtcli.parts.context import Ctx, Visible
from xtcli.parts.embed import Factorised, Tokens
from xtcli.parts.kernels import add_scores
from xtcli.parts.linear import Draw, Linear, Table
from xtcli.parts.norms import NormSlot, make_norm
from xtcli.parts.scope import Impossible, Scope
from xtcli.parts.shared import slot_distance
from xtcli.parts.wiring import PostNorm, active, run
from xtcli.registry import field, part

Term = Literal["c2p", "p2c"]


def log_buckets(distance: Tensor, buckets: int, furthest: int) -> Tensor:
    """Distances up to half of `buckets` as they are, the others on a logarithmic scale that ends at `furthest`."""
    middle = buckets // 2
    size = distance.abs().clamp(min=middle).float()
    end = torch.log(torch.tensor((furthest - 1) / middle, device=distance.device))
    far = torch.ceil(torch.log(size / middle) / end * (middle - 1)) + middle
    return torch.where(distance.abs() <= middle, distance, (far * distance.sign()).long())


class Distances(nn.Module):
    """The vectors of distances -span ... span - 1, (2 span, D), one table for the stack."""

    def __init__(self, rows: int, norm: registry.Config, scope: Scope) -> None:
        super().__init__()
        self.table = Table(rows, scope.dim)
        self.norm = make_norm(scope, "distance_norm", norm)

    def tables(self, ctx: Ctx, dtype: torch.dtype) -> Tensor:
        """All rows, normed."""
        return self.norm(self.table.weight)  # type: ignore[no-any-return]


@part("mixer", "disentangled")
class Disentangled(Attention):
    """Self-attention whose scores add terms of content and distance."""

    honours = ("score", "out")
    carries = False

    class Config(Attention.Config):
        """Disentangled self-attention."""

        terms: Annotated[tuple[Term, ...], Strict(False)] = field(
            "c2p: queries and distances, p2c: keys and distances; each counts in the scale", ("c2p", "p2c")
        )
        span: int | None = field("distances told apart on each side; null = model.context", None, gt=0, tiny=128)
        buckets: int | None = field("distances that share `span` logarithmically; null = none do", None, gt=1, tiny=32)
        shared: bool = field("distances go through the projections of the content", False)
        key_bias: bool = field("adds a bias to k", True)
        distance_bias: bool = field("adds a bias to the projection of c2p", True)
        distance_norm: NormSlot = field("norm of the distance vectors", norms.NONE)
        distance_dropout: float | None = field("dropout of these; null = model.dropout", None, ge=0, lt=1)

    def __init__(self, config: Config, scope: Scope) -> None:
        super().__init__(config, scope)
        furthest = config.span or scope.context
        if furthest is None:
            raise Impossible("span", "distances must end somewhere", "state span, or model.context")
        if self.groups != self.heads:
            raise Impossible("kv_heads", "distances need as many kv_heads as heads")
        self.furthest, self.buckets = furthest, config.buckets
        self.span = config.buckets or furthest
        if config.buckets is not None and furthest - 1 in (0, config.buckets // 2):
            raise Impossible("buckets", f"{config.buckets} buckets leave no distance below {furthest} to be shared")
        if config.scale is None:
            self.scale = float(self.head_dim * (1 + len(config.terms))) ** -0.5
        wide = self.heads * self.head_dim
        if not config.key_bias:
            self.k = Linear(scope.dim, wide, False)
        own = not config.shared
        self.distance_k = Linear(scope.dim, wide, config.distance_bias) if own and "c2p" in config.terms else None
        self.distance_q = Linear(scope.dim, wide, True, "query") if own and "p2c" in config.terms else None
        self.terms = config.terms
        self.distances = -1
        if config.terms or config.span is not None:
            key = ("distances", self.span, config.distance_norm)
            self.distances = scope.shared.table(key, lambda: Distances(2 * self.span, config.distance_norm, scope))
        rate = scope.dropout if config.distance_dropout is None else config.distance_dropout
        self.distance_dropout = nn.Dropout(rate)

    def rows(self, ctx: Ctx, queries: int) -> Tensor:
        """The row of the table for each pair, (B|1, T, S)."""
        distance = -slot_distance(ctx, queries)
        if self.buckets is not None:
            distance = log_buckets(distance, self.buckets, self.furthest)
        return (distance + self.span).clamp(0, 2 * self.span - 1)

    def forward(self, x: Tensor, ctx: Ctx) -> Tensor:
        """x (B, T, dim) -> (B, T, dim)."""
        q = self.q_norm(self.split(self.q(x), self.heads))
        k, v = self.recall(self.k_norm(self.split(self.k(x), self.heads)), self.split(self.v(x), self.heads), ctx)
        real = None if ctx.keep is None else ctx.keep[:, None, ctx.offset : ctx.offset + x.shape[1], None]
        visible = ctx.visible[self.view] if real is None else levelled(ctx.visible[self.view], real)
        q = q if real is None else q * real
        if not self.terms:
            return self.attend(q, k, v, visible, x, ctx)
        vectors = self.distance_dropout(ctx.turns[self.distances])[None]
        rows = self.rows(ctx, q.shape[2])[:, None].expand(q.shape[0], self.heads, -1, -1)
        extra = torch.zeros((), dtype=q.dtype, device=q.device)
        if "c2p" in self.terms:
            keys = self.split((self.distance_k or self.k)(vectors), self.heads)
            extra = extra + (q @ keys.transpose(-1, -2)).gather(-1, rows)
        if "p2c" in self.terms:
            queries = self.split((self.distance_q or self.q)(vectors), self.heads)
            extra = extra + (k @ queries.transpose(-1, -2)).gather(-1, rows.transpose(-1, -2)).transpose(-1, -2)
        extra = extra * self.scale
        return self.weigh(q, k, v, extra if real is None else extra * real, visible, x, ctx)

    def weigh(self, q: Tensor, k: Tensor, v: Tensor, extra: Tensor, visible: Visible, x: Tensor, ctx: Ctx) -> Tensor:
        """Attention with scores (B, H, T, S) added to those of the content: (B, T, dim)."""
        if self.fused:
            return self.attend(q, k, v, add_scores(visible, extra), x, ctx)
        seen = add_scores(visible, torch.zeros_like(extra)).mask
        scores = self.score.raw(q @ k.transpose(-1, -2) * self.scale + extra, ctx)  # type: ignore[operator]
        weights = self.score.weights(scores, seen == float("-inf")).to(v.dtype)  # type: ignore[operator]
        weights = F.dropout(weights, self.rate if self.training else 0.0, self.training)
        y = (self.score.mixed(weights) @ v).transpose(1, 2).flatten(-2)  # type: ignore[operator]
        return self.o(y, x) if self.out_reads_input else self.o(y)  # type: ignore[no-any-return]


def levelled(visible: Visible, real: Tensor) -> Visible:
    """The mask with nothing hidden from queries that are not real (B, 1, T, 1)."""
    mask = visible.mask
    if mask is None:
        return visible
    return Visible(mask | ~real) if mask.dtype == torch.bool else Visible(mask.masked_fill(~real, 0.0))


@part("mixer", "conv")
class Convolution(nn.Module):
    """act(dropout(conv(x))) over the places around each; padding is zero on both sides of it."""

    hides = False  # the places of other documents

    class Config(registry.Config):
        """A convolution over places."""

        kernel: int = field("places that each reads, an odd number", 3, gt=0)
        groups: int = field("groups of channels", 1, gt=0)
        act: Activation = field("activation", "tanh")
        dropout: float | None = field("dropout before the activation; null = model.dropout", None, ge=0, lt=1)

    def __init__(self, config: Config, scope: Scope) -> None:
        super().__init__()
        if scope.causal:
            raise Impossible("", "a centred convolution sees both ways", "use it in an encoder")
        if config.kernel % 2 == 0:
            raise Impossible("kernel", f"{config.kernel} places have no middle", "use an odd number")
        if scope.dim % config.groups:
            raise Impossible("groups", f"{config.groups} groups do not divide dim {scope.dim}")
        self.groups = config.groups
        self.weight = nn.Parameter(torch.empty(scope.dim, scope.dim // config.groups, config.kernel))
        self.bias = nn.Parameter(torch.empty(scope.dim))
        self.act = ACTIVATIONS[config.act]
        self.dropout = nn.Dropout(scope.dropout if config.dropout is None else config.dropout)

    def draw(self, normal: Draw) -> None:
        normal(self.weight, 0.02)
        self.bias.zero_()

    def new_state(self, batch: int, capacity: int, device: Any, dtype: Any) -> None:
        return None

    def forward(self, x: Tensor, ctx: Ctx) -> Tensor:
        """x (B, T, D) -> (B, T, D); raises UserError for documents that should not see each other."""
        if ctx.documents is not None:
            raise refuse("a convolution mixes the documents of a row", "set objective.pack=stream or none")
        x = held(x, ctx).transpose(1, 2)
        y = F.conv1d(x, self.weight, self.bias, padding=self.weight.shape[-1] // 2, groups=self.groups)
        return self.act(self.dropout(held(y.transpose(1, 2), ctx)))


def held(x: Tensor, ctx: Ctx) -> Tensor:
    """x (B, T, D) with zeros at padding."""
    return x if ctx.keep is None else x * ctx.keep[:, ctx.offset :, None].to(x.dtype)


@part("embed", "held-tokens")
class HeldTokens(Tokens):
    """Token, position and segment embeddings, zero at padding."""

    def forward(self, ids: Tensor | None, vectors: Tensor | None, segments: Tensor | None, ctx: Ctx) -> Tensor:
        return held(super().forward(ids, vectors, segments, ctx), ctx)


@part("embed", "held-factorised")
class HeldFactorised(Factorised):
    """The same in a width of their own, projected to dim."""

    def forward(self, ids: Tensor | None, vectors: Tensor | None, segments: Tensor | None, ctx: Ctx) -> Tensor:
        return held(super().forward(ids, vectors, segments, ctx), ctx)


@part("wiring", "post-beside")
class PostBeside(PostNorm):
    """Post-norm over all sublayers but the last, which reads what the others read: norm(post(x) + last(x)), zero at
    padding."""

    def forward(self, x: Tensor, sublayers: Mapping[str, nn.Module], ctx: Ctx) -> Tensor:
        *others, last = active(sublayers, ctx)
        y = x
        for name, sublayer, own in others:
            y = self.norm[name](y + self.weigh(name, run(sublayer, y, own)))
        name, sublayer, own = last
        return held(self.norm[name](y + self.path(run(sublayer, x, own))), ctx)
