"""Feed-forwards side by side, of which each token passes through a few.

    mlp    down_e(act(up_e(x)))              glu    down_e(act(gate_e(x)) * up_e(x))

Weights of all experts e are one tensor (E, out, in). Rows come sorted by expert with a count for each, so that an
expert multiplies its own rows and no others (Gale et al. 2022, arXiv:2211.15841). The product is one operator, which
compiled code does not look into; behind the last counted row it gives zeros. (`torch.library.custom_op` would say the
same in fewer lines, and load the compiler at the first call.)

One product after the other needs the counts on the host, which makes a GPU wait. Where PyTorch has a kernel for all of
them at once, in bfloat16 on GPUs of compute capability 9.0, the counts stay where they are; so they do for a few rows,
which have a kernel of ours (fast/fewrows.py).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import register_flop_formula

from xtcli import fast, registry
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
    y: Tensor = torch.ops.xtcli.grouped_linear(x, weight, counts)
    return y if x.device.type == "cpu" else blanked(y, counts)


def blanked(y: Tensor, counts: Tensor) -> Tensor:
    """Rows y (N, O) with zeros behind the last counted one, in a pass that a compiler joins to what comes next."""
    return torch.where(torch.arange(len(y), device=y.device)[:, None] < counts.sum(), y, 0.0)


def grouped_outer(y: Tensor, x: Tensor, counts: Tensor) -> Tensor:
    """Rows y (N, O) and x (N, I) -> (E, O, I), the sum of outer products over the rows of each."""
    return torch.ops.xtcli.grouped_outer(y, x, counts)  # type: ignore[no-any-return]


def linear_by_one(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """`grouped_linear`, one expert after the other; reads the counts on the host."""
    out = x.new_zeros(x.shape[0], weight.shape[1])
    start = 0
    for matrix, end in zip(weight, counts.cumsum(0).tolist(), strict=True):
        if end > start:
            torch.mm(x[start:end], matrix.t(), out=out[start:end])
        start = end
    return out


def outer_by_one(y: Tensor, x: Tensor, counts: Tensor) -> Tensor:
    """`grouped_outer`, one expert after the other; reads the counts on the host."""
    out = x.new_zeros(counts.shape[0], y.shape[1], x.shape[1])
    start = 0
    for matrix, end in zip(out, counts.cumsum(0).tolist(), strict=True):
        if end > start:
            torch.mm(y[start:end].t(), x[start:end], out=matrix)
        start = end
    return out


def linear_at_once(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """`grouped_linear` by one kernel; what is behind the last counted row may be anything."""
    return F.grouped_mm(x, weight.transpose(1, 2), offs=_ends(counts))


def outer_at_once(y: Tensor, x: Tensor, counts: Tensor) -> Tensor:
    """`grouped_outer` by one kernel."""
    return F.grouped_mm(y.t(), x, offs=_ends(counts))


def _ends(counts: Tensor) -> Tensor:
    return counts.cumsum(0, dtype=torch.int32)


def fits_at_once(*operands: Tensor) -> bool:
    """Whether one kernel multiplies these: bfloat16, compute capability 9.0, rows that begin at 16 bytes."""
    device = operands[0].device
    if device.type != "cuda" or torch.cuda.get_device_capability(device) != (9, 0):
        return False
    return all(x.dtype == torch.bfloat16 and _aligned(x) for x in operands)


def _aligned(x: Tensor) -> bool:
    step = 16 // x.itemsize
    strides = [stride for stride, size in zip(x.stride(), x.shape, strict=True) if stride != 1 and size > 1]
    return x.data_ptr() % 16 == 0 and all(stride % step == 0 for stride in strides)


@torch.library.impl("xtcli::grouped_linear", DEVICES)
def _linear(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    if fits_at_once(x, weight):
        return linear_at_once(x, weight, counts)
    if fast.runs_on(x.device):
        from xtcli.fast import fewrows

        if fewrows.suits(x, weight):
            return fewrows.few_rows(x, weight, counts)
    return linear_by_one(x, weight, counts)


@torch.library.impl("xtcli::grouped_outer", DEVICES)
def _outer(y: Tensor, x: Tensor, counts: Tensor) -> Tensor:
    return (outer_at_once if fits_at_once(y, x) else outer_by_one)(y, x, counts)


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
        # As a product, since the gradient of an index would add rows one by one.
        chosen = F.one_hot(owner, len(counts)).to(y.dtype)
        return y + chosen @ self.bias.to(y.dtype)

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
