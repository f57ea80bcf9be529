"""Feed-forwards: each position on its own, (B, T, D) -> (B, T, D).

mlp    down(act(up(x)))                      Vaswani et al. 2017, arXiv:1706.03762
glu    down(act(gate(x)) * up(x))            Shazeer 2020, arXiv:2002.05202

With `chunk` they are computed so many positions at a time, which takes less memory and changes nothing else.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from xtcli import registry
from xtcli.fast.cpu import feedforward as oncpu
from xtcli.parts.activations import ACTIVATIONS, Activation
from xtcli.parts.context import Ctx
from xtcli.parts.dropouts import make_dropout
from xtcli.parts.linear import Linear
from xtcli.parts.scope import Impossible, Scope
from xtcli.registry import Config, field, part


class FeedForward(nn.Module):
    """What all feed-forwards share: no state between calls."""

    class Config(registry.Config):
        """A feed-forward network."""

        hidden: int = field("inner width", gt=0, tiny=256, example=96)
        act: Activation = field("activation", "gelu")
        bias: bool = field("adds biases to all its linear layers", True)
        out_bias: bool | None = field("adds a bias to the last linear layer; null = bias", None)
        dropout: float = field("dropout on the inner activations", 0.0, ge=0, lt=1)
        channels: bool = field("dropout drops whole channels of a row", False)
        chunk: int | None = field("positions computed at a time; null = all", None, gt=0)

    def __init__(self, config: Config, scope: Scope) -> None:
        super().__init__()
        if config.chunk is not None and type(self).forward is not FeedForward.forward:
            raise Impossible("chunk", f"'{config.kind}' reads all positions at once", "leave it out")
        self.chunk = config.chunk
        self.up = Linear(scope.dim, config.hidden, config.bias)
        self.down = Linear(
            config.hidden, scope.dim, config.bias if config.out_bias is None else config.out_bias, "output"
        )
        self.act = ACTIVATIONS[config.act]
        self.dropout = make_dropout(config.dropout, config.channels)

    def new_state(self, batch: int, capacity: int, device: Any, dtype: Any) -> None:
        return None

    def inner(self, x: Tensor) -> Tensor:
        """x (B, T, D) -> (B, T, D)."""
        raise AssertionError("a feed-forward must say what it computes")

    def forward(self, x: Tensor, ctx: Ctx) -> Tensor:
        if self.chunk is None or x.shape[1] <= self.chunk:
            return self.inner(x)
        if not torch.is_grad_enabled():
            return torch.cat([self.inner(piece) for piece in x.split(self.chunk, 1)], 1)
        return torch.cat([checkpoint(self.inner, piece, use_reentrant=False) for piece in x.split(self.chunk, 1)], 1)


@part("ffn", "mlp")
class MLP(FeedForward):
    """Two linear layers and an activation between."""

    def inner(self, x: Tensor) -> Tensor:
        if x.device.type == "cpu" and (kind := self._joined(x)):
            up, down = self.up, self.down
            return oncpu.inner(x, up.weight, up.bias, down.weight, down.bias, kind)
        return self.down(self.dropout(self.act(self.up(x))))  # type: ignore[no-any-return]

    def _joined(self, x: Tensor) -> str | None:
        """The GELU that a pass of our own has between both products; None where something else is asked of them."""
        kind = next((name for name in ("gelu", "gelu_tanh") if ACTIVATIONS[name] is self.act), None)
        up, down, dropped = self.up, self.down, self.training and self.dropout.p > 0
        if kind is None or dropped or not all(_bare(one) for one in (up, down)):
            return None
        return kind if oncpu.takes(x, up.weight, down.weight, up.bias) else None


def _bare(layer: nn.Module) -> bool:
    """Whether this is a linear layer, without an adapter or anyone who watches it."""
    return type(layer) is Linear and not (layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks)


@part("ffn", "glu")
class GLU(FeedForward):
    """A gated linear unit: one branch opens the other."""

    def __init__(self, config: FeedForward.Config, scope: Scope) -> None:
        super().__init__(config, scope)
        self.gate = Linear(scope.dim, config.hidden, config.bias)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Both branches of x (B, T, D): gate and up, (B, T, hidden) each."""
        return self.gate(x), self.up(x)

    def inner(self, x: Tensor) -> Tensor:
        gate, up = self.project(x)
        return self.down(self.dropout(self.act(gate) * up))  # type: ignore[no-any-return]
