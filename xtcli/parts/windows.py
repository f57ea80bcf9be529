"""Windows of slots around each query, for a kernel of ours that finds the keys of a query by arithmetic.

The kernel is fast/window.py. A pair inside the window counts where query and key have the same label. A short text is
one window too: `takes` says where the kernel is then faster than PyTorch's.

Axes: B rows, H query heads, G key/value heads, T tokens, D head width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from xtcli import fast
from xtcli.parts import masks
from xtcli.parts.context import Visible
from xtcli.parts.linear import narrowed
from xtcli.registry import Config

ALONE, NOTHING = -2, -3
"""Labels of queries that see themselves alone, and that see nothing."""

WIDTHS = (16, 32, 64, 128)
"""Widths of a head that the kernel takes."""

KINDS: tuple[torch.dtype, ...] = (torch.float16, torch.bfloat16)
"""What it multiplies."""

BESIDE = 64
"""Keys besides a window that the kernels take at most."""

SHORT_WIDTH, SHORT_STEP = 64, 64
"""Width of a head, and what the tokens are a multiple of, with which short texts were measured."""

PAST, ALL = 1024, 1024
PAST_OF_GROUPS, ALL_OF_GROUPS = 2048, 512
"""Tokens up to which the kernel is faster on an H200, forward and backward together: those that see the past and those
that see everything, in heads of their own and in groups that share keys."""


@dataclass(frozen=True)
class Near:
    """Query t sees the keys from t - left to t + right. labels: int32 (B, T) of queries and of keys, or None.

    beside: places (B, E) of keys that labels hide from the window and that are seen besides, T where a row has fewer,
    and who sees them (B, 1, 1|T, E). The queries there are labelled NOTHING.
    """

    left: int
    right: int
    labels: tuple[Tensor, Tensor] | None
    beside: tuple[Tensor, Tensor] | None = None

    def takes(self, width: int, dtype: torch.dtype) -> bool:
        """Whether the kernel attends with heads of this width."""
        return width in WIDTHS and dtype in KINDS

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """q (B, H, T, D), k and v (B, G, T, D) -> (B, H, T, D), where there are no keys besides."""
        assert self.beside is None, "keys besides a window want what is found at their places"
        mine, theirs = (None, None) if self.labels is None else self.labels
        y: Tensor = torch.ops.xt.attend_window(q, k, v, mine, theirs, self.left, self.right, scale)[0]
        return y

    def attend_beside(self, q: Tensor, k: Tensor, v: Tensor, scale: float, found: Tensor) -> Tensor:
        """The same with keys besides; found (B, H, E, D) is put in their places."""
        from xtcli.fast import windowaside

        assert self.beside is not None and self.labels is not None
        return windowaside.attend(q, k, v, *self.beside, *self.labels, self.left, self.right, scale, found)


def of_rule(
    rule: Config, device: torch.device, labels: tuple[Tensor, Tensor] | None, alone: Tensor | None
) -> Near | None:
    """The window that a rule is, if it is one and the kernel runs on this device. alone (B, T): queries that see
    themselves alone."""
    stretch = masks.stretch(rule)
    if stretch is None or not runs_on(device):
        return None
    left, right = stretch
    if left is None or right is None:
        return None
    # The kernels enter the operator that `attend` calls.
    from xtcli.fast import window  # noqa: F401

    if labels is not None and alone is not None:
        labels = torch.where(alone, ALONE, labels[0]), labels[1]
    return Near(left, right, labels)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def runs_on(device: torch.device) -> bool:
    """Whether the kernel runs there: its tiles are those of compute capability 9.0.

    Compiled code does not ask again.
    """
    return fast.runs_on(device) and torch.cuda.get_device_capability(device) == (9, 0)


def takes(q: Tensor, k: Tensor, v: Tensor, visible: Visible, dropout: float) -> bool:
    """Whether q (B, H, T, D) attend to k and v (B, G, S, D) faster by the kernel than by PyTorch's, with gradients."""
    if dropout or visible.mask is not None or not (torch.is_grad_enabled() and q.requires_grad):
        return False
    (_, heads, length, width), alike = q.shape, k.shape == v.shape and k.shape[2] == q.shape[2]
    if not alike or width != SHORT_WIDTH or length % SHORT_STEP or not runs_on(q.device):
        return False
    past, everything = (PAST, ALL) if k.shape[1] == heads else (PAST_OF_GROUPS, ALL_OF_GROUPS)
    return length <= (past if visible.causal else everything) and narrowed(q)[0].dtype in KINDS


def attend(q: Tensor, k: Tensor, v: Tensor, visible: Visible, scale: float) -> Tensor:
    """What `takes` agreed to: q (B, H, T, D), k and v (B, G, T, D) -> (B, H, T, D)."""
    # The kernels enter the operator.
    from xtcli.fast import window  # noqa: F401

    length = q.shape[2]
    q, k, v = narrowed(q, k, v)
    return Near(length, 0 if visible.causal else length, None).attend(q, k, v, scale)
