"""From scores to weights, and the two ways to attend.

    softmax   exp(s) / sum exp(s)
    softcap   softmax(cap tanh(s / cap))        (Gemma 2)

`fused` hands q, k, v and the mask to PyTorch's kernels; `plain` is the specification, in tensors, and
serves every kind of score. Both take q (B, H, T, D), k and v (B, G, S, D) and give (B, H, T, D).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from xtcli import registry
from xtcli.parts.context import Visible
from xtcli.parts.linear import widen
from xtcli.registry import field, part


class Score:
    """A kind of score; `fused` says whether PyTorch's attention kernels can express it."""

    fused = False
    wide = False  # whether queries and keys are multiplied in float32 whatever their type

    @staticmethod
    def weights(config: Any, scores: Tensor, hidden: Tensor | None) -> Tensor:
        """Weights (B, H, T, S), float32, that sum to 1 over S; `hidden` is True where a key must not be seen."""
        raise AssertionError("a score kind must give weights")


@part("score", "softmax")
class Softmax(Score):
    """The ordinary one."""

    fused = True

    class Config(registry.Config):
        """Softmax over the keys."""

    @staticmethod
    def weights(config: Any, scores: Tensor, hidden: Tensor | None) -> Tensor:
        if hidden is not None:
            scores = scores.masked_fill(hidden, float("-inf"))
        return widen(scores).softmax(-1)


@part("score", "softmax-wide")
class WideSoftmax(Softmax):
    """Scores and their softmax in float32, so that half-precision scores cannot overflow."""

    fused = False
    wide = True


@part("score", "softcap")
class Softcap(Score):
    """Scores bent into (-cap, cap) before the softmax."""

    class Config(registry.Config):
        """Softmax over bounded scores."""

        cap: float = field("bound of the scores", gt=0, example=5.0)

    @staticmethod
    def weights(config: Any, scores: Tensor, hidden: Tensor | None) -> Tensor:
        return Softmax.weights(config, config.cap * torch.tanh(scores / config.cap), hidden)


def fused(q: Tensor, k: Tensor, v: Tensor, visible: Visible, scale: float, dropout: float) -> Tensor:
    """PyTorch's scaled-dot-product attention."""
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
    q: Tensor, k: Tensor, v: Tensor, visible: Visible, scale: float, dropout: float, kind: type, config: Any
) -> Tensor:
    """Attention written out; any score kind."""
    groups = q.shape[1] // k.shape[1]
    if groups > 1:
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    if kind.wide:  # type: ignore[attr-defined]
        q, k = q.float(), k.float()
    scores = q @ k.transpose(-1, -2) * scale  # (B, H, T, S)
    hidden = None
    if visible.causal:
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
    elif visible.mask is not None and visible.mask.dtype == torch.bool:
        hidden = ~visible.mask
    elif visible.mask is not None:
        hidden = visible.mask == float("-inf")
        scores = scores + visible.mask.masked_fill(hidden, 0.0)
    weights = kind.weights(config, scores, hidden).to(v.dtype)  # type: ignore[attr-defined]
    return F.dropout(weights, dropout, training=dropout > 0) @ v


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
