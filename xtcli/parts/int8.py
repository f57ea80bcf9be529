"""Weights in 8 bits: each output of a linear layer has a scale.

    w ~ q s,    s = max |w| / 127 over the inputs of an output,    q = round(w / s)

Only weights are rounded; what they multiply keeps its type. Tables of tokens stay as they are, and so does a head that
is tied to one. `weight` gives the rounded weights in the model's type, so that every part reads the same numbers.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from xtcli.parts.linear import Linear


class Int8Linear(nn.Module):
    """A linear layer of whole numbers `whole` (N, K), -127 ... 127, and a `scale` (N,), float32, for each output."""

    whole: Tensor
    scale: Tensor

    def __init__(self, layer: Linear) -> None:
        super().__init__()
        wide = layer.weight.detach().float()
        # A row of zeros has any scale.
        scale = wide.abs().amax(1).clamp(min=1e-30) / 127
        self.register_buffer("whole", torch.round(wide / scale[:, None]).to(torch.int8))
        self.register_buffer("scale", scale)
        self.bias, self.role, self.dtype = layer.bias, layer.role, layer.weight.dtype

    @property
    def weight(self) -> Tensor:
        """The rounded weights (N, K)."""
        return (self.whole.float() * self.scale[:, None]).to(self.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., K) -> (..., N)."""
        return F.linear(x, self.weight, self.bias)

    def extra_repr(self) -> str:
        return f"{self.whole.shape[1]}, {self.whole.shape[0]}, 8 bits"


def quantise(model: nn.Module) -> int:
    """Round the weights of all plain linear layers, in place; how many layers that were."""
    found = [
        (module, name, child)
        for module in model.modules()
        for name, child in module.named_children()
        if type(child) is Linear
    ]
    for module, name, child in found:
        setattr(module, name, Int8Linear(child))
    return len(found)
