"""What lines of metrics say, and what a resumed run reads from them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any


@dataclass
class Done:
    """What has already happened at the current step, so that a resumed run does not repeat it."""

    validated: int = -1
    sampled: int = -1
    saved: int = -1
    val_loss: float | None = None


def other_unit(heads: Any, names: Iterable[str]) -> dict[str, str]:
    """What the losses of these heads are counted in, for a line of metrics; nothing where it is nats."""
    found = sorted({heads[name].unit for name in names if name in heads} - {"nats"})
    return {"unit": " and ".join(found)} if found else {}


def logged(lines: Iterator[dict[str, Any]] | list[dict[str, Any]], step: int) -> Done:
    """What the log says has been done at `step`."""
    done = Done()
    for line in lines:
        if "val_loss" in line and line["step"] == step:
            done.validated, done.val_loss = step, line["val_loss"]
    return done
