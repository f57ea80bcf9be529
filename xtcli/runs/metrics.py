"""metrics.jsonl: one JSON object a line, appended as the run goes.

A line has `step`; a training line `loss`, a validation `val_loss`, anything else `event`. Floats are written
with the digits that read back to the same bits; NaN and infinities, which JSON lacks, as the strings
"nan", "inf" and "-inf".

A resumed run repeats the steps after its checkpoint, so `rewind` moves their lines to
metrics.abandoned.jsonl first: the log is that of a run never stopped, and nothing is thrown away.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from xtcli.errors import refuse
from xtcli.runs.folder import disk_full, is_full, write_atomically

FILE = "metrics.jsonl"
ABANDONED = "metrics.abandoned.jsonl"

_SPECIAL = ("nan", "inf", "-inf")


class Metrics:
    """The log of one run, open for appending."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / FILE
        self.file = open(self.path, "ab", buffering=0)  # noqa: SIM115

    def append(self, record: Mapping[str, Any]) -> None:
        """Write one line; it survives the process from here on, and the machine from the next `sync`."""
        try:
            self.file.write((json.dumps(_strict(dict(record)), allow_nan=False) + "\n").encode())
        except OSError as error:
            if is_full(error):
                raise disk_full(self.path) from error
            raise

    def sync(self) -> None:
        """Make every line so far durable."""
        os.fsync(self.file.fileno())

    def rewind(self, step: int) -> int:
        """Move the lines of later steps, and a last line cut by a kill, to the abandoned log; returns their number."""
        kept: list[bytes] = []
        gone: list[bytes] = []
        for line in self.path.read_bytes().splitlines(keepends=True):
            (kept if _belongs(line, step) else gone).append(line)
        if gone:
            with open(self.path.with_name(ABANDONED), "ab") as file:
                file.writelines(line if line.endswith(b"\n") else line + b"\n" for line in gone)
                file.flush()
                os.fsync(file.fileno())
            self.file.close()
            write_atomically(self.path, b"".join(kept))
            self.file = open(self.path, "ab", buffering=0)  # noqa: SIM115
        return len(gone)

    def close(self) -> None:
        """Make the log durable and close it."""
        if not self.file.closed:
            self.sync()
            self.file.close()


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's log; a last line that is still being written is left out. Raises UserError."""
    path = folder / FILE
    try:
        lines = path.read_bytes().splitlines(keepends=True)
    except OSError:
        raise refuse(f"has no {FILE}", "give the folder of a run", place=str(folder)) from None
    records = []
    for number, line in enumerate(lines, 1):
        record = _parse(line)
        if record is None and number < len(lines):
            raise refuse("not a line of metrics", "restore the file, or delete the line", place=f"{path}:{number}")
        if record is not None:
            records.append({key: _loose(value) for key, value in record.items()})
    return records


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) and line.endswith(b"\n") else None


def _belongs(line: bytes, step: int) -> bool:
    record = _parse(line)
    return record is not None and record.get("step", 0) <= step


def _strict(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {key: _strict(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(item) for item in value]
    return value


def _loose(value: Any) -> Any:
    return float(value) if isinstance(value, str) and value in _SPECIAL else value
