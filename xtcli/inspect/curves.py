"""Loss curves of runs from their logs: a table of where each stands, and one panel a curve, all on the same scale."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xtcli.errors import meant, refuse
from xtcli.inspect import units
from xtcli.runs.metrics import FILE, read_metrics
from xtcli.train.curve import curve

UNIT = "nats per target"
Points = list[tuple[int, float]]


@dataclass(frozen=True)
class RunCurves:
    """The losses of one run by step; `skipped` counts those that were not finite."""

    run: str
    training: Points
    validation: Points
    skipped: int

    @property
    def steps(self) -> int:
        """The last step that was logged."""
        return max(step for step, _ in [*self.training, *self.validation])

    @property
    def best(self) -> tuple[int, float] | None:
        """Step and value of the lowest validation loss."""
        return min(self.validation, key=lambda point: point[1], default=None)


def read(paths: Sequence[Path]) -> list[RunCurves]:
    """The curves of each run; raises UserError for what is no run, or has logged no loss yet."""
    found = []
    for path in paths:
        if not (path / FILE).is_file():
            beside = path.parent if path.parent.is_dir() else Path()
            runs = (item for item in beside.iterdir() if (item / FILE).is_file())
            remedy = meant(path, runs, "give the folder of a run, as xt train printed it")
            raise refuse(f"'{path}' is not a run: it has no {FILE}", remedy)
        records = read_metrics(path)
        training, bad_training = _points(records, "loss")
        validation, bad_validation = _points(records, "val_loss")
        if not training and not validation:
            raise refuse(f"'{path}' has logged no finite loss", "let it train some steps first")
        found.append(RunCurves(str(path), training, validation, bad_training + bad_validation))
    return found


def _points(records: Sequence[dict[str, Any]], key: str) -> tuple[Points, int]:
    values = [(int(line["step"]), float(line[key])) for line in records if key in line and "step" in line]
    finite = sorted((step, value) for step, value in values if math.isfinite(value))
    return finite, len(values) - len(finite)


HEADINGS = ("run", "steps", "training loss", "validation loss", "best validation loss", "not finite")


def lines(runs: Sequence[RunCurves], width: int, height: int, blocks: bool = True) -> list[str]:
    """A table of the runs, and where the output has braille characters a panel for each curve."""
    rows: list[tuple[str, ...]] = [HEADINGS]
    for run in runs:
        last = [f"{points[-1][1]:.4f}" if points else "-" for points in (run.training, run.validation)]
        best = f"{run.best[1]:.4f} at step {run.best[0]:,}" if run.best else "-"
        rows.append((run.run, f"{run.steps:,}", *last, best, f"{run.skipped:,}" if run.skipped else "none"))
    text = [*units.table(rows, right=(1, 2, 3, 4, 5)), f"losses in {UNIT}"]
    if not blocks:
        return text
    panels = [(f"{run.run}, {name}", points) for run in runs for name, points in _named(run) if len(points) > 1]
    every = [value for _, points in panels for _, value in points]
    room = max(4, min(10, (height - len(text)) // max(len(panels), 1) - 3))
    for title, points in panels:
        span = (min(every), max(every), max(run.steps for run in runs))
        text += ["", title, *_panel(points, min(width, 100), room, *span)]
    return text


def _named(run: RunCurves) -> tuple[tuple[str, Points], tuple[str, Points]]:
    return ("training", run.training), ("validation", run.validation)


def _panel(points: Points, width: int, height: int, low: float, high: float, last: int) -> list[str]:
    return curve(points, width, height, low=low, high=high, first=0, last=last)


def facts(runs: Sequence[RunCurves]) -> list[dict[str, Any]]:
    """The curves as plain data."""
    return [
        {
            "run": run.run,
            "unit": UNIT,
            "training": [list(point) for point in run.training],
            "validation": [list(point) for point in run.validation],
            "best_validation": list(run.best) if run.best else None,
            "not_finite": run.skipped,
        }
        for run in runs
    ]
