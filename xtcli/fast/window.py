"""Attention in a window around each query, with gradients.

    query t sees key s    where t - left <= s <= t + right, and both have the same label

The tiles of keys that a tile of queries sees follow by arithmetic, and those at the edges of the window alone are asked
pair by pair. Backwards, one kernel makes the slopes of queries and another those of keys and values; each makes the
weights anew from what the forward pass keeps (Dao 2023, arXiv:2307.08691), and adds in a fixed order. Where
hopper/slopes.py is faster it does the work of both.

Axes: B rows, H query heads, G key/value heads, T tokens, D head width, M queries and N keys of a tile. Scores are in
units of log 2 inside the kernels, as are the logarithms that the forward pass keeps.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from xtcli.fast import windowkernels as kernels
from xtcli.fast.hopper import slopes as hopper
from xtcli.fast.layout import alike, steps, whole_rows
from xtcli.parts.slides import LOG2E

FORWARD = {16: (64, 64, 4, 3), 32: (64, 64, 4, 3), 64: (64, 64, 4, 3), 128: (64, 64, 4, 3)}
QUERIES = {16: (64, 64, 4, 3), 32: (64, 64, 4, 3), 64: (64, 64, 4, 3), 128: (64, 64, 4, 2)}
KEYS = {16: (32, 64, 4, 3), 32: (32, 64, 4, 3), 64: (32, 64, 4, 3), 128: (64, 64, 4, 2)}
KEYS_OF_GROUPS = {**KEYS, 64: (64, 64, 4, 3)}
"""By width of a head: queries and keys of a tile, warps, stages. Found by trial on an H200, at 8,192 tokens and a
window of 512, and for heads of 64 with the whole past of 1,024 and 2,048 tokens."""
REGISTERS = {64: 128}
"""Registers of a thread in the kernel for keys of heads that share none, so that four programs fit side by side."""


def forward(
    q: Tensor, k: Tensor, v: Tensor, mine: Tensor | None, theirs: Tensor | None, left: int, right: int, scale: float
) -> tuple[Tensor, Tensor]:
    """y (B, H, T, D), and log2 of each query's sum of powers (B, H, T).

    q (B, H, T, D), k and v (B, G, T, D). Labels of queries and of keys int32 (B, T), or None: a pair counts where they
    are equal, and a query labelled -2 sees itself alone.
    """
    q, k, v = (whole_rows(x) for x in (q, k, v))
    y, ends = alike(q), q.new_empty(q.shape[:3], dtype=torch.float32)
    M, _, options = _cut(FORWARD, q)
    given = (q, k, v, *_labels(mine, theirs, ends), y, ends, *steps(q, k, v, y))
    kernels.forward[(triton.cdiv(q.shape[2], M), q.shape[0] * q.shape[1])](
        *given, *_sizes(q, k), left, right, scale * LOG2E, mine is not None, **options
    )
    return y, ends


def backward(
    dy: Tensor, q: Tensor, k: Tensor, v: Tensor, mine: Tensor | None, theirs: Tensor | None, y: Tensor, ends: Tensor,
    left: int, right: int, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The slopes of q, k and v."""
    dq, dk, dv = (alike(x) for x in (q, k, v))
    slopes_into(dq, dk, dv, dy, q, k, v, mine, theirs, y, ends, left, right, scale)
    return dq, dk, dv


