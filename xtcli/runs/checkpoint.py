"""Checkpoints: saving one, finding the newest whole one, loading it.

    checkpoints/step-N/   preset.yaml  model.safetensors  tokenizer.json  manifest.json
                          trainer/state.json  trainer/optimizer.safetensors

The folder is committed as `folder.py` says, so a name `step-N` is a whole checkpoint or one that was
damaged later. Order is that of N, never of file times. No pickle is written or read.
"""

from __future__ import annotations

import os
import re
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from rich.console import Console
from torch import Tensor, nn

from xtcli.errors import Problem, UserError, refuse
from xtcli.runs.folder import MANIFEST, commit_folder, sync_folder, verify
from xtcli.runs.state import TrainerState, load_state, save_state
from xtcli.runs.tensors import load_weights, save_weights, stored_bytes

CHECKPOINTS = "checkpoints"
PRESET = "preset.yaml"
TRAINER = "trainer"

_STEP = re.compile(r"step-(0|[1-9]\d*)")


class Savable(Protocol):
    """A tokenizer, as far as a checkpoint knows one."""

    def save(self, folder: Path) -> None: ...


@dataclass(frozen=True)
class Checkpoint:
    """A loaded checkpoint; `weights` are views of its files, `trainer` is None where training left none."""

    folder: Path
    preset_yaml: str
    weights: dict[str, Tensor]
    trainer: TrainerState | None


def save_checkpoint(
    run: Path,
    step: int,
    *,
    preset_yaml: str,
    model: nn.Module,
    tokenizer: Savable | None,
    trainer: TrainerState | None,
) -> Path:
    """Commit `checkpoints/step-<step>` of the run and return it.

    A whole checkpoint of that step is already this state and stays; a damaged one is set aside.
    """
    final = run / CHECKPOINTS / f"step-{step}"
    if final.exists():
        try:
            verify(final)
            return final
        except UserError:
            set_aside(final)
    commit_folder(
        final, lambda folder: write_checkpoint(folder, preset_yaml, model=model, tokenizer=tokenizer, trainer=trainer)
    )
    return final


def write_checkpoint(
    folder: Path,
    preset_yaml: str,
    *,
    model: nn.Module,
    tokenizer: Savable | None = None,
    trainer: TrainerState | None = None,
) -> None:
    """Put the files of a checkpoint, manifest aside, into an empty folder: the `write` of `commit_folder`."""
    (folder / PRESET).write_text(preset_yaml, encoding="utf-8")
    save_weights(model.state_dict(), folder)
    if tokenizer is not None:
        tokenizer.save(folder)
    if trainer is not None:
        (folder / TRAINER).mkdir()
        save_state(trainer, folder / TRAINER)


def load_checkpoint(folder: Path, device: torch.device | str = "cpu", *, trainer: bool = False) -> Checkpoint:
    """Load one checkpoint that has been verified; `trainer` asks for the state to resume from and refuses without."""
    state = None
    if trainer:
        if not (folder / TRAINER).is_dir():
            raise refuse("has weights but no trainer state to resume from", "start a new run", place=str(folder))
        state = load_state(folder / TRAINER)
    try:
        preset = (folder / PRESET).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        raise refuse(f"has no readable {PRESET}", "was it made by xt?", place=str(folder)) from None
    return Checkpoint(folder, preset, load_weights(folder, device), state)


def locate(path: Path, *, trainer: bool = False) -> Path:
    """The verified checkpoint that `path` means: itself, or the newest whole one of a run.

    A checkpoint named by the user is never replaced by another. Without `trainer` the optimizer's
    files are not read for their digests. Raises UserError for what is neither run nor checkpoint.
    """
    if not path.exists():
        raise refuse("no such run or checkpoint", "a run is a folder that xt train made", place=str(path))
    if (path / MANIFEST).exists() or step_of(path) is not None:
        verify(path, trust=None if trainer else f"{TRAINER}/")
        return path
    if (path / CHECKPOINTS).is_dir():
        return newest(path, trainer=trainer)
    folder = path.parent if path.is_file() else path
    hint = f"did you mean {folder}?" if (folder / MANIFEST).exists() else "give a folder that xt train or build made"
    if (folder / "config.json").exists() and not (folder / MANIFEST).exists():
        hint = f"a checkpoint of transformers is converted first: xt convert auto {folder} DST"
    raise refuse("is neither a run nor a checkpoint", hint, place=str(path))


def newest(run: Path, *, trainer: bool = False, warn: Callable[[UserError], None] | None = None) -> Path:
    """The newest whole checkpoint of a run, verified.

    Each newer one that is damaged is reported through `warn` (by default, a warning on stderr) and
    passed over. Raises UserError when the run has no checkpoint, or no whole one.
    """
    found = checkpoints(run)
    damage: list[UserError] = []
    for step in sorted(found, reverse=True):
        try:
            verify(found[step], trust=None if trainer else f"{TRAINER}/")
        except UserError as error:
            damage.append(error)
            continue
        for passed in damage:
            (warn or _print_warning)(passed)
        return found[step]
    if damage:
        raise UserError(
            Problem("no checkpoint of this run is whole", str(run), remedy="start a new run"),
            *(problem for one in damage for problem in one.problems),
        )
    raise refuse("the run has no checkpoint yet", f"start it anew: xt train {run / PRESET}", place=str(run))


def checkpoints(run: Path) -> dict[int, Path]:
    """The checkpoint folders of a run by step, whole or not."""
    folder = run / CHECKPOINTS
    found = {step_of(path): path for path in folder.iterdir()} if folder.is_dir() else {}
    return dict(sorted((step, path) for step, path in found.items() if step is not None))


def step_of(path: Path) -> int | None:
    """The step of a checkpoint's name, None for another name."""
    match = _STEP.fullmatch(path.name)
    return int(match[1]) if match else None


def set_aside(folder: Path) -> Path:
    """Rename a checkpoint so that nothing takes it for one of this run's; nothing is deleted."""
    aside = folder.with_name(f"{folder.name}.aside-{uuid.uuid4().hex[:8]}")
    os.rename(folder, aside)
    sync_folder(folder.parent)
    return aside


def checkpoint_bytes(model: nn.Module, optimizer_bytes: int) -> int:
    """Bytes of one checkpoint of this model: weights as they are stored, and the optimizer's running values."""
    return stored_bytes(model.state_dict()) + optimizer_bytes


def _print_warning(error: UserError) -> None:
    Console(stderr=True).print(f"warning: falling back to an older checkpoint: {error}", style="yellow", markup=False)
