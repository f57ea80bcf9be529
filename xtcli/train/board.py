"""The lines of metrics as TensorBoard event files, for those who have it; metrics.jsonl stays the truth."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from xtcli.errors import refuse

FOLDER = "tensorboard"


def open_board(run: Path) -> Callable[[dict[str, Any]], None]:
    """A function that writes every number of a line of metrics under its name, in <run>/tensorboard."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise refuse(
            "TensorBoard is not installed", "pip install 'xt-transformers[tensorboard]'", path="train.tensorboard"
        ) from None
    writer = SummaryWriter(str(run / FOLDER))

    def write(line: dict[str, Any]) -> None:
        for name, value in _numbers(line, ""):
            writer.add_scalar(name, value, line["step"])
        writer.flush()

    return write


def _numbers(line: dict[str, Any], prefix: str) -> list[tuple[str, float]]:
    found: list[tuple[str, float]] = []
    for name, value in line.items():
        if isinstance(value, dict):
            found += _numbers(value, f"{prefix}{name}/")
        elif name != "step" and isinstance(value, int | float) and not isinstance(value, bool):
            found.append((prefix + name, float(value)))
    return found
