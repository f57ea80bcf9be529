"""Changing the type of weights, which happens only when asked for, and what it costs."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from xtcli.convert.checks import label
from xtcli.errors import did_you_mean, refuse

TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
SHORT = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16", "fp64": "float64"}


def parse(name: str | torch.dtype | None) -> torch.dtype | None:
    """The type that a name means; None stays None."""
    if name is None or isinstance(name, torch.dtype):
        return name
    full = SHORT.get(name, name)
    if full not in TYPES:
        raise refuse(f"there is no type '{name}'", did_you_mean(name, [*TYPES, *SHORT]), path="--dtype")
    return TYPES[full]


@dataclass
class Cast:
    """To one floating type, or none; remembers what it changed and the worst error that it made."""

    dtype: torch.dtype | None
    changed: dict[str, int] = field(default_factory=dict)
    rounding: dict[str, Any] | None = None

    def type(self, before: torch.dtype) -> torch.dtype:
        """The type that a tensor of type `before` will have."""
        return self.dtype if self.dtype is not None and before.is_floating_point else before

    def count(self, before: torch.dtype) -> None:
        """Remember that one tensor of this type goes through."""
        after = self.type(before)
        if after != before:
            change = f"{label(before)} -> {label(after)}"
            self.changed[change] = self.changed.get(change, 0) + 1

    def __call__(self, name: str, tensor: Tensor) -> Tensor:
        """The tensor in its new type; raises UserError where a value has no place there."""
        after = self.type(tensor.dtype)
        if after == tensor.dtype:
            return tensor
        cast = tensor.to(after)
        if bool((cast.isinf() & ~tensor.isinf()).any()):
            raise refuse(
                f"'{name}' holds values beyond the range of {label(after)}", "choose a wider type", path="--dtype"
            )
        finite = tensor.isfinite()
        error = float((tensor - cast).to(torch.float32)[finite].abs().max()) if bool(finite.any()) else 0.0
        if self.rounding is None or error > self.rounding["error"]:
            self.rounding = {"error": error, "tensor": name}
        return cast
