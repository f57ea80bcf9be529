"""Positions that attention knows: additive biases, scores made from queries and distances, places in the input.

    none           nothing
    inherit        what the stack states
    rotary         see rotary.py
    t5             a learned table over buckets of distance (Raffel et al. 2020, arXiv:1910.10683)
    alibi          a slope for each head times the distance (Press et al. 2022, arXiv:2108.12409)
    distance-mlp   a small network of the distance (Wang et al. 2021, arXiv:2108.00154)
    tupe           see tupe.py
    shaw           see shaw.py
    infused        queries and keys, not values, are made from x + waves of the place (arXiv:2012.15832)
    all            several at once

`reach` says how a kind enters: `turn` rotates, `bias` is computed once per stack, `relative` lives in
each attention and reads its queries and keys, `input` changes what queries and keys are made from. `share`
multiplies the scale of the attention's own scores. A bias that `slides` depends on the distance of slots alone.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import torch
from pydantic import Strict
from torch import Tensor, nn

from xtcli import registry
from xtcli.parts.activations import ACTIVATIONS, Activation
from xtcli.parts.blockmasks import Scores
from xtcli.parts.context import Ctx
from xtcli.parts.embed import SinusoidalPlaces
from xtcli.parts.linear import Linear, Table
from xtcli.parts.scope import Impossible, Scope
from xtcli.parts.shared import distances, slid
from xtcli.registry import Config, Slot, field, part, part_of

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


class Bias(nn.Module):
    """Something added to the scores, one for the stack: `scores(ctx, queries)` gives (B|1, H, T, S).

    share: see above. slides: depends on the distance of slots alone. reads_width: is made for heads of one width.
    pairwise: `by_pair(ctx, rows)` gives what a kernel does to the score of one pair (`blockmasks.Scores`), and whether
    it looks up what is stored of each token.
    """

    reach = "bias"
    share = 1.0
    slides = False
    reads_width = False
    pairwise = False


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
class BucketBias(Bias):
    """A bias for each head and bucket of distance, one table for the whole stack."""

    slides = True

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
        return slid(self._values, ctx, queries)

    def row(self, ctx: Ctx, queries: int) -> Tensor:
        """(H, T + S - 1), the scores of all distances."""
        return distances(self._values, ctx, queries)

    def _values(self, distances: Tensor) -> Tensor:
        return self.table(bucket(distances, self.buckets, self.furthest, self.both_sides))  # type: ignore[no-any-return]


def alibi_slopes(heads: int) -> list[float]:
    """Geometric slopes; for a count that is no power of two the rest come from the next power's odd steps."""
    power = 2 ** math.floor(math.log2(heads))
    slopes = [2 ** (-8 / power * (i + 1)) for i in range(power)]
    return slopes + [2 ** (-4 / power * (2 * i + 1)) for i in range(heads - power)]


def numbers(values: tuple[float, ...], device: torch.device) -> Tensor:
    """Constants on a device. A GPU gets them once: it need not wait for the host, and a recorded pass that copied them
    would read memory that the host has given to something else."""
    return _kept(values, device) if device.type == "cuda" else torch.tensor(values).to(device)


