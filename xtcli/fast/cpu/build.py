"""The library of C kernels: compiled at first use by the system's C compiler, for this very CPU.

It lies under $XT_CACHE, else ~/.cache/xt: kernels/<key>.so, where the key is made from the sources, the flags, the
compiler and the CPU. A file is whole or absent, and of several processes one compiles. Nothing here ever fails a run.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

from xtcli.runs.folder import cache_folder

COMPILERS = ("cc", "gcc", "clang")
FLAGS = ("-std=gnu11", "-O3", "-march=native", "-ffp-contract=fast", "-fno-math-errno", "-shared", "-fPIC")
SECONDS = 120
"""After which a compiler is not waited for any more."""
HERE = Path(__file__).parent
HEADERS = ("lanes.h", "acts.h", "team.h")
SOURCES = ("kernels.c", "attention.c", "slopes.c", "pointwise.c", "crossentropy.c", "decode.c", *HEADERS)
THREADS = ("GOMP_parallel", "omp_get_thread_num", "omp_get_num_threads")
"""Entry points of the OpenMP runtime that PyTorch has loaded, whose threads the kernels run on."""


@cache
def library() -> Any | None:
    """The kernels; None where they cannot be had, which is said to the user if a remedy is known."""
    if not sys.platform.startswith("linux"):
        return None
    loaded = ctypes.CDLL(None)
    runtime = [getattr(loaded, name) for name in THREADS if hasattr(loaded, name)]
    compiler = next((path for name in COMPILERS if (path := shutil.which(name))), None)
    if len(runtime) < len(THREADS):
        _say("this build of PyTorch has no GNU OpenMP: PyTorch's operators are used, which are slower on a CPU")
        return None
    if compiler is None:
        _say("no C compiler: PyTorch's operators are used, which are slower on a CPU; install gcc")
        return None
    try:
        found = _load(compiler)
    except (OSError, subprocess.SubprocessError) as error:
        _say(f"the kernels for CPUs cannot be compiled, PyTorch's operators are used: {_reason(error)}")
        return None
    found.xt_threads(*(ctypes.cast(one, ctypes.c_void_p) for one in runtime))
    return found


def _load(compiler: str) -> ctypes.CDLL:
    name = f"{_key(compiler)}.so"
    folder = cache_folder() / "kernels"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / f"{name}.lock", "w")  # noqa: SIM115
    except OSError:
        # Loaded from a folder that nobody else can write to, and gone after that.
        with tempfile.TemporaryDirectory() as place:
            return _made(compiler, Path(place) / name)
    with lock:
        # One process at a time, where the file system knows locks.
        with suppress(OSError):
            import fcntl

            fcntl.flock(lock, fcntl.LOCK_EX)
        return _made(compiler, folder / name)


def _made(compiler: str, file: Path) -> ctypes.CDLL:
    """The library in a file, compiled if it is not there or no library."""
    if file.exists():
        with suppress(OSError):
            return ctypes.CDLL(str(file))
    _say("compiling kernels for this CPU (once) ...")
    handle, part = tempfile.mkstemp(dir=file.parent, suffix=".part")
    os.close(handle)
    try:
        command = [compiler, *FLAGS, str(HERE / SOURCES[0]), "-o", part, "-lm"]
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=SECONDS, stdin=subprocess.DEVNULL)
        os.replace(part, file)
    finally:
        Path(part).unlink(missing_ok=True)
    return ctypes.CDLL(str(file))


def _key(compiler: str) -> str:
    """What the compiled file depends on."""
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, timeout=SECONDS).stdout
    parts = [version, " ".join(FLAGS), platform.machine(), _cpu(), *((HERE / name).read_text() for name in SOURCES)]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:24]


def _cpu() -> str:
    """The first CPU's model and what it can do, without what changes from moment to moment."""
    lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    return "\n".join(
        line for line in lines if line.split(":")[0].strip().lower() in ("model name", "flags", "features")
    )


def _reason(error: Exception) -> str:
    said = str(getattr(error, "stderr", None) or error).strip().splitlines()
    return next((line for line in said if "error" in line), said[0] if said else type(error).__name__)


def _say(text: str) -> None:
    print(f"xt: {text}", file=sys.stderr, flush=True)
