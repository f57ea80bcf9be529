"""Freed memory is kept where the C library is glibc, unless the user has chosen otherwise."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from xtcli.pages import CHOICES

ASK = "from xtcli.pages import keep_pages; print(keep_pages())"
FAULTS = """
import resource
import numpy
from xtcli.pages import keep_pages
keep_pages()
def faults():
    numpy.ones(2**24)  # 128 MiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
first, second = faults(), faults()
print(faults() - second)
"""
LARGE = """
from pathlib import Path
from xtcli.pages import keep_pages
keep_pages()
areas = Path("/proc/self/smaps").read_text().split("VmFlags:")
print(sum("[heap]" in area and " hg" in flags.partition("\\n")[0] for area, flags in zip(areas, areas[1:])))
"""
glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")


def said(code: str, **more: str) -> str:
    bare = {name: value for name, value in os.environ.items() if name not in CHOICES}
    run = subprocess.run([sys.executable, "-c", code], env=bare | more, capture_output=True, text=True, check=True)
    return run.stdout.strip()


@glibc
def test_a_choice_of_the_user_stays() -> None:
    assert said(ASK) == "True"
    for name in ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_MAX_"):
        assert said(ASK, **{name: "65536"}) == "False"


@glibc
def test_a_large_block_is_given_out_again_with_its_pages() -> None:
    assert int(said(FAULTS)) < 16


def _advised() -> bool:
    """Whether the kernel knows large pages, and a process's addresses are no memory in use."""
    known = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    return known.exists() and Path("/proc/sys/vm/overcommit_memory").read_text().strip() != "2"


@glibc
@pytest.mark.skipif(not _advised(), reason="no large pages on request")
def test_the_heap_asks_for_large_pages() -> None:
    assert int(said(LARGE)) >= 1
