"""Answers to a question that stands before the text: [CLS] question [SEP] text [SEP].

    question-span   start, end = dense(norm(f(x) + x)), f a feed-forward; places of the question get -1e6

The question ends with the first separator, or is as long as the input `question_lengths` (B, 1) says. The same length
tells segments apart where none are given (`separator` of the token embedding).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from xtcli import registry
from xtcli.parts import norms
from xtcli.parts.activations import ACTIVATIONS, Activation
from xtcli.parts.heads import Hidden, Span
from xtcli.parts.linear import Linear
from xtcli.parts.norms import NormSlot, make_norm
from xtcli.parts.scope import Scope
from xtcli.parts.segments import QUESTION, question_length
from xtcli.registry import field, part

AWAY = 1e6
"""What is taken off the logits of places that cannot hold the answer."""


@part("head", "question-span")
class QuestionSpan(Span):
    """Start and end of an answer, through a feed-forward block, outside the question."""

    reads = (QUESTION,)

    class Config(registry.Config):
        """Extractive question answering where the question is a part of the text."""

        separator: int = field("id of the token that ends the question", 2, ge=0, tiny=511)
        hidden: int = field("inner width of the block", gt=0, tiny=256, example=96)
        act: Activation = field("activation of the block", "gelu")
        norm: NormSlot = field("norm behind the block", norms.INHERIT)
        dropout: float | None = field("dropout before and in the block; null = model.dropout", None, ge=0, lt=1)

    def __init__(self, config: Config, scope: Scope) -> None:
        nn.Module.__init__(self)
        self.separator = config.separator
        self.dropout = nn.Dropout(scope.dropout if config.dropout is None else config.dropout)
        self.up = Linear(scope.dim, config.hidden, True)
        self.act = ACTIVATIONS[config.act]
        self.down = Linear(config.hidden, scope.dim, True)
        self.norm = make_norm(scope, "norm", config.norm)
        self.classifier = Linear(scope.dim, 2, True, "head")

    def outputs(self, hidden: Hidden) -> dict[str, Tensor]:
        x = hidden.states
        inner = self.down(self.act(self.up(self.dropout(x))))
        logits = self.classifier(self.norm(self.dropout(inner) + x))
        ends = question_length(hidden.ids, hidden.extras, self.separator)
        if ends is not None:
            place = torch.arange(x.shape[1], device=x.device)
            question = (place < ends) & (place > 0)
            logits = logits - AWAY * question[..., None]
        start, end = logits.unbind(-1)
        return {"start_logits": start, "end_logits": end}
