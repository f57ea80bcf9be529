"""Locks on files and folders that die with their process.

A lock file whose existence means "taken" outlives a killed process and then needs a human; the
operating system's own advisory lock (flock) is dropped by the kernel however the process ends.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

UNLOCKABLE_AGE = 24 * 3600.0
"""Seconds after which something that cannot be locked (a folder on Windows or on some network disks) is abandoned."""

_held: set[int] = set()


def hold(path: Path) -> int | None:
    """A descriptor that keeps `path` (an existing file or folder) locked until it is released or its process ends.

    None when another holder has it. Raises OSError where the file system has no such locks.
    """
    if sys.platform == "win32":
        import msvcrt

        descriptor = os.open(path, os.O_RDWR)
        try:
            # Windows locks byte ranges against reading too: take one far behind the text.
            os.lseek(descriptor, 2**30, os.SEEK_SET)
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        except OSError:
            os.close(descriptor)
            return None
    else:
        import fcntl

        descriptor = os.open(path, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            return None
        except OSError:
            os.close(descriptor)
            raise
    _held.add(descriptor)
    return descriptor


def release(descriptor: int) -> None:
    """Give up what `hold` gave."""
    _held.discard(descriptor)
    os.close(descriptor)


@contextmanager
def abandoned(path: Path) -> Iterator[bool]:
    """Whether nobody alive holds `path`, which stays locked inside the `with`; by age where locks do not work."""
    descriptor = None
    try:
        if sys.platform == "win32":
            raise OSError("an open file cannot be deleted here, nor a folder locked")
        descriptor = hold(path)
        free = descriptor is not None
    except FileNotFoundError:
        free = False
    except OSError:
        free = time.time() - path.stat().st_mtime > UNLOCKABLE_AGE
    try:
        yield free
    finally:
        if descriptor is not None:
            release(descriptor)


def _forget_in_child() -> None:
    # A forked data worker shares the descriptor and would keep the lock alive after its parent was killed.
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


if sys.platform != "win32":
    os.register_at_fork(after_in_child=_forget_in_child)
