"""Attention in float32 and its slopes by the C kernels; PyTorch's `scaled_dot_product_attention` says what it computes.

On one core, forward and backward: 8 x 4 heads of 32, 256 tokens, 6.3 ms where PyTorch's kernels take 12.2.

Axes: B batch, H query heads, G key/value heads, T queries, S keys, D width of a head.
"""

from __future__ import annotations

import ctypes
from ctypes import byref, c_float, c_int64, c_void_p
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from xtcli.fast.cpu.build import library
from xtcli.fast.cpu.parted import abreast
from xtcli.parts.context import Visible

LANES, WIDEST = 16, 256
"""Widths of a head are multiples of the one, up to the other."""
LONGEST = 1024
"""Keys beyond which whole rows of scores leave the cache, and PyTorch's blocks are as fast."""
FEWEST = 16
"""Queries below which there is nothing to share."""
LEAST = 2**22
"""Multiplications of queries and keys from which a call pays, and a first one the time to compile."""


class _Rows(ctypes.Structure):
    _fields_ = [("at", c_void_p), ("batch", c_int64), ("head", c_int64), ("token", c_int64)]


class _Attention(ctypes.Structure):
    """`attention` of attention.c."""

    _fields_ = [
        *((name, c_int64) for name in ("batch", "heads", "groups", "queries", "keys", "width", "causal", "masked")),
        ("mask", c_void_p),
        ("mask_strides", c_int64 * 4),
        ("scale", c_float),
        *((name, _Rows) for name in ("q", "k", "v", "out")),
        ("norms", c_void_p),
        *((name, _Rows) for name in ("slope", "dq", "dk", "dv")),
        ("room", c_void_p),
        *((name, c_int64) for name in ("share", "bands", "next")),
    ]


def takes(q: Tensor, k: Tensor, v: Tensor, visible: Visible, dropout: float) -> bool:
    """Whether attention of q (B, H, T, D) over k, v (B, G, S, D) is for these kernels."""
    if torch.compiler.is_compiling() or dropout or not all(_fits(one) for one in (q, k, v)):
        return False
    if visible.mask is not None and (visible.mask.requires_grad or visible.mask.dtype not in (torch.bool, q.dtype)):
        return False
    (batch, heads, queries, width), keys = q.shape, k.shape[2]
    if (
        width % LANES
        or width > WIDEST
        or keys > LONGEST
        or queries < FEWEST
        or v.shape != k.shape
        or (visible.causal and queries != keys)
    ):
        return False
    return batch * heads * queries * keys * width >= LEAST and library() is not None


def _fits(x: Tensor) -> bool:
    """Whether this is memory of float32 whose last axis lies together, and no stand-in for a tensor."""
    return type(x) is Tensor and x.dtype == torch.float32 and x.dim() == 4 and x.stride(3) == 1


def attend(q: Tensor, k: Tensor, v: Tensor, visible: Visible, scale: float) -> Tensor:
    """(B, H, T, D), which lies as (B, T, H, D)."""
    return _Attend.apply(q, k, v, visible.mask, visible.causal, scale)  # type: ignore[no-any-return, no-untyped-call]


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float) -> Tensor:
        out = _beside(q)
        norms = q.new_empty(*q.shape[:3], 2)
        call = _call(q, k, v, mask, causal, scale, out, norms)
        _run(call, False, "xt_attention")
        ctx.save_for_backward(q, k, v, mask, out, norms)
        ctx.causal, ctx.scale = causal, scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor) -> Any:
        q, k, v, mask, out, norms = ctx.saved_tensors
        slope = slope if slope.stride(3) == 1 else slope.contiguous()
        slopes = abreast(q, k, v) if q.shape[2] == k.shape[2] else [_beside(one) for one in (q, k, v)]
        call = _call(q, k, v, mask, ctx.causal, ctx.scale, out, norms)
        call.slope, call.dq, call.dk, call.dv = (_rows(one) for one in (slope, *slopes))
        _run(call, True, "xt_attention_slopes")
        return (*slopes, None, None, None)


def _beside(x: Tensor) -> Tensor:
    """Room for x (B, H, T, D), the heads of a token side by side, as projections have them."""
    batch, heads, tokens, width = x.shape
    return x.new_empty(batch, tokens, heads, width).transpose(1, 2)


def _call(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float, out: Tensor, norms: Tensor
) -> _Attention:
    """Sizes and addresses; every shape is checked, since C believes what it is told."""
    (batch, heads, queries, width), (groups, keys) = q.shape, k.shape[1:3]
    shapes_fit = k.shape == v.shape == (batch, groups, keys, width) and heads % groups == 0
    if not shapes_fit or (causal and queries != keys) or out.shape != q.shape:
        raise AssertionError(f"attention of {tuple(q.shape)} over {tuple(k.shape)} and {tuple(v.shape)}")
    call = _Attention(batch, heads, groups, queries, keys, width, int(causal), scale=scale, norms=norms.data_ptr())
    call.q, call.k, call.v, call.out = (_rows(one) for one in (q, k, v, out))
    if mask is not None:
        wide = mask.expand(batch, heads, queries, keys)
        call.masked, call.mask = 1 if mask.dtype == torch.bool else 2, mask.data_ptr()
        call.mask_strides = (c_int64 * 4)(*wide.stride())
    return call


def _rows(x: Tensor) -> _Rows:
    return _Rows(x.data_ptr(), *x.stride()[:3])


def _run(call: _Attention, slopes: bool, name: str) -> None:
    known, threads = library(), torch.get_num_threads()
    assert known is not None, "takes() has said that the kernels are there"
    known.xt_attention_room.restype = c_int64
    call.share = known.xt_attention_room(byref(call), c_int64(slopes))
    room = torch.empty(threads * call.share, dtype=torch.float32)
    call.room = room.data_ptr()
    getattr(known, name)(byref(call), c_int64(threads))
