"""RWKV-4's two halves of a block, both with a token shift (Peng et al. 2023, arXiv:2305.13048).

    m_z(x) = mu_z x_t + (1 - mu_z) x_(t-1)                    a mix of its own for each projection
    time-mix      o(sigmoid(r(m_r)) * wkv(k(m_k), v(m_v)))    wkv.py: w = -exp(decay), u = bonus
    channel-mix   sigmoid(r(m_r)) * v(relu(k(m_k))^2)

    halved        the wiring: x + f(norm(x)); in evaluation the stream is halved after every `every` layers, and what
                  sublayers add is divided alike, which keeps 16-bit numbers in range and all but the eps of norms equal

Their state has one size however long the text: the last input of each half and, in at least float32, wkv's numerator,
denominator and exponent. Padding does not touch it. Axes: B rows, T tokens, C channels of time-mix.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from xtcli import registry
from xtcli.parts import masks
from xtcli.parts.context import Ctx
from xtcli.parts.linear import Draw, Linear, widen
from xtcli.parts.previous import THROUGH, goes_on, new_documents, real_tokens, shift
from xtcli.parts.scope import Impossible, Scope
from xtcli.parts.wiring import PreNorm, Wiring, active
from xtcli.parts.wkv import NOTHING, wkv
from xtcli.registry import field, part


@dataclass
class ShiftState:
    """The last input (B, dim)."""

    remembered: ClassVar[tuple[str, ...]] = ("last",)
    last: Tensor

    def select(self, rows: Tensor) -> None:
        self.last = self.last[rows]


@dataclass
class TimeState(ShiftState):
    """The last input, and wkv's numerator, denominator and exponent (B, C)."""

    remembered: ClassVar[tuple[str, ...]] = ("last", "numerator", "denominator", "exponent")
    numerator: Tensor
    denominator: Tensor
    exponent: Tensor

    def select(self, rows: Tensor) -> None:
        super().select(rows)
        self.numerator, self.denominator = self.numerator[rows], self.denominator[rows]
        self.exponent = self.exponent[rows]


class Mixing(nn.Module):
    """What both halves share: the token shift, and the mixes that start as powers of a ramp over the channels."""

    remembered = ShiftState.remembered
    depth: float

    def __init__(self, scope: Scope, kind: str) -> None:
        super().__init__()
        if not scope.causal:
            raise Impossible("", f"a {kind} mixer reads from left to right alone", "use it in a decoder")
        # 0 in the first layer, 1 in the last.
        self.depth = scope.layer / max(scope.layers - 1, 1)
        self.rest = 1.0 - scope.layer / scope.layers

    def ramp(self, mix: nn.Parameter, power: float, plus: float = 0.0) -> None:
        """Fill a mix with ramp^power + plus."""
        ramp = torch.arange(mix.shape[0], device=mix.device) / mix.shape[0]
        mix.copy_(ramp.pow(power) + plus)

    def shifted(self, x: Tensor, ctx: Ctx, state: ShiftState) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """The token before each (B, T, dim), which tokens are real, and where documents go on."""
        real, opens = real_tokens(ctx, x.shape[1]), goes_on(new_documents(ctx, x.shape[1]))
        before, last = shift(x, state.last, real, opens)
        state.last = last.detach()
        return before, real, opens


def mixed(x: Tensor, before: Tensor, mix: Tensor) -> Tensor:
    """mix x + (1 - mix) before."""
    return x * mix + before * (1 - mix)


