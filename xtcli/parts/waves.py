"""Scores with projected waves of the distance (Dai et al. 2019, arXiv:1901.02860).

    score(i, j) = ((q_i + u) k_j + (q_i + v) W r(i - j)) / sqrt(d),   r(n) = [sin n w | cos n w],  w_m = 10000^(-2m/D)

The waves are as wide as the model and the same for all layers; W, u and v are each layer's own (u and v those of all
layers with `shared`). In an encoder distances have both signs; in a decoder those of later keys are never made.
Axes as in context.py; R distances, from the longest to the shortest.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from xtcli import registry
from xtcli.parts.context import Ctx
from xtcli.parts.linear import Draw, Linear
from xtcli.parts.scope import Impossible, Scope
from xtcli.registry import field, part


def slide(scores: Tensor, keys: int) -> Tensor:
    """Scores (..., T, R) by distance, R distances that fall by one -> (..., T, S) by key.

    Query i and key j have the distance at T - 1 - i + j; what lies beyond R is another row's and must be hidden.
    """
    queries, distances = scores.shape[-2:]
    rows = F.pad(scores, (1, 0)).flatten(-2)[..., queries:].unflatten(-1, (queries, distances))
    found: Tensor = rows[..., :keys]
    return found


class Biases(nn.Module):
    """u, what a key is worth by itself, and v, what a distance is: (H, d) each."""

    def __init__(self, heads: int, head_dim: int) -> None:
        super().__init__()
        self.content = nn.Parameter(torch.empty(heads, head_dim))
        self.place = nn.Parameter(torch.empty(heads, head_dim))

    def draw(self, normal: Draw) -> None:
        """As matrices are drawn."""
        normal(self.content, 0.02)
        normal(self.place, 0.02)


@dataclass(frozen=True)
class Made:
    """What all layers share in one call: waves (P, R, D), P = 2 where rows may be read backwards; perhaps u and v."""

    waves: Tensor
    biases: Biases | None


class Table(nn.Module):
    """Makes the waves of one call, once for all layers."""

    def __init__(self, config: Wave.Config, scope: Scope, head_dim: int) -> None:
        super().__init__()
        self.clamp, self.mirrored, self.both_sides = config.clamp, config.mirrored, not scope.causal
        self.dropout = nn.Dropout(scope.dropout if config.dropout is None else config.dropout)
        self.width = scope.dim
        self.biases = Biases(scope.heads or 1, head_dim) if config.shared else None

    def tables(self, ctx: Ctx, dtype: torch.dtype) -> Made:
        """Waves of the distances from the first key's to the last query's (or, both ways, to the last key's)."""
        queries, keys = ctx.positions.shape[1], ctx.keys.shape[1]
        device = ctx.keys.device
        furthest = ctx.offset + queries - 1
        last = furthest - keys - queries + 1 if self.both_sides else furthest - keys
        distances = torch.arange(furthest, last, -1, device=device).float()
        if self.clamp is not None:
            distances = distances.clamp(-self.clamp, self.clamp)
        steps = torch.arange(0, self.width, 2, device=device).float()
        angles = distances[:, None] * (1.0 / 10000.0 ** (steps / self.width))
        sines, cosines = angles.sin(), angles.cos()
        ways = (sines, -sines) if self.mirrored else (sines,)
        waves = torch.stack([torch.cat((way, cosines), -1) for way in ways])
        return Made(self.dropout(waves.to(dtype)), self.biases)


@part("position", "wave")
class Wave(nn.Module):
    """Scores of keys and distances by themselves and with queries."""

    reach = "relative"

    class Config(registry.Config):
        """Projected waves of the distance."""

        clamp: int | None = field("distance beyond which all are alike", None, gt=0, tiny=64)
        shared: bool = field("u and v are the same in all layers", False)
        mirrored: bool = field(
            "some rows are read backwards: those of `backwards`, or the second half of a batch", False
        )
        dropout: float | None = field("dropout of the waves; null = model.dropout", None, ge=0, lt=1)

    def __init__(self, config: Config, scope: Scope, head_dim: int) -> None:
        super().__init__()
        if scope.heads is None or scope.shared is None:
            raise AssertionError("waves belong to an attention")
        if scope.dim % 2:
            raise Impossible("", f"waves need an even dim, not {scope.dim}")
        self.heads, self.factor = scope.heads, head_dim**-0.5
        self.mirrored = config.mirrored
        self.reads = ("backwards",) if config.mirrored else ()
        rate = scope.dropout if config.dropout is None else config.dropout
        key = ("wave", config.clamp, config.mirrored, rate, *((scope.heads, head_dim) if config.shared else ()))
        self.number = scope.shared.table(key, lambda: Table(config, scope, head_dim))
        self.r = Linear(scope.dim, scope.heads * head_dim, False)
        self.biases = None if config.shared else Biases(scope.heads, head_dim)

    def own(self, ctx: Ctx) -> Biases:
        """u and v."""
        found: Biases | None = ctx.turns[self.number].biases if self.biases is None else self.biases
        assert found is not None
        return found

    def scores(self, q: Tensor, k: Tensor, ctx: Ctx) -> Tensor:
        """q (B, H, T, d), k (B, G, S, d) -> (B, H, T, S), already scaled."""
        both: Tensor = (self.content(k, ctx) + self.places(q, k.shape[2], ctx)) * self.factor
        return both

    def content(self, k: Tensor, ctx: Ctx) -> Tensor:
        """k (B, G, S, d) -> (B, H, 1, S): u k."""
        grouped = self.own(ctx).content.unflatten(0, (k.shape[1], -1))  # (G, H / G, d)
        return torch.einsum("gnd,bgsd->bgns", grouped, k).flatten(1, 2)[:, :, None]

    def places(self, q: Tensor, keys: int, ctx: Ctx) -> Tensor:
        """(B, H, T, S): (q + v) W r."""
        r = self.r(ctx.turns[self.number].waves).unflatten(-1, (self.heads, -1))  # (P, R, H, d)
        asking = q + self.own(ctx).place[:, None]
        if not self.mirrored:
            return slide(torch.einsum("bhtd,rhd->bhtr", asking, r[0]), keys)
        return slide(torch.einsum("bhtd,brhd->bhtr", asking, r[self.ways(q.shape[0], ctx)]), keys)

    def ways(self, rows: int, ctx: Ctx) -> Tensor:
        """1 for each row that is read backwards, (B,)."""
        if "backwards" in ctx.extras:
            given: Tensor = ctx.extras["backwards"]
            return given.long()
        if rows % 2:
            raise ValueError(f"half of a batch is read backwards, and {rows} rows have no half: pass `backwards`")
        return (torch.arange(rows, device=ctx.keys.device) >= rows // 2).long()
