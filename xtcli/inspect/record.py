"""What a run or checkpoint folder holds beside its preset: tensors on disk, steps, losses. Nothing is verified or read
but headers and the log, so that this costs nothing whatever the size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from xtcli.inspect import curves, units
from xtcli.inspect.tensors import stored
from xtcli.runs.checkpoint import checkpoints, step_of
from xtcli.runs.folder import MANIFEST
from xtcli.runs.metrics import FILE
from xtcli.runs.run import is_run


def has_weights(path: Path) -> bool:
    """Whether `path` is a checkpoint, or a run that has one."""
    return (path / MANIFEST).is_file() or (is_run(path) and bool(checkpoints(path)))


def facts(path: Path) -> dict[str, Any]:
    """The folder in figures; empty for what is neither run nor checkpoint."""
    found: dict[str, Any] = {}
    folder: Path | None = path if (path / MANIFEST).is_file() else None
    if is_run(path):
        steps = checkpoints(path)
        found["checkpoint_steps"] = list(steps)
        folder = steps[max(steps)] if steps else None
        if (path / FILE).is_file() and (path / FILE).stat().st_size:
            found |= _losses(path)
    if folder is not None:
        held = stored(folder)
        found["stored"] = {
            "checkpoint": str(folder),
            "step": step_of(folder),
            "tensors": held.tensors,
            "ties": held.ties,
            "bytes": held.bytes,
            "dtypes": list(held.dtypes),
            "words": str(held),
        }
    return found


def _losses(path: Path) -> dict[str, Any]:
    from xtcli.errors import UserError

    try:
        run = curves.read([path])[0]
    except UserError:
        # A run that has logged nothing yet has nothing to say here.
        return {}
    best = {"step": run.best[0], "loss": run.best[1]} if run.best else None
    return {"steps": run.steps, "training_loss": run.training[-1][1] if run.training else None, "best_validation": best}


def lines(found: dict[str, Any]) -> list[str]:
    """The folder in words."""
    text = []
    if "checkpoint_steps" in found:
        steps = found["checkpoint_steps"]
        text.append(
            f"checkpoints  {'none yet' if not steps else 'of step ' + ', '.join(f'{step:,}' for step in steps)}"
        )
    if "steps" in found:
        said = f"{units.plural(found['steps'], 'step')} logged"
        if found["training_loss"] is not None:
            said += f", training loss {found['training_loss']:.4f} {curves.UNIT}"
        if found["best_validation"]:
            best = found["best_validation"]
            said += f", best validation loss {best['loss']:.4f} at step {best['step']:,}"
        text.append(f"progress     {said}")
    if "stored" in found:
        text.append(f"stored       {found['stored']['words']}")
    return text
