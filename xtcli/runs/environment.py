"""environment.json: what a run's numbers depend on beside its preset."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy
import torch

PACKAGES = ("xt-transformers", "torch", "numpy", "safetensors", "tokenizers", "datasets", "triton")
DECISIVE = (
    "python",
    "packages",
    "platform",
    "cpu",
    "threads",
    "devices",
    "deterministic",
    "chosen",
    "data",
    "tokenizer",
)
"""The entries of which a change can change a loss."""


def describe(
    *, seed: int, chosen: Mapping[str, Any] | None = None, data: str | None = None, tokenizer: str | None = None
) -> dict[str, Any]:
    """Versions, machine, threads, source commit, seed and the digests of data and tokenizer, as JSON values.

    `chosen` is what the preset left to the machine: device, precision, micro-batch ...
    """
    return {
        "python": platform.python_version(),
        "packages": {name: found for name in PACKAGES if (found := _version(name))},
        "platform": platform.platform(),
        "cpu": {
            "name": _cpu_name(),
            "cores": os.cpu_count(),
            "vectors": torch.backends.cpu.get_cpu_capability(),
        },
        "threads": {"torch": torch.get_num_threads(), "torch_interop": torch.get_num_interop_threads()},
        "devices": [_device(index) for index in range(torch.cuda.device_count())],
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "mps": torch.backends.mps.is_available(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "chosen": dict(chosen or {}),
        "commit": _commit(),
        "seed": seed,
        "data": data,
        "tokenizer": tokenizer,
    }


def recorded(file: Path) -> dict[str, Any]:
    """What an environment.json says; nothing where it cannot be read."""
    try:
        found = json.loads(file.read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def changes(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """One sentence for each decisive entry that differs: with any of them a resumed run is not bit-exact."""
    return [
        f"{name} was {_short(before.get(name))} when the run started and is {_short(now.get(name))}"
        for name in DECISIVE
        if before.get(name) != now.get(name)
    ]


def _short(value: Any) -> str:
    if isinstance(value, dict):
        return " ".join(f"{key} {item}" for key, item in value.items())
    return ", ".join(map(_short, value)) or "none" if isinstance(value, list) else str(value)


def _version(name: str) -> str | None:
    if name == "torch":
        return str(torch.__version__)
    if name == "numpy":
        return str(numpy.__version__)
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _device(index: int) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(index)
    return {"name": properties.name, "bytes": properties.total_memory}


def _cpu_name() -> str:
    if sys.platform == "linux":
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _commit() -> str | None:
    """The commit of the source that runs, `-dirty` when edited; None when installed without its repository."""
    here = Path(__file__).resolve()
    # An installed package may lie inside somebody else's repository: only a tracked file tells ours.
    for command in (("ls-files", "--error-unmatch", here.name), ("describe", "--always", "--dirty", "--abbrev=40")):
        try:
            done = subprocess.run(
                ["git", "-C", str(here.parent), *command], capture_output=True, text=True, timeout=10, check=False
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        if done.returncode != 0:
            return None
    return done.stdout.strip()
