"""Linear layers in groups, which read a part of the width each, and the attention and feed-forward made of them.

    y_g = W_g x_g + b_g        group g of the outputs reads group g of the inputs (a 1 x 1 grouped convolution)

Iandola et al. 2020, arXiv:2006.11316.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from xtcli.parts.attention import Attention
from xtcli.parts.ffn import MLP
from xtcli.parts.linear import Linear, Role
from xtcli.parts.scope import Impossible, Scope
from xtcli.registry import field, part


class GroupedLinear(Linear):
    """A linear layer of `groups` blocks; weight (out, in / groups)."""

    def __init__(self, inner: int, outer: int, bias: bool, groups: int, role: Role = "input") -> None:
        super().__init__(inner // groups, outer, bias, role)
        self.groups = groups

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) -> (..., out)."""
        if self.groups == 1:
            return F.linear(x, self.weight, self.bias)
        pieces = x.unflatten(-1, (self.groups, -1))  # (..., g, in / g)
        weight = self.weight.unflatten(0, (self.groups, -1))  # (g, out / g, in / g)
        y = torch.einsum("...gi,goi->...go", pieces, weight).flatten(-2)
        return y if self.bias is None else y + self.bias.to(y.dtype)


def grouped(layer: Linear, groups: int, name: str) -> GroupedLinear:
    """A layer like `layer` in so many groups; raises Impossible for a count that does not divide its widths."""
    outer, inner = layer.weight.shape
    if inner % groups or outer % groups:
        raise Impossible(name, f"{groups} groups do not divide the widths {inner} and {outer}")
    return GroupedLinear(inner, outer, layer.bias is not None, groups, layer.role)


@part("mixer", "grouped-attention")
class GroupedAttention(Attention):
    """Self-attention whose projections are split into groups."""

    honours = ("score", "memory")  # the output projection is grouped itself

    class Config(Attention.Config):
        """Self-attention with grouped projections."""

        q_groups: int = field("groups of the query projection", 4, gt=0)
        k_groups: int = field("groups of the key projection", 4, gt=0)
        v_groups: int = field("groups of the value projection", 4, gt=0)
        out_groups: int = field("groups of the output projection", 1, gt=0)

    def __init__(self, config: Config, scope: Scope) -> None:
        super().__init__(config, scope)
        self.q = grouped(self.q, config.q_groups, "q_groups")
        self.k = grouped(self.k, config.k_groups, "k_groups")
        self.v = grouped(self.v, config.v_groups, "v_groups")
        out: Any = self.o
        self.o = grouped(out, config.out_groups, "out_groups")


@part("ffn", "grouped-mlp")
class GroupedMLP(MLP):
    """Two grouped linear layers and an activation between."""

    class Config(MLP.Config):
        """A feed-forward with grouped linear layers."""

        up_groups: int = field("groups of the first layer", 4, gt=0)
        down_groups: int = field("groups of the second layer", 4, gt=0)

    def __init__(self, config: Config, scope: Scope) -> None:
        super().__init__(config, scope)
        self.up = grouped(self.up, config.up_groups, "up_groups")
        self.down = grouped(self.down, config.down_groups, "down_groups")
