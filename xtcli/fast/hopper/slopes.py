"""The way back of attention over a short text by one kernel, for heads of 64 that share no keys.

The kernel is slopes.cu; the specification are the two of fast/window.py, which make every weight twice. This one makes
it once and adds up the slopes of queries in global memory, always in the same order.

Axes: B rows, H heads, T tokens, D = 64 head width.
"""

from __future__ import annotations

import ctypes
from ctypes import byref, c_float, c_int, c_longlong, c_uint32, c_uint64, c_void_p
from functools import cache, lru_cache
from pathlib import Path

import torch
from torch import Tensor

from xtcli.fast import processors
from xtcli.fast.hopper.build import Failed, Kernel, call, compiled, missed, suits
from xtcli.parts.slides import LOG2E

FILES = ("tiles.cuh", "window.cuh", "loader.cuh", "keeper.cuh", "maker.cuh", "slopes.cu")

WIDTH, SIDE, MAKERS = 64, 64, 2
"""Width of a head; queries and keys of a tile; groups of four warps that have keys of their own."""
GROUPS = 4
"""Groups of four warps in all."""
STAGES, BUFFERS = 4, 3
"""Tiles of queries, and of slopes of weights, that are under way at once."""
LEAST, MOST = 512, 1024
"""Tokens for which the kernel is faster than window.py's two in a step of training on an H200: from there on sums of
the texts that are under way no longer fit in the cache."""
BUSY = 0.85
"""Share of the multiprocessors that must be at work: each takes one row and head at a time."""

ANGLES = {torch.float32: "float", torch.bfloat16: "u16"}

Turn = tuple[Tensor, Tensor, bool]


class _Map(ctypes.Structure):
    """A description of a tensor for the units that copy tiles (CUtensorMap)."""

    _fields_ = [("words", c_uint64 * 16)]


class _Work(ctypes.Structure):
    """Work of window.cuh."""

    _fields_ = [
        *((name, c_void_p) for name in ("o", "dy", "ends", "scratch", "sums", "cos", "sin")),
        *((name, c_longlong) for name in ("o_row", "o_head", "o_token", "dy_row", "dy_head", "dy_token", "by_angle")),
        *((name, c_int) for name in ("heads", "length", "left", "right", "items")),
        *((name, c_float) for name in ("scale", "slope")),
    ]


def fits(q: Tensor, k: Tensor, left: int, right: int, turn: Turn | None) -> bool:
    """Whether the kernel is for such heads q (B, H, T, D) and k (B, G, T, D): whole texts, seen to the left or both
    ways, with nothing to tell pairs apart but their places."""
    length = q.shape[2]
    whole = left >= length - 1 and (right == 0 or right >= length - 1)
    short = LEAST <= length <= MOST and length % SIDE == 0
    heads = q.shape == k.shape and q.shape[-1] == WIDTH and q.dtype == torch.bfloat16
    return heads and short and whole and (turn is None or turn[0].dtype in ANGLES)


def takes(q: Tensor, k: Tensor, left: int, right: int, turn: Turn | None, biased: bool) -> bool:
    """Whether the kernel fits, keeps q's device busy, and is to be had there."""
    if not q.is_cuda or not fits(q, k, left, right, turn) or not suits(q.get_device()):
        return False
    items, blocks = q.shape[0] * q.shape[1], processors(q.device)
    return items >= BUSY * blocks * -(-items // blocks) and _kernel(q, turn, biased) is not None


def source(turn: int, sums: bool, angle: str) -> str:
    """The text of one kernel; see slopes.cu for what the first three lines say."""
    known = {"TURN": turn, "SUMS": int(sums), "ANGLE": angle}
    constants = "".join(f"#define {name} {value}\n" for name, value in known.items())
    return constants + "\n".join(Path(__file__).with_name(name).read_text() for name in FILES)


def memory(length: int) -> int:
    """Bytes of shared memory: tiles and room to begin them at 1,024, numbers of two texts' queries, sums of warps."""
    tiles = 2 * 2 * MAKERS + 2 * STAGES + BUFFERS * MAKERS + MAKERS
    return 1024 + tiles * SIDE * WIDTH * 2 + 2 * 2 * 4 * length + (4 * MAKERS * 2 + 4) * WIDTH * 4


@cache
def kernel(device: int, length: int, turn: int, sums: bool, angle: str) -> Kernel | None:
    """The kernel on a device, compiled at its first use; None where it cannot be had, which is said to the user."""
    try:
        with torch.cuda.device(device):
            return Kernel(compiled(source(turn, sums, angle)), "slopes", GROUPS * 128, memory(length))
    except Failed as error:
        missed(str(error).splitlines()[0])
        return None


def _kernel(q: Tensor, turn: Turn | None, biased: bool) -> Kernel | None:
    angle = ANGLES[torch.float32 if turn is None else turn[0].dtype]
    return kernel(q.get_device(), q.shape[2], 0 if turn is None else 2 if turn[2] else 1, biased, angle)


@lru_cache(maxsize=4096)
def _map(address: int, sizes: tuple[int, ...], steps: tuple[int, ...]) -> _Map:
    """A tensor of bfloat16 by tiles, the innermost axis first; steps in bytes from the second one on."""
    made = _Map()
    call(
        "cuTensorMapEncodeTiled", byref(made), 9, 4, c_void_p(address), (c_uint64 * 4)(*sizes), (c_uint64 * 3)(*steps),
        (c_uint32 * 4)(WIDTH, SIDE, 1, 1), (c_uint32 * 4)(1, 1, 1, 1), 0, 3, 3, 0,
    )  # fmt: skip
    return made


def _heads(x: Tensor) -> _Map:
    batch, heads, length, width = x.shape
    row, head, token = (step * x.itemsize for step in x.stride()[:3])
    return _map(x.data_ptr(), (width, length, heads, batch), (token, head, row))


def slopes_into(
    dq: Tensor, dk: Tensor, dv: Tensor, dy: Tensor, q: Tensor, k: Tensor, v: Tensor, y: Tensor, ends: Tensor,
    left: int, right: int, scale: float, turn: Turn | None = None, biased: bool = False,
) -> Tensor | None:  # fmt: skip
    """Write the slopes of q, k and v (B, H, T, D), as window.py does; all tensors have rows that begin at 16 bytes.

    `biased`: returns sums over tokens, float32 (8 B, 3 H D), which add up to those of all.
    """
    batch, heads, length, width = q.shape
    items = batch * heads
    blocks = min(items, processors(q.device))
    scratch = ends.new_empty(blocks * length * width)
    sums = ends.new_empty(batch * 4 * MAKERS, 3 * heads * width) if biased else None
    cos, sin, _ = turn or (ends, ends, False)
    work = _Work(
        *(x.data_ptr() for x in (y, dy, ends, scratch)), 0 if sums is None else sums.data_ptr(), cos.data_ptr(),
        sin.data_ptr(), *y.stride()[:3], *dy.stride()[:3], 0 if cos.shape[0] == 1 else cos.stride(0), heads, length,
        left, right, items, scale * LOG2E, scale,
    )  # fmt: skip
    run = _kernel(q, turn, biased)
    assert run is not None, "nobody asked whether it takes these"
    with torch.cuda.device(q.device):
        stream = torch.cuda.current_stream().cuda_stream
        run(blocks, stream, *(_heads(x) for x in (q, k, v, dy, dq, dk, dv)), work)
    return sums
