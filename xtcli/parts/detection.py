"""Telling which tokens of a text are not the ones that stood there (Clark et al. 2020, arXiv:2003.10555).

replaced    p(token t was replaced) = sigmoid(w . act(dense(h_t)) + b), one logit a token
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from xtcli import registry
from xtcli.parts.activations import ACTIVATIONS, Activation
from xtcli.parts.heads import Head, Hidden
from xtcli.parts.linear import Linear, widen
from xtcli.parts.outputs import IGNORE, Term
from xtcli.parts.scope import Scope
from xtcli.registry import Config, field, part


@part("head", "replaced")
class Replaced(Head):
    """A logit (B, T) for each token: above 0, it looks replaced."""

    class Config(registry.Config):
        """Replaced-token detection."""

        act: Activation = field("activation between the two linear layers", "gelu")

    def __init__(self, config: Config, scope: Scope) -> None:
        super().__init__()
        self.dense = Linear(scope.dim, scope.dim, True)
        self.act = ACTIVATIONS[config.act]
        self.classifier = Linear(scope.dim, 1, True, "head")

    def outputs(self, hidden: Hidden) -> dict[str, Tensor]:
        return {"logits": self.classifier(self.act(self.dense(hidden.states))).squeeze(-1)}

    def loss(self, hidden: Hidden, targets: Tensor) -> Term:
        """Binary cross-entropy of targets (B, T), 1 = replaced, over the tokens that are no padding."""
        logits = widen(self.outputs(hidden)["logits"])
        counted = targets != IGNORE
        if hidden.keep is not None:
            counted = counted & hidden.keep
        losses = F.binary_cross_entropy_with_logits(logits, targets.to(logits.dtype), reduction="none")
        return Term((losses * counted).sum(), counted.sum())
