"""Dropout: of single numbers, or of whole channels of a row, which are then missing at all its places.

Channels are dropped as in Tompson et al. 2014, arXiv:1411.4280.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F


class ChannelDropout(nn.Dropout):
    """In training each channel of each row is 0 with chance p, the others grow by 1 / (1 - p)."""

    def forward(self, x: Tensor) -> Tensor:
        """x (B, ..., D) -> the same."""
        kept = x.new_ones(x.shape[0], *[1] * (x.dim() - 2), x.shape[-1])
        return x * F.dropout(kept, self.p, self.training) if self.training and self.p else x


def make_dropout(rate: float, channels: bool) -> nn.Dropout:
    """A dropout of numbers, or of channels."""
    return ChannelDropout(rate) if channels else nn.Dropout(rate)
