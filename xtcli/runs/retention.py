"""Which checkpoints to delete: the rule, which knows no files, and its use on a run.

Kept are the newest `keep` whole ones, the best, and the pinned (a file named `keep` in the folder). What
is older than all of the newest `keep` whole ones goes, damaged or not. The order is that of steps, so
neither a wrong clock nor a copied folder changes it, and with nothing whole nothing is deleted.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from pathlib import Path

from xtcli.errors import UserError
from xtcli.runs.checkpoint import checkpoints
from xtcli.runs.folder import remove_folder, verify

PIN = "keep"


def to_delete(
    steps: Iterable[int], keep: int, best: int | None, pinned: Collection[int], complete: Collection[int]
) -> list[int]:
    """The steps to delete, oldest first; `keep` >= 1, `complete` are the whole ones among `steps`."""
    if keep < 1:
        raise ValueError("at least one checkpoint is kept")
    steps = set(steps)
    whole = sorted(steps.intersection(complete))
    if len(whole) <= keep:
        return []
    oldest_kept = whole[-keep]
    return sorted(step for step in steps if step < oldest_kept and step != best and step not in pinned)


def prune(run: Path, new: Path, keep: int, best: int | None) -> list[int]:
    """Delete old checkpoints of `run` once `new`, just committed, verifies; returns their steps.

    Raises Damaged, deleting nothing, if `new` does not verify. Of the others only presence and size
    are looked at, since `new` alone already guarantees that something whole remains.
    """
    verify(new)
    found = checkpoints(run)
    complete = {step for step, path in found.items() if path == new or _looks_whole(path)}
    pinned = {step for step, path in found.items() if (path / PIN).exists()}
    gone = to_delete(found, keep, best, pinned, complete)
    for step in gone:
        if found[step] != new:
            remove_folder(found[step])
    return gone


def _looks_whole(folder: Path) -> bool:
    try:
        verify(folder, trust="")
    except UserError:
        return False
    return True
