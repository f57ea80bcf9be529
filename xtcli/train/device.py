"""Where training runs and in which number format.

Peak rates are dense bf16 matrix products without sparsity, from the makers' data sheets; a device that
is not in the table has no MFU, since a guess would be worse than none.
"""

from __future__ import annotations

import contextlib
import platform
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch

from xtcli.config.train import TrainConfig
from xtcli.errors import refuse
from xtcli.objectives.words import count

PEAKS = (
    ("H100 PCIe", 756e12),
    ("H100 NVL", 835e12),
    ("H100", 989.4e12),
    ("H200", 989.4e12),
    ("H800", 989.4e12),
    ("GH200", 989.4e12),
    ("B200", 2250e12),
    ("A100", 312e12),
    ("A800", 312e12),
    ("A40", 149.7e12),
    ("A10G", 70e12),
    ("A10", 125e12),
    ("L40S", 362e12),
    ("L40", 181e12),
    ("L4", 121e12),
    ("RTX 4090", 165.2e12),
    ("RTX 3090", 71e12),
)
"""Part of the device's name -> FLOP/s; the first that fits counts."""

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "bf16-true": torch.bfloat16, "fp16": torch.float16}
STORED = {"bf16-true": torch.bfloat16}
"""Type of the weights where it is not float32."""


@dataclass(frozen=True)
class Place:
    """A device, its name, and the precision of matrix products on it."""

    device: torch.device
    name: str
    precision: str

    @property
    def dtype(self) -> torch.dtype:
        """Type of the matrix products, and of the copies of weights that they read."""
        return DTYPES[self.precision]

    @property
    def stored(self) -> torch.dtype:
        """Type of the weights, their gradients and the optimizer's running values."""
        return STORED.get(self.precision, torch.float32)

    @property
    def peak(self) -> float | None:
        """Peak FLOP/s of dense bf16 or fp16 products, or None where it is not known or not what runs."""
        if self.device.type != "cuda" or self.precision == "fp32":
            return None
        return next((rate for part, rate in PEAKS if part in self.name), None)

    def amp(self) -> AbstractContextManager[Any]:
        """The context in which forward passes run."""
        if self.precision == "fp32":
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=self.dtype)

    def scaler(self) -> torch.amp.GradScaler | None:
        """fp16 gradients need scaling to stay above zero; other formats do not."""
        return torch.amp.GradScaler(self.device.type) if self.precision == "fp16" else None

    def synchronise(self) -> None:
        """Wait for what was queued."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        elif self.device.type == "mps":
            torch.mps.synchronize()

    def memory(self) -> tuple[int, int]:
        """Peak bytes in use so far, and bytes that there are."""
        if self.device.type == "cuda":
            total = torch.cuda.get_device_properties(self.device).total_memory
            return torch.cuda.max_memory_allocated(self.device), total
        if self.device.type == "mps":
            return torch.mps.driver_allocated_memory(), torch.mps.recommended_max_memory()
        return resident_bytes(), main_memory()

    def free(self) -> int:
        """Bytes that training may take now."""
        if self.device.type == "cuda":
            return int(torch.cuda.mem_get_info(self.device)[0])
        if self.device.type == "mps":
            return int(torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory())
        return available_memory()


def choose(config: TrainConfig) -> Place:
    """The device and precision that the preset asks for, or the fastest there is."""
    present: dict[str, Callable[[], bool]] = {
        "cuda": torch.cuda.is_available,
        "mps": torch.backends.mps.is_available,
        "cpu": lambda: True,
    }
    kind: str = config.device
    if kind == "auto":
        kind = next(name for name, there in present.items() if there())
    elif not present[kind]():
        remedy = f"set train.device=auto; this PyTorch ({torch.__version__}) finds: {', '.join(_found(present))}"
        raise refuse(f"there is no {kind} device on this machine", remedy, path="train.device")
    device = torch.device("cuda", torch.cuda.current_device()) if kind == "cuda" else torch.device(kind)
    precision = config.precision
    if precision == "auto":
        precision = "bf16" if kind == "cuda" and torch.cuda.is_bf16_supported() else "fp32"
    if precision == "fp16" and kind == "cpu":
        raise refuse("fp16 training needs a GPU", "set train.precision=fp32 or bf16", path="train.precision")
    return Place(device, _name(device), precision)


def _found(present: dict[str, Callable[[], bool]]) -> list[str]:
    return [name for name, there in present.items() if there()]


def _name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "mps":
        return f"{platform.machine()} GPU (MPS)"
    return f"CPU, {count(torch.get_num_threads(), 'thread')}"


def main_memory() -> int:
    """Bytes of main memory."""
    return _meminfo("MemTotal") or 2**62


def available_memory() -> int:
    """Bytes of main memory that are free or can be freed."""
    return _meminfo("MemAvailable") or main_memory()


def resident_bytes() -> int:
    """Largest resident size of this process so far."""
    import resource
    import sys

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _meminfo(key: str) -> int | None:
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            for line in file:
                if line.startswith(key + ":"):
                    return int(line.split()[1]) * 1024
    except OSError:
        return None
    return None
