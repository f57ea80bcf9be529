"""Rotary positions: queries and keys turn by an angle that grows with their place.

    angle(p, i) = p * theta^(-2i / r),   r = int(head width * fraction)

Su et al. 2021, arXiv:2104.09864. Layout `half` pairs dimension i with i + r/2 (Llama, NeoX),
`interleaved` pairs 2i with 2i + 1 (GPT-J); the other dimensions pass unturned. Angles are float32.
The scalings stretch the context: see each kind. One surprise: `dynamic` and `longrope` depend on
the length so far, so cached keys must be stored unturned (`static` is False) and turned at use.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from pydantic import Strict
from torch import Tensor, nn

from xtcli import registry
from xtcli.parts.context import Ctx
from xtcli.parts.scope import Impossible, Scope
from xtcli.registry import Config, Slot, field, part, part_of


def base_frequencies(theta: float | Tensor, width: int, device: Any = None) -> Tensor:
    """theta^(-2i / width), i < width / 2, float32; a batch of thetas (B, 1) gives (B, width / 2)."""
    exponents = torch.arange(0, width, 2, dtype=torch.int64, device=device).float() / width
    frequencies: Tensor = 1.0 / (theta**exponents)
    return frequencies


class Scaling:
    """How a rotation is stretched. `frequencies` (width / 2,) or (B, width / 2); `gain` multiplies cos and sin."""

    static = True

    @staticmethod
    def frequencies(config: Any, theta: float, width: int, context: int, length: Tensor) -> Tensor:
        """`length` (B|1, 1) is the number of places in use, `context` the length of pretraining."""
        raise AssertionError("a scaling kind must give its frequencies")

    @staticmethod
    def gain(config: Any, context: int) -> float:
        return 1.0


@part("scaling", "none")
class Unscaled(Scaling):
    """The angles as they are."""

    class Config(registry.Config):
        """No scaling."""

    @staticmethod
    def frequencies(config: Any, theta: float, width: int, context: int, length: Tensor) -> Tensor:
        return base_frequencies(theta, width, length.device)


@part("scaling", "linear")
class LinearScaling(Scaling):
    """Positions divided by the factor (Chen et al. 2023, arXiv:2306.15595)."""

    class Config(registry.Config):
        """Position interpolation."""

        factor: float = field("how much longer the context becomes", gt=0, example=2.0)

    @staticmethod
    def frequencies(config: Any, theta: float, width: int, context: int, length: Tensor) -> Tensor:
        factor: float = config.factor
        return base_frequencies(theta, width, length.device) / factor


@part("scaling", "dynamic")
class DynamicScaling(Scaling):
    """The base grows with the length n beyond the context M: theta (s n / M - s + 1)^(r / (r - 2))."""

    static = False

    class Config(registry.Config):
        """NTK-aware interpolation that starts beyond the context."""

        factor: float = field("scaling factor s", gt=0, example=2.0)

    @staticmethod
    def frequencies(config: Any, theta: float, width: int, context: int, length: Tensor) -> Tensor:
        places = length.clamp(min=context)
        grown = theta * (config.factor * places / context - (config.factor - 1)) ** (width / (width - 2))
        return base_frequencies(grown, width, length.device)


@part("scaling", "wavelength")
class WavelengthScaling(Scaling):
    """Long waves divided by the factor, short ones kept, a blend between (Llama 3.1)."""

    class Config(registry.Config):
        """Scaling by wavelength."""

        factor: float = field("divides the frequencies of long waves", gt=0, example=8.0)
        low: float = field("waves longer than original / low are scaled wholly", 1.0, gt=0)
        high: float = field("waves shorter than original / high are kept", 4.0, gt=0)
        original: int = field("context of pretraining", gt=0, example=16)

    @staticmethod
    def frequencies(config: Any, theta: float, width: int, context: int, length: Tensor) -> Tensor:
        kept = base_frequencies(theta, width, length.device)
        waves = 2 * math.pi / kept
        blend = (config.original / waves - config.low) / (config.high - config.low)
        mixed = (1 - blend) * kept / config.factor + blend * kept
        scaled = torch.where(waves > config.original / config.low, kept / config.factor, mixed)
        return torch.where(waves < config.original / config.high, kept, scaled)


@part("scaling", "yarn")
class YarnScaling(Scaling):
    """Dimensions that turn often are kept, those that turn rarely interpolated (arXiv:2309.00071)."""

    class Config(registry.Config):
        """YaRN."""

        factor: float = field("how much longer the context becomes", gt=0, example=2.0)
        original: int | None = field("context of pretraining; null = model.context", None, gt=0)
        fast: float = field("turns in the context above which a dimension is kept", 32.0, gt=0)
        slow: float = field("turns in the context below which a dimension is interpolated", 1.0, gt=0)
        truncate: bool = field("rounds the ends of the ramp outwards", True)
        gain: float | None = field("multiplies cos and sin; null = from the factor", None, gt=0)
        mscale: float | None = field("weight of log(factor) in the gain", None)
        mscale_all: float | None = field("weight of log(factor) that divides the gain", None)

    @staticmethod
    def frequencies(config: Any, theta: float, width: int, context: int, length: Tensor) -> Tensor:
        places = config.original or context

        def dimension(turns: float) -> float:
            return width * math.log(places / (turns * 2 * math.pi)) / (2 * math.log(theta))

        low, high = dimension(config.fast), dimension(config.slow)
        if config.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, width - 1)
        if low == high:
            high += 0.001
        ramp = ((torch.arange(width // 2, device=length.device).float() - low) / (high - low)).clamp(0, 1)
        kept = base_frequencies(theta, width, length.device)
        factor: float = config.factor
        return kept / factor * ramp + kept * (1 - ramp)

    @staticmethod
    def gain(config: Any, context: int) -> float:
        def grown(weight: float) -> float:
            return 1.0 if config.factor <= 1 else 0.1 * weight * math.log(config.factor) + 1.0

        if config.gain is not None:
            return float(config.gain)
        if config.mscale and config.mscale_all:
            return grown(config.mscale) / grown(config.mscale_all)
        return grown(1.0)


@part("scaling", "longrope")
class LongRopeScaling(Scaling):
    """A factor for each dimension, one list for short texts and one for long (arXiv:2402.13753)."""

    static = False

    class Config(registry.Config):
        """LongRoPE."""

        short: Annotated[tuple[float, ...], Strict(False)] = field(
            "divisors up to the original context", example=(1.0,) * 8
        )
        long: Annotated[tuple[float, ...], Strict(False)] = field("divisors beyond it", example=(2.0,) * 8)
        original: int | None = field("context of pretraining; null = model.context", None, gt=0)
        factor: float | None = field("growth of the context, for the gain; null = context / original", None, gt=0)
        gain: float | None = field("multiplies cos and sin; null = from the factor", None, gt=0)

    @staticmethod
    def frequencies(config: Any, theta: float, width: int, context: int, length: Tensor) -> Tensor:
        short, long = (torch.tensor(f, dtype=torch.float32, device=length.device) for f in (config.short, config.long))
        divisors = torch.where(length > (config.original or context), long, short)
        exponents = torch.arange(0, width, 2, dtype=torch.int64, device=length.device).float() / width
        return 1.0 / (divisors * theta**exponents)

    @staticmethod
    def gain(config: Any, context: int) -> float:
        original = config.original or context
        factor = config.factor if config.factor is not None else context / original
        if config.gain is not None:
            return float(config.gain)
        return 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))


@dataclass(frozen=True)
class Turn:
    """cos and sin of the query places (B|1, 1, T, r / 2), and of all key places where keys turn at use."""

    cos: Tensor
    sin: Tensor
    key_cos: Tensor
    key_sin: Tensor


@part("position", "rotary")
class Rotary(nn.Module):
    """Rotates queries and keys; no parameters."""

    reach = "turn"

    class Config(registry.Config):
        """Rotary positions."""

        theta: float = field("base of the frequencies", 10000.0, gt=1)
        fraction: float = field("share of the head width that turns", 1.0, gt=0, le=1)
        layout: Literal["half", "interleaved"] = field("which dimensions pair up", "half")
        scaling: Annotated[Config, Slot("scaling")] = field("stretches the context", Unscaled.Config())

    def __init__(self, config: Config, scope: Scope, head_dim: int) -> None:
        super().__init__()
        self.width = int(head_dim * config.fraction)
        if self.width % 2 or self.width == 0:
            raise Impossible("fraction", f"{self.width} of {head_dim} head dimensions turn, an odd number or none")
        scaling = part_of(config.scaling)
        if scaling is not Unscaled and scope.context is None:
            raise Impossible("scaling", "scaling needs model.context, the length of pretraining")
        for name in ("short", "long"):
            divisors = getattr(config.scaling, name, None)
            if divisors is not None and len(divisors) != self.width // 2:
                raise Impossible(f"scaling.{name}", f"has {len(divisors)} divisors, the heads need {self.width // 2}")
        self.config, self.context = config, scope.context or 0
        self.static: bool = scaling.static
        # Up to this length the frequencies of a scaling that is not static stay the same.
        self.steady: int = getattr(config.scaling, "original", None) or self.context
        self.gain: float = scaling.gain(config.scaling, self.context)

    def tables(self, ctx: Ctx, dtype: torch.dtype) -> Turn:
        """cos and sin for this call, in the dtype of x."""
        length = ctx.keys.max(dim=1, keepdim=True).values + 1  # (B|1, 1)
        scaling = part_of(self.config.scaling)
        frequencies = scaling.frequencies(self.config.scaling, self.config.theta, self.width, self.context, length)
        cos, sin = self._turns(ctx.positions, frequencies, dtype)
        if self.static and ctx.fed is None:
            return Turn(cos, sin, cos, sin)
        if self.static:
            return Turn(cos, sin, *self._turns(ctx.fed, frequencies, dtype))  # type: ignore[arg-type]
        return Turn(cos, sin, *self._turns(ctx.keys, frequencies, dtype))

    def _turns(self, places: Tensor, frequencies: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        angles = places[:, None, :, None].float() * frequencies.reshape(-1, 1, 1, self.width // 2)
        return (angles.cos() * self.gain).to(dtype), (angles.sin() * self.gain).to(dtype)

    def extra_repr(self) -> str:
        return f"{self.width}, theta={self.config.theta}, {self.config.layout}, scaling={self.config.scaling.kind}"


def turn_half(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the first 2 x cos.shape[-1] dimensions of x (..., T, d); dimension i pairs with i + r/2."""
    half = cos.shape[-1]
    a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat((a * cos - b * sin, b * cos + a * sin, rest), dim=-1)


