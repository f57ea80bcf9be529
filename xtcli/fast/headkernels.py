"""Rotation of query and key heads, and the joint gradient of queries, keys and values, in Triton; heads.py is the
specification.

A program has a few heads and goes through tiles of rows. A line is one head of one row: its pairs are turned in
float32, its other dimensions pass. Sums over rows stay in registers; each program leaves one line of them.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from xtcli.fast import processors
from xtcli.fast.normkernels import total


class Cut(NamedTuple):
    """Elements of a tile, warps, and programs for each multiprocessor (0: one for each tile)."""

    tile: int
    warps: int
    programs: int = 0


@triton.jit
def _read(place, real, MASKED: tl.constexpr):  # type: ignore[no-untyped-def]
    x = tl.load(place, mask=real, other=0.0) if MASKED else tl.load(place)
    return x.to(tl.float32)


@triton.jit
def _write(place, x, real, MASKED: tl.constexpr):  # type: ignore[no-untyped-def]
    if MASKED:
        tl.store(place, x.to(place.dtype.element_ty), mask=real)
    else:
        tl.store(place, x.to(place.dtype.element_ty))


@triton.jit
def _leave(sums, column, x, inside, WIDTH: tl.constexpr, STEP: tl.constexpr, ROWS: tl.constexpr, HEADS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Sums over the rows of lines x (ROWS HEADS, lanes) to `sums`, a lane every STEP columns."""
    LANES: tl.constexpr = x.shape[1]
    total = tl.sum(tl.reshape(x, (ROWS, HEADS, LANES)), 0)
    at = column + tl.arange(0, HEADS)[:, None] * WIDTH + tl.arange(0, LANES)[None, :] * STEP
    tl.store(sums + at, total, mask=(tl.arange(0, LANES) < inside)[None, :])


