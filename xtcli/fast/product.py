"""Products of a few rows with weights that are read once: norm, matrices, bias, activation and residual in one launch.

    y = act(W norm(x) + b)                     one matrix, or up to three whose outputs stand behind one another
    y = act(G norm(x) + g) * (U norm(x) + u)   two that are `paired`
    y = stream + weight * (W x + b)            into the residual stream

`twins` is the specification. One row is multiplied lane by lane, each program holding whole rows of the weights.
Several rows go through the tensor cores: there a norm is a launch of its own (`settle`), and so is the sum where the
inputs of a matrix are split among programs, into which the residual and the next norm go.

Weights are asked for before a launch waits for the one that makes x, where the device can start a launch early (`PDL`:
programmatic dependent launch, from compute capability 9.0 on).
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from xtcli.fast.lanes import bent, capped, early, late
from xtcli.fast.plan import WIDEST, Matrix, Norm

NORMS = {"rms": 1, "layer": 2}


@triton.jit
def _normed(x, gain, shift, k, inside, width, eps, offset, dtype: tl.constexpr, NORM: tl.constexpr):  # type: ignore[no-untyped-def]
    """A row x (K,), float32 and 0 outside, normed and rounded where the plain norm rounds."""
    if NORM == 1:
        x = (x * tl.rsqrt(tl.sum(x * x) / width + eps)).to(dtype).to(tl.float32)
        g = tl.load(gain + k, mask=inside, other=0.0)
        x = (x * (g.to(tl.float32) + offset)).to(dtype).to(tl.float32)
    elif NORM == 2:
        apart = tl.where(inside, x - tl.sum(x) / width, 0.0)
        x = apart * tl.rsqrt(tl.sum(apart * apart) / width + eps)
        x = x * tl.load(gain + k, mask=inside, other=0.0).to(tl.float32)
        if shift is not None:
            x += tl.load(shift + k, mask=inside, other=0.0).to(tl.float32)
        x = x.to(dtype).to(tl.float32)
    return x


@triton.jit
def _matrix(block, w0, w1, w2, n0, n1, n2, PARTS: tl.constexpr, BN: tl.constexpr):  # type: ignore[no-untyped-def]
    """Of the matrices one behind the other, that of a block of outputs: pointer, first row, rows, outputs before."""
    if PARTS == 1:
        w, begin, rows, before = w0, block * BN, n0, 0
    else:
        first = tl.cdiv(n0, BN)
        second = first + tl.cdiv(n1, BN)
        w = tl.where(block < first, w0, tl.where(block < second, w1, w2))
        begin = (block - tl.where(block < first, 0, tl.where(block < second, first, second))) * BN
        rows = tl.where(block < first, n0, tl.where(block < second, n1, n2))
        before = tl.where(block < first, 0, tl.where(block < second, n0, n0 + n1))
    return w, begin, rows, before


@triton.jit
def _pick(block, p0, p1, p2, n0, n1, PARTS: tl.constexpr, BN: tl.constexpr):  # type: ignore[no-untyped-def]
    """The pointer of a block's part."""
    if PARTS == 1:
        p = p0
    else:
        first = tl.cdiv(n0, BN)
        p = tl.where(block < first, p0, tl.where(block < first + tl.cdiv(n1, BN), p1, p2))
    return p