@part("mixer", "time-mix")
class TimeMix(Mixing):
    """An average over the past that fades at a rate of each channel's own, weighted by keys."""

    rule = masks.CAUSAL
    sees = f"{THROUGH} of one size"

    class Config(registry.Config):
        """RWKV-4's time mix."""

        width: int | None = field("channels inside; null = dim", None, gt=0, tiny=64)

    def __init__(self, config: Config, scope: Scope) -> None:
        super().__init__(scope, "time-mix")
        width = config.width or scope.dim
        self.r = Linear(scope.dim, width, False)
        self.k = Linear(scope.dim, width, False)
        self.v = Linear(scope.dim, width, False)
        self.o = Linear(width, scope.dim, False, "output")
        self.decay, self.bonus = nn.Parameter(torch.empty(width)), nn.Parameter(torch.empty(width))
        self.mix_r, self.mix_k, self.mix_v = (nn.Parameter(torch.empty(scope.dim)) for _ in range(3))

    def draw(self, normal: Draw) -> None:
        """Decays from slow to fast over the channels, steeper in deep layers; the bonus in a zigzag."""
        width, device = self.decay.shape[0], self.decay.device
        place = torch.arange(width, device=device)
        self.decay.copy_(-5 + 8 * (place / max(width - 1, 1)) ** (0.7 + 1.3 * self.depth))
        self.bonus.copy_(((place + 1) % 3 - 1) * 0.5 + math.log(0.3))
        self.ramp(self.mix_k, self.rest)
        self.ramp(self.mix_v, self.rest, 0.3 * self.depth)
        self.ramp(self.mix_r, 0.5 * self.rest)

    def new_state(self, batch: int, capacity: int, device: Any, dtype: Any) -> TimeState:
        """Nothing read yet; the size does not depend on `capacity`."""
        wide = dtype if dtype == torch.float64 else torch.float32
        last = torch.zeros(batch, self.mix_k.shape[0], device=device, dtype=dtype)
        empty = torch.zeros(batch, self.decay.shape[0], device=device, dtype=wide)
        return TimeState(last, empty, empty.clone(), torch.full_like(empty, NOTHING))

    def forward(self, x: Tensor, ctx: Ctx) -> Tensor:
        """x (B, T, dim) -> (B, T, dim)."""
        state: TimeState = self.new_state(x.shape[0], 0, x.device, x.dtype) if ctx.state is None else ctx.state
        before, real, opens = self.shifted(x, ctx, state)
        k, v = self.k(mixed(x, before, self.mix_k)), self.v(mixed(x, before, self.mix_v))
        r = torch.sigmoid(self.r(mixed(x, before, self.mix_r)))
        kept = (state.numerator, state.denominator, state.exponent)
        decay = -torch.exp(widen(self.decay))
        y, last = wkv(widen(k), widen(v), decay, widen(self.bonus), kept, real, opens)
        state.numerator, state.denominator, state.exponent = (value.detach() for value in last)
        return self.o(r * y.to(r.dtype))  # type: ignore[no-any-return]


@part("mixer", "channel-mix")
class ChannelMix(Mixing):
    """A feed-forward that sees the token before, behind a gate; it stands in the place of an ffn."""

    rule = masks.Window.Config(left=1)

    class Config(registry.Config):
        """RWKV-4's channel mix."""

        hidden: int = field("inner width", gt=0, tiny=256, example=96)

    def __init__(self, config: Config, scope: Scope) -> None:
        super().__init__(scope, "channel-mix")
        self.r = Linear(scope.dim, scope.dim, False)
        self.k = Linear(scope.dim, config.hidden, False)
        self.v = Linear(config.hidden, scope.dim, False, "output")
        self.mix_r, self.mix_k = (nn.Parameter(torch.empty(scope.dim)) for _ in range(2))

    def draw(self, normal: Draw) -> None:
        """Both mixes alike."""
        self.ramp(self.mix_k, self.rest)
        self.ramp(self.mix_r, self.rest)

    def new_state(self, batch: int, capacity: int, device: Any, dtype: Any) -> ShiftState:
        """Nothing read yet; the size does not depend on `capacity`."""
        return ShiftState(torch.zeros(batch, self.mix_k.shape[0], device=device, dtype=dtype))

    def forward(self, x: Tensor, ctx: Ctx) -> Tensor:
        """x (B, T, dim) -> (B, T, dim)."""
        state: ShiftState = self.new_state(x.shape[0], 0, x.device, x.dtype) if ctx.state is None else ctx.state
        before, _, _ = self.shifted(x, ctx, state)
        k = F.relu(self.k(mixed(x, before, self.mix_k))).square()
        r = torch.sigmoid(self.r(mixed(x, before, self.mix_r)))
        return r * self.v(k)  # type: ignore[no-any-return]


@part("wiring", "halved")
class Halved(PreNorm):
    """Pre-norm whose stream is halved every few layers outside training; the weights stay as they are."""

    irreversible = "the stream is halved between layers"

    class Config(Wiring.Config):
        """Pre-norms, and how often the stream is halved."""

        every: int = field("layers between two halvings; 0 = never", 6, ge=0)

    def __init__(self, config: Config, scope: Scope, names: tuple[str, ...]) -> None:
        super().__init__(config, scope, names)
        every = config.every
        # Powers of two: the division is exact.
        self.share = 0.5 ** (scope.layer // every) if every else 1.0
        self.ends = 0.5 if every and (scope.layer + 1) % every == 0 else 1.0

    def forward(self, x: Tensor, sublayers: Mapping[str, nn.Module], ctx: Ctx) -> Tensor:
        share, ends = (1.0, 1.0) if self.training else (self.share, self.ends)
        for name, sublayer, own in active(sublayers, ctx):
            y = self.branch(name, x, sublayer, own)
            x = x + (y * share if share != 1.0 else y)
        return x * ends if ends != 1.0 else x
