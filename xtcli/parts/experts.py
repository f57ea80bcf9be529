"""Feed-forwards side by side, of which each token passes through a few.

    mlp    down_e(act(up_e(x)))              glu    down_e(act(gate_e(x)) * up_e(x))

Weights of all experts e are one tensor (E, out, in). Rows come sorted by expert with a count for each, so that an
expert multiplies its own rows and no others (Gale et al. 2022, arXiv:2211.15841). The product is one operator, which
compiled code does not look into; behind the last counted row it gives zeros. (`torch.library.custom_op` would say the
same in fewer lines, and load the compiler at the first call.)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import register_flop_formula

from xtcli import registry
from xtcli.parts.activations import ACTIVATIONS, Activation
from xtcli.parts.linear import Role
from xtcli.parts.scope import Scope
from xtcli.registry import field, part

_LIBRARY = torch.library.Library("xtcli", "DEF")
_LIBRARY.define("grouped_linear(Tensor x, Tensor weight, Tensor counts) -> Tensor")
_LIBRARY.define("grouped_outer(Tensor y, Tensor x, Tensor counts) -> Tensor")
DEVICES = ("cpu", "cuda")


def grouped_linear(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """Rows x (N, I), weights (E, O, I), counts (E,) of the rows of each -> (N, O), zeros behind the last one."""
    return torch.ops.xtcli.grouped_linear(x, weight, counts)  # type: ignore[no-any-return]


def grouped_outer(y: Tensor, x: Tensor, counts: Tensor) -> Tensor:
    """Rows y (N, O) and x (N, I) -> (E, O, I), the sum of outer products over the rows of each."""
    return torch.ops.xtcli.grouped_outer(y, x, counts)  # type: ignore[no-any-return]


@torch.library.impl("xtcli::grouped_linear", DEVICES)
def _linear(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    out = x.new_zeros(x.shape[0], weight.shape[1])
    start = 0
    for matrix, end in zip(weight, counts.cumsum(0).tolist(), strict=True):
        if end > start:
            torch.mm(x[start:end], matrix.t(), out=out[start:end])
        start = end
    return out


@torch.library.impl("xtcli::grouped_outer", DEVICES)
def _outer(y: Tensor, x: Tensor, counts: Tensor) -> Tensor:
    out = x.new_zeros(counts.shape[0], y.shape[1], x.shape[1])
    start = 0
    for matrix, end in zip(out, counts.cumsum(0).tolist(), strict=True):
        if end > start:
            torch.mm(y[start:end].t(), x[start:end], out=matrix)
        start = end
    return out


@torch.library.register_fake("xtcli::grouped_linear")  # type: ignore[untyped-decorator]
def _linear_shape(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[1])


@torch.library.register_fake("xtcli::grouped_outer")  # type: ignore[untyped-decorator]
def _outer_shape(y: Tensor, x: Tensor, counts: Tensor) -> Tensor:
    return x.new_empty(counts.shape[0], y.shape[1], x.shape[1])


def _remember(ctx: Any, inputs: Any, output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
    x, weight, counts = ctx.saved_tensors
    needed = ctx.needs_input_grad
    dx = grouped_linear(dy, weight.transpose(1, 2), counts) if needed[0] else None
    return dx, grouped_outer(dy, x, counts) if needed[1] else None, None


torch.library.register_autograd("xtcli::grouped_linear", _backward, setup_context=_remember)


@register_flop_formula(torch.ops.xtcli.grouped_linear)
def _linear_flops(x: Any, weight: Any, counts: Any, out_shape: Any = None, **rest: Any) -> int:
    return int(2 * x[0] * weight[1] * weight[2])


@register_flop_formula(torch.ops.xtcli.grouped_outer)
def _outer_flops(y: Any, x: Any, counts: Any, out_shape: Any = None, **rest: Any) -> int:
    return int(2 * x[0] * x[1] * y[1])


class ExpertLinear(nn.Module):
    """A linear layer for each expert: weight (E, out, in), bias (E, out)."""

    products = ("weight",)

    def __init__(self, experts: int, inner: int, outer: int, bias: bool, role: Role = "input") -> None:
        super().__init__()
        self.in_features, self.role = inner, role
        self.weight = nn.Parameter(torch.empty(experts, outer, inner))
        self.bias = nn.Parameter(torch.empty(experts, outer)) if bias else None

    def forward(self, x: Tensor, counts: Tensor) -> Tensor:
        """Rows (N, in) sorted by expert -> (N, out)."""
        weight: Tensor = self.weight
        kind = x.device.type
        if kind in ("cpu", "cuda") and torch.is_autocast_enabled(kind):
            narrow = torch.get_autocast_dtype(kind)
            x, weight = x.to(narrow), weight.to(narrow)
        y: Tensor = grouped_linear(x, weight, counts)
        if self.bias is None:
            return y
        places = torch.arange(len(x), device=x.device)
        owner = torch.searchsorted(counts.cumsum(0), places, right=True).clamp(max=len(counts) - 1)
        return y + self.bias[owner].to(y.dtype)

    def extra_repr(self) -> str:
        return f"experts={self.weight.shape[0]}, in={self.in_features}, out={self.weight.shape[1]}"


class Experts(nn.Module):
    """What all kinds of experts share."""

    class Config(registry.Config):
        """A feed-forward for each expert."""

        hidden: int = field("inner width of an expert", gt=0, tiny=256, example=48)
        act: Activation = field("activation", "gelu")
        bias: bool = field("adds biases to all its linear layers", False)
        dropout: float = field("dropout on the inner activations", 0.0, ge=0, lt=1)

    def __init__(self, config: Config, scope: Scope, experts: int) -> None:
        super().__init__()
        self.count = experts
        self.up = ExpertLinear(experts, scope.dim, config.hidden, config.bias)
        self.down = ExpertLinear(experts, config.hidden, scope.dim, config.bias, "output")
        self.act = ACTIVATIONS[config.act]
        self.dropout = nn.Dropout(config.dropout)


@part("expert", "mlp")
class ExpertMLP(Experts):
    """Two linear layers and an activation between."""

    def forward(self, x: Tensor, counts: Tensor) -> Tensor:
        """Rows (N, D) sorted by expert, counts (E,) -> (N, D)."""
        return self.down(self.dropout(self.act(self.up(x, counts))), counts)  # type: ignore[no-any-return]


@part("expert", "glu")
class ExpertGLU(Experts):
    """Gated linear units."""

    def __init__(self, config: Experts.Config, scope: Scope, experts: int) -> None:
        super().__init__(config, scope, experts)
        self.gate = ExpertLinear(experts, scope.dim, config.hidden, config.bias)

    def forward(self, x: Tensor, counts: Tensor) -> Tensor:
        """Rows (N, D) sorted by expert, counts (E,) -> (N, D)."""
        inner = self.act(self.gate(x, counts)) * self.up(x, counts)
        return self.down(self.dropout(inner), counts)  # type: ignore[no-any-return]
