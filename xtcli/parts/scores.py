"""From scores to weights.

A kind of score is a stage of this path, and every other stage is passed through unchanged:

    raw       residual        s + the raw scores of the attention before           He et al. 2021, arXiv:2012.11747
              talking-heads   sum_h s[h] pre[h, k]                                 Shazeer et al. 2020, arXiv:2003.02436
                              + positions
    bound     softcap         cap tanh(s / cap)                                    (Gemma 2)
                              hidden keys are struck out
    choose    top-k           keys below the k-th best are struck out too          Zhao et al. 2019, arXiv:1912.11637
    normal    softmax         exp(s) / sum exp(s)
              entmax          see entmax.py
                              dropout
    mixed     talking-heads   sum_k p[k] post[k, g]

A stage that stands alone ends in a softmax; `chain` joins several, in the order of the path, which is the one in
which they compose: heads mix before a key is hidden (a sum with -inf would hide it from all heads, or be no
number), and keys are ranked after (or the future would take the places of the past). The softmax is float32.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Annotated, Literal, Self

import torch
from pydantic import Strict, model_validator
from pydantic_core import PydanticCustomError
from torch import Tensor, nn

from xtcli import registry
from xtcli.parts.context import Ctx
from xtcli.parts.entmax import entmax15
from xtcli.parts.linear import Draw, widen
from xtcli.parts.scope import Impossible, Scope
from xtcli.registry import Config, Slot, field, part, part_of

ScoreSlot = Annotated[Config, Slot("score")]


@dataclass(frozen=True)
class Sizes:
    """What a score is told of its attention: query heads, persistent keys, whether it reads an encoder's memory, and
    whether its scores, (B, H, T, S) once in a pass, may be carried on."""

    heads: int
    memory: int = 0
    cross: bool = False
    carries: bool = True


class Score(nn.Module):
    """One stage; `fused` says whether PyTorch's kernels can express it, `wide` whether q and k are multiplied in
    float32 whatever their type, `step` where on the path it stands."""

    fused = False
    wide = False
    step = 0

    def __init__(self, config: Config, scope: Scope, sizes: Sizes) -> None:
        super().__init__()

    def raw(self, scores: Tensor, ctx: Ctx | None) -> Tensor:
        """Scores (B, H, T, S) before positions and mask."""
        return scores

    def bound(self, scores: Tensor) -> Tensor:
        """Scores with positions, before the mask."""
        return scores

    def choose(self, scores: Tensor, hidden: Tensor | None) -> Tensor | None:
        """True where a key is not seen, hidden or not chosen; None where all are."""
        return hidden

    def normal(self, scores: Tensor) -> Tensor:
        """Weights that sum to 1 over S, from scores with -inf for what is not seen."""
        return widen(scores).softmax(-1)

    def mixed(self, weights: Tensor) -> Tensor:
        """Weights after dropout."""
        return weights

    def weights(self, scores: Tensor, hidden: Tensor | None) -> Tensor:
        """Weights (B, H, T, S), float32, that sum to 1 over S; `hidden` is True where a key must not be seen."""
        scores = self.bound(scores)
        hidden = self.choose(scores, hidden)
        return self.normal(scores if hidden is None else scores.masked_fill(hidden, float("-inf")))


@part("score", "residual")
class Residual(Score):
    """Adds the raw scores of the attention before, of the same sort: self- and cross-attention each have a chain.

    What is carried is the sum before positions, mixing and mask, so that a bias counts once and a key that one layer
    hides is not lost to the next. `mean` divides the sum by the layer's place in the chain, from 1.
    """

    step = 1

    class Config(registry.Config):
        """Scores carried from layer to layer."""

        mean: bool = field("the mean of the scores so far in place of their sum", False)

    def __init__(self, config: Config, scope: Scope, sizes: Sizes) -> None:
        super().__init__(config, scope, sizes)
        if scope.shared is None or not sizes.carries:
            raise Impossible("", "this attention has no scores that another could carry on", "leave residual out")
        self.chain, self.layer = scope.shared.link(scope, sizes)
        self.mean = config.mean

    def raw(self, scores: Tensor, ctx: Ctx | None) -> Tensor:
        assert ctx is not None, "an attention gives its context to its scores"
        carried = dict(ctx.ledger.numbered(self.chain))
        # A layer that is passed over leaves nothing, and the scores come from the one before it.
        for number in range(self.layer - 1, -1, -1):
            if number in carried:
                scores = scores + carried[number]
                break
        ctx.ledger.leave(self.chain, self.layer, scores)
        return scores / (self.layer + 1) if self.mean else scores

    def extra_repr(self) -> str:
        return "the mean of the scores so far" if self.mean else "the sum of the scores so far"


@part("score", "talking-heads")
class TalkingHeads(Score):
    """Mixes the scores of all heads, and their weights; after that a row no longer sums to 1."""

    step = 2

    class Config(registry.Config):
        """Heads that exchange scores and weights."""

        pre: bool = field("mixes the scores", True)
        post: bool = field("mixes the weights", True)
        start: Literal["identity", "normal"] = field("from unmixed heads, or from N(0, 1)", "identity")

    def __init__(self, config: Config, scope: Scope, sizes: Sizes) -> None:
        super().__init__(config, scope, sizes)
        if not config.pre and not config.post:
            raise Impossible("", "talking heads mix neither scores nor weights", "set pre or post")
        shape = (sizes.heads, sizes.heads)
        self.pre = nn.Parameter(torch.empty(shape)) if config.pre else None
        self.post = nn.Parameter(torch.empty(shape)) if config.post else None
        self.start = config.start

    def draw(self, normal: Draw) -> None:
        for parameter in self.parameters(recurse=False):
            if self.start == "identity":
                nn.init.eye_(parameter)
            else:
                normal(parameter, 1.0)

    def raw(self, scores: Tensor, ctx: Ctx | None) -> Tensor:
        return scores if self.pre is None else _mix(scores, self.pre)

    def mixed(self, weights: Tensor) -> Tensor:
        return weights if self.post is None else _mix(weights, self.post)


def _mix(x: Tensor, matrix: Tensor) -> Tensor:
    """x (B, H, T, S), matrix (H, K) -> (B, K, T, S)."""
    return torch.einsum("bhts,hk->bkts", x, matrix.to(x.dtype))


@part("score", "softcap")
class Softcap(Score):
    """Scores bent into (-cap, cap) before the softmax."""

    step = 3

    class Config(registry.Config):
        """Softmax over bounded scores."""

        cap: float = field("bound of the scores", gt=0, example=5.0)

    def __init__(self, config: Config, scope: Scope, sizes: Sizes) -> None:
        super().__init__(config, scope, sizes)
        self.cap = config.cap

    def bound(self, scores: Tensor) -> Tensor:
        return self.cap * torch.tanh(scores / self.cap)

    def extra_repr(self) -> str:
        return f"cap={self.cap}"


@part("score", "top-k")
class TopK(Score):
    """Only the k best visible keys of a query, and whatever ties with the last of them."""

    step = 4

    class Config(registry.Config):
        """Softmax over the best keys."""

        k: int = field("keys that a query attends to", 8, gt=0)

    def __init__(self, config: Config, scope: Scope, sizes: Sizes) -> None:
        super().__init__(config, scope, sizes)
        self.k = config.k

    def choose(self, scores: Tensor, hidden: Tensor | None) -> Tensor | None:
        seen = scores if hidden is None else scores.masked_fill(hidden, float("-inf"))
        # With fewer than k visible keys the k-th best is -inf, and nothing is below it.
        last = seen.topk(min(self.k, seen.shape[-1]), dim=-1).values[..., -1:]
        return seen < last if hidden is None else hidden | (seen < last)

    def extra_repr(self) -> str:
        return f"k={self.k}"


@part("score", "softmax")
class Softmax(Score):
    """The ordinary one."""

    fused = True
    step = 5

    class Config(registry.Config):
        """Softmax over the keys."""


@part("score", "softmax-wide")
class WideSoftmax(Softmax):
    """Scores and their softmax in float32, so that half-precision scores cannot overflow."""

    fused = False
    wide = True


@part("score", "entmax")
class Entmax(Score):
    """1.5-entmax: keys far below the best get exactly nothing."""

    step = 5

    class Config(registry.Config):
        """1.5-entmax over the keys."""

    def normal(self, scores: Tensor) -> Tensor:
        return entmax15(widen(scores))


ORDER = "residual, talking-heads, softcap, top-k, then softmax, softmax-wide or entmax"


@part("score", "chain")
class Chain(Score):
    """Several stages, in the order of the path."""

    class Config(registry.Config):
        """Several kinds of score one after the other."""

        of: Annotated[tuple[ScoreSlot, ...], Strict(False)] = field(
            f"the kinds, in this order: {ORDER}", example=("talking-heads", "top-k", "entmax"), min_length=1
        )

        @model_validator(mode="after")
        def _in_order(self) -> Self:
            for config in self.of:
                if config.kind == "chain":
                    raise PydanticCustomError("score_chain", "a chain holds no chain; list its kinds here")
            for before, after in itertools.pairwise(self.of):
                first, second = part_of(before).step, part_of(after).step
                if first >= second:
                    why = "both stand at one place" if first == second else f"'{after.kind}' comes before"
                    raise PydanticCustomError(
                        "score_chain",
                        "{second} cannot follow {first}: {why}; the order is {order}",
                        {"first": repr(before.kind), "second": repr(after.kind), "why": why, "order": ORDER},
                    )
            return self

    def __init__(self, config: Config, scope: Scope, sizes: Sizes) -> None:
        super().__init__(config, scope, sizes)
        self.of = nn.ModuleList(scope.make(f"of.{i}", stage, sizes) for i, stage in enumerate(config.of))
        kinds = [part_of(stage) for stage in config.of]
        self.fused, self.wide = all(kind.fused for kind in kinds), any(kind.wide for kind in kinds)

    def raw(self, scores: Tensor, ctx: Ctx | None) -> Tensor:
        for stage in self.of:
            scores = stage.raw(scores, ctx)  # type: ignore[operator]
        return scores

    def bound(self, scores: Tensor) -> Tensor:
        for stage in self.of:
            scores = stage.bound(scores)  # type: ignore[operator]
        return scores

    def choose(self, scores: Tensor, hidden: Tensor | None) -> Tensor | None:
        for stage in self.of:
            hidden = stage.choose(scores, hidden)  # type: ignore[operator]
        return hidden

    def normal(self, scores: Tensor) -> Tensor:
        return self.of[-1].normal(scores)  # type: ignore[operator, no-any-return]

    def mixed(self, weights: Tensor) -> Tensor:
        for stage in self.of:
            weights = stage.mixed(weights)  # type: ignore[operator]
        return weights