@triton.jit
def _walk(  # type: ignore[no-untyped-def]
    source, by_text, by_place, by_head, head, target, wide, column, cos, sin, by_angle, sums, length, count, tiles,
    group, groups,
    TURN: tl.constexpr, BACK: tl.constexpr, WIDTH: tl.constexpr, HALF: tl.constexpr, LANES: tl.constexpr,
    OTHERS: tl.constexpr, ROWS: tl.constexpr, HEADS: tl.constexpr, SUMS: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """HEADS heads from `head` on of `source` to the columns from `column` on of `target`.

    TURN: 0 not at all, 1 halves, 2 neighbours; by the negative angle if BACK. LANES: of a pair's members, or of the
    whole head; OTHERS: of what does not turn.
    """
    LINES: tl.constexpr = ROWS * HEADS
    TURNS: tl.constexpr = HALF if TURN else WIDTH
    REST: tl.constexpr = WIDTH - 2 * HALF if TURN else 0
    MASKED: tl.constexpr = (not EVEN) or (LANES != TURNS)
    CUT: tl.constexpr = (not EVEN) or (OTHERS != REST)
    line = tl.arange(0, LINES)
    lane = tl.arange(0, LANES)[None, :]
    other = tl.arange(0, OTHERS)[None, :]
    one = tl.zeros((LINES, LANES), tl.float32)
    two = tl.zeros((LINES, LANES) if TURN else (1, 1), tl.float32)
    three = tl.zeros((LINES, OTHERS) if REST else (1, 1), tl.float32)
    for tile in range(group, tiles, groups):
        row = tile * ROWS + line // HEADS
        text = row // length
        place = row - text * length
        at = text.to(tl.int64) * by_text + place.to(tl.int64) * by_place + (head + line % HEADS) * by_head
        to = row.to(tl.int64) * wide + column + (line % HEADS) * WIDTH
        inside = (row < count)[:, None]
        real = inside & (lane < TURNS)
        begin, end = source + at[:, None], target + to[:, None]
        if TURN:
            angle = (text * by_angle + place * HALF)[:, None] + lane
            c = _read(cos + angle, real, MASKED)
            s = _read(sin + angle, real, MASKED)
            if BACK:
                s = -s
            if TURN == 1:
                a = _read(begin + lane, real, MASKED)
                b = _read(begin + HALF + lane, real, MASKED)
            else:
                both = tl.arange(0, 2 * LANES)[None, :]
                pairs = inside & (both < 2 * HALF)
                a, b = tl.split(tl.reshape(_read(begin + both, pairs, MASKED), (LINES, LANES, 2)))
            x = a * c - b * s
            y = b * c + a * s
            if REST:
                kept = inside & (other < REST)
                z = _read(begin + 2 * HALF + other, kept, CUT)
                _write(end + 2 * HALF + other, z, kept, CUT)
                if SUMS:
                    three += z
            if TURN == 1:
                _write(end + lane, x, real, MASKED)
                _write(end + HALF + lane, y, real, MASKED)
            else:
                _write(end + both, tl.reshape(tl.join(x, y), (LINES, 2 * LANES)), pairs, MASKED)
            if SUMS:
                one += x
                two += y
        else:
            x = _read(begin + lane, real, MASKED)
            _write(end + lane, x, real, MASKED)
            if SUMS:
                one += x
    if SUMS:
        sums += group * wide
        if TURN == 0:
            _leave(sums, column, one, WIDTH, WIDTH, 1, ROWS, HEADS)
        elif TURN == 1:
            _leave(sums, column, one, HALF, WIDTH, 1, ROWS, HEADS)
            _leave(sums, column + HALF, two, HALF, WIDTH, 1, ROWS, HEADS)
        else:
            _leave(sums, column, one, HALF, WIDTH, 2, ROWS, HEADS)
            _leave(sums, column + 1, two, HALF, WIDTH, 2, ROWS, HEADS)
        if REST:
            _leave(sums, column + 2 * HALF, three, REST, WIDTH, 1, ROWS, HEADS)


@triton.jit
def _turn(  # type: ignore[no-untyped-def]
    joint, wide, cos, sin, by_angle, length, count, tiles,
    TURN: tl.constexpr, WIDTH: tl.constexpr, HALF: tl.constexpr, LANES: tl.constexpr, OTHERS: tl.constexpr,
    ROWS: tl.constexpr, HEADS: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0) * HEADS
    _walk(
        joint, length * wide, wide, WIDTH, head, joint, wide, head * WIDTH, cos, sin, by_angle, joint, length, count,
        tiles, tl.program_id(1), tl.num_programs(1),
        TURN, False, WIDTH, HALF, LANES, OTHERS, ROWS, HEADS, False, EVEN,
    )  # fmt: skip


@triton.jit
def _join(  # type: ignore[no-untyped-def]
    dq, q_text, q_place, q_head, dk, k_text, k_place, k_head, dv, v_text, v_place, v_head,
    joint, wide, cos, sin, by_angle, sums, length, count, tiles, heads, groups,
    TURN: tl.constexpr, WIDTH: tl.constexpr, HALF: tl.constexpr, LANES: tl.constexpr, ALL: tl.constexpr,
    OTHERS: tl.constexpr, ROWS: tl.constexpr, HEADS: tl.constexpr, SUMS: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0) * HEADS
    column = head * WIDTH
    line, lines = tl.program_id(1), tl.num_programs(1)
    if head < heads:
        _walk(
            dq, q_text, q_place, q_head, head, joint, wide, column, cos, sin, by_angle, sums, length, count, tiles,
            line, lines, TURN, True, WIDTH, HALF, LANES, OTHERS, ROWS, HEADS, SUMS, EVEN,
        )  # fmt: skip
    elif head < heads + groups:
        _walk(
            dk, k_text, k_place, k_head, head - heads, joint, wide, column, cos, sin, by_angle, sums, length, count,
            tiles, line, lines, TURN, True, WIDTH, HALF, LANES, OTHERS, ROWS, HEADS, SUMS, EVEN,
        )  # fmt: skip
    else:
        _walk(
            dv, v_text, v_place, v_head, head - heads - groups, joint, wide, column, cos, sin, by_angle, sums, length,
            count, tiles, line, lines, 0, True, WIDTH, HALF, ALL, OTHERS, ROWS, HEADS, SUMS, EVEN,
        )  # fmt: skip


def turn(
    joint: Tensor, cos: Tensor, sin: Tensor, heads: int, groups: int, interleaved: bool, cut: Cut | None = None
) -> None:
    """Turns, in place, the first `heads` + `groups` of the heads in joint (B T, (heads + 2 groups) D) by the angles of
    cos and sin (B|1, 1, T, r / 2)."""
    (count, wide), length = joint.shape, cos.shape[2]
    width = wide // (heads + 2 * groups)
    cut = cut or Cut(2048, 4)
    half, few = cos.shape[-1], together(heads, groups, width)
    rows = _rows(cut.tile, few, width)
    tiles = -(-count // rows)
    programs = _programs(tiles, (heads + groups) // few, cut, joint.device)
    cos, sin = cos.contiguous(), sin.contiguous()
    if count:
        _turn[((heads + groups) // few, programs)](
            joint, wide, cos, sin, 0 if cos.shape[0] == 1 else length * half, length, count, tiles,
            2 if interleaved else 1, width, half, _lanes(half), _lanes(width - 2 * half), rows, few,
            count % rows == 0, num_warps=cut.warps,
        )  # fmt: skip


def join(
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    interleaved: bool,
    biased: bool,
    cut: Cut | None = None,
) -> tuple[Tensor, Tensor | None]:
    """dq (B, H, T, D), dk and dv (B, G, T, D) -> turned back and joined (B T, (H + 2 G) D), and its sums over rows."""
    dq, dk, dv = (x if x.stride(3) == 1 else x.contiguous() for x in (dq, dk, dv))
    (texts, heads, length, width), groups = dq.shape, dk.shape[1]
    cut = cut or (Cut(4096, 4, 4) if biased else Cut(2048, 4))
    half, few = cos.shape[-1] if cos is not None else 0, together(heads, groups, width)
    rows = _rows(cut.tile, few, width)
    count, wide = texts * length, (heads + 2 * groups) * width
    tiles = -(-count // rows)
    programs = _programs(tiles, (heads + 2 * groups) // few, cut, dq.device)
    joint = dq.new_empty(count, wide)
    sums = joint.new_empty(programs, wide, dtype=torch.float32) if biased else None
    if not count:
        return joint, None if sums is None else joint.new_zeros(wide, dtype=torch.float32)
    kind = 0 if cos is None else 2 if interleaved else 1
    cos, sin = (joint, joint) if cos is None or sin is None else (cos.contiguous(), sin.contiguous())
    by_angle = 0 if kind == 0 or cos.shape[0] == 1 else length * half
    _join[((heads + 2 * groups) // few, programs)](
        dq, *_strides(dq), dk, *_strides(dk), dv, *_strides(dv),
        joint, wide, cos, sin, by_angle, joint if sums is None else sums, length, count, tiles, heads, groups,
        kind, width, half, _lanes(half if kind else width), _lanes(width), _lanes(width - 2 * half), rows, few,
        sums is not None, count % rows == 0, num_warps=cut.warps,
    )  # fmt: skip
    return joint, None if sums is None else total(sums)


def together(heads: int, groups: int, width: int) -> int:
    """How many heads a program has: a power of two that divides both counts, about 256 columns."""
    few = math.gcd(heads, groups)
    return min(few & -few, max(256 // _lanes(width), 1))


def _rows(tile: int, few: int, width: int) -> int:
    return max(tile // (few * _lanes(width)), 1)


def _lanes(count: int) -> int:
    return 1 << max(count - 1, 0).bit_length()


def _strides(x: Tensor) -> tuple[int, int, int]:
    """From text to text, place to place and head to head."""
    return x.stride(0), x.stride(2), x.stride(1)


def _programs(tiles: int, chunks: int, cut: Cut, device: torch.device) -> int:
    if not cut.programs:
        # The second axis of a grid ends there.
        return min(tiles, 65535)
    return min(tiles, -(-cut.programs * processors(device) // chunks))
