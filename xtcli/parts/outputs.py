"""What a model returns, by the field's names, and the terms of its loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from xtcli.parts.linear import widen

IGNORE = -100
"""A target that is not supervised."""

NAMES = (
    "loss logits mc_loss mc_logits prediction_logits seq_relationship_logits sop_logits start_logits end_logits "
    "last_hidden_state pooler_output hidden_states encoder_last_hidden_state encoder_hidden_states "
    "decoder_hidden_states aux_loss z_loss router_logits router_probs encoder_aux_loss encoder_z_loss decoder_aux_loss "
    "decoder_z_loss encoder_router_logits decoder_router_logits mems losses prediction_scores start_top_log_probs "
    "start_top_index end_top_log_probs end_top_index cls_logits reconstruction mlm_loss mep_loss entity_logits "
    "entity_last_hidden_state entity_hidden_states logits_ngram last_hidden_state_ngram hidden_states_ngram "
    "decoder_ngram_hidden_states state"
).split()


class Output(dict[str, Any]):
    """Outputs by name, as items and as attributes; one that this call did not make is None.

    Indexing by a number counts the outputs that were made, in order.
    """

    def __getattr__(self, name: str) -> Any:
        if name in self or name in NAMES:
            return self.get(name)
        raise AttributeError(f"no output is named {name!r}")

    def __getitem__(self, key: Any) -> Any:
        return self.to_tuple()[key] if isinstance(key, int | slice) else super().__getitem__(key)

    def to_tuple(self) -> tuple[Any, ...]:
        """The outputs that were made, in order."""
        return tuple(self.values())


@dataclass(frozen=True)
class Term:
    """One head's share of the loss: a sum over `count` supervised targets."""

    sum: Tensor
    count: Tensor
    weight: float = 1.0

    def mean(self) -> Tensor:
        """Mean loss of a target; 0 where none is supervised."""
        return self.sum / self.count.clamp(min=1)


def cross_entropy(logits: Tensor, targets: Tensor, smoothing: float = 0.0) -> Term:
    """Summed cross-entropy of logits (..., C) against targets (...), float32, IGNORE left out.

    `smoothing` is the share of each target that is spread over all classes alike.
    """
    flat = targets.reshape(-1)
    wide = widen(logits.reshape(-1, logits.shape[-1]))
    total = F.cross_entropy(wide, flat, ignore_index=IGNORE, reduction="sum", label_smoothing=smoothing)
    return Term(total, (flat != IGNORE).sum())


def shifted(labels: Tensor) -> Tensor:
    """Labels (..., T) moved one place to the left, so that each place holds its successor."""
    return torch.cat((labels[..., 1:], torch.full_like(labels[..., :1], IGNORE)), dim=-1)
