"""Norms: x -> x of the same width.

    layer       (x - mean) / sqrt(var + eps) * weight + bias     Ba et al. 2016, arXiv:1607.06450
    rms         x / sqrt(mean(x^2) + eps) * weight               Zhang, Sennrich 2019, arXiv:1910.07467
    simple-rms  x / sqrt(mean(x^2) + eps)                        Qin et al. 2023, arXiv:2307.14995
    rms-scale   x / sqrt(mean(x^2) + eps) * weight, one number   Ma et al. 2022, arXiv:2209.10655
    scale       x / max(|x|, eps) * weight, a single number      Nguyen, Salazar 2019, arXiv:1910.05895
    unit        x / max(|x|, eps), in groups of the axis         Henry et al. 2020, arXiv:2010.04245
    batch       (x - mean) / sqrt(var + eps) * weight + bias     Ioffe, Szegedy 2015, arXiv:1502.03167
    affine      x * weight + bias                                Sun et al. 2020, arXiv:2004.02984
    gain        x * weight
    none        x
    inherit     the model's norm

RMS statistics and lengths are float32 whatever the input; the gain multiplies after the cast back, as
T5 and Llama do. `offset` adds a constant to the stored gain (Gemma stores w and multiplies by 1 + w).
"""

from __future__ import annotations

from typing import Annotated

import torch
from torch import Tensor, nn

from xtcli import registry
from xtcli.parts.linear import Draw, widen
from xtcli.parts.scope import Impossible, Scope
from xtcli.registry import Config, Slot, field, part

NormSlot = Annotated[Config, Slot("norm")]


@part("norm", "layer")
class LayerNorm(nn.LayerNorm):
    """Mean and variance over the last axis, then gain and bias."""

    class Config(registry.Config):
        """Layer normalisation."""

        eps: float = field("added to the variance", 1e-5, gt=0)
        bias: bool = field("adds a learned bias", True)

    def __init__(self, config: Config, scope: Scope) -> None:
        super().__init__(scope.dim, eps=config.eps, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        # Autocast norms in float32; a stream in 16 bits stays one.
        return super().forward(x).to(x.dtype)


@part("norm", "rms")
class RMSNorm(nn.Module):
    """Root mean square over the last axis, then gain."""

    class Config(registry.Config):
        """Root-mean-square normalisation."""

        eps: float = field("added to the mean square", 1e-6, gt=0)
        offset: float = field("added to the stored gain before it multiplies", 0.0)

    def __init__(self, config: Config, scope: Scope) -> None:
        super().__init__()
        self.eps, self.offset = config.eps, config.offset
        self.weight = nn.Parameter(torch.empty(scope.dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.constant_(self.weight, 1.0 - self.offset)

    def forward(self, x: Tensor) -> Tensor:
        wide = widen(x)
        scaled = (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)).to(x.dtype)
        gain = self.weight + self.offset if self.offset else self.weight
        return (scaled * gain).to(x.dtype)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}"


@part("norm", "simple-rms")
class SimpleRMSNorm(nn.Module):
    """Root mean square over the last axis; no parameters."""

    class Config(registry.Config):
        """Root-mean-square normalisation without a gain."""

        eps: float = field("added to the mean square", 1e-6, gt=0)

    def __init__(self, config: Config, scope: Scope) -> None:
        super().__init__()
        self.eps = config.eps

    def forward(self, x: Tensor) -> Tensor:
        wide = widen(x)
        return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)).to(x.dtype)

    def extra_repr(self) -> str:
        return f"eps={self.eps}"


@part("norm", "rms-scale")
class RMSScaleNorm(SimpleRMSNorm):
    """Root mean square over the last axis, then one learned number for all channels."""

    class Config(registry.Config):
        """Root-mean-square normalisation with a single gain."""

        eps: float = field("added to the mean square", 1e-5, gt=0)

    def __init__(self, config: Config, scope: Scope) -> None:
        super().__init__(config, scope)  # type: ignore[arg-type]
        self.weight = nn.Parameter(torch.empty(1))

    def draw(self, normal: Draw) -> None:
        self.weight.fill_(1.0)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.weight


