"""Kernels of our own for GPUs. Each computes what a plain part computes, which remains the specification."""

from __future__ import annotations

import importlib.util
from functools import cache

import torch


def runs_on(device: torch.device) -> bool:
    """Whether these kernels run on `device`: a CUDA GPU, with Triton installed."""
    return device.type == "cuda" and _installed()


@cache
def _installed() -> bool:
    return importlib.util.find_spec("triton") is not None
