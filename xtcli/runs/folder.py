"""Folders and files that are either whole or absent, whatever kills the process or the machine.

    make NAME.tmp-<uuid>, write the files, fsync each, write manifest.json (size and SHA-256 of each
    file) and fsync it, fsync the folders, rename to NAME, fsync the parent

The rename is the commit, and the manifest is proof against what comes later: a flipped bit, a cut
or missing file. Every temporary name is locked by its writer, so that a later start can tell the
leavings of a killed process from the work of a live one. On Windows folders cannot be fsynced or
locked: there the promise holds against a killed process, not against power loss.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import stat
import sys
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from xtcli.errors import Problem, UserError, refuse
from xtcli.runs import lock

MANIFEST = "manifest.json"
MANIFEST_VERSION = 1
MANIFEST_LIMIT = 64 * 2**20
"""Bytes of manifest that are read; more is not one of ours."""

_STALE = re.compile(r".+\.tmp-[0-9a-f]{32}")
_BINARY: int = getattr(os, "O_BINARY", 0)
_FULL = (errno.ENOSPC, errno.EDQUOT)


class Damaged(UserError):
    """A committed folder that is not what was written; `file` is the one at fault."""

    def __init__(self, folder: Path, file: str, cause: str) -> None:
        self.folder, self.file = folder, file
        super().__init__(Problem(f"{file}: {cause}", str(folder), remedy="use another checkpoint, or copy it anew"))


@dataclass(frozen=True)
class Entry:
    """What the manifest says of one file."""

    size: int
    sha256: str


def cache_folder(chosen: str | None = None) -> Path:
    """Where caches lie: in `chosen`, else $XT_CACHE, else ~/.cache/xt."""
    return Path(chosen or os.environ.get("XT_CACHE") or "~/.cache/xt").expanduser()


def write_atomically(path: Path, data: bytes) -> None:
    """Replace `path` by `data`: afterwards, or after a crash at any moment, it is wholly old or wholly new."""
    temporary = _temporary(path)
    try:
        descriptor = os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY | _BINARY, 0o666)
        with os.fdopen(descriptor, "wb") as file, lock.abandoned(temporary):
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with suppress(OSError):
            os.unlink(temporary)
        if is_full(error):
            raise disk_full(path) from error
        raise
    sync_folder(path.parent)


def commit_folder(final: Path, write: Callable[[Path], None]) -> None:
    """Make the folder `final` from the files that `write(folder)` puts into an empty folder.

    `final` must not exist. On any failure nothing of it is left and the failure is raised; a full
    disk as a UserError. `write` may make subfolders; it must not keep files open.
    """
    make_folder(final.parent)
    temporary, claim = _claim(final)
    try:
        write(temporary)
        _seal(temporary)
        if final.exists():
            raise FileExistsError(errno.EEXIST, "a committed folder is never overwritten", str(final))
        os.rename(temporary, final)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if is_full(error):
            raise disk_full(final) from error
        raise
    finally:
        if claim is not None:
            lock.release(claim)
    sync_folder(final.parent)


def remove_folder(folder: Path) -> None:
    """Delete a committed folder; it loses its name first, so that a crash leaves no half of it under that name."""
    temporary = _temporary(folder)
    os.rename(folder, temporary)
    sync_folder(folder.parent)
    shutil.rmtree(temporary, ignore_errors=True)


def clean(parent: Path) -> list[str]:
    """Delete what killed writers left in `parent`; returns the names. The work of a live process is not touched."""
    gone = []
    for path in sorted(parent.iterdir()) if parent.is_dir() else []:
        if not _STALE.fullmatch(path.name) or path.is_symlink():
            continue
        with lock.abandoned(path) as free:
            if free:
                _delete(path)
                gone.append(path.name)
    return gone


def read_manifest(folder: Path) -> dict[str, Entry]:
    """The files of a committed folder by relative POSIX path; raises Damaged, or UserError for another version."""
    path = folder / MANIFEST
    try:
        if path.stat().st_size > MANIFEST_LIMIT:
            raise Damaged(folder, MANIFEST, f"larger than {MANIFEST_LIMIT} bytes")
        text = path.read_bytes()
        document = json.loads(text)
    except (FileNotFoundError, NotADirectoryError):
        raise Damaged(folder, MANIFEST, "missing, so the folder was never finished") from None
    except (ValueError, RecursionError) as error:
        raise Damaged(folder, MANIFEST, f"not JSON ({error})") from None
    if not text.endswith(b"\n"):
        raise Damaged(folder, MANIFEST, "cut short")
    try:
        version = document["version"]
        files = {name: Entry(**entry) for name, entry in document["files"].items()}
    except (KeyError, TypeError, AttributeError):
        raise Damaged(folder, MANIFEST, "not a manifest") from None
    if version != MANIFEST_VERSION:
        raise refuse(
            f"written as version {version!r}; this xt reads version {MANIFEST_VERSION}",
            "use the xt that wrote it",
            place=str(folder),
        )
    for name, entry in files.items():
        if not _inside(name) or type(entry.size) is not int or not isinstance(entry.sha256, str):
            raise Damaged(folder, MANIFEST, f"has a bad entry {name!r}")
    return files


def verify(folder: Path, *, trust: str | None = None) -> None:
    """Raise Damaged unless each file that the manifest of `folder` names is there, whole and unchanged.

    Files that it does not name (a `keep` mark, notes) are no damage, since no reader opens them.
    Of files whose name starts with `trust` only presence and size are compared ("" is all of them).
    """
    for name, entry in read_manifest(folder).items():
        check(folder, name, entry, digest=trust is None or not name.startswith(trust))


def check(folder: Path, name: str, entry: Entry, *, digest: bool = True) -> None:
    """Raise Damaged unless one file of `folder` is as its manifest entry says."""
    try:
        status = os.stat(folder / name)
    except OSError:
        raise Damaged(folder, name, "missing") from None
    if not stat.S_ISREG(status.st_mode):
        raise Damaged(folder, name, "not a file")
    if status.st_size != entry.size:
        how = "cut short" if status.st_size < entry.size else "too long"
        raise Damaged(folder, name, f"{how}: {status.st_size} bytes where {entry.size} were written")
    if digest:
        try:
            with open(folder / name, "rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise Damaged(folder, name, f"cannot be read ({error.strerror})") from None
        if found != entry.sha256:
            raise Damaged(folder, name, "its content has changed (SHA-256 differs)")


def make_folder(path: Path) -> None:
    """Make a folder and its parents, each durable before the next."""
    if path.is_dir():
        return
    make_folder(path.parent)
    with suppress(FileExistsError):
        os.mkdir(path)
    sync_folder(path.parent)


def sync_folder(path: Path) -> None:
    """Make the names in a folder durable; where the file system cannot sync a folder, its own order must do."""
    if sys.platform == "win32":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def _delete(path: Path) -> None:
    """Delete as much as the system allows; the rest is stale and goes at the next start."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            os.unlink(path)


