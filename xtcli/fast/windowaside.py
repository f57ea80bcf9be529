"""Attention in a window and, besides, to a few keys that all queries see, in one softmax.

The window is that of window.py, which leaves those few keys out; a kernel behind it joins them. Each part has the
logarithm of its sum of powers, by which both are weighed (Dao 2023, arXiv:2307.08691, section 3.1); with the logarithm
of the whole and what came out of the whole, the way back of either part is the one it has alone.

The queries at the places of those keys see nothing here: what they are to find is given, and takes its place.

Axes: B rows, H query heads, G key/value heads, T tokens, D head width, E keys besides.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from xtcli.fast import asidekernels as kernels
from xtcli.fast import window
from xtcli.fast.layout import alike, steps, whole_rows
from xtcli.parts.slides import LOG2E

QUERIES, TILES = 64, 8
"""Queries of a tile, and tiles of a program on the way back."""
LEAST = 16
"""Keys that tensor cores take at least."""


def forward(
    q: Tensor, k: Tensor, v: Tensor, places: Tensor, seen: Tensor, mine: Tensor, theirs: Tensor, left: int, right: int,
    scale: float, found: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """y (B, H, T, D), and log2 of each query's sum of powers (B, H, T); see `attend`."""
    q, k, v = (whole_rows(x) for x in (q, k, v))
    y, ends = window.forward(q, k, v, mine, theirs, left, right, scale)
    sizes, constants = _sizes(q, k, places)
    kernels.forward[(triton.cdiv(q.shape[2], QUERIES), q.shape[0] * q.shape[1])](
        q, k, v, places, seen, mine, y, ends, *steps(q, k, v, y), *_seen_steps(seen), *sizes, scale * LOG2E,
        **constants,
    )  # fmt: skip
    _exchange(y, whole_rows(found), places, constants["N"], True)
    return y, ends


def backward(
    dy: Tensor, q: Tensor, k: Tensor, v: Tensor, places: Tensor, seen: Tensor, mine: Tensor, theirs: Tensor,
    y: Tensor, ends: Tensor, left: int, right: int, scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The slopes of q, k, v and of what is found at the places."""
    dy, q, k, v = (whole_rows(x) for x in (dy, q, k, v))
    dq, dk, dv = window.backward(dy, q, k, v, mine, theirs, y, ends, left, right, scale)
    sizes, constants = _sizes(q, k, places)
    batch, heads, length, width = q.shape
    lines, groups = triton.cdiv(length, TILES * QUERIES), k.shape[1]
    parts = ends.new_empty(batch * heads, lines, 2, constants["N"], width)
    kernels.queries[(lines, batch * heads)](
        q, k, v, places, seen, y, dy, ends, dq, parts, *steps(q, k, v, y, dy, dq), *_seen_steps(seen), *sizes,
        scale * LOG2E, scale, TILES=TILES, **constants,
    )  # fmt: skip
    kernels.keys[(2, batch * groups)](
        places, parts, dk, dv, *steps(dk, dv), groups, *sizes[1:], lines, D=width, N=constants["N"]
    )
    reached = dy.new_empty(batch, heads, places.shape[1], width)
    _exchange(dy, reached, places, constants["N"], False)
    return dq, dk, dv, reached


def _exchange(x: Tensor, few: Tensor, places: Tensor, count: int, put: bool) -> None:
    """Put `few` (B, H, E, D) into x (B, H, T, D) at the places, or take from there."""
    batch, heads, length, width = x.shape
    kernels.rows[(batch * heads,)](x, few, places, *steps(x, few), heads, length, places.shape[1], put, width, count)


def _sizes(q: Tensor, k: Tensor, places: Tensor) -> tuple[tuple[int, ...], dict[str, Any]]:
    heads, length, width = q.shape[1:]
    sizes = heads, heads // k.shape[1], length, places.shape[1]
    few = max(triton.next_power_of_2(places.shape[1]), LEAST)
    return sizes, {"EVEN": length % QUERIES == 0, "D": width, "M": QUERIES, "N": few, "num_warps": 4}


def _seen_steps(seen: Tensor) -> tuple[int, int]:
    """Steps from row to row and from query to query."""
    return 0 if seen.shape[0] == 1 else seen.stride(0), 0 if seen.shape[2] == 1 else seen.stride(2)


_LIBRARY = torch.library.Library("xt", "FRAGMENT")
_GIVEN = "Tensor q, Tensor k, Tensor v, Tensor places, Tensor seen, Tensor mine, Tensor theirs"
_LIBRARY.define(f"attend_aside({_GIVEN}, int left, int right, float scale, Tensor found) -> (Tensor, Tensor)")
_LIBRARY.define(
    f"attend_aside_back(Tensor dy, {_GIVEN}, Tensor y, Tensor ends, int left, int right, float scale) "
    "-> (Tensor, Tensor, Tensor, Tensor)"
)
# On a CPU they run in Triton's interpreter.
torch.library.impl("xt::attend_aside", ("cuda", "cpu"))(forward)
torch.library.impl("xt::attend_aside_back", ("cuda", "cpu"))(backward)


@torch.library.register_fake("xt::attend_aside")
def _shapes(q: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return alike(q), q.new_empty(q.shape[:3], dtype=torch.float32)


@torch.library.register_fake("xt::attend_aside_back")
def _slopes(dy: Tensor, q: Tensor, k: Tensor, v: Tensor, places: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    found = dy.new_empty(*q.shape[:2], places.shape[1], q.shape[3])
    return alike(q), alike(k), alike(v), found


def _keep(ctx: Any, inputs: Any, output: Any) -> None:
    *tensors, left, right, scale, _ = inputs
    ctx.mark_non_differentiable(output[1])
    # None in place of zeros for what nothing reads.
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, *output)
    ctx.numbers = left, right, scale


def _back(ctx: Any, dy: Tensor, ends: Any) -> Any:
    *slopes, found = torch.ops.xt.attend_aside_back(dy, *ctx.saved_tensors, *ctx.numbers)
    return *slopes, *(None,) * 7, found


torch.library.register_autograd("xt::attend_aside", _back, setup_context=_keep)


def attend(
    q: Tensor, k: Tensor, v: Tensor, places: Tensor, seen: Tensor, mine: Tensor, theirs: Tensor, left: int, right: int,
    scale: float, found: Tensor,
) -> Tensor:  # fmt: skip
    """(B, H, T, D) of q (B, H, T, D), k and v (B, G, T, D), with found (B, H, E, D) at the places.

    places (B, E), int64: the keys that are seen besides, which labels hide from the window, T where a row has fewer;
    seen (B|1, 1, 1|T, E): by whom. Labels int32 (B, T) as in window.py; queries at the places are labelled -3.
    """
    given = q, k, v, places.contiguous(), seen.contiguous(), mine, theirs
    y: Tensor = torch.ops.xt.attend_aside(*given, left, right, scale, found.to(q.dtype))[0]
    return y
