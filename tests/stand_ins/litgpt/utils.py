"""The loss."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def chunked_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100)
