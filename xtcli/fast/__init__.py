"""Kernels of our own for GPUs. Each computes what a plain part computes, which remains the specification."""

from __future__ import annotations

import importlib.util
from functools import cache

import torch


def runs_on(device: torch.device) -> bool:
    """Whether these kernels run on `device`: a CUDA GPU, with Triton installed."""
    return device.type == "cuda" and _installed()


def processors(device: torch.device) -> int:
    """Multiprocessors of a GPU; a few where there is none."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 3


@cache
def _installed() -> bool:
    return importlib.util.find_spec("triton") is not None
