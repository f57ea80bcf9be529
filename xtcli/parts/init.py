"""Initialisation: how fresh weights are drawn.

    normal   N(0, std) for matrices and tables; with `residual` the matrices that write to the residual
             stream get std / sqrt(number of sublayers) (GPT-2)
    fan_in   N(0, 1 / fan in) for matrices, N(0, 1) for tables; query matrices also divide by sqrt(head
             width), which stands in for the scaling of the scores (T5, Mesh TensorFlow)

Biases are 0 and gains 1. A part with parameters of its own kind draws them in `draw(normal)`, where
`normal(weight, std)` fills one from the model's seed.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from xtcli import registry
from xtcli.parts.attention import Heads
from xtcli.parts.experts import ExpertLinear
from xtcli.parts.linear import Linear
from xtcli.parts.norms import LayerNorm, RMSNorm
from xtcli.registry import Config, field, part


class Initialiser:
    """Draws the weights of a whole model, module by module, from one generator."""

    def __init__(self, config: Config, sublayers: int) -> None:
        raise AssertionError("an init kind must draw weights")

    def matrix(self, module: Linear | ExpertLinear, head_dim: int | None) -> float:
        """Standard deviation of a linear layer's weight."""
        raise AssertionError

    def table(self, module: nn.Embedding, width: int) -> float:
        """Standard deviation of a table; `width` is the model's."""
        raise AssertionError

    def draw(self, model: nn.Module, width: int, seed: int) -> None:
        """Fill every parameter of `model` in place."""
        owners = {id(child.q): child for child in model.modules() if isinstance(child, Heads)}
        generators: dict[torch.device, torch.Generator] = {}

        def normal(weight: Tensor, std: float) -> None:
            if weight.device not in generators:
                generators[weight.device] = torch.Generator(weight.device).manual_seed(seed)
            weight.normal_(0.0, std, generator=generators[weight.device])

        with torch.no_grad():
            for module in model.modules():
                if isinstance(module, Linear | ExpertLinear):
                    owner = owners.get(id(module))
                    normal(module.weight, self.matrix(module, owner.head_dim if owner else None))
                    if module.bias is not None:
                        module.bias.zero_()
                elif isinstance(module, nn.Embedding):
                    normal(module.weight, self.table(module, width))
                elif isinstance(module, LayerNorm | RMSNorm):
                    module.reset_parameters()
                elif callable(own := getattr(module, "draw", None)):
                    own(normal)
                else:
                    for name, parameter in module.named_parameters(recurse=False):
                        if name != "bias":
                            raise AssertionError(f"{type(module).__name__}.{name} has no initialisation")
                        parameter.zero_()
                    for name, buffer in module.named_buffers(recurse=False):
                        if name == "bias":
                            buffer.zero_()


@part("init", "normal")
class NormalInit(Initialiser):
    """One standard deviation for all."""

    class Config(registry.Config):
        """Normal weights of one standard deviation."""

        std: float = field("standard deviation", 0.02, gt=0)
        residual: bool = field("divides by sqrt(sublayers) what writes to the residual stream", False)

    def __init__(self, config: Config, sublayers: int) -> None:
        self.std = config.std
        self.output_std = config.std / math.sqrt(max(sublayers, 1)) if config.residual else config.std

    def matrix(self, module: Linear | ExpertLinear, head_dim: int | None) -> float:
        return self.output_std if module.role == "output" else self.std

    def table(self, module: nn.Embedding, width: int) -> float:
        return self.std


@part("init", "fan_in")
class FanInInit(Initialiser):
    """Variance 1 / fan in."""

    class Config(registry.Config):
        """Normal weights scaled by their fan-in."""

        factor: float = field("multiplies every standard deviation", 1.0, gt=0)

    def __init__(self, config: Config, sublayers: int) -> None:
        self.factor = config.factor

    def matrix(self, module: Linear | ExpertLinear, head_dim: int | None) -> float:
        if module.role == "head":
            return self.factor
        return float(self.factor * (module.in_features * (head_dim or 1)) ** -0.5)

    def table(self, module: nn.Embedding, width: int) -> float:
        return self.factor if module.embedding_dim == width else self.factor * width**-0.5
