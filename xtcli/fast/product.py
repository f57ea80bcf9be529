"""Products of a few rows with weights that are read once: norm, matrices, bias, activation and residual in one launch.

    y = act(W norm(x) + b)                     one matrix, or up to three whose outputs stand behind one another
    y = act(G norm(x) + g) * (U norm(x) + u)   two that are `paired`
    y = stream + weight * (W x + b)            into the residual stream

`twins.product` is the specification. A row alone is multiplied lane by lane, each program holding whole rows of the
weights; more rows go through the tensor cores. Weights are asked for before a launch waits for the one that makes x,
where the device can start a launch early (`PDL`: programmatic dependent launch, from compute capability 9.0 on).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from xtcli.fast.plan import Matrix, Norm

NORMS = {"rms": 1, "layer": 2}
WIDEST = 8192
"""Widest row that a program holds at once."""


@triton.jit
def early(PDL: tl.constexpr):  # type: ignore[no-untyped-def]
    """Let the next launch begin as soon as all programs of this one have."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def late(PDL: tl.constexpr):  # type: ignore[no-untyped-def]
    """Wait for the launch before, whose results are read from here on."""
    if PDL:
        tl.extra.cuda.gdc_wait()


@triton.jit
def bent(x, ACT: tl.constexpr):  # type: ignore[no-untyped-def]
    """An activation of float32 values, by its name in parts.activations."""
    if ACT == "silu":
        y = x * tl.sigmoid(x)
    elif ACT == "gelu":
        y = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif ACT == "gelu_tanh" or ACT == "gelu_fast":
        y = x * tl.sigmoid(1.5957691216057308 * x * (1.0 + 0.044715 * x * x))
    elif ACT == "quick_gelu":
        y = x * tl.sigmoid(1.702 * x)
    elif ACT == "relu":
        y = tl.maximum(x, 0.0)
    elif ACT == "relu2":
        y = tl.maximum(x, 0.0)
        y = y * y
    else:
        tl.static_assert(ACT == "identity", "an activation that no kernel knows")
        y = x
    return y


@triton.jit
def capped(x, cap):  # type: ignore[no-untyped-def]
    """cap * tanh(x / cap)."""
    small = tl.exp(-2.0 * tl.abs(x) / cap)
    size = cap * (1.0 - small) / (1.0 + small)
    return tl.where(x < 0, -size, size)


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
    x, gain, shift, w0, w1, w2, b0, b1, b2, s0, s1, s2, stream, y, count, n0, n1, n2, outs, width, eps, offset, weight,
    cap,
    NORM: tl.constexpr, PARTS: tl.constexpr, PAIRED: tl.constexpr, ACT: tl.constexpr, WEIGHED: tl.constexpr,
    CAPPED: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr,
    ROUND: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """BM rows of x at most; a program makes BN outputs of each."""
    early(PDL)
    block = tl.program_id(0)
    w, begin, rows, before = _matrix(block, w0, w1, w2, n0, n1, n2, PARTS, BN)
    n = begin + tl.arange(0, BN)
    m = tl.program_id(1) * BM + tl.arange(0, BM)
    real, row = n < rows, m < count
    late(PDL)
    mean = tl.zeros((BM,), tl.float32)
    scale = tl.zeros((BM,), tl.float32)
    if NORM == 2:
        for start in range(0, width, BK):
            k = start + tl.arange(0, BK)
            piece = tl.load(x + m[:, None] * width + k[None, :], mask=row[:, None] & (k < width)[None, :], other=0.0)
            mean += tl.sum(piece.to(tl.float32), 1)
        mean = mean / width
        for start in range(0, width, BK):
            k = start + tl.arange(0, BK)
            inside = row[:, None] & (k < width)[None, :]
            piece = tl.load(x + m[:, None] * width + k[None, :], mask=inside, other=0.0).to(tl.float32)
            apart = tl.where(inside, piece - mean[:, None], 0.0)
            scale += tl.sum(apart * apart, 1)
        scale = tl.rsqrt(scale / width + eps)
    total = tl.zeros((BM, BN), tl.float32)
    second = tl.zeros((BM, BN), tl.float32)
    for start in tl.range(0, width, BK, num_stages=STAGES):
        k = start + tl.arange(0, BK)
        inside = (k < width)[None, :]
        piece = tl.load(x + m[:, None] * width + k[None, :], mask=row[:, None] & inside, other=0.0)
        at = n.to(tl.int64)[:, None] * width + k[None, :]
        tile = tl.load(w + at, mask=real[:, None] & inside, other=0.0)
        if NORM != 0:
            wide = piece.to(tl.float32)
            g = tl.load(gain + k, mask=k < width, other=0.0).to(tl.float32)[None, :]
            if NORM == 1:
                # The length is known when all has been read; the product waits for it as well as its operand would.
                scale += tl.sum(wide * wide, 1)
                wide = wide * (g + offset)
            else:
                wide = (wide - mean[:, None]) * scale[:, None] * g
                if shift is not None:
                    wide += tl.load(shift + k, mask=k < width, other=0.0).to(tl.float32)[None, :]
            piece = wide.to(ROUND)
        total = tl.dot(piece, tl.trans(tile.to(ROUND)), total, input_precision="ieee")
        if PAIRED:
            tile = tl.load(w1 + at, mask=real[:, None] & inside, other=0.0)
            second = tl.dot(piece, tl.trans(tile.to(ROUND)), second, input_precision="ieee")
    if NORM == 1:
        scale = tl.rsqrt(scale / width + eps)
        total *= scale[:, None]
        second *= scale[:, None]
    if s0 is not None:
        total *= tl.load(_pick(block, s0, s1, s2, n0, n1, PARTS, BN) + n, mask=real)[None, :]
        if PAIRED:
            second *= tl.load(s1 + n, mask=real)[None, :]
    if b0 is not None:
        total += tl.load(_pick(block, b0, b1, b2, n0, n1, PARTS, BN) + n, mask=real).to(tl.float32)[None, :]
        if PAIRED:
            second += tl.load(b1 + n, mask=real).to(tl.float32)[None, :]
    out = bent(total.to(ROUND).to(tl.float32), ACT).to(ROUND)
    if PAIRED:
        out = (out.to(tl.float32) * second.to(ROUND).to(tl.float32)).to(ROUND)
    if CAPPED:
        out = capped(out.to(tl.float32), cap).to(ROUND)
    if WEIGHED:
        out = (out.to(tl.float32) * weight).to(ROUND)
    place = m.to(tl.int64)[:, None] * outs + before + n[None, :]
    both = row[:, None] & real[None, :]
    if stream is not None:
        out = (out.to(tl.float32) + tl.load(stream + place, mask=both).to(tl.float32)).to(ROUND)
    tl.store(y + place, out.to(y.dtype.element_ty), mask=both)


TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


class Shape:
    """How a product is cut: outputs, lanes and pieces of a program. Measured on an H100; see docs/log.md."""

    def __init__(self, rows: int, width: int, outputs: int, paired: bool) -> None:
        self.even = False
        if rows == 1:
            self.piece = min(triton.next_power_of_2(width), WIDEST)
            self.even = self.piece == width
            self.warps = 8 if self.piece >= 2048 else 4
            self.outputs = max(1, 8192 // self.piece // (2 if paired else 1))
            self.stages = 1
            return
        self.piece = 128 if width >= 128 else max(triton.next_power_of_2(width), 16)
        self.outputs = 16 if outputs < 8192 else 32
        self.warps, self.stages = 4, 4


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
    """x (B, K) times `parts` (N_i, K), into out (B, N); as in `twins.product`."""
    count, width = x.shape
    if norm is not None and count == 1 and width > WIDEST:
        raise ValueError(f"a norm over {width} is wider than the {WIDEST} that a program holds")
    if not (x.is_contiguous() and out.is_contiguous() and all(part.weight.is_contiguous() for part in parts)):
        raise ValueError("rows and weights must lie in one piece each")
    sizes = [part.weight.shape[0] for part in parts]
    cut = shape or Shape(count, width, sum(sizes), paired)
    first = parts[0]
    three = [*parts, first, first][:3]
    n0, n1, n2 = (*sizes, 0, 0)[:3]
    stacked = 1 if paired or len(parts) == 1 else 3
    blocks = triton.cdiv(n0, cut.outputs) if stacked == 1 else sum(triton.cdiv(n, cut.outputs) for n in sizes)
    given = (
        x, None if norm is None else norm.gain, None if norm is None else norm.shift,
        *(part.weight for part in three), *(part.bias for part in three), *(part.scale for part in three), stream, out,
    )  # fmt: skip
    numbers = (width, 0.0 if norm is None else norm.eps, 0.0 if norm is None else norm.offset, weight, cap or 0.0)
    kind = 0 if norm is None else NORMS[norm.kind]
    options = (kind, stacked, paired, act, weight != 1.0, cap is not None)
    # A launch option that only compilers for GPUs of one maker know is given where it is used alone.
    launch = {"launch_pdl": True} if pdl else {}
    if count == 1:
        _row[(blocks,)](
            *given, n0, n1, n2, *numbers, *options, cut.outputs, cut.piece, cut.even, cut.piece < width,
            TYPES[x.dtype], pdl,
            num_warps=cut.warps, **launch,
        )  # fmt: skip
        return
    height = max(16, min(triton.next_power_of_2(count), 64))
    _rows[(blocks, triton.cdiv(count, height))](
        *given, count, n0, n1, n2, out.shape[1], *numbers, *options, height, cut.outputs, cut.piece, cut.stages,
        TYPES[x.dtype], pdl, num_warps=cut.warps, **launch,
    )  # fmt: skip
