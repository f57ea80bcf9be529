"""Positions that attention knows: additive biases, and scores made from queries and distances.

    none        nothing
    inherit     what the stack states
    rotary      see rotary.py
    t5          a learned table over buckets of distance (Raffel et al. 2020, arXiv:1910.10683)
    alibi       a slope for each head times the distance (Press et al. 2022, arXiv:2108.12409)
    shaw        query (and key) times a learned vector of the distance (Shaw et al. 2018, arXiv:1803.02155)

`reach` says how a kind enters: `turn` rotates, `bias` is computed once per stack, `relative` lives in
each attention and reads its queries and keys.
"""

from __future__ import annotations

import math
from typing import Annotated

import torch
from torch import Tensor, nn

from xtcli import registry
from xtcli.parts.context import Ctx
from xtcli.parts.linear import Table
from xtcli.parts.scope import Impossible, Scope
from xtcli.parts.shared import slot_distance
from xtcli.registry import Config, Slot, field, part

PositionSlot = Annotated[Config, Slot("position")]


@part("position", "none")
class NoPosition(nn.Module):
    """Attention that does not know where its keys stand."""

    reach = "none"

    class Config(registry.Config):
        """No positions in attention."""


@part("position", "inherit")
class InheritedPosition(nn.Module):
    """A stand-in for the stack's position."""

    reach = "none"

    class Config(registry.Config):
        """The position that the stack states."""


NONE: Config = NoPosition.Config()
INHERIT: Config = InheritedPosition.Config()


def bucket(distance: Tensor, buckets: int, furthest: int, both_sides: bool) -> Tensor:
    """T5's bucket of key - query: half the buckets exact, the rest logarithmic up to `furthest`.

    With `both_sides` the upper half of the buckets is for keys after the query; without, such keys
    share bucket 0 with the query itself.
    """
    if both_sides:
        buckets //= 2
        start = (distance > 0).long() * buckets
        steps = distance.abs()
    else:
        start = torch.zeros_like(distance)
        steps = (-distance).clamp(min=0)
    exact = buckets // 2
    ratio = torch.log(steps.float().clamp(min=1) / exact) / math.log(furthest / exact)
    far = (exact + (ratio * (buckets - exact)).long()).clamp(max=buckets - 1)
    return start + torch.where(steps < exact, steps, far)


@part("position", "t5")
class BucketBias(nn.Module):
    """A bias for each head and bucket of distance, one table for the whole stack."""

    reach = "bias"

    class Config(registry.Config):
        """Learned bias over buckets of distance."""

        buckets: int = field("rows of the table", 32, ge=4)
        furthest: int = field("distance from which all share the last bucket", 128, gt=0)

    def __init__(self, config: Config, scope: Scope, heads: int) -> None:
        super().__init__()
        self.buckets, self.furthest, self.both_sides = config.buckets, config.furthest, not scope.causal
        exact = config.buckets // (4 if self.both_sides else 2)
        if exact < 1 or config.furthest <= exact:
            raise Impossible("furthest", f"must exceed the {exact} exact distances of {config.buckets} buckets")
        self.table = Table(config.buckets, heads)

    def scores(self, ctx: Ctx, queries: int) -> Tensor:
        """(1, H, T, S), from slot distances."""
        rows = bucket(slot_distance(ctx, queries), self.buckets, self.furthest, self.both_sides)
        return self.table(rows).permute(2, 0, 1)[None]  # type: ignore[no-any-return]


def alibi_slopes(heads: int) -> list[float]:
    """Geometric slopes; for a count that is no power of two the rest come from the next power's odd steps."""
    power = 2 ** math.floor(math.log2(heads))
    slopes = [2 ** (-8 / power * (i + 1)) for i in range(power)]
    return slopes + [2 ** (-4 / power * (2 * i + 1)) for i in range(heads - power)]


@part("position", "alibi")
class Alibi(nn.Module):
    """slope x (key place - query place); no parameters."""

    reach = "bias"

    class Config(registry.Config):
        """Attention with linear biases."""

    def __init__(self, config: Config, scope: Scope, heads: int) -> None:
        super().__init__()
        self.slopes = alibi_slopes(heads)
        self.both_sides = not scope.causal

    def scores(self, ctx: Ctx, queries: int) -> Tensor:
        """(B|1, H, T, S); symmetric in an encoder."""
        distance = (ctx.keys[:, None, :] - ctx.positions[:, :, None])[:, None].float()
        steps = -distance.abs() if self.both_sides else distance
        slopes = torch.tensor(self.slopes, device=steps.device)[None, :, None, None]
        return slopes * steps


@part("position", "shaw")
class Relative(nn.Module):
    """Scores of a query (and a key) with a learned vector of their distance, one table for each layer."""

    reach = "relative"

    class Config(registry.Config):
        """Learned vectors of the distance, multiplied with queries."""

        distance: int = field(
            "longest distance that has its own vector; beyond it the last one serves", gt=0, tiny=127, example=5
        )
        key_term: bool = field("keys score with the vector too", False)
        scaled: bool = field("these scores are divided by sqrt(head width) like the others", True)

    def __init__(self, config: Config, scope: Scope, head_dim: int) -> None:
        super().__init__()
        self.distance, self.key_term = config.distance, config.key_term
        self.factor = head_dim**-0.5 if config.scaled else 1.0
        self.table = Table(2 * config.distance + 1, head_dim)

    def scores(self, q: Tensor, k: Tensor, ctx: Ctx) -> Tensor:
        """q (B, H, T, d), k (B, H, S, d) -> (B, H, T, S), already scaled."""
        steps = (-slot_distance(ctx, q.shape[2])).clamp(-self.distance, self.distance) + self.distance
        vectors = self.table(steps)  # (T, S, d)
        scores = torch.einsum("bhtd,tsd->bhts", q, vectors)
        if self.key_term:
            scores = scores + torch.einsum("bhsd,tsd->bhts", k, vectors)
        return scores * self.factor
