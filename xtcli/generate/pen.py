"""Choosing one token after another: logits to tokens on the device, tokens to the host."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from xtcli.errors import refuse
from xtcli.generate.feed import Feed
from xtcli.generate.rules import Rules
from xtcli.generate.sampling import Sampling, draw, penalise

BROKEN = ("the model's logits are not numbers", "its weights are damaged, or try --dtype fp32")


def pick(logits: Tensor, sampling: Sampling, seen: Tensor | None, numbers: Tensor | None) -> tuple[Tensor, Tensor]:
    """The next token of each row (B,), and the same for the host: -1 where logits (B, V) are no numbers.

    seen (B, V): tokens that a row has, for the penalty; numbers (B,): random bits, None for the likeliest token.
    """
    if seen is not None:
        logits = penalise(logits, seen, sampling.repetition_penalty)
    if numbers is None:
        chosen = logits.argmax(-1)
        weight = logits.gather(-1, chosen[:, None])[:, 0]
    else:
        probabilities = sampling.probabilities(logits)
        chosen = draw(probabilities, numbers)
        weight = probabilities.gather(-1, chosen[:, None])[:, 0]
    return chosen, torch.where(weight.isfinite(), chosen, -1)


def choose(logits: Tensor, sampling: Sampling, seen: Tensor | None, numbers: Tensor | None) -> tuple[Tensor, list[int]]:
    """The next token of each row, on the device and on the host; raises UserError where logits are no numbers."""
    chosen, told = pick(logits, sampling, seen, numbers)
    host: list[int] = told.tolist()
    if -1 in host:
        raise refuse(*BROKEN)
    return chosen, host


class Pen:
    """Writes the rows of a feed step by step; the host looks at the device once a step.

    numbers (B, steps): random bits of each row's tokens, None for the likeliest.
    """

    def __init__(self, feed: Feed, rules: Rules, logits: Tensor, numbers: Tensor | None) -> None:
        self.feed, self.rules, self.logits, self.numbers = feed, rules, logits, numbers
        self.seen = feed.seen(rules.vocab) if rules.sampling.repetition_penalty != 1 else None
        self.chosen: Tensor

    def take(self, step: int, budgets: Sequence[int]) -> list[int]:
        """Token `step` of each row, counted from 0; `budgets` are the rows' own."""
        if step > 0:
            self.logits = self.feed.step(self.chosen)
        self.logits = self.rules.force(self.logits[:, : self.rules.vocab], step, budgets)
        numbers = None if self.numbers is None else self.numbers[:, step]
        self.chosen, host = choose(self.logits, self.rules.sampling, self.seen, numbers)
        if self.seen is not None:
            self.seen.scatter_(1, self.chosen[:, None], True)
        return host

    def select(self, going: list[int]) -> None:
        """Leave out all rows but these."""
        keep = torch.tensor(going, device=self.logits.device)
        self.feed.select(keep)
        self.chosen = self.chosen[keep]
        self.seen = None if self.seen is None else self.seen[keep]
        self.numbers = None if self.numbers is None else self.numbers[keep]
