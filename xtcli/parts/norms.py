"""Norms: x -> x of the same width.

    layer   (x - mean) / sqrt(var + eps) * weight + bias      Ba et al. 2016, arXiv:1607.06450
    rms     x / sqrt(mean(x^2) + eps) * weight                Zhang, Sennrich 2019, arXiv:1910.07467
    none    x
    inherit the model's norm

RMS statistics are float32 whatever the input; the gain multiplies after the cast back, as T5 and
Llama do. `offset` adds a constant to the stored gain (Gemma stores w and multiplies by 1 + w).
"""

from __future__ import annotations

from typing import Annotated

import torch
from torch import Tensor, nn

from xtcli import registry
from xtcli.parts.linear import widen
from xtcli.parts.scope import Scope
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
        return scaled * (self.weight + self.offset) if self.offset else scaled * self.weight

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}"


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