@part("norm", "gain")
class Gain(nn.Module):
    """A gain without statistics or bias."""

    class Config(registry.Config):
        """A gain, no normalisation."""

    def __init__(self, config: Config, scope: Scope) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(scope.dim))

    def draw(self, normal: Draw) -> None:
        self.weight.fill_(1.0)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight


@part("norm", "batch")
class BatchNorm(nn.BatchNorm1d):
    """Mean and variance of each channel: over all places of all rows in training, padding and future among them, else
    the running ones that training left."""

    class Config(registry.Config):
        """Batch normalisation."""

        eps: float = field("added to the variance", 1e-5, gt=0)
        affine: bool = field("learns a gain and a bias", True)

    def __init__(self, config: Config, scope: Scope) -> None:
        super().__init__(scope.dim, eps=config.eps, affine=config.affine)

    def draw(self, normal: Draw) -> None:
        """Gain 1, bias 0, nothing seen yet."""
        self.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        return super().forward(x.flatten(0, -2)).to(x.dtype).reshape(x.shape)


@part("norm", "scale")
class ScaleNorm(nn.Module):
    """Every vector gets one learned length, which starts at sqrt(dim)."""

    class Config(registry.Config):
        """A learned length."""

        eps: float = field("the least length that is divided by", 1e-5, gt=0)

    def __init__(self, config: Config, scope: Scope) -> None:
        super().__init__()
        self.eps, self.start = config.eps, scope.dim**0.5
        self.weight = nn.Parameter(torch.empty(1))

    def draw(self, normal: Draw) -> None:
        self.weight.fill_(self.start)

    def forward(self, x: Tensor) -> Tensor:
        return unit(x, self.eps) * self.weight

    def extra_repr(self) -> str:
        return f"eps={self.eps}"


@part("norm", "unit")
class UnitNorm(nn.Module):
    """Vectors of length 1. As `qk_norm`, with `scale: 10`, it makes attention compare by the cosine."""

    class Config(registry.Config):
        """Length 1."""

        groups: int = field("equal parts of the vector that each get length 1", 1, gt=0)
        eps: float = field("the least length that is divided by", 1e-12, gt=0)

    def __init__(self, config: Config, scope: Scope) -> None:
        super().__init__()
        if scope.dim % config.groups:
            raise Impossible("groups", f"{config.groups} groups do not divide a width of {scope.dim}")
        self.groups, self.eps = config.groups, config.eps

    def forward(self, x: Tensor) -> Tensor:
        return unit(x.unflatten(-1, (self.groups, -1)), self.eps).flatten(-2)

    def extra_repr(self) -> str:
        return f"groups={self.groups}, eps={self.eps}"


def unit(x: Tensor, eps: float) -> Tensor:
    """x / max(|x|, eps) over the last axis."""
    wide = widen(x)
    length: Tensor = wide.norm(dim=-1, keepdim=True)
    return (wide / length.clamp(min=eps)).to(x.dtype)


@part("norm", "affine")
class Affine(nn.Module):
    """A gain and a bias without statistics."""

    class Config(registry.Config):
        """A gain and a bias, no normalisation."""

    def __init__(self, config: Config, scope: Scope) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(scope.dim))
        self.bias = nn.Parameter(torch.empty(scope.dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Gain 1, bias 0."""
        nn.init.ones_(self.weight)
        nn.init.zeros_(self.bias)

    def draw(self, normal: Draw) -> None:
        self.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight + self.bias


@part("norm", "none")
class NoNorm(nn.Identity):
    """The input as it is."""

    class Config(registry.Config):
        """No normalisation."""

    def __init__(self, config: Config, scope: Scope) -> None:
        super().__init__()


@part("norm", "inherit")
class InheritedNorm(nn.Identity):
    """A stand-in that `make_norm` replaces by the model's norm."""

    class Config(registry.Config):
        """The norm that `model.norm` states."""

    def __init__(self, config: Config, scope: Scope) -> None:
        raise AssertionError("make_norm resolves inherited norms")


INHERIT: Config = InheritedNorm.Config()
NONE: Config = NoNorm.Config()


def make_norm(scope: Scope, name: str, config: Config, **changes: object) -> nn.Module:
    """The norm at `name`: its own kind, or the model's where it inherits."""
    return scope.make(name, scope.norm if config.kind == "inherit" else config, **changes)
