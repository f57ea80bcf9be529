"""A feed-forward of two products with a GELU between them, trained in float32; parts/ffn.py says what it computes.

    y = GELU(x U^T + b) D^T + c        dh = (dy D) GELU'(x U^T + b)

The first bias is added, and its slope summed, where the GELU is; slopes are written over what they are made of. Each
pass over the inner values counts, for they fit no cache.

Axes: N tokens, K width, M inner width.
"""

from __future__ import annotations

import ctypes
from ctypes import byref, c_int64, c_void_p
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from xtcli.fast.cpu import pointwise
from xtcli.fast.cpu.build import library

LANES = 16
"""Inner widths are multiples of this."""
TOGETHER = 32
"""Tokens whose slopes are added up in one sum, as pointwise.c has it."""


class _Biased(ctypes.Structure):
    """`biased` of pointwise.c."""

    _fields_ = [
        *((name, c_void_p) for name in ("x", "bias", "slope", "out", "sums")),
        *((name, c_int64) for name in ("rows", "columns", "kind", "next")),
    ]


def takes(x: Tensor, up: Tensor, down: Tensor, bias: Tensor | None) -> bool:
    """Whether a pass over x (..., K) by weights up (M, K) and down (K, M) is for these kernels."""
    if torch.compiler.is_compiling() or not torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"):
        return False
    plain = type(x) is Tensor and bias is not None and all(one.dtype == torch.float32 for one in (x, up, down, bias))
    inner, width = up.shape
    if not plain or inner % LANES or down.shape[1] != inner or not up.is_contiguous():
        return False
    return x.numel() // max(width, 1) * inner >= pointwise.LEAST and library() is not None


def inner(x: Tensor, up: Tensor, bias: Tensor, down: Tensor, out_bias: Tensor | None, kind: str) -> Tensor:
    """x (..., K) -> (..., K); `kind` is `gelu` or `gelu_tanh`."""
    rows = x.reshape(-1, x.shape[-1])
    y: Tensor = _Inner.apply(rows, up, bias, down, out_bias, pointwise.KINDS.index(kind))  # type: ignore[no-untyped-call]
    return y.view(*x.shape[:-1], -1)


class _Inner(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, up: Tensor, bias: Tensor, down: Tensor, out_bias: Tensor | None, kind: int
    ) -> Tensor:
        made = x @ up.t()
        bent = torch.empty_like(made)
        _run(made, bias, None, bent, None, kind)
        ctx.save_for_backward(x, up, bias, down, made, bent)
        ctx.kind, ctx.biased = kind, out_bias is not None
        return bent @ down.t() if out_bias is None else torch.addmm(out_bias, bent, down.t())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor) -> Any:
        x, up, bias, down, made, bent = ctx.saved_tensors
        needs = ctx.needs_input_grad
        of_down = slope.t() @ bent if needs[3] else None
        of_out_bias = slope.sum(0) if ctx.biased and needs[4] else None
        inner = slope @ down
        sums = inner.new_empty(-(-inner.shape[0] // TOGETHER), inner.shape[1])
        _run(made, bias, inner, inner, sums, ctx.kind)
        of_x = inner @ up if needs[0] else None
        of_up = inner.t() @ x if needs[1] else None
        return of_x, of_up, sums.sum(0) if needs[2] else None, of_down, of_out_bias, None


def _run(x: Tensor, bias: Tensor, slope: Tensor | None, out: Tensor, sums: Tensor | None, kind: int) -> None:
    """GELU of x (N, M) + bias (M,) into `out`; with a slope (N, M), that times the derivative, and its sums."""
    rows, columns = x.shape
    whole = [one for one in (x, slope, out) if one is not None]
    fits = all(one.shape == x.shape and one.is_contiguous() and one.dtype == torch.float32 for one in whole)
    if (
        not fits
        or columns % LANES
        or bias.shape != (columns,)
        or not bias.is_contiguous()
        or (slope is None) != (sums is None)
    ):
        raise AssertionError(f"GELU of {tuple(x.shape)}, strides {x.stride()}, bias {tuple(bias.shape)}")
    at = [None if one is None else one.data_ptr() for one in (x, bias, slope, out, sums)]
    known = library()
    assert known is not None, "takes() has said that the kernels are there"
    known.xt_biased(byref(_Biased(*at, rows, columns, kind)), c_int64(torch.get_num_threads()))