@triton.jit
def _row(  # type: ignore[no-untyped-def]
    x, gain, shift, w0, w1, w2, b0, b1, b2, s0, s1, s2, stream, y, n0, n1, n2, width, eps, offset, weight, cap,
    NORM: tl.constexpr, PARTS: tl.constexpr, PAIRED: tl.constexpr, ACT: tl.constexpr, WEIGHED: tl.constexpr,
    CAPPED: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, EVEN: tl.constexpr, LONG: tl.constexpr,
    ROUND: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One row of x; a program makes BN outputs."""
    early(PDL)
    block = tl.program_id(0)
    k = tl.arange(0, BK)
    w, begin, rows, before = _matrix(block, w0, w1, w2, n0, n1, n2, PARTS, BN)
    n = begin + tl.arange(0, BN)
    real = n < rows
    at = n.to(tl.int64)[:, None] * width + k[None, :]
    seen = real[:, None] if EVEN else real[:, None] & (k < width)[None, :]
    tile = tl.load(w + at, mask=seen, other=0.0, eviction_policy="evict_first")
    if PAIRED:
        other = tl.load(w1 + at, mask=seen, other=0.0, eviction_policy="evict_first")
    late(PDL)
    inside = k < width
    whole = tl.load(x + k, mask=inside, other=0.0).to(tl.float32)
    whole = _normed(whole, gain, shift, k, inside, width, eps, offset, ROUND, NORM)
    total = tl.sum(tile.to(tl.float32) * whole[None, :], 1)
    if PAIRED:
        second = tl.sum(other.to(tl.float32) * whole[None, :], 1)
    if LONG:
        # Rows wider than a program holds: the rest, piece by piece.
        for start in range(BK, width, BK):
            far = start + k
            seen = real[:, None] & (far < width)[None, :]
            piece = tl.load(x + far, mask=far < width, other=0.0).to(tl.float32)[None, :]
            at = n.to(tl.int64)[:, None] * width + far[None, :]
            total += tl.sum(tl.load(w + at, mask=seen, other=0.0).to(tl.float32) * piece, 1)
            if PAIRED:
                second += tl.sum(tl.load(w1 + at, mask=seen, other=0.0).to(tl.float32) * piece, 1)
    if s0 is not None:
        total *= tl.load(_pick(block, s0, s1, s2, n0, n1, PARTS, BN) + n, mask=real)
        if PAIRED:
            second *= tl.load(s1 + n, mask=real)
    if b0 is not None:
        total += tl.load(_pick(block, b0, b1, b2, n0, n1, PARTS, BN) + n, mask=real).to(tl.float32)
        if PAIRED:
            second += tl.load(b1 + n, mask=real).to(tl.float32)
    out = bent(total.to(ROUND).to(tl.float32), ACT).to(ROUND)
    if PAIRED:
        out = (out.to(tl.float32) * second.to(ROUND).to(tl.float32)).to(ROUND)
    if CAPPED:
        out = capped(out.to(tl.float32), cap).to(ROUND)
    if WEIGHED:
        out = (out.to(tl.float32) * weight).to(ROUND)
    if stream is not None:
        out = (out.to(tl.float32) + tl.load(stream + n, mask=real).to(tl.float32)).to(ROUND)
    tl.store(y + before + n, out.to(y.dtype.element_ty), mask=real)


@triton.jit
def _rows(  # type: ignore[no-untyped-def]
    x, w0, w1, w2, b0, b1, b2, s0, s1, s2, y, count, n0, n1, n2, outs, width, cap,
    PARTS: tl.constexpr, PAIRED: tl.constexpr, ACT: tl.constexpr, CAPPED: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr, SPLITS: tl.constexpr, STAGES: tl.constexpr, ROUND: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """BM rows of x at most; a program makes BN outputs of each, from its share of the inputs."""
    early(PDL)
    block = tl.program_id(0)
    w, begin, rows, before = _matrix(block, w0, w1, w2, n0, n1, n2, PARTS, BN)
    n = begin + tl.arange(0, BN)
    m = tl.program_id(1) * BM + tl.arange(0, BM)
    real, row = n < rows, m < count
    share = tl.cdiv(tl.cdiv(width, BK), SPLITS) * BK
    first = tl.program_id(2) * share
    end = tl.minimum(first + share, width)
    late(PDL)
    # Outputs stand in rows here: tensor cores take 64 of them at once, and few rows of x.
    total = tl.zeros((BN, BM), tl.float32)
    second = tl.zeros((BN, BM), tl.float32)
    for start in tl.range(first, end, BK, num_stages=STAGES):
        k = start + tl.arange(0, BK)
        inside = (k < width)[None, :]
        piece = tl.load(x + m[:, None] * width + k[None, :], mask=row[:, None] & inside, other=0.0)
        at = n.to(tl.int64)[:, None] * width + k[None, :]
        tile = tl.load(w + at, mask=real[:, None] & inside, other=0.0)
        total = tl.dot(tile.to(ROUND), tl.trans(piece), total, input_precision="ieee")
        if PAIRED:
            tile = tl.load(w1 + at, mask=real[:, None] & inside, other=0.0)
            second = tl.dot(tile.to(ROUND), tl.trans(piece), second, input_precision="ieee")
    if s0 is not None:
        total *= tl.load(_pick(block, s0, s1, s2, n0, n1, PARTS, BN) + n, mask=real)[:, None]
        if PAIRED:
            second *= tl.load(s1 + n, mask=real)[:, None]
    place = m.to(tl.int64)[None, :] * outs + before + n[:, None]
    both = row[None, :] & real[:, None]
    if SPLITS > 1:
        tl.store(y + tl.program_id(2).to(tl.int64) * count * outs + place, total, mask=both)
    else:
        if b0 is not None:
            total += tl.load(_pick(block, b0, b1, b2, n0, n1, PARTS, BN) + n, mask=real).to(tl.float32)[:, None]
            if PAIRED:
                second += tl.load(b1 + n, mask=real).to(tl.float32)[:, None]
        out = bent(total.to(ROUND).to(tl.float32), ACT).to(ROUND)
        if PAIRED:
            out = (out.to(tl.float32) * second.to(ROUND).to(tl.float32)).to(ROUND)
        if CAPPED:
            out = capped(out.to(tl.float32), cap).to(ROUND)
        tl.store(y + place, out.to(y.dtype.element_ty), mask=both)


@triton.jit
def _settle(  # type: ignore[no-untyped-def]
    stream, parts, bias, gain, shift, y, normed, width, rows, eps, offset, weight,
    SPLITS: tl.constexpr, WEIGHED: tl.constexpr, NORM: tl.constexpr, BK: tl.constexpr, ROUND: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """A program has a row of the stream."""
    early(PDL)
    row = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, BK)
    inside = k < width
    late(PDL)
    x = tl.load(stream + row * width + k, mask=inside, other=0.0).to(tl.float32)
    if SPLITS > 0:
        total = tl.zeros((BK,), tl.float32)
        for split in tl.static_range(SPLITS):
            total += tl.load(parts + (split * rows + row) * width + k, mask=inside, other=0.0).to(tl.float32)
        if bias is not None:
            total += tl.load(bias + k, mask=inside, other=0.0).to(tl.float32)
        total = total.to(ROUND).to(tl.float32)
        if WEIGHED:
            total = (total * weight).to(ROUND).to(tl.float32)
        x = (x + total).to(ROUND).to(tl.float32)
        tl.store(y + row * width + k, x.to(ROUND), mask=inside)
    if normed is not None:
        x = _normed(x, gain, shift, k, inside, width, eps, offset, ROUND, NORM)
        tl.store(normed + row * width + k, x.to(ROUND), mask=inside)


TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


class Shape:
    """How a product is cut: outputs and inputs of a program, its warps. Measured on an H100; see docs/log.md."""

    def __init__(self, rows: int, width: int, paired: bool, bytes: int) -> None:
        """`bytes` of a value of x."""
        if rows == 1:
            self.piece = min(triton.next_power_of_2(width), WIDEST)
            self.warps = 8 if self.piece > 2048 or paired else 4
            self.outputs = max(1, (16384 if self.piece > 2048 else 4096 if paired else 8192) // self.piece)
            self.stages = 1
            return
        self.piece = min(64 if paired else 128, max(triton.next_power_of_2(width), 16))
        self.outputs = 64 if width >= 1024 else 32
        # Pieces that are under way must fit into the memory of a multiprocessor.
        self.stages = 2 if bytes > 2 else 5 if paired else 4
        self.warps = 4


def given(parts: tuple[Matrix, ...]) -> tuple[list[Any], list[int]]:
    """Weights, biases and scales of up to three matrices, as many of each, and the outputs of each."""
    if not all(part.weight.is_contiguous() for part in parts):
        raise ValueError("weights must lie in one piece each")
    three = [*parts, parts[0], parts[0]][:3]
    found: list[list[Any]] = [
        [part.weight for part in three],
        [part.bias for part in three],
        [part.scale for part in three],
    ]
    sizes = [part.weight.shape[0] for part in parts]
    return [one for kind in found for one in kind], [*sizes, 0, 0][:3]


def product(
    x: Tensor,
    norm: Norm | None,
    parts: tuple[Matrix, ...],
    out: Tensor,
    *,
    paired: bool = False,
    act: str = "identity",
    stream: Tensor | None = None,
    weight: float = 1.0,
    cap: float | None = None,
    pdl: bool = False,
    shape: Shape | None = None,
) -> None:
    """One row x (1, K) times `parts` (N_i, K), into out (1, N); as in `twins.product`."""
    width = x.shape[1]
    if norm is not None and width > WIDEST:
        raise ValueError(f"a norm over {width} is wider than the {WIDEST} that a program holds")
    if x.shape[0] != 1 or not x.is_contiguous() or not out.is_contiguous():
        raise ValueError("one row is multiplied, which must lie in one piece")
    matrices, sizes = given(parts)
    cut = shape or Shape(1, width, paired, x.element_size())
    single = paired or len(parts) == 1
    blocks = sum(triton.cdiv(size, cut.outputs) for size in (sizes[:1] if single else sizes))
    eps, offset = (0.0, 0.0) if norm is None else (norm.eps, norm.offset)
    # A launch option that only compilers for GPUs of one maker know is given where it is used alone.
    launch = {"launch_pdl": True} if pdl else {}
    _row[(blocks,)](
        x, None if norm is None else norm.gain, None if norm is None else norm.shift, *matrices, stream, out, *sizes,
        width, eps, offset, weight, cap or 0.0,
        0 if norm is None else NORMS[norm.kind], 1 if single else 3, paired, act, weight != 1.0, cap is not None,
        cut.outputs, cut.piece, cut.piece == width, cut.piece < width, TYPES[x.dtype], pdl, num_warps=cut.warps,
        **launch,
    )  # fmt: skip


def products(
    x: Tensor,
    parts: tuple[Matrix, ...],
    out: Tensor,
    *,
    paired: bool = False,
    act: str = "identity",
    cap: float | None = None,
    pdl: bool = False,
    shape: Shape | None = None,
) -> None:
    """Rows x (B, K) times `parts`, into out (B, N); or out (S, B, N), float32, for S sums over shares of the inputs."""
    count, width = x.shape
    if not (x.is_contiguous() and out.is_contiguous()):
        raise ValueError("rows must lie in one piece")
    matrices, sizes = given(parts)
    splits = out.shape[0] if out.dim() == 3 else 1
    cut = shape or Shape(count, width, paired, x.element_size())
    single = paired or len(parts) == 1
    blocks = sum(triton.cdiv(size, cut.outputs) for size in (sizes[:1] if single else sizes))
    height = max(16, min(triton.next_power_of_2(count), 64))
    launch = {"launch_pdl": True} if pdl else {}
    _rows[(blocks, triton.cdiv(count, height), splits)](
        x, *matrices, out, count, *sizes, out.shape[-1], width, cap or 0.0,
        1 if single else 3, paired, act, cap is not None, height, cut.outputs, cut.piece, splits, cut.stages,
        TYPES[x.dtype], pdl, num_warps=cut.warps, **launch,
    )  # fmt: skip


def settle(
    stream: Tensor,
    parts: Tensor | None,
    bias: Tensor | None,
    weight: float,
    out: Tensor,
    norm: Norm | None,
    normed: Tensor | None,
    *,
    pdl: bool = False,
) -> None:
    """stream + weight * (sum of parts + bias) into out, and its norm into normed; as in `twins.settle`."""
    rows, width = stream.shape
    if width > WIDEST:
        raise ValueError(f"a row of {width} is wider than the {WIDEST} that a program holds")
    block = triton.next_power_of_2(width)
    launch = {"launch_pdl": True} if pdl else {}
    _settle[(rows,)](
        stream, parts, bias, None if norm is None else norm.gain, None if norm is None else norm.shift, out, normed,
        width, rows, 0.0 if norm is None else norm.eps, 0.0 if norm is None else norm.offset, weight,
        0 if parts is None else parts.shape[0], weight != 1.0, 0 if norm is None else NORMS[norm.kind], block,
        TYPES[stream.dtype], pdl, num_warps=8 if block >= 2048 else 4, **launch,
    )  # fmt: skip
