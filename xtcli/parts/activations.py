"""Pointwise activations by the field's names.

`gelu` is exact (erf), `gelu_tanh` the tanh form, `gelu_fast` the tanh form with its constants
rounded as older checkpoints have it, `gelu_10` gelu up to 10, `quick_gelu` x sigmoid(1.702 x), `relu2` relu squared.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from xtcli.fast.cpu import pointwise

Activation = Literal[
    "gelu",
    "gelu_tanh",
    "gelu_fast",
    "gelu_10",
    "quick_gelu",
    "relu",
    "relu2",
    "relu6",
    "silu",
    "tanh",
    "sigmoid",
    "mish",
    "leaky_relu",
    "elu",
    "laplace",
    "identity",
]


def _gelu(x: Tensor) -> Tensor:
    return pointwise.gelu(x, "gelu") if pointwise.takes(x) else F.gelu(x)


def _gelu_tanh(x: Tensor) -> Tensor:
    return pointwise.gelu(x, "gelu_tanh") if pointwise.takes(x) else F.gelu(x, approximate="tanh")


def _gelu_fast(x: Tensor) -> Tensor:
    return 0.5 * x * (1.0 + torch.tanh(x * 0.7978845608 * (1.0 + 0.044715 * x * x)))


def _gelu_10(x: Tensor) -> Tensor:
    return F.gelu(x).clamp(-10.0, 10.0)


def _quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


def _relu2(x: Tensor) -> Tensor:
    return F.relu(x).square()


def _laplace(x: Tensor) -> Tensor:
    return 0.5 * (1.0 + torch.erf((x - 0.707107) / (0.282095 * 2**0.5)))


def _identity(x: Tensor) -> Tensor:
    return x


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": _gelu,
    "gelu_tanh": _gelu_tanh,
    "gelu_fast": _gelu_fast,
    "gelu_10": _gelu_10,
    "quick_gelu": _quick_gelu,
    "relu": F.relu,
    "relu2": _relu2,
    "relu6": F.relu6,
    "silu": F.silu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "mish": F.mish,
    "leaky_relu": F.leaky_relu,
    "elu": F.elu,
    "laplace": _laplace,
    "identity": _identity,
}
