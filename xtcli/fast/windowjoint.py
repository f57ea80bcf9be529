"""The way back of attention in a window to the one product that made queries, keys and values.

    dq, dk, dv by window.py, joined and turned back by heads.py        the specification: two operators
    dp = [turned back dq, dk | dv], db = sum dp                        the same by the kernels that make the slopes

`join` puts the second in the place of the first where a graph has both, one behind the other.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node

from xtcli.fast import normkernels, window
from xtcli.fast.heads import apart

xt = torch.ops.xt

_LIBRARY = torch.library.Library("xt", "FRAGMENT")
_LIBRARY.define(
    "attend_window_joint_back(Tensor dy, Tensor q, Tensor k, Tensor v, Tensor? mine, Tensor? theirs, Tensor y, "
    "Tensor ends, int left, int right, float scale, Tensor? cos, Tensor? sin, bool interleaved, bool biased) "
    "-> (Tensor, Tensor)"
)


def backward(
    dy: Tensor, q: Tensor, k: Tensor, v: Tensor, mine: Tensor | None, theirs: Tensor | None, y: Tensor, ends: Tensor,
    left: int, right: int, scale: float, cos: Tensor | None, sin: Tensor | None, interleaved: bool, biased: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Slopes (B T, (H + 2 G) D) of the product that q (B, H, T, D), k and v (B, G, T, D) are of, those of q and k
    turned back by cos and sin (B|1, 1, T, D / 2); their sums over the rows in float32, or nothing (0,)."""
    (batch, heads, length, width), groups = q.shape, k.shape[1]
    joint = q.new_empty(batch * length, (heads + 2 * groups) * width)
    turn = None if cos is None or sin is None else (cos, sin, interleaved)
    sums = window.slopes_into(
        *apart(joint, length, heads, groups), dy, q, k, v, mine, theirs, y, ends, left, right, scale, turn, biased
    )
    return joint, ends.new_empty(0) if sums is None else normkernels.total(sums)


torch.library.impl("xt::attend_window_joint_back", ("cuda", "cpu"))(backward)


@torch.library.register_fake("xt::attend_window_joint_back")
def _shapes(dy: Tensor, q: Tensor, k: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    wide = (q.shape[1] + 2 * k.shape[1]) * q.shape[3]
    sums = q.new_empty(wide if rest[-1] else 0, dtype=torch.float32)
    return q.new_empty(q.shape[0] * q.shape[2], wide), sums


def join(graph: Graph) -> int:
    """Let attention write its slopes where the joint product's way back reads them; returns how many do."""
    count = 0
    for node in graph.find_nodes(op="call_function", target=xt.joint_slope.default):
        *slopes, cos, sin, interleaved, biased = node.args
        back = _back(slopes)
        if back is None or not _fits(back, cos):
            continue
        with graph.inserting_before(node):
            made = graph.call_function(xt.attend_window_joint_back.default, (*back.args, cos, sin, interleaved, biased))
        made.meta["val"] = node.meta["val"]
        node.replace_all_uses_with(made)
        graph.erase_node(node)
        for slope in slopes:
            graph.erase_node(slope)
        graph.erase_node(back)
        count += 1
    return count


def _back(slopes: list[Any]) -> Node | None:
    """The attention that all three slopes are of, and nobody else's."""
    first = slopes[0].args[0] if slopes[0].target is operator.getitem else None
    if not isinstance(first, Node) or first.target is not xt.attend_window_back.default:
        return None
    whole = all(
        slope.target is operator.getitem and slope.args == (first, number) and len(slope.users) == 1
        for number, slope in enumerate(slopes)
    )
    return first if whole and len(first.users) == len(slopes) else None


def _fits(back: Node, cos: Any) -> bool:
    """Whether the kernels turn such heads: whole, or not at all."""
    q: Any = back.args[1]
    return cos is None or 2 * cos.meta["val"].shape[-1] == q.meta["val"].shape[-1]