def turn_interleaved(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the first 2 x cos.shape[-1] dimensions of x (..., T, d); dimension 2i pairs with 2i + 1."""
    half = cos.shape[-1]
    turned, rest = x[..., : 2 * half], x[..., 2 * half :]
    a, b = turned[..., 0::2], turned[..., 1::2]
    pairs = torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-1).flatten(-2)
    return torch.cat((pairs, rest), dim=-1)


class _Half(torch.autograd.Function):
    """What a rotation hands back is turned by the negative angle: one operation, where the derivative of slices and
    joins is many, of which a compiler makes a slow kernel."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return turn_half(x, cos, sin)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        cos, sin = ctx.saved_tensors
        return turn_half(dy, cos, -sin), None, None


class _Interleaved(torch.autograd.Function):
    """The same of the other layout."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return turn_interleaved(x, cos, sin)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        cos, sin = ctx.saved_tensors
        return turn_interleaved(dy, cos, -sin), None, None


def _half(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return _Half.apply(x, cos, sin) if torch.is_grad_enabled() else turn_half(x, cos, sin)  # type: ignore[no-untyped-call]


def _interleaved(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return _Interleaved.apply(x, cos, sin) if torch.is_grad_enabled() else turn_interleaved(x, cos, sin)  # type: ignore[no-untyped-call]


TURNS = {"half": _half, "interleaved": _interleaved}
"""By layout; gradients go back to what is turned, not to cos and sin."""
