"""One thread a process, so that the suite can run in several; nothing reaches for a network or a GPU."""

from __future__ import annotations

import contextlib
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
# Kernels for GPUs run in Triton's interpreter here, which must be said before anything imports it.
os.environ.setdefault("TRITON_INTERPRET", "1")

with contextlib.suppress(ImportError):
    from interpreter import spare

    spare()
