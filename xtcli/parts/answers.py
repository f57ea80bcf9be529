"""Start and end of an answer found one after the other, and whether there is one (Yang et al. 2019, arXiv:1906.08237).

    start   w h_i                                   the most probable S places begin a beam each
    end     w norm(tanh(W [h_i ; h_start]))         the most probable E places of each beam
    none    w tanh(W [expected h_start ; h_cls])    no answer; h_cls stands at `cls_index`, or last

In training the end is looked for from the true start. `p_mask` (B, T) is 1 where no answer may begin or end.
What the field calls log_probs are probabilities.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from xtcli import registry
from xtcli.parts import norms
from xtcli.parts.heads import Head, Hidden, Labels
from xtcli.parts.linear import Linear
from xtcli.parts.norms import NormSlot, make_norm
from xtcli.parts.outputs import IGNORE, Term, cross_entropy
from xtcli.parts.scope import Scope
from xtcli.registry import field, part

HIDDEN = 1e30


class End(nn.Module):
    """Scores of each place as the end of an answer that begins at a known state."""

    def __init__(self, scope: Scope, norm: registry.Config) -> None:
        super().__init__()
        self.dense = Linear(2 * scope.dim, scope.dim, True)
        self.norm = make_norm(scope, "norm", norm)
        self.classifier = Linear(scope.dim, 1, True, "head")

    def forward(self, states: Tensor, starts: Tensor) -> Tensor:
        """states (B, T, D), starts (B, S, D) -> (B, T, S)."""
        shape = (states.shape[0], states.shape[1], starts.shape[1], states.shape[2])
        pairs = torch.cat((states[:, :, None].expand(shape), starts[:, None].expand(shape)), -1)
        return self.classifier(self.norm(torch.tanh(self.dense(pairs)))).squeeze(-1)  # type: ignore[no-any-return]


class NoAnswer(nn.Module):
    """One score of a text: high where it holds no answer."""

    def __init__(self, scope: Scope) -> None:
        super().__init__()
        self.dense = Linear(2 * scope.dim, scope.dim, True)
        self.classifier = Linear(scope.dim, 1, False, "head")

    def forward(self, start: Tensor, cls: Tensor) -> Tensor:
        """(B, D) each -> (B,)."""
        return self.classifier(torch.tanh(self.dense(torch.cat((start, cls), -1)))).squeeze(-1)  # type: ignore[no-any-return]


@part("head", "answers")
class Answers(Head):
    """Extractive question answering by beams; targets (B, 3): start, end, and 1 where there is no answer."""

    label = "start_positions"
    more_labels = ("end_positions", "is_impossible")
    reads = ("p_mask", "cls_index")

    class Config(registry.Config):
        """Question answering by beams."""

        starts: int = field("starts that are followed", 5, gt=0)
        ends: int = field("ends of each", 5, gt=0)
        norm: NormSlot = field("norm before the score of an end", norms.INHERIT)

    def __init__(self, config: Config, scope: Scope) -> None:
        super().__init__()
        self.starts, self.ends = config.starts, config.ends
        self.start = Linear(scope.dim, 1, True, "head")
        self.end = End(scope, config.norm)
        self.none = NoAnswer(scope)

    def begin(self, hidden: Hidden) -> Tensor:
        """Scores (B, T) of each place as a start."""
        return self.masked(self.start(hidden.states).squeeze(-1), hidden)

    def masked(self, scores: Tensor, hidden: Hidden) -> Tensor:
        """Scores (B, T) or (B, T, S) with what `p_mask` excludes pushed below all others."""
        mask = hidden.extras.get("p_mask")
        if mask is None:
            return scores
        mask = mask.to(scores.dtype).reshape(*mask.shape, *[1] * (scores.dim() - 2))
        low = HIDDEN if scores.dtype != torch.float16 else 65500
        return scores * (1 - mask) - low * mask

    def cls(self, hidden: Hidden) -> Tensor:
        """The state (B, D) that knows of no answer."""
        places = hidden.extras.get("cls_index")
        return hidden.states[:, -1] if places is None else at(hidden.states, places.reshape(-1, 1))[:, 0]

    def outputs(self, hidden: Hidden) -> dict[str, Tensor]:
        states, length = hidden.states, hidden.states.shape[1]
        chances = self.begin(hidden).softmax(-1)
        start, where = chances.topk(min(self.starts, length), -1)
        ends = self.masked(self.end(states, at(states, where)), hidden).softmax(1)
        end, ending = ends.topk(min(self.ends, length), 1)
        expected = torch.einsum("btd,bt->bd", states, chances)
        return {
            "start_top_log_probs": start,
            "start_top_index": where,
            "end_top_log_probs": end.flatten(1),
            "end_top_index": ending.flatten(1),
            "cls_logits": self.none(expected, self.cls(hidden)),
        }

    def loss(self, hidden: Hidden, targets: Tensor) -> Term:
        first = targets[:, :1]
        ends = self.masked(self.end(hidden.states, at(hidden.states, first.clamp(min=0))), hidden)[..., 0]
        terms = [cross_entropy(self.begin(hidden), targets[:, 0]), cross_entropy(ends, targets[:, 1])]
        total = terms[0].sum + terms[1].sum
        told = targets[:, 2] != IGNORE
        scores = self.none(at(hidden.states, first.clamp(min=0))[:, 0], self.cls(hidden))
        missing = F.binary_cross_entropy_with_logits(
            scores, targets[:, 2].clamp(min=0).to(scores.dtype), reduction="none"
        )
        # Half of its mean beside the mean of start and end: as many as both together count.
        return Term(total + (missing * told).sum(), terms[0].count + terms[1].count)

    def targets(self, labels: Labels, causal: bool) -> Tensor | None:
        start, end, none = (labels.get(name) for name in ("start_positions", "end_positions", "is_impossible"))
        if start is None or end is None:
            return None
        start, end = start.reshape(-1), end.reshape(-1)
        missing = torch.full_like(start, IGNORE) if none is None else none.reshape(-1).long()
        return torch.stack((start, end, missing), -1)


def at(states: Tensor, places: Tensor) -> Tensor:
    """states (B, T, D) at places (B, S) -> (B, S, D)."""
    return states.gather(1, places[..., None].expand(-1, -1, states.shape[-1]))
