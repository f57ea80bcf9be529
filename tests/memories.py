"""What the tests of models with memories of earlier segments share: the reference run, and outputs laid flat."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from xtcli.convert.families.transfo_xl import TRANSFO_XL

runnable = TRANSFO_XL.runnable


def flat(output: Any) -> dict[str, Tensor]:
    """Outputs by name; those of several tensors with their number."""
    found: dict[str, Tensor] = {}
    for name, value in output.items():
        if isinstance(value, Tensor):
            found[name] = value
        elif isinstance(value, list | tuple):
            found |= {f"{name}.{n}": one for n, one in enumerate(value) if isinstance(one, Tensor)}
    return found


def off(
    theirs: Any, ours: Any, given: dict[str, Any], tolerance: float, real: Tensor | None = None
) -> dict[str, float]:
    """The outputs of the reference that ours lacks or that differ, `real` (B, T) being the places that count."""
    with torch.no_grad(), runnable():
        expected = flat(theirs(**given, output_hidden_states=True))
        found = flat(ours(**given, output_hidden_states=True))
    worst = {}
    for name, value in expected.items():
        have = found.get(name)
        if have is None or have.shape != value.shape:
            worst[name] = float("inf")
            continue
        gap = (have - value).abs()
        if real is not None:
            across = real.t() if name.startswith("mems") else real
            if value.shape[: across.dim()] == across.shape:
                gap = gap * across.reshape(*across.shape, *[1] * (gap.dim() - 2))
        worst[name] = float(gap.max() / max(1.0, float(value[value > -1e29].abs().max()) / 10)) if gap.numel() else 0.0
    return {name: value for name, value in worst.items() if not value <= tolerance}
