"""Memory that a process keeps for its next large tensor, where the C library is glibc.

glibc maps each block of more than 32 MiB anew and gives it back when it is freed, so that the kernel hands out, and
clears, the same pages again at every operator: at 16,384 tokens that is a fifth of the time of a forward pass on two
cores. Blocks from a heap that is never trimmed are clean once.
"""

from __future__ import annotations

import os
import sys

TRIM_THRESHOLD, MMAP_MAX = -1, -4
"""Numbers of `mallopt`'s parameters."""
CHOICES = ("MALLOC_MMAP_MAX_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES", "LD_PRELOAD")
"""Environment variables by which a user has chosen otherwise."""


def keep_pages() -> bool:
    """Ask the C library to keep freed pages; False where it is not glibc, or the user has chosen."""
    if not sys.platform.startswith("linux") or any(name in os.environ for name in CHOICES):
        return False
    import ctypes

    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return all([mallopt(MMAP_MAX, 0) == 1, mallopt(TRIM_THRESHOLD, -1) == 1])
