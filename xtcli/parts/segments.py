"""Where the first of two texts ends: [CLS] first [SEP] second [SEP].

The first separator ends it, or the input `question_lengths` (B, 1) says how many tokens it has, with what stands before
it and with its separator.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

QUESTION = "question_lengths"
"""The name of the input."""

AWAY = 1e6
"""What is taken off the logits of places that cannot be chosen."""


def question_length(ids: Tensor | None, extras: Mapping[str, Tensor], separator: int) -> Tensor | None:
    """Tokens (B, 1) of the first text; None where nothing tells."""
    given = extras.get(QUESTION)
    if given is not None:
        return given.reshape(-1, 1)
    return None if ids is None else (ids == separator).int().argmax(-1, keepdim=True) + 1


def behind(ids: Tensor | None, extras: Mapping[str, Tensor], separator: int, length: int) -> Tensor | None:
    """Segments (B, T): 0 in the first text, 1 in the second."""
    ends = question_length(ids, extras, separator)
    return None if ends is None else (torch.arange(length, device=ends.device) >= ends).long()


def outside(logits: Tensor, ids: Tensor | None, extras: Mapping[str, Tensor], separator: int) -> Tensor:
    """Logits (B, T, N), AWAY less at the places of the first text but the very first."""
    ends = question_length(ids, extras, separator)
    if ends is None:
        return logits
    place = torch.arange(logits.shape[1], device=logits.device)
    return logits - AWAY * ((place < ends) & (place > 0))[..., None]
