"""Memory that a process keeps for its next large tensor, where the C library is glibc.

glibc maps each block of more than 32 MiB anew and gives it back when it is freed, so that the kernel hands out, and
clears, the same pages again at every operator: at 16,384 tokens that is a fifth of the time of a forward pass on two
cores. Blocks from a heap that is never trimmed are clean once. Where the kernel hands out pages of 2 MiB on request,
the heap asks for them: addresses of small pages are looked up anew so often that a training step on a CPU takes a sixth
longer with them.
"""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

TRIM_THRESHOLD, MMAP_MAX = -1, -4
"""Numbers of `mallopt`'s parameters."""
HUGEPAGE, LARGE = 14, 2**21
"""`madvise`'s number for large pages, and what they begin at multiples of."""
CHOICES = ("MALLOC_MMAP_MAX_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES", "LD_PRELOAD")
"""Environment variables by which a user has chosen otherwise."""


def keep_pages() -> bool:
    """Ask the C library to keep freed pages; False where it is not glibc, or the user has chosen."""
    if not sys.platform.startswith("linux") or any(name in os.environ for name in CHOICES):
        return False
    import ctypes

    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallopt"):
        return False
    kept = all([libc.mallopt(MMAP_MAX, 0) == 1, libc.mallopt(TRIM_THRESHOLD, -1) == 1])
    if kept:
        _ask_for_large_pages(libc)
    return kept


def _ask_for_large_pages(libc: Any) -> None:
    """Let the heap's next addresses, as many as half of the memory, lie in large pages once they are written to.

    Nothing is asked where addresses alone count as memory in use.
    """
    from ctypes import c_int, c_size_t, c_void_p

    with suppress(OSError):
        if Path("/proc/sys/vm/overcommit_memory").read_text().strip() == "2":
            return
    size = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    libc.malloc.restype = c_void_p
    at = libc.malloc(c_size_t(size))
    if at:
        first = -(-at // LARGE) * LARGE
        libc.madvise(c_void_p(first), c_size_t(at + size - first), c_int(HUGEPAGE))
        libc.free(c_void_p(at))