def _temporary(path: Path) -> Path:
    return path.with_name(f"{path.name}.tmp-{uuid.uuid4().hex}")


def _claim(final: Path) -> tuple[Path, int | None]:
    """A new empty temporary folder for `final` and the lock on it, None where folders cannot be locked."""
    while True:
        temporary = _temporary(final)
        os.mkdir(temporary)
        try:
            claim = lock.hold(temporary)
        except FileNotFoundError:
            continue
        except OSError:
            return temporary, None
        # A cleaner may have taken the folder between its making and its lock; then it is gone, or about to be.
        if claim is not None and temporary.exists():
            return temporary, claim
        if claim is not None:
            lock.release(claim)


def _seal(folder: Path) -> None:
    """Make every file below `folder` durable, then describe them in a durable manifest."""
    entries: dict[str, dict[str, int | str]] = {}
    folders = [folder]
    for path in sorted(folder.rglob("*")):
        if path.is_dir():
            folders.append(path)
            continue
        descriptor = os.open(path, os.O_RDWR | _BINARY)
        with os.fdopen(descriptor, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            os.fsync(file.fileno())
            size = os.fstat(file.fileno()).st_size
        entries[path.relative_to(folder).as_posix()] = {"size": size, "sha256": digest}
    text = json.dumps({"version": MANIFEST_VERSION, "files": entries}, indent=1) + "\n"
    write_atomically(folder / MANIFEST, text.encode())
    for inner in reversed(folders):
        sync_folder(inner)


def _inside(name: str) -> bool:
    path = PurePosixPath(name)
    return bool(name) and not path.is_absolute() and ".." not in path.parts and "\\" not in name and ":" not in name


def is_full(error: BaseException) -> bool:
    """Whether `error` is a full disk or quota, also where a library hides the number in its message."""
    if isinstance(error, OSError):
        return error.errno in _FULL
    return any(f"(os error {number})" in str(error) for number in _FULL)


def disk_full(path: Path) -> UserError:
    """What to tell when `path` could not be written for want of space."""
    return refuse(
        f"the disk is full: {path.name} was not written, everything written before it is intact",
        "free some space and resume",
        place=str(path.parent),
    )
