"""The two ways to attend, and what masks they take.

`fused` hands q, k, v and the mask to kernels, PyTorch's or ours; `plain` is the specification, in tensors, and serves
every kind of score. Both take q (B, H, T, D), k and v (B, G, S, D) and give (B, H, T, D).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from xtcli.fast.cpu import attention as oncpu
from xtcli.parts import blockmasks, slides, windows
from xtcli.parts.context import Ctx, Visible
from xtcli.parts.linear import widen

OURS: dict[str, Any] = {"cpu": oncpu, "cuda": windows}
"""Kernels of our own by type of device: `takes` says whether they are for a call, and `attend` does it."""


def fused(q: Tensor, k: Tensor, v: Tensor, visible: Visible, scale: float, dropout: float) -> Tensor:
    """PyTorch's kernels, or ours; which of them, says routes.py."""
    if visible.blocks is not None:
        if dropout:
            raise AssertionError("a mask by blocks leaves no weights to drop")
        return blockmasks.attend(q, k, v, visible.blocks, scale)
    if visible.sliding is not None:
        return slides.attend(q, k, v, visible.sliding, scale, dropout)
    ours = OURS.get(q.device.type)
    if ours is not None and ours.takes(q, k, v, visible, dropout):
        return ours.attend(q, k, v, visible, scale)  # type: ignore[no-any-return]
    return pytorchs(q, k, v, visible, scale, dropout)


def pytorchs(q: Tensor, k: Tensor, v: Tensor, visible: Visible, scale: float, dropout: float) -> Tensor:
    """The kernel that PyTorch chooses for a stored mask or none."""
    return F.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=visible.mask,
        dropout_p=dropout,
        is_causal=visible.causal,
        scale=scale,
        enable_gqa=k.shape[1] != q.shape[1],
    )


def plain(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    visible: Visible,
    scale: float,
    dropout: float,
    score: Any,
    ctx: Ctx | None = None,
) -> Tensor:
    """Attention written out; any score."""
    groups = q.shape[1] // k.shape[1]
    if groups > 1:
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    if score.wide:
        q, k = widen(q), widen(k)
    scores = score.raw(q @ k.transpose(-1, -2) * scale, ctx)  # (B, H, T, S)
    hidden = None
    if visible.causal:
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
    elif visible.mask is not None and visible.mask.dtype == torch.bool:
        hidden = ~visible.mask
    elif visible.mask is not None:
        hidden = visible.mask == float("-inf")
        scores = scores + visible.mask.masked_fill(hidden, 0.0)
    weights = score.weights(scores, hidden).to(v.dtype)
    return score.mixed(F.dropout(weights, dropout, training=dropout > 0)) @ v  # type: ignore[no-any-return]


def add_scores(visible: Visible, extra: Tensor) -> Visible:
    """The mask with scores (B, H, T, S) added to it."""
    if visible.causal:
        seen = torch.ones(extra.shape[-2:], dtype=torch.bool, device=extra.device).tril()
        return Visible(extra.masked_fill(~seen, float("-inf")))
    if visible.mask is None:
        return Visible(extra)
    if visible.mask.dtype == torch.bool:
        return Visible(extra.masked_fill(~visible.mask, float("-inf")))
    return Visible(extra + visible.mask)


def add_keys(visible: Visible, count: int, q: Tensor) -> Visible:
    """The mask with `count` keys on the left that every query sees, without a bias; q (B, H, T, D)."""
    mask = visible.mask
    if visible.causal:
        mask = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool, device=q.device).tril()
    return visible if mask is None else Visible(F.pad(mask, (count, 0), value=float(mask.dtype == torch.bool)))
