"""Routers: which experts each token passes through, and with what weight.

    top-k       the k likeliest; weights are their probabilities, made to sum to 1    Shazeer 2017, arXiv:1701.06538
    capacity    the likeliest; weight is its probability                              Fedus 2021, arXiv:2101.03961

Probabilities p = softmax(W x), over all experts. Under `capacity` an expert takes so many tokens of each row, first
come, first served, and those behind go past it. That looks back only, so a causal model stays causal; in decoding the
state is how many tokens each expert has been asked for.

Axes: B rows, T tokens, E experts, K choices of a token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from xtcli import registry
from xtcli.parts.context import Ctx
from xtcli.parts.linear import Linear, exactly, widen
from xtcli.parts.scope import Impossible, Scope
from xtcli.registry import field, part


@dataclass(frozen=True)
class Routes:
    """`experts` (B, T, K), E where a token goes past; `weights` (B, T, K); `logits` (B, T, E) before the softmax."""

    experts: Tensor
    weights: Tensor
    logits: Tensor


@dataclass
class Asked:
    """How many tokens of each row have asked for each expert, (B, E)."""

    counts: Tensor

    def select(self, rows: Tensor) -> None:
        self.counts = self.counts[rows]


class Router(nn.Module):
    """A linear layer over the experts. `choices` is K."""

    choices = 1

    class Config(registry.Config):
        """A linear layer over the experts."""

        bias: bool = field("adds a bias to the logits", False)
        jitter: float = field(
            "in training, inputs of the router are multiplied by 1 - jitter ... 1 + jitter", 0.0, ge=0
        )

    def __init__(self, config: Config, scope: Scope, experts: int) -> None:
        super().__init__()
        self.classifier = Linear(scope.dim, experts, config.bias)
        self.experts, self.jitter = experts, config.jitter

    def new_state(self, batch: int, capacity: int, device: Any, dtype: Any) -> Asked | None:
        """What decoding remembers of the tokens before."""
        return None

    def most(self, batch: int, length: int) -> int:
        """The most (token, expert) pairs that B x T tokens can make."""
        return batch * length * self.choices

    def noisy(self, x: Tensor) -> Tensor:
        """The inputs, jittered in training."""
        if not self.training or self.jitter == 0.0:
            return x
        return x * torch.empty_like(x).uniform_(1.0 - self.jitter, 1.0 + self.jitter)

    def best(self, probs: Tensor, ctx: Ctx) -> Tensor:
        """The likeliest experts (B, T, K) of each token, likeliest first; the same where a part is computed again."""

        def choose() -> Tensor:
            # Of equals the first is taken where there is one choice, which topk does not promise.
            return probs.argmax(-1, keepdim=True) if self.choices == 1 else probs.topk(self.choices, -1).indices

        return choose() if ctx.decisions is None else ctx.decisions.settle(choose)

    def forward(self, x: Tensor, real: Tensor | None, ctx: Ctx) -> Routes:
        """x (B, T, D); `real` (B, T) is False at padding, None where there is none."""
        raise AssertionError("a router must give routes")

    def report(self, logits: Tensor, experts: Tensor) -> Any:
        """What the reference's outputs hold for one layer."""
        raise AssertionError("a router must say what it reports")


@part("router", "top-k")
class TopK(Router):
    """The k likeliest experts of each token, however many others want them."""

    class Config(Router.Config):
        """The k likeliest experts."""

        choose: int = field("experts of each token", 2, gt=0, tiny=2)
        renormalise: bool = field("weights of a token's experts sum to 1", True)

    def __init__(self, config: Config, scope: Scope, experts: int) -> None:
        super().__init__(config, scope, experts)
        if config.choose > experts:
            raise Impossible("choose", f"{config.choose} of {experts} experts", f"choose at most {experts}")
        self.choices, self.renormalise = config.choose, config.renormalise

    def forward(self, x: Tensor, real: Tensor | None, ctx: Ctx) -> Routes:
        logits = self.classifier(self.noisy(x))
        probs = widen(logits).softmax(-1)
        experts = self.best(probs, ctx)
        weights = probs.gather(-1, experts)
        if self.renormalise:
            weights = weights / weights.sum(-1, keepdim=True)
        return Routes(experts, weights.to(x.dtype), logits)

    def report(self, logits: Tensor, experts: Tensor) -> Tensor:
        return logits.flatten(0, 1)


@part("router", "capacity")
class Capacity(Router):
    """The likeliest expert of each token, unless the row has filled it."""

    class Config(Router.Config):
        """The likeliest expert, while it has room."""

        capacity: int = field("tokens of a row that an expert takes", 64, gt=0, example=64)
        padding: bool = field("padding takes room like text", False)
        dtype: Literal["float32", "float16", "bfloat16"] = field("in which routes are computed", "float32")

    def __init__(self, config: Config, scope: Scope, experts: int) -> None:
        super().__init__(config, scope, experts)
        self.classifier.products = ()  # routes are computed in a type of their own
        self.capacity, self.padding = config.capacity, config.padding
        self.dtype: torch.dtype = getattr(torch, config.dtype)

    def new_state(self, batch: int, capacity: int, device: Any, dtype: Any) -> Asked:
        return Asked(torch.zeros(batch, self.experts, dtype=torch.long, device=device))

    def most(self, batch: int, length: int) -> int:
        return batch * min(length, self.experts * self.capacity)

    def forward(self, x: Tensor, real: Tensor | None, ctx: Ctx) -> Routes:
        with exactly(x):
            bias = self.classifier.bias
            logits = F.linear(
                self.noisy(x.to(self.dtype)),
                self.classifier.weight.to(self.dtype),
                None if bias is None else bias.to(self.dtype),
            )
            probs = logits.softmax(-1).to(x.dtype)
        chosen = self.best(probs, ctx)  # (B, T, 1)
        asked = F.one_hot(chosen[..., 0], self.experts)  # (B, T, E)
        if real is not None and not self.padding:
            asked = asked * real[..., None]
        state: Asked | None = ctx.state
        before = 0 if state is None else state.counts[:, None]
        queue = asked.cumsum(1) + before
        room = (asked * (queue <= self.capacity)).sum(-1) > 0
        if state is not None:
            state.counts = state.counts + asked.sum(1)
        return Routes(chosen.masked_fill(~room[..., None], self.experts), probs.gather(-1, chosen), logits)

    def report(self, logits: Tensor, experts: Tensor) -> tuple[Tensor, Tensor]:
        """Logits, and experts with 0 for a token that goes past."""
        return logits, experts.squeeze(-1) % self.experts
