"""One conversion from end to end: where it may write, what it writes, and how that becomes whole at once."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from xtcli.convert.casts import Cast, parse
from xtcli.convert.exports import export_checkpoint
from xtcli.convert.families import by_name
from xtcli.convert.imports import import_checkpoint
from xtcli.convert.members import verified
from xtcli.convert.reading import CONFIG, no_family
from xtcli.convert.report import Report
from xtcli.convert.verify import Sides, compare
from xtcli.errors import meant, refuse
from xtcli.runs.folder import MANIFEST, commit_folder

PRESET = "preset.yaml"


def run(
    src: Path,
    dst: Path,
    family: str,
    to: str,
    verify: bool,
    dtype: Any,
    dry_run: bool,
    allow_pickle: bool,
    force: bool,
) -> Report:
    """See `xtcli.convert.convert`."""
    if to not in ("xt", "hf"):
        raise refuse(f"cannot convert to '{to}'", "give 'xt' or 'hf'", path="--to")
    if family not in (*by_name(), "auto"):
        raise no_family(family)
    if not src.is_dir():
        beside = src.parent.iterdir() if src.parent.is_dir() else ()
        folders = (path for path in beside if path.is_dir())
        raise refuse(f"there is no folder '{src}'", meant(src, folders, "give a folder on this machine"))
    _check_target(src, dst, force)
    ours = (src / PRESET).exists() and not (src / CONFIG).exists()
    if to == "xt" and ours:
        raise refuse("is an xt checkpoint already", "add --to hf for the way back", place=str(src))
    if to == "hf" and not ours and (src / CONFIG).exists():
        raise refuse("is a transformers checkpoint already", "leave out --to hf", place=str(src))
    cast = Cast(parse(dtype))

    def commit(report: Report, write: Callable[[Path], None], sides: Callable[[Path], Mapping[str, Sides]]) -> None:
        def whole(inside: Path) -> None:
            write(inside)
            if verify:
                report.verified = verified({name: compare(one, str(src)) for name, one in sides(inside).items()})
            report.written = True
            report.write(inside)

        if not dry_run:
            _commit(dst, whole)

    if to == "hf":
        return export_checkpoint(src, family, cast, commit, str(dst))
    scratch = dst.parent if allow_pickle else None
    if scratch is not None:
        scratch.mkdir(parents=True, exist_ok=True)
    return import_checkpoint(src, family, cast, scratch, commit, str(dst))


def _check_target(src: Path, dst: Path, force: bool) -> None:
    """Raise UserError unless `dst` may become the result."""
    if dst.resolve() == src.resolve() or dst.resolve() in src.resolve().parents:
        raise refuse("the result cannot replace its own source", "choose another folder", place=str(dst))
    if not dst.exists() and not dst.is_symlink():
        return
    if not force:
        raise refuse("exists", "choose another folder, or add --force to replace it", place=str(dst))
    replaceable = dst.is_dir() and not dst.is_symlink()
    if not replaceable or (
        any(dst.iterdir()) and not any((dst / name).exists() for name in (CONFIG, MANIFEST, PRESET))
    ):
        raise refuse("is no checkpoint, and --force replaces nothing else", "choose another folder", place=str(dst))


def _commit(dst: Path, write: Callable[[Path], None]) -> None:
    """Make `dst` from what `write` puts into a folder; what was there goes only once the new one is complete."""
    aside = dst.with_name(f"{dst.name}.old-{uuid.uuid4().hex}")

    def last(inside: Path) -> None:
        write(inside)
        if dst.exists():
            os.rename(dst, aside)

    try:
        commit_folder(dst, last)
    except BaseException:
        if aside.exists() and not dst.exists():
            os.rename(aside, dst)
        raise
    shutil.rmtree(aside, ignore_errors=True)
