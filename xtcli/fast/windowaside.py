"""Attention in a window and, besides, to a few keys that all queries see, in one softmax.

The window is that of window.py, which leaves those few keys out; their scores are written out, since they are few. Each
part has the logarithm of its sum of powers, by which both are weighed (Dao 2023, arXiv:2307.08691, section 3.1); with
the logarithm of the whole and what came out of the whole, the way back of either part is the one it has alone.

Axes: B rows, H query heads, G key/value heads, T tokens, D head width, E keys besides.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from xtcli.fast.window import LOG2E


def _picked(x: Tensor, places: Tensor, heads: int) -> Tensor:
    """x (B, G, T, D) at places (B, E), for each query head: (B, H, E, D)."""
    index = places[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3])
    return x.gather(2, index).repeat_interleave(heads // x.shape[1], 1)


def _scores(q: Tensor, keys: Tensor, seen: Tensor, scale: float) -> Tensor:
    """(B, H, T, E), float32, in units of log 2; -inf for what is not seen."""
    scores = (q @ keys.transpose(-1, -2)).float() * (scale * LOG2E)
    return scores.masked_fill(~seen, float("-inf"))


def _added(x: Tensor, places: Tensor, more: Tensor) -> Tensor:
    """x (B, G, T, D) and, at places (B, E), the sums over each group's heads of more (B, H, E, D)."""
    groups = x.shape[1]
    summed = more.unflatten(1, (groups, more.shape[1] // groups)).sum(2)
    index = places[:, None, :, None].expand_as(summed)
    return x.scatter_add(2, index, summed.to(x.dtype))


class _Beside(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, places: Tensor, seen: Tensor, mine: Tensor, theirs: Tensor,
        left: int, right: int, scale: float,
    ) -> Tensor:  # fmt: skip
        y, ends = torch.ops.xt.attend_window(q, k, v, mine, theirs, left, right, scale)
        keys, values = _picked(k, places, q.shape[1]), _picked(v, places, q.shape[1])
        scores = _scores(q, keys, seen, scale)
        # A query whose window is empty is told by +inf, and one that sees nothing at all is to be told so as well.
        near = ends.masked_fill(ends == float("inf"), float("-inf"))
        far = torch.logsumexp(scores / LOG2E, -1) * LOG2E
        total = torch.logaddexp2(near, far)
        total = total.masked_fill(total == float("-inf"), float("inf"))
        weights = torch.exp2(scores - total[..., None]).to(v.dtype)
        y = (y * torch.exp2(near - total)[..., None] + weights @ values).to(y.dtype)
        ctx.save_for_backward(q, k, v, places, seen, mine, theirs, y, total)
        ctx.numbers = left, right, scale
        return y  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        q, k, v, places, seen, mine, theirs, y, total = ctx.saved_tensors
        dq, dk, dv = torch.ops.xt.attend_window_back(dy, q, k, v, mine, theirs, y, total, *ctx.numbers)
        keys, values = _picked(k, places, q.shape[1]), _picked(v, places, q.shape[1])
        scale = ctx.numbers[2]
        weights = torch.exp2(_scores(q, keys, seen, scale) - total[..., None])
        delta = (dy.float() * y).sum(-1, keepdim=True)
        slopes = (weights * ((dy @ values.transpose(-1, -2)).float() - delta) * scale).to(q.dtype)
        dq = dq + slopes @ keys
        dk = _added(dk, places, slopes.transpose(-1, -2) @ q)
        dv = _added(dv, places, weights.to(dy.dtype).transpose(-1, -2) @ dy)
        return dq, dk, dv, *(None,) * 7


def attend(
    q: Tensor, k: Tensor, v: Tensor, places: Tensor, seen: Tensor, mine: Tensor, theirs: Tensor, left: int, right: int,
    scale: float,
) -> Tensor:  # fmt: skip
    """(B, H, T, D) of q (B, H, T, D), k and v (B, G, T, D).

    places (B, E): the keys that are seen besides, which labels hide from the window; seen (B, 1, 1|T, E): by whom.
    Labels int32 (B, T) as in window.py.
    """
    y: Tensor = _Beside.apply(q, k, v, places, seen, mine, theirs, left, right, scale)  # type: ignore[no-untyped-call]
    return y