def slopes_into(
    dq: Tensor, dk: Tensor, dv: Tensor, dy: Tensor, q: Tensor, k: Tensor, v: Tensor, mine: Tensor | None,
    theirs: Tensor | None, y: Tensor, ends: Tensor, left: int, right: int, scale: float,
    turn: tuple[Tensor, Tensor, bool] | None = None, biased: bool = False,
) -> Tensor | None:  # fmt: skip
    """Write the slopes of q (B, H, T, D), k and v (B, G, T, D), those of q and k turned back by `turn`, which is cos
    and sin (B|1, 1, T, D / 2) and whether neighbours are pairs. `biased`: their sums over some of the tokens each,
    float32 (N, (H + 2 G) D)."""
    dy, q, k, v = (whole_rows(x) for x in (dy, q, k, v))
    if turn is not None:
        turn = turn[0].contiguous(), turn[1].contiguous(), turn[2]
    if mine is None and hopper.takes(q, k, left, right, turn, biased):
        return hopper.slopes_into(dq, dk, dv, dy, q, k, v, y, ends, left, right, scale, turn, biased)
    (batch, heads, length, width), groups = q.shape, k.shape[1]
    grouped = groups < heads
    (M, _, for_queries), (_, N, for_keys) = _cut(QUERIES, q), _cut(KEYS_OF_GROUPS if grouped else KEYS, q)
    if not grouped and width in REGISTERS:
        for_keys["maxnreg"] = REGISTERS[width]
    tiles = triton.cdiv(length, M), triton.cdiv(length, N)
    sums = None
    if biased:
        if M != N:
            raise AssertionError(f"sums of tiles of {M} queries and of {N} keys")
        sums = ends.new_empty(batch * tiles[0], (heads + 2 * groups) * width)
    cos, sin, near = turn or (ends, ends, False)
    deltas = torch.empty_like(ends)
    labels = _labels(mine, theirs, ends)
    by_angle = 0 if cos.shape[0] == 1 else cos.stride(0)
    numbers = (
        cos, sin, by_angle, ends if sums is None else sums, *_sizes(q, k), left, right, scale * LOG2E, scale,
        mine is not None, 0 if turn is None else 2 if near else 1, biased,
    )  # fmt: skip
    kernels.queries[(tiles[0], batch * heads)](
        q, k, v, *labels, y, dy, ends, deltas, dq, *steps(q, k, v, y, dy, dq), *numbers, **for_queries
    )  # fmt: skip
    grid = (tiles[1], batch * groups)
    kernels.keys[grid[::-1] if grouped else grid](
        q, k, v, *labels, dy, ends, deltas, dk, dv, *steps(q, k, v, dy, dk, dv), *numbers, ACROSS=grouped, **for_keys
    )  # fmt: skip
    return sums


def _cut(table: dict[int, tuple[int, int, int, int]], q: Tensor) -> tuple[int, int, dict[str, Any]]:
    """The tile of a kernel, and its constants."""
    M, N, warps, stages = table[q.shape[-1]]
    even = q.shape[2] % M == 0 and q.shape[2] % N == 0
    sizes = {"EVEN": even, "D": q.shape[-1], "M": M, "N": N}
    return M, N, sizes | {"num_warps": warps, "num_stages": stages}


def _labels(mine: Tensor | None, theirs: Tensor | None, other: Tensor) -> tuple[Tensor, Tensor]:
    """Something to hand over where there are none."""
    return (other, other) if mine is None or theirs is None else (mine, theirs)


def _sizes(q: Tensor, k: Tensor) -> tuple[int, int, int]:
    return q.shape[1], q.shape[1] // k.shape[1], q.shape[2]


_LIBRARY = torch.library.Library("xt", "FRAGMENT")
_GIVEN = "Tensor q, Tensor k, Tensor v, Tensor? mine, Tensor? theirs"
_LIBRARY.define(f"attend_window({_GIVEN}, int left, int right, float scale) -> (Tensor, Tensor)")
_LIBRARY.define(
    f"attend_window_back(Tensor dy, {_GIVEN}, Tensor y, Tensor ends, int left, int right, float scale) "
    "-> (Tensor, Tensor, Tensor)"
)
# On a CPU they run in Triton's interpreter.
torch.library.impl("xt::attend_window", ("cuda", "cpu"))(forward)
torch.library.impl("xt::attend_window_back", ("cuda", "cpu"))(backward)


@torch.library.register_fake("xt::attend_window")
def _shapes(q: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return alike(q), q.new_empty(q.shape[:3], dtype=torch.float32)


@torch.library.register_fake("xt::attend_window_back")
def _slope_shapes(dy: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    return alike(q), alike(k), alike(v)


def _remember(ctx: Any, inputs: Any, output: Any) -> None:
    q, k, v, mine, theirs, *ctx.numbers = inputs
    # None in place of zeros for what nothing reads.
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, mine, theirs, *output)


def _slopes(ctx: Any, dy: Tensor, _: Tensor | None) -> Any:
    return *torch.ops.xt.attend_window_back(dy, *ctx.saved_tensors, *ctx.numbers), *(None,) * 5


torch.library.register_autograd("xt::attend_window", _slopes, setup_context=_remember)
