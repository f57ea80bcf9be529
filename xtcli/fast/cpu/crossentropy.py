"""The loss of a slab of logits and its slope by the C kernel; `slab_terms` of parts/losses.py says what it computes.

On one core, 2,048 rows of 258 logits: 0.5 ms where the operators take 1.2.

Axes: N rows, V vocabulary.
"""

from __future__ import annotations

import ctypes
from ctypes import byref, c_float, c_int64, c_void_p

import torch
from torch import Tensor

from xtcli.fast.cpu.build import library

LEAST = 2**16
"""Logits from which a call pays."""


class _Crossed(ctypes.Structure):
    """`crossed` of crossentropy.c."""

    _fields_ = [
        *((name, c_void_p) for name in ("logits", "targets", "losses", "slope")),
        *((name, c_int64) for name in ("rows", "width", "ignored")),
        ("smoothing", c_float),
        *((name, c_int64) for name in ("wrong", "next")),
    ]


def takes(logits: Tensor, targets: Tensor, cap: float | None, vocab: int) -> bool:
    """Whether the loss of logits (N, V) is for this kernel."""
    if logits.device.type != "cpu" or torch.compiler.is_compiling() or cap is not None:
        return False
    plain = type(logits) is Tensor and logits.dtype == torch.float32 and logits.is_contiguous()
    fits = plain and logits.shape[1] == vocab and targets.dtype == torch.int64 and targets.is_contiguous()
    return fits and logits.numel() >= LEAST and library() is not None


def terms(logits: Tensor, targets: Tensor, smoothing: float, ignored: int) -> tuple[Tensor, Tensor]:
    """The summed loss of logits (N, V) for targets (N,), and its slope (N, V)."""
    (rows, width), known = logits.shape, library()
    if targets.shape != (rows,):
        raise AssertionError(f"targets {tuple(targets.shape)} of {rows} rows")
    assert known is not None, "takes() has said that the kernels are there"
    losses, slope = logits.new_empty(rows), torch.empty_like(logits)
    at = [one.data_ptr() for one in (logits, targets, losses, slope)]
    known.xt_crossed.restype = c_int64
    wrong = known.xt_crossed(byref(_Crossed(*at, rows, width, ignored, smoothing)), c_int64(torch.get_num_threads()))
    if wrong:
        raise IndexError(f"{wrong} targets are outside of a vocabulary of {width}")
    return losses.sum(), slope
