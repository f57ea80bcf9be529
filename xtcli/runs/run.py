"""The folder of one training run.

    preset.yaml         what ran, fully resolved        metrics.jsonl    a line per logged step
    command             a line per start                samples/step-N.txt
    environment.json    versions, machine, digests      checkpoints/step-N/
    .lock               held while a process trains it

A new run never writes into an old one's folder, and only one process at a time trains a run.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import socket
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from torch import nn

from xtcli.errors import UserError, refuse
from xtcli.runs import lock, retention
from xtcli.runs.checkpoint import (
    CHECKPOINTS,
    PRESET,
    Savable,
    checkpoints,
    newest,
    save_checkpoint,
    set_aside,
    step_of,
)
from xtcli.runs.environment import changes
from xtcli.runs.folder import clean, make_folder, sync_folder, write_atomically
from xtcli.runs.metrics import ABANDONED, Metrics
from xtcli.runs.state import TrainerState

RUNS = Path("runs")
SAMPLES = "samples"
ENVIRONMENT = "environment.json"
COMMAND = "command"
LOCK = ".lock"


@dataclass
class Run:
    """A run that this process trains: its folder is locked until `close`.

    `notes` are sentences for the user about what was found or chosen on the way.
    """

    path: Path
    preset_yaml: str
    metrics: Metrics
    claim: int | None
    notes: list[str] = field(default_factory=list)

    @classmethod
    def create(
        cls,
        name: str,
        *,
        preset_yaml: str,
        command: Sequence[str],
        environment: dict[str, Any],
        out: Path | None = None,
    ) -> Self:
        """Make the folder of a new run: `out`, refused unless empty, or runs/<name>, -2, -3 ... if that is taken."""
        path = _own(out) if out is not None else _free(RUNS / name)
        notes = []
        if out is None and path.name != name:
            notes.append(f"{RUNS / name} exists: this run is {path}")
        claim = _claim(path, notes)
        write_atomically(path / ENVIRONMENT, (json.dumps(environment, indent=1) + "\n").encode())
        write_atomically(path / COMMAND, (shlex.join(command) + "\n").encode())
        for folder in (CHECKPOINTS, SAMPLES):
            make_folder(path / folder)
        # The preset makes a folder a run, so it comes last.
        write_atomically(path / PRESET, preset_yaml.encode())
        return cls(path, preset_yaml, Metrics(path), claim, notes)

    @classmethod
    def open(cls, path: Path) -> Self:
        """Lock an existing run to go on with it; what a killed process left half-written is deleted."""
        if not path.exists():
            raise refuse("no such run", "a run is a folder that xt train made", place=str(path))
        if not is_run(path):
            step = step_of(path)
            remedy = f"resume with xt train {path.parent.parent}" if step is not None else "give a folder xt train made"
            raise refuse("is not a run", remedy, place=str(path))
        try:
            text = (path / PRESET).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise refuse(f"its {PRESET} cannot be read ({error})", place=str(path)) from None
        notes: list[str] = []
        claim = _claim(path, notes)
        gone = [name for folder in (path, path / CHECKPOINTS, path / SAMPLES) for name in clean(folder)]
        if gone:
            notes.append(f"deleted what a killed process left half-written: {', '.join(gone)}")
        return cls(path, text, Metrics(path), claim, notes)

    def newest(self) -> Path:
        """The newest whole checkpoint; each damaged one passed over is a warning and a line of metrics."""
        return newest(self.path, trainer=True, warn=self._passed_over)

    def rewind(self, step: int) -> None:
        """Take the run back to `step`, to go on from there: later lines and checkpoints are set aside, not deleted."""
        aside = [set_aside(folder).name for later, folder in checkpoints(self.path).items() if later > step]
        lines = self.metrics.rewind(step)
        if aside:
            self.notes.append(f"checkpoints after step {step} are now {', '.join(aside)}")
        if lines:
            self.notes.append(f"lines of metrics after step {step} ({lines}) are now in {ABANDONED}")

    def resumed(self, step: int, command: Sequence[str], environment: dict[str, Any]) -> list[str]:
        """Record a resume at `step`; returns what differs from the machine and data that the run started with."""
        with (self.path / COMMAND).open("a", encoding="utf-8") as file:
            file.write(shlex.join(command) + "\n")
        try:
            differences = changes(json.loads((self.path / ENVIRONMENT).read_bytes()), environment)
        except (OSError, ValueError):
            differences = [f"{ENVIRONMENT} is lost: whether the machine is the same cannot be told"]
        self.event("resume", step=step, changed=differences)
        return differences

    def change_preset(self, step: int, preset_yaml: str) -> None:
        """Go on from `step` under other settings, also at the next resume; the old ones stay beside them."""
        write_atomically(self.path / f"preset.until-step-{step}.yaml", self.preset_yaml.encode())
        write_atomically(self.path / PRESET, preset_yaml.encode())
        self.preset_yaml = preset_yaml

    def save(
        self,
        step: int,
        *,
        model: nn.Module,
        tokenizer: Savable | None,
        trainer: TrainerState,
        keep: int,
        best: int | None = None,
    ) -> Path:
        """Commit the checkpoint of `step`, verify it, and only then delete what retention gives up.

        Log everything of `step` before: the lines that a checkpoint vouches for are made durable with it.
        """
        self.metrics.sync()
        path = save_checkpoint(
            self.path, step, preset_yaml=self.preset_yaml, model=model, tokenizer=tokenizer, trainer=trainer
        )
        retention.prune(self.path, path, keep, best)
        return path

    def sample(self, step: int, text: str) -> Path:
        """Write samples/step-N.txt."""
        path = self.path / SAMPLES / f"step-{step}.txt"
        write_atomically(path, text.encode(errors="replace"))
        return path

    def has_sample(self, step: int) -> bool:
        """Whether samples/step-N.txt is there."""
        return (self.path / SAMPLES / f"step-{step}.txt").exists()

    def event(self, name: str, **values: Any) -> None:
        """Write a line of metrics that is neither a training step nor a validation."""
        self.metrics.append({"event": name, **values})

    def close(self) -> None:
        """Make the log durable and give the run free."""
        self.metrics.close()
        if self.claim is not None:
            lock.release(self.claim)
            self.claim = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _passed_over(self, error: UserError) -> None:
        self.notes.append(f"falling back to an older checkpoint: {error}")
        self.event("damaged_checkpoint", cause=str(error))


def check_disk(path: Path, bytes_per_checkpoint: int, keep: int, *, best: bool) -> str:
    """Say what the checkpoints of the run at `path`, which need not exist yet, will take; refuse when it is too much.

    Besides `keep` and the best there is one more while it is written. Those already there count.
    """
    most = keep + best + 1
    needed = max(1, most - len(checkpoints(path))) * bytes_per_checkpoint
    place = path.absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    text = f"{most} checkpoints of {gib(bytes_per_checkpoint)} at most, {gib(free)} free"
    if needed > free:
        raise refuse(
            f"the disk is too small for the checkpoints of this run: {text}",
            f"free {gib(needed - free)}, lower train.keep or write elsewhere with --out",
            place=str(path),
        )
    return text


def is_run(path: Path) -> bool:
    """Whether `path` is the folder of a run."""
    return (path / PRESET).is_file() and (path / CHECKPOINTS).is_dir()


def gib(size: int) -> str:
    """Bytes in the unit that reads best."""
    amount, units = float(size), ["KiB", "MiB", "GiB", "TiB"]
    if amount < 1024:
        return f"{size} bytes"
    while amount >= 1024 and units:
        amount, unit = amount / 1024, units.pop(0)
    return f"{amount:.1f} {unit}"


def _own(out: Path) -> Path:
    if out.exists() and not out.is_dir():
        raise refuse("is a file, not a folder for a run", "choose another --out", place=str(out))
    if out.is_dir() and any(out.iterdir()):
        remedy = f"resume it with xt train {out}, or choose another --out" if is_run(out) else "choose another --out"
        raise refuse("is not empty, and a new run never writes into an old folder", remedy, place=str(out))
    _make(out)
    return out


def _free(path: Path) -> Path:
    """The first of path, path-2, path-3 ... that this process could make itself."""
    _make(path.parent)
    number = 1
    while True:
        candidate = path if number == 1 else path.with_name(f"{path.name}-{number}")
        try:
            os.mkdir(candidate)
        except FileExistsError:
            number += 1
        except OSError as error:
            raise _unwritable(candidate, error) from None
        else:
            sync_folder(path.parent)
            return candidate


def _make(path: Path) -> None:
    try:
        make_folder(path)
    except OSError as error:
        raise _unwritable(path, error) from None


def _unwritable(path: Path, error: OSError) -> UserError:
    return refuse(f"cannot make the folder ({error.strerror})", "choose another --out", place=str(path))


def _claim(path: Path, notes: list[str]) -> int | None:
    file = path / LOCK
    try:
        file.touch()
    except OSError as error:
        raise refuse(
            f"cannot be written to ({error.strerror})", "give the run back to its owner", place=str(path)
        ) from None
    try:
        claim = lock.hold(file)
    except OSError:
        notes.append("this file system has no locks: make sure that no other process trains this run")
        return None
    if claim is None:
        raise refuse(
            f"another process trains this run ({file.read_text(encoding='utf-8').strip()})",
            "wait for it, or stop it",
            place=str(path),
        )
    file.write_text(f"process {os.getpid()} on {socket.gethostname()}\n", encoding="utf-8")
    return claim
