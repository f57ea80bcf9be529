"""Norms over rows in Triton, forward and backward, with what stands beside them; norms.py is the specification.

A program has whole rows, some at once, each in pieces that it holds in registers: a row is read once. On the way back
programs go through the rows in turns, keep the sums of gains and biases over their rows in registers (and of a slope,
for a bias elsewhere), and leave one line of sums each, which a small launch adds up: the same in every run.
"""

# Triton knows sums of tuples, but no unpacking inside one.
# ruff: noqa: RUF005
# mypy: disable-error-code="assignment,var-annotated"

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from xtcli.fast import processors


class Cut(NamedTuple):
    """How rows are cut: rows at once, columns of a piece, warps, programs for each multiprocessor (0: all rows)."""

    rows: int
    piece: int
    warps: int
    programs: int = 0
    stages: int = 1


@triton.jit
def _forward(  # type: ignore[no-untyped-def]
    x, y, gain, bias, s, n, stats, count, tiles, eps, offset,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, PIECE: tl.constexpr, PIECES: tl.constexpr,
    CENTRED: tl.constexpr, SHIFTED: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    columns = tl.arange(0, PIECE)
    gains, shifts = (), ()
    for piece in tl.static_range(PIECES):
        at = piece * PIECE + columns
        w = tl.load(gain + at, mask=at < WIDTH, other=0.0)
        if SHIFTED:
            w = (w.to(tl.float32) + offset).to(gain.dtype.element_ty)
        gains = gains + (w.to(tl.float32),)
        if bias is not None:
            shifts = shifts + (tl.load(bias + at, mask=at < WIDTH, other=0.0).to(tl.float32),)
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        row = tile * ROWS + tl.arange(0, ROWS)
        start = row.to(tl.int64)[:, None] * WIDTH
        held = ()
        total = tl.zeros((ROWS, PIECE), tl.float32)
        for piece in tl.static_range(PIECES):
            k = piece * PIECE + columns[None, :]
            real = (k < WIDTH) if EVEN else (k < WIDTH) & (row < count)[:, None]
            v = tl.load(x + start + k, mask=real, other=0.0).to(tl.float32)
            if y is not None:
                v += tl.load(y + start + k, mask=real, other=0.0).to(tl.float32)
                rounded = v.to(s.dtype.element_ty)
                tl.store(s + start + k, rounded, mask=real)
                v = rounded.to(tl.float32)
            held = held + (v,)
            total += v if CENTRED else v * v
        if CENTRED:
            mean = tl.sum(total, 1) / WIDTH
            tl.store(stats + count + row, mean, mask=row < count)
            total = tl.zeros((ROWS, PIECE), tl.float32)
            apart = ()
            for piece in tl.static_range(PIECES):
                k = piece * PIECE + columns[None, :]
                v = tl.where(k < WIDTH, held[piece] - mean[:, None], 0.0)
                apart = apart + (v,)
                total += v * v
            held = apart
        rstd = tl.rsqrt(tl.sum(total, 1) / WIDTH + eps)
        tl.store(stats + row, rstd, mask=row < count)
        for piece in tl.static_range(PIECES):
            k = piece * PIECE + columns[None, :]
            real = (k < WIDTH) if EVEN else (k < WIDTH) & (row < count)[:, None]
            v = held[piece] * rstd[:, None]
            if not CENTRED:
                v = v.to(n.dtype.element_ty).to(tl.float32)
            v = v * gains[piece][None, :]
            if bias is not None:
                v += shifts[piece][None, :]
            tl.store(n + start + k, v.to(n.dtype.element_ty), mask=real)


@triton.jit
def _backward(  # type: ignore[no-untyped-def]
    dn, dm, ds, x, gain, stats, dx, sums, count, tiles, offset,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, PIECE: tl.constexpr, PIECES: tl.constexpr,
    CENTRED: tl.constexpr, BIASED: tl.constexpr, SHIFTED: tl.constexpr, EVEN: tl.constexpr,
    STAGES: tl.constexpr, SUMMED: tl.constexpr, KINDS: tl.constexpr,
):  # fmt: skip
    columns = tl.arange(0, PIECE)
    gains, for_gain, for_bias, for_slope = (), (), (), ()
    for piece in tl.static_range(PIECES):
        at = piece * PIECE + columns
        w = tl.load(gain + at, mask=at < WIDTH, other=0.0)
        if SHIFTED:
            w = (w.to(tl.float32) + offset).to(gain.dtype.element_ty)
        gains = gains + (w.to(tl.float32),)
        for_gain = for_gain + (tl.zeros((ROWS, PIECE), tl.float32),)
        if BIASED:
            for_bias = for_bias + (tl.zeros((ROWS, PIECE), tl.float32),)
        if SUMMED is not None:
            for_slope = for_slope + (tl.zeros((ROWS, PIECE), tl.float32),)
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), num_stages=STAGES):
        row = tile * ROWS + tl.arange(0, ROWS)
        start = row.to(tl.int64)[:, None] * WIDTH
        rstd = tl.load(stats + row, mask=row < count, other=0.0)[:, None]
        if CENTRED:
            mean = tl.load(stats + count + row, mask=row < count, other=0.0)[:, None]
        inputs, slopes, seconds, streams = (), (), (), ()
        for piece in tl.static_range(PIECES):
            k = piece * PIECE + columns[None, :]
            real = (k < WIDTH) if EVEN else (k < WIDTH) & (row < count)[:, None]
            inputs = inputs + (tl.load(x + start + k, mask=real, other=0.0),)
            slopes = slopes + (tl.load(dn + start + k, mask=real, other=0.0),)
            if dm is not None:
                seconds = seconds + (tl.load(dm + start + k, mask=real, other=0.0),)
            if ds is not None:
                streams = streams + (tl.load(ds + start + k, mask=real, other=0.0),)
        units, scaled, gain_sums, bias_sums, slope_sums = (), (), (), (), ()
        along = tl.zeros((ROWS, PIECE), tl.float32)
        level = tl.zeros((ROWS, PIECE), tl.float32)
        for piece in tl.static_range(PIECES):
            u = inputs[piece].to(tl.float32)
            u = (u - mean) * rstd if CENTRED else u * rstd
            g = slopes[piece].to(tl.float32)
            if dm is not None:
                g += seconds[piece].to(tl.float32)
            gain_sums = gain_sums + (for_gain[piece] + g * u,)
            if BIASED:
                bias_sums = bias_sums + (for_bias[piece] + g,)
            if SUMMED == "ds":
                slope_sums = slope_sums + (for_slope[piece] + streams[piece].to(tl.float32),)
            g = g * gains[piece][None, :]
            along += g * u
            level += g
            units, scaled = units + (u,), scaled + (g,)
        for_gain, for_bias = gain_sums, bias_sums
        mean_along = (tl.sum(along, 1) / WIDTH)[:, None]
        mean_level = (tl.sum(level, 1) / WIDTH)[:, None] if CENTRED else 0.0
        for piece in tl.static_range(PIECES):
            k = piece * PIECE + columns[None, :]
            real = (k < WIDTH) if EVEN else (k < WIDTH) & (row < count)[:, None]
            d = (scaled[piece] - units[piece] * mean_along - mean_level) * rstd
            if ds is not None:
                d += streams[piece].to(tl.float32)
            out = d.to(dx.dtype.element_ty)
            tl.store(dx + start + k, out, mask=real)
            if SUMMED == "dx":
                slope_sums = slope_sums + (for_slope[piece] + out.to(tl.float32),)
        for_slope = slope_sums
    line = sums + tl.program_id(0) * (WIDTH * KINDS)
    for piece in tl.static_range(PIECES):
        at = piece * PIECE + columns
        tl.store(line + at, tl.sum(for_gain[piece], 0), mask=at < WIDTH)
        if BIASED:
            tl.store(line + WIDTH + at, tl.sum(for_bias[piece], 0), mask=at < WIDTH)
        if SUMMED is not None:
            tl.store(line + (KINDS - 1) * WIDTH + at, tl.sum(for_slope[piece], 0), mask=at < WIDTH)


