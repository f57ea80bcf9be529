"""Wirings: how a block joins its sublayers, norms and the residual stream.

    pre              x + s f(norm(x))                  sandwich-norm    x + s norm'(f(norm(x)))
    pre-wide         the same, x in float32
    post             norm(x + s f(x))                  rezero           x + s alpha f(x), alpha from 0
    parallel         x + sum of s f(norm_f(x))         parallel-shared  x + sum of s f(norm(x))
    normed           norm(x) + s f(norm(x))            pre-post         post where it says so, else pre

`s` is the `scale` of the sublayer: 1/2 for the feed-forwards before and after attention is the macaron
layer (Lu et al. 2019, arXiv:1906.02762), one number for all a residual multiplier. Gates stand in gates.py.

Sublayers run in the order of the block's map. One that reads the encoder's memory is passed over when
there is none, so that a decoder can run alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, Strict
from torch import Tensor, nn

from xtcli import registry
from xtcli.errors import did_you_mean, refuse
from xtcli.parts import norms
from xtcli.parts.context import Ctx, Memory
from xtcli.parts.dropouts import make_dropout
from xtcli.parts.linear import widen
from xtcli.parts.norms import NormSlot, make_norm
from xtcli.parts.scope import Impossible, Scope
from xtcli.registry import Config, Slot, field, part

WiringSlot = Annotated[Config, Slot("wiring")]
Rate = Annotated[float, Field(ge=0, lt=1)]

SublayerName = Literal[
    "pre_ffn", "attn", "attn_2", "cross", "cross_2", "mixer", "mixer_2", "conv",
    "ffn", "ffn_2", "ffn_3", "ffn_4", "ffn_5", "ffn_6", "ffn_7", "ffn_8",
]  # fmt: skip


class Joining(nn.Module):
    """What every wiring does to a sublayer's output before it joins the stream: dropout, drop path, scale.

    One that adds to the stream what a sublayer makes has `branch`, which other stacks can use alone; one that
    does otherwise says so in `irreversible`.
    """

    irreversible = ""
    recurs = True  # sublayers are called through `run`

    class Config(registry.Config):
        """Weights and dropout of what sublayers add."""

        scale: float | dict[SublayerName, float] = field(
            "multiplies what sublayers add; one number, or one by name", 1.0
        )
        dropout: Rate | dict[SublayerName, Rate] | None = field(
            "dropout on what sublayers add; one number, or one by name; null, or no name = model.dropout", None
        )
        channels: bool = field("dropout drops whole channels of a row", False)
        drop_path: float = field("chance in training that a row goes past a sublayer", 0.0, ge=0, lt=1)

    def __init__(self, config: Config, scope: Scope, names: tuple[str, ...]) -> None:
        super().__init__()
        one = not isinstance(config.scale, dict)
        scale: dict[str, float] = dict.fromkeys(names, config.scale) if one else dict(config.scale)  # type: ignore[arg-type]
        for name in scale:
            if name not in names:
                raise Impossible("scale", f"the block has no sublayer '{name}'", did_you_mean(name, names))
        self.scale = scale
        rates: dict[str, float] = dict(config.dropout) if isinstance(config.dropout, dict) else {}  # type: ignore[arg-type]
        for name in rates:
            if name not in names:
                raise Impossible("dropout", f"the block has no sublayer '{name}'", did_you_mean(name, names))
        usual = config.dropout if isinstance(config.dropout, float) else scope.dropout
        self.dropout = make_dropout(usual, config.channels)
        apart = {name: make_dropout(rate, config.channels) for name, rate in rates.items() if rate != usual}
        self.dropouts = nn.ModuleDict(apart)
        self.path = DropPath(config.drop_path)

    @staticmethod
    def inside(config: Any, scope: Scope) -> Scope:
        """The scope of the sublayers."""
        return scope

    def weigh(self, name: str, y: Tensor) -> Tensor:
        """What sublayer `name` made, (B, T, D), as it joins the stream."""
        y = self.path(self.dropouts[name](y) if name in self.dropouts else self.dropout(y))
        scale = self.scale.get(name, 1.0)
        return y if scale == 1.0 else y * scale


class Wiring(Joining):
    """A wiring with one norm for each sublayer."""

    class Config(Joining.Config):
        """Norms, weights and dropout."""

        norm: NormSlot = field("norm of each sublayer", norms.INHERIT)
        norms: dict[str, NormSlot] = field("norms of sublayers that differ, by name", {})

    def __init__(self, config: Config, scope: Scope, names: tuple[str, ...]) -> None:
        super().__init__(config, scope, names)
        for name in config.norms:
            if name not in names:
                raise Impossible("norms", f"the block has no sublayer '{name}'", did_you_mean(name, names))
        kinds = dict.fromkeys(names, config.norm) | config.norms
        self.norm = nn.ModuleDict({name: make_norm(scope, "norm", kinds[name]) for name in names})


class DropPath(nn.Module):
    """Stochastic depth (Huang et al. 2016, arXiv:1603.09382): in training whole rows are 0, the others grow by
    1 / (1 - rate)."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, y: Tensor) -> Tensor:
        if not self.training or self.rate == 0.0:
            return y
        kept = torch.rand(y.shape[0], 1, 1, device=y.device) >= self.rate
        return y * kept / (1.0 - self.rate)

    def extra_repr(self) -> str:
        return f"{self.rate}"


