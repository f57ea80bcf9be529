"""Result files: what was measured, on what, with which configuration, every raw time; whole or not there.

A file can be run again (`--rerun`). Two results are compared only where device, number format and tokens per step
are the same: anything else would compare machines or settings and call it a change.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from xtcli.errors import Problem, UserError, refuse
from xtcli.runs.environment import describe
from xtcli.runs.folder import disk_full, is_full, write_atomically

VERSION = 2
SAME = ("device", "dtype", "tokens_per_step")
"""What two results must share to be compared."""


def result(kind: str, config: Mapping[str, Any], same: Mapping[str, Any], body: Mapping[str, Any]) -> dict[str, Any]:
    """A result as plain data. `same` has the entries of SAME that the kind of measurement knows."""
    environment = describe(seed=int(config.get("seed", 0)))
    return {
        "xt_bench": VERSION,
        "kind": kind,
        "config": dict(config),
        "conditions": {name: same.get(name) for name in SAME},
        "environment": environment,
        **body,
    }


def check_file(path: Path | None, suffix: str, option: str) -> None:
    """Refuse a file that cannot be written, before any work is done."""
    if path is None:
        return
    if path.suffix.lower() != suffix:
        raise refuse(f"the file '{path}' does not end in {suffix}", f"write {option} {path}{suffix}")
    if not path.parent.is_dir():
        raise refuse(f"there is no folder '{path.parent}'", "make it first", place=option)


def write(path: Path, found: Mapping[str, Any]) -> None:
    """Write a result; one that is there already is replaced, at once."""
    try:
        write_atomically(path, (json.dumps(found, indent=1) + "\n").encode())
    except OSError as error:
        if is_full(error):
            raise disk_full(path) from error
        raise refuse(f"'{path}' cannot be written: {error.strerror}") from None


def read(path: Path) -> dict[str, Any]:
    """A result file; raises UserError for anything else."""
    try:
        found = json.loads(path.read_bytes())
    except OSError as error:
        raise refuse(f"'{path}' cannot be read: {error.strerror}") from None
    except ValueError:
        found = None
    if not isinstance(found, dict) or "xt_bench" not in found:
        raise refuse(f"'{path}' is not a result of xt bench", "give a file that --out wrote")
    if found["xt_bench"] != VERSION:
        raise refuse(f"'{path}' has version {found['xt_bench']}, this xt reads {VERSION}", "measure anew")
    return found


def check_conditions(before: Mapping[str, Any], now: Mapping[str, Any], place: str) -> None:
    """Refuse to compare what was measured under other conditions."""
    problems = [
        Problem(
            f"{name.replace('_', ' ')} was {before['conditions'].get(name)} and is {now['conditions'].get(name)}",
            place,
            remedy="only results of the same device, number format and tokens per step are compared",
        )
        for name in SAME
        if before["conditions"].get(name) != now["conditions"].get(name)
    ]
    if problems:
        raise UserError(*problems)


def medians(found: Mapping[str, Any]) -> dict[str, float]:
    """Name of each timed thing -> median ms."""
    times: dict[str, float] = {}
    for row in found["rows"]:
        for part, value in row.items():
            if isinstance(value, Mapping) and "median_ms" in value:
                times[f"{row['name']} {part}"] = value["median_ms"]
    return times


def beside(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[Sequence[str]]:
    """Both results as rows of cells: name, median then, median now, change."""
    then, new = medians(before), medians(now)
    rows: list[Sequence[str]] = []
    for name in [*then, *(name for name in new if name not in then)]:
        a, b = then.get(name), new.get(name)
        change = "-" if a is None or b is None else f"{(b / a - 1) * 100:+.1f} %"
        rows.append((name, *("-" if value is None else f"{value:.4g} ms" for value in (a, b)), change))
    return rows