@triton.jit
def _total(sums, out, lines, width, LINES: tl.constexpr, COLUMNS: tl.constexpr):  # type: ignore[no-untyped-def]
    """The sum of `lines` lines (lines, width), float32."""
    k = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros((LINES, COLUMNS), tl.float32)
    for first in range(0, lines, LINES):
        line = first + tl.arange(0, LINES)
        real = (line < lines)[:, None] & (k < width)[None, :]
        total += tl.load(sums + line[:, None] * width + k[None, :], mask=real, other=0.0)
    tl.store(out + k, tl.sum(total, 0), mask=k < width)


def forward(
    x: Tensor,
    y: Tensor | None,
    gain: Tensor,
    bias: Tensor | None,
    eps: float,
    offset: float,
    centred: bool,
    cut: Cut | None = None,
) -> tuple[Tensor | None, Tensor, Tensor]:
    """x (N, D), y (N, D) or None -> their sum or None, its norm (N, D), statistics (1 or 2, N): see norms.py."""
    count, width = x.shape
    cut = cut or forward_cut(width)
    s = None if y is None else torch.empty_like(x)
    n = torch.empty_like(x)
    stats = x.new_empty(2 if centred else 1, count, dtype=torch.float32)
    tiles = triton.cdiv(count, cut.rows)
    programs = min(tiles, cut.programs * processors(x.device)) if cut.programs else tiles
    if count:
        _forward[(programs,)](
            x, y, gain, bias, s, n, stats, count, tiles, eps, offset,
            width, cut.rows, cut.piece, triton.cdiv(width, cut.piece), centred, offset != 0.0, count % cut.rows == 0,
            num_warps=cut.warps,
        )  # fmt: skip
    return s, n, stats