def active(sublayers: Mapping[str, nn.Module], ctx: Ctx) -> Iterator[tuple[str, nn.Module, Ctx]]:
    """The sublayers that take part in this call, each with its own state."""
    states: Mapping[str, Any] = ctx.state or {}
    for name, sublayer in sublayers.items():
        if ctx.memory is None and getattr(sublayer, "reads_memory", False):
            if getattr(sublayer, "required", False):
                raise refuse(f"'{name}' reads a memory, and none was given", "pass encoder_hidden_states")
            continue
        yield name, sublayer, ctx.within(states.get(name))


def run(sublayer: nn.Module, x: Tensor, ctx: Ctx, norm: nn.Module | None = None) -> Tensor:
    """What a sublayer makes of x (B, T, D), read through `norm`, as its memory of earlier segments is.

    One that `reads_stream` is given x itself as well: what it adds depends on what it is added to.
    """
    if isinstance(ctx.state, Memory):
        x = ctx.state.take(x, norm)
    read = x if norm is None else norm(x)
    return sublayer(read, ctx, x) if getattr(sublayer, "reads_stream", False) else sublayer(read, ctx)  # type: ignore[no-any-return]


class Additive(Joining):
    """The plain residual: each sublayer in turn adds its branch."""

    def branch(self, name: str, x: Tensor, sublayer: nn.Module, ctx: Ctx) -> Tensor:
        """What sublayer `name` adds to x (B, T, D)."""
        raise AssertionError("an additive wiring must say what a sublayer adds")

    def forward(self, x: Tensor, sublayers: Mapping[str, nn.Module], ctx: Ctx) -> Tensor:
        for name, sublayer, own in active(sublayers, ctx):
            x = x + self.branch(name, x, sublayer, own)
        return x


@part("wiring", "pre")
class PreNorm(Additive, Wiring):
    """Each sublayer reads a normed copy of the stream (Xiong et al. 2020, arXiv:2002.04745)."""

    def branch(self, name: str, x: Tensor, sublayer: nn.Module, ctx: Ctx) -> Tensor:
        return self.weigh(name, run(sublayer, x, ctx, self.norm[name]))


@part("wiring", "pre-wide")
class WidePreNorm(PreNorm):
    """Pre-norm whose stream is in at least float32, whatever the type of the weights."""

    def forward(self, x: Tensor, sublayers: Mapping[str, nn.Module], ctx: Ctx) -> Tensor:
        x = widen(x)
        for name, sublayer, own in active(sublayers, ctx):
            typed = x.to(next(self.norm[name].parameters(), x).dtype)
            x = x + self.branch(name, typed, sublayer, own)
        return x


@part("wiring", "post")
class PostNorm(Wiring):
    """The sum is normed after each sublayer (Vaswani et al. 2017)."""

    irreversible = "norms over the sum change the stream that they would have to be undone on"

    def forward(self, x: Tensor, sublayers: Mapping[str, nn.Module], ctx: Ctx) -> Tensor:
        for name, sublayer, own in active(sublayers, ctx):
            x = self.norm[name](x + self.weigh(name, run(sublayer, x, own)))
        return x


