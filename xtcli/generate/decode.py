"""Choosing one token after another for every row of a batch, until each row ends for its own reason.

    eos      the token that ends a text          length   as many tokens as were asked for
    stop     a stop string                       context  as many tokens as the model takes

Rows that have ended leave the batch when half of it has. The host looks at the device once a step.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from xtcli.errors import refuse
from xtcli.generate.feed import Feed
from xtcli.generate.sampling import Sampling, draw, penalise, random_numbers
from xtcli.generate.stops import Text

Finish = Literal["eos", "stop", "length", "context"]


@dataclass(frozen=True)
class Piece:
    """Text that a row has just said; `done` when nothing follows."""

    row: int
    text: str
    done: bool = False


@dataclass(frozen=True)
class Choice:
    """A token, the model's probability of it, and the likeliest tokens (id, probability) there."""

    token: int
    probability: float
    likeliest: list[tuple[int, float]]


@dataclass
class Row:
    """One text being written. `number` counts rows over all prompts and fixes the row's random numbers."""

    number: int
    text: Text
    budget: int
    bounded: bool
    tokens: list[int] = field(default_factory=list)
    choices: list[Choice] = field(default_factory=list)
    finish: Finish | None = None
    score: float | None = None

    def take(self, token: int, ends: frozenset[int], cut: bool = False) -> str:
        """Add a token and see whether the row ends; the text to print. `cut`: the token stands there by force."""
        self.tokens.append(token)
        said = ""
        if token in ends:
            self.finish = "eos" if not cut else "context" if self.bounded else "length"
        else:
            said = self.text.push(token)
            if self.text.stopped:
                self.finish = "stop"
            elif len(self.tokens) >= self.budget:
                self.finish = "context" if self.bounded else "length"
        if self.finish is not None:
            said += self.text.finish()
            if self.text.stopped:
                self.finish = "stop"
        return said


@dataclass
class Timing:
    """Seconds and tokens of reading prompts (until every row has its first token) and of writing."""

    prefill_seconds: float = 0.0
    prefill_tokens: int = 0
    decode_seconds: float = 0.0
    decode_tokens: int = 0

    @staticmethod
    def _rate(tokens: int, seconds: float) -> float | None:
        return tokens / seconds if tokens and seconds > 0 else None

    @property
    def prefill_rate(self) -> float | None:
        """Prompt tokens per second, None where nothing was measured."""
        return self._rate(self.prefill_tokens, self.prefill_seconds)

    @property
    def decode_rate(self) -> float | None:
        """New tokens per second over all rows, None where nothing was measured."""
        return self._rate(self.decode_tokens, self.decode_seconds)


@dataclass(frozen=True)
class Rules:
    """What holds for all rows. `vocab` is the number of ids that have a text; `lens` alternatives are noted.

    `first` is the token that every text begins with, `last` the one that ends a text at its limit; None is any.
    """

    sampling: Sampling
    ends: frozenset[int]
    vocab: int
    seed: int = 0
    lens: int = 0
    first: int | None = None
    last: int | None = None

    def force(self, logits: Tensor, step: int, budgets: Sequence[int]) -> Tensor:
        """Logits (B, V) of token `step`, in which only the token that must come is left in the rows that have one."""
        for token, rows in (
            (self.first, [step == 0] * len(budgets)),
            (self.last, [step == budget - 1 for budget in budgets]),
        ):
            if token is not None and any(rows):
                only = torch.full_like(logits[:1], float("-inf"))
                only[0, token] = 0.0
                logits = torch.where(torch.tensor(rows, device=logits.device)[:, None], only, logits)
        return logits


def decode(feed: Feed, rows: Sequence[Row], repeats: int, rules: Rules, timing: Timing) -> Iterator[Piece]:
    """Write all rows; each of the feed's prompts has `repeats` rows, one behind the other."""
    began = time.perf_counter()
    logits = feed.start()
    if repeats > 1:
        feed.select(torch.arange(len(rows) // repeats, device=logits.device).repeat_interleave(repeats))
        logits = logits.repeat_interleave(repeats, dim=0)
    sampling, alive = rules.sampling, list(rows)
    seen = feed.seen(rules.vocab) if sampling.repetition_penalty != 1 else None
    numbers = None
    if not sampling.greedy:
        most = max(row.budget for row in rows)
        numbers = random_numbers(rules.seed, [row.number for row in rows], most, logits.device)
    for step in range(max(row.budget for row in rows)):
        logits = rules.force(logits[:, : rules.vocab], step, [row.budget for row in alive])
        chosen, host = choose(logits, sampling, seen, None if numbers is None else numbers[:, step])
        if step == 0:
            timing.prefill_seconds += time.perf_counter() - began
            began = time.perf_counter()
        if rules.lens:
            _note(logits, chosen, [row if row.finish is None else None for row in alive], rules.lens)
        for row, token in zip(alive, host, strict=True):
            if row.finish is None:
                timing.decode_tokens += step > 0
                cut = rules.last is not None and step == row.budget - 1
                said = row.take(token, rules.ends, cut)
                if said or row.finish is not None:
                    yield Piece(row.number, said, row.finish is not None)
        going = [at for at, row in enumerate(alive) if row.finish is None]
        if not going:
            break
        if seen is not None:
            seen.scatter_(1, chosen[:, None], True)
        if 2 * len(going) <= len(alive):
            alive = [alive[at] for at in going]
            keep = torch.tensor(going, device=logits.device)
            feed.select(keep)
            chosen = chosen[keep]
            seen = None if seen is None else seen[keep]
            numbers = None if numbers is None else numbers[keep]
        logits = feed.step(chosen)
    timing.decode_seconds += time.perf_counter() - began


def choose(logits: Tensor, sampling: Sampling, seen: Tensor | None, numbers: Tensor | None) -> tuple[Tensor, list[int]]:
    """The next token of each row, on the device and on the host; raises UserError where logits are no numbers."""
    if seen is not None:
        logits = penalise(logits, seen, sampling.repetition_penalty)
    if numbers is None:
        chosen = logits.argmax(-1)
        weight = logits.gather(-1, chosen[:, None])[:, 0]
    else:
        probabilities = sampling.probabilities(logits)
        chosen = draw(probabilities, numbers)
        weight = probabilities.gather(-1, chosen[:, None])[:, 0]
    host = torch.where(weight.isfinite(), chosen, -1).tolist()
    if -1 in host:
        raise refuse("the model's logits are not numbers", "its weights are damaged, or try --dtype fp32")
    return chosen, host


def _note(logits: Tensor, chosen: Tensor, rows: Sequence[Row | None], count: int) -> None:
    """Write down the chosen tokens' probabilities and the likeliest tokens of rows still going."""
    logs = logits.log_softmax(-1)
    top = logs.topk(min(count, logs.shape[-1]))
    taken = zip(chosen.tolist(), logs.gather(-1, chosen[:, None])[:, 0].tolist(), strict=True)
    likeliest = zip(top.indices.tolist(), top.values.tolist(), strict=True)
    for row, (token, log), (ids, values) in zip(rows, taken, likeliest, strict=True):
        if row is not None:
            alternatives = [(i, math.exp(v)) for i, v in zip(ids, values, strict=True)]
            row.choices.append(Choice(token, math.exp(log), alternatives))