@functools.cache
def _kept(values: tuple[float, ...], device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return torch.tensor(values).to(device)


@part("position", "alibi")
class Alibi(Bias):
    """slope x (key place - query place); no parameters.

    One surprise: `rounded` biases are those of the keys' own places, slope and product in bfloat16, as some models
    were trained; then a distance means something else far from the start.
    """

    class Config(registry.Config):
        """Attention with linear biases."""

        places: Literal["given", "counted"] = field(
            "places as they were given, or the running count of the real tokens of a row", "given"
        )
        scaled: bool = field("divided by sqrt(head width) like the scores", False)
        rounded: bool = field("made of the keys' places in bfloat16; only where nothing looks ahead", False)

    def __init__(self, config: Config, scope: Scope, heads: int) -> None:
        super().__init__()
        self.slopes = alibi_slopes(heads)
        self.both_sides = not scope.causal
        self.counted, self.rounded = config.places == "counted", config.rounded
        self.slides, self.pairwise = not self.counted, not self.rounded
        self.factor = (scope.head_dim or 1) ** -0.5 if config.scaled else 1.0
        if config.rounded and self.both_sides:
            raise Impossible("rounded", "means places of keys, which a model that sees both ways cannot tell apart")

    def scores(self, ctx: Ctx, queries: int) -> Tensor:
        """(B|1, H, T, S); symmetric in an encoder."""
        keys, places = self.places(ctx, queries)
        slopes = numbers(tuple(self.slopes), keys.device)[None, :, None, None]
        if self.rounded:
            bias = slopes.bfloat16() * keys[:, None, None, :]
            return (bias.float() * self.factor).expand(-1, -1, queries, -1)
        distance = (keys[:, None, :] - places[:, :, None])[:, None].float()
        steps = -distance.abs() if self.both_sides else distance
        return slopes * steps * self.factor

    def places(self, ctx: Ctx, queries: int) -> tuple[Tensor, Tensor]:
        """Places of keys (B|1, S) and queries (B|1, T)."""
        keys, places = ctx.keys, ctx.positions
        if self.counted and ctx.documents is None:
            end = ctx.offset + queries
            real = ctx.keep if ctx.keep is not None else torch.ones_like(keys, dtype=torch.bool)
            keys = (real.cumsum(-1) - 1) * real
            places = keys[:, ctx.offset : end]
        return keys, places

    def by_pair(self, ctx: Ctx, rows: int) -> tuple[Scores, bool]:
        """`scores` of one pair, for a text that is read at once, and whether places are looked up."""
        looks = ctx.placed or ctx.behind > 0 or ctx.keep is not None or ctx.documents is not None
        keys, places = (x.expand(rows, -1) for x in self.places(ctx, ctx.keys.shape[1]))
        slopes = numbers(tuple(self.slopes), keys.device) * self.factor
        both_sides = self.both_sides

        def scores(score: Tensor, row: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
            distance = keys[row, k] - places[row, q] if looks else k - q
            return score + slopes[head] * (-distance.abs() if both_sides else distance)

        return scores, looks


@part("position", "distance-mlp")
class DistanceNetwork(Bias):
    """A bias for each head from a network of key slot - query slot, one for the whole stack; any length."""

    slides = True

    class Config(registry.Config):
        """A learned function of the distance."""

        hidden: int = field("inner width", 64, gt=0, tiny=16)
        depth: int = field("inner layers", 2, gt=0)
        act: Activation = field("activation", "silu")
        log: bool = field("reads sign(distance) log(1 + |distance|)", False)

    def __init__(self, config: Config, scope: Scope, heads: int) -> None:
        super().__init__()
        widths = [1] + [config.hidden] * config.depth + [heads]
        self.layers = nn.ModuleList(Linear(a, b, True) for a, b in itertools.pairwise(widths))
        self.act, self.log = ACTIVATIONS[config.act], config.log
        self.both_sides = not scope.causal

    def scores(self, ctx: Ctx, queries: int) -> Tensor:
        """(1, H, T, S), from slot distances."""
        return slid(self._values, ctx, queries)

    def row(self, ctx: Ctx, queries: int) -> Tensor:
        """(H, T + S - 1), the scores of all distances."""
        return distances(self._values, ctx, queries)

    def _values(self, distances: Tensor) -> Tensor:
        weight: Tensor = self.layers[0].weight  # type: ignore[assignment]
        x = distances.to(weight.dtype)[:, None]
        x = x.sign() * torch.log1p(x.abs()) if self.log else x
        for layer in self.layers[:-1]:
            x = self.act(layer(x))
        return self.layers[-1](x)  # type: ignore[no-any-return]


@part("position", "infused")
class Infused(SinusoidalPlaces):
    """Waves of the place join what queries and keys are made from; values know no places. No parameters."""

    reach = "input"

    class Config(registry.Config):
        """Position-infused attention."""

    def __init__(self, config: Config, scope: Scope) -> None:
        super().__init__(SinusoidalPlaces.Config(), scope)

    def forward(self, x: Tensor, ctx: Ctx) -> Tensor:  # type: ignore[override]
        """x (B, T, D) -> (B, T, D)."""
        return super().forward(x, ctx.positions)


@part("position", "all")
class AllOf(nn.Module):
    """The sum of what several kinds add. An attention takes rotations and changes of the input out beforehand."""

    reach = "all"

    class Config(registry.Config):
        """Several kinds at once."""

        of: Annotated[tuple[PositionSlot, ...], Strict(False)] = field(
            "the kinds", example=("rotary", "t5"), min_length=1
        )

    def __init__(self, config: Config, scope: Scope, size: int) -> None:
        super().__init__()
        self.of = nn.ModuleList(scope.make(f"of.{i}", member, size) for i, member in enumerate(config.of))
        self.both_sides = not scope.causal

    @property
    def limit(self) -> int | None:
        """The most tokens that all can tell apart, or None."""
        limits = (getattr(member, "limit", None) for member in self.of)
        return min((limit for limit in limits if limit is not None), default=None)

    @property
    def slides(self) -> bool:
        """Whether all depend on the distance alone."""
        return all(getattr(member, "slides", False) for member in self.of)

    def scores(self, *given: Any) -> Tensor:
        """The sum of the members' scores."""
        added: list[Tensor] = [member.scores(*given) for member in self.of]  # type: ignore[operator]
        return functools.reduce(torch.add, added)


def spread(config: Config) -> dict[str, list[Config]]:
    """The kinds that a position is made of, by how they enter."""
    if not isinstance(config, AllOf.Config):
        return {part_of(config).reach: [config]}
    found: dict[str, list[Config]] = {}
    for member in config.of:
        if member.kind == "inherit":
            raise Impossible("position", "'inherit' cannot be one of several positions", "name the stack's kind")
        for reach, members in spread(member).items():
            found.setdefault(reach, []).extend(members)
    return found


def joined(members: Sequence[Config]) -> Config | None:
    """One config for all of several, None for none."""
    return members[0] if len(members) == 1 else AllOf.Config(of=tuple(members)) if members else None