@part("wiring", "pre-post")
class PreOrPostNorm(Wiring):
    """Norms of some sublayers stand behind their sums, those of the others before them."""

    irreversible = PostNorm.irreversible

    class Config(Wiring.Config):
        """Norms before sublayers or behind them."""

        after: Annotated[tuple[SublayerName, ...], Strict(False)] = field(
            "sublayers whose sum is normed; the others read through their norm", example=("attn",)
        )

    def __init__(self, config: Config, scope: Scope, names: tuple[str, ...]) -> None:
        super().__init__(config, scope, names)
        for name in config.after:
            if name not in names:
                raise Impossible("after", f"the block has no sublayer '{name}'", did_you_mean(name, names))
        self.after = frozenset(config.after)

    def forward(self, x: Tensor, sublayers: Mapping[str, nn.Module], ctx: Ctx) -> Tensor:
        for name, sublayer, own in active(sublayers, ctx):
            norm = self.norm[name]
            if name in self.after:
                x = norm(x + self.weigh(name, run(sublayer, x, own)))
            else:
                x = x + self.weigh(name, run(sublayer, x, own, norm))
        return x


@part("wiring", "normed")
class NormedStream(Wiring):
    """What was normed is what goes on: n = norm(x), then n + f(n)."""

    irreversible = "the norm over the stream would have to be undone"

    def forward(self, x: Tensor, sublayers: Mapping[str, nn.Module], ctx: Ctx) -> Tensor:
        for name, sublayer, own in active(sublayers, ctx):
            x = self.norm[name](x)
            x = x + self.weigh(name, run(sublayer, x, own))
        return x


@part("wiring", "sandwich-norm")
class SandwichNorm(Additive, Wiring):
    """A norm before and one after each sublayer (Ding et al. 2021, arXiv:2105.13290); `out` are those after."""

    def __init__(self, config: Wiring.Config, scope: Scope, names: tuple[str, ...]) -> None:
        super().__init__(config, scope, names)
        self.out = nn.ModuleDict({name: make_norm(scope, "norm", config.norm) for name in names})

    def branch(self, name: str, x: Tensor, sublayer: nn.Module, ctx: Ctx) -> Tensor:
        return self.weigh(name, self.out[name](run(sublayer, x, ctx, self.norm[name])))


@part("wiring", "rezero")
class ReZero(Additive):
    """No norms; branches fade in from nothing (Bachlechner et al. 2020, arXiv:2003.04887).

    At the start only the alphas have gradients.
    """

    class Config(Joining.Config):
        """Learned weights of branches in the place of norms."""

        per: Literal["layer", "sublayer"] = field("what has an alpha of its own; the paper: a layer", "layer")

    def __init__(self, config: Config, scope: Scope, names: tuple[str, ...]) -> None:
        super().__init__(config, scope, names)
        self.rows = {name: row if config.per == "sublayer" else 0 for row, name in enumerate(names)}
        self.alpha = nn.Parameter(torch.zeros(max(self.rows.values()) + 1))

    def draw(self, normal: Any) -> None:
        """Nothing joins at first."""
        self.alpha.zero_()

    def branch(self, name: str, x: Tensor, sublayer: nn.Module, ctx: Ctx) -> Tensor:
        return self.alpha[self.rows[name]] * self.weigh(name, run(sublayer, x, ctx))


PARALLEL = "parallel sublayers read one stream, reversible ones each other's"


@part("wiring", "parallel")
class Parallel(Wiring):
    """All sublayers read the same x, each through a norm of its own (Black et al. 2022, arXiv:2204.06745)."""

    irreversible = PARALLEL

    def forward(self, x: Tensor, sublayers: Mapping[str, nn.Module], ctx: Ctx) -> Tensor:
        total = x
        for name, sublayer, own in active(sublayers, ctx):
            total = total + self.weigh(name, run(sublayer, x, own, self.norm[name]))
        return total


@part("wiring", "parallel-shared")
class ParallelShared(Joining):
    """All sublayers read the same x through one norm (Wang and Komatsuzaki 2021, GPT-J)."""

    irreversible = PARALLEL

    class Config(Joining.Config):
        """A norm for all, weights and dropout."""

        norm: NormSlot = field("norm that all sublayers read through", norms.INHERIT)

    def __init__(self, config: Config, scope: Scope, names: tuple[str, ...]) -> None:
        super().__init__(config, scope, names)
        self.norm = make_norm(scope, "norm", config.norm)

    def forward(self, x: Tensor, sublayers: Mapping[str, nn.Module], ctx: Ctx) -> Tensor:
        total = x
        for name, sublayer, own in active(sublayers, ctx):
            total = total + self.weigh(name, run(sublayer, x, own, self.norm))
        return total