def backward(
    dn: Tensor,
    dm: Tensor | None,
    ds: Tensor | None,
    x: Tensor,
    gain: Tensor,
    stats: Tensor,
    offset: float,
    biased: bool,
    summed: str | None = None,
    cut: Cut | None = None,
) -> tuple[Tensor, Tensor]:
    """dn, x (N, D), dm and ds (N, D) or None -> the slopes of x, and of gain and bias (1 or 2, D): see norms.py.

    One row more has the sums of the columns of what `summed` says, ds or dx.
    """
    count, width = x.shape
    cut = cut or backward_cut(width, summed)
    dx = torch.empty_like(x)
    kinds = 1 + biased + (summed is not None)
    if not count:
        return dx, x.new_zeros(kinds, width, dtype=torch.float32)
    tiles = triton.cdiv(count, cut.rows)
    programs = min(tiles, cut.programs * processors(x.device))
    sums = x.new_empty(programs, kinds, width, dtype=torch.float32)
    _backward[(programs,)](
        dn, dm, ds, x, gain, stats, dx, sums, count, tiles, offset,
        width, cut.rows, cut.piece, triton.cdiv(width, cut.piece), stats.shape[0] == 2, biased, offset != 0.0,
        count % cut.rows == 0, cut.stages, summed, kinds, num_warps=cut.warps,
    )  # fmt: skip
    return dx, total(sums)


def total(sums: Tensor, lines: int = 64, columns: int = 16, warps: int = 4) -> Tensor:
    """The sum over the first axis, float32."""
    out = torch.empty_like(sums[0])
    width = out.numel()
    _total[(triton.cdiv(width, columns),)](sums, out, sums.shape[0], width, lines, columns, num_warps=warps)
    return out


def forward_cut(width: int) -> Cut:
    """The cut of `_forward` for a width, the fastest of those timed on an H200: about 4,096 elements a program."""
    whole = triton.next_power_of_2(width)
    if whole == 1024:
        return Cut(1, whole, 1)
    return Cut(min(max(4096 // whole, 1), 4), whole, 4 if whole < 1024 else 8)


def backward_cut(width: int, summed: str | None = None) -> Cut:
    """The cut of `_backward` for a width: about 2,048 elements a program, which must stay in registers."""
    whole = triton.next_power_of_2(width)
    if whole == 1024:
        return {None: Cut(1, whole, 2, 8, 2), "ds": Cut(2, whole, 2, 4, 2), "dx": Cut(1, 256, 2, 8, 2)}[summed]
    rows = min(max(2048 // whole, 1), 4)
    return Cut(rows, whole, 4 if whole <= 2048 else 8, 4 if whole <= 2048 else 2, 1 if rows > 1 else 2)
