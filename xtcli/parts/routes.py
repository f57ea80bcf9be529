"""Which kernel an attention runs on.

    what is seen                               kernel
    everything, a row of keys, the past        PyTorch's attention: cuDNN on Hopper, groups of heads as they are
    a window, in training, LEAST tokens up     fast/window.py on compute capability 9.0; without a bias
    everything or the past of a short text     the same, in training (windows.takes)
    else, in training, LEAST tokens or more    FlexAttention with a mask by blocks; lists of blocks by fast/blocks.py
    else                                       PyTorch's attention with a stored mask
    a learned bias of the distance, training   fast/distance.py, without a bias of all pairs
    other scores that are added and learned    PyTorch's attention: of its kernels the one that gives their gradient
    scores that are not softmax                tensors (`kernels.plain`)
    float32 on a CPU, no dropout               kernels of our own in C (fast/cpu/attention.py), up to a length

PyTorch chooses among its own kernels by itself; on one H100 its choice was the fastest of them wherever it was measured
(docs/log.md). FlexAttention is compiled for each shape and mask, which takes about ten seconds: that pays in training.
"""

from __future__ import annotations

import torch
from torch import Tensor

from xtcli import fast
from xtcli.parts.context import Ctx
from xtcli.registry import Config

LEAST = 1024
"""Tokens from which a mask by blocks is faster than a stored one: even at 512, half the time at 1,024."""

HALF = (torch.float16, torch.bfloat16)


def suits(x: Tensor) -> bool:
    """Whether FlexAttention pays for a stack that reads x (B, T, dim), if its masks are not plain ones."""
    return x.device.type == "cuda" and torch.is_grad_enabled() and x.shape[1] >= LEAST and _half(x)


def by_distance(rule: Config, x: Tensor, ctx: Ctx) -> bool:
    """Whether a rule over what enters a stack, x (B, T, dim), and a bias of the distance go to kernels of our own."""
    if not (fast.runs_on(x.device) and torch.is_grad_enabled() and _half(x)):
        return False
    placed = ctx.offset or ctx.prefix or ctx.prefix_reads or x.shape[1] != ctx.keys.shape[1]
    return not placed and ctx.documents is None and rule.kind in ("full", "causal")


def _half(x: Tensor) -> bool:
    """Whether products of what x enters are of 16 bits."""
    kind = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else x.dtype
    return kind in HALF


def by_blocks(rule: Config, bias: int | None, ctx: Ctx, queries: int) -> bool:
    """Whether a rule over this text, and what is added to its scores, is for FlexAttention, as all other kernels want a
    mask of all pairs; a text with places in front of it is not."""
    if ctx.offset or ctx.prefix or ctx.prefix_reads or queries != ctx.keys.shape[1]:
        return False
    plain = ("full",) if ctx.keep is not None else ("full", "causal")
    return ctx.documents is not None or bias is not None or rule.kind not in plain
