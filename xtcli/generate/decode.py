"""Choosing one token after another for every row of a batch, until each row ends for its own reason.

    eos      the token that ends a text          length   as many tokens as were asked for
    stop     a stop string                       context  as many tokens as the model takes

Rows that have ended leave the batch when half of it has. How tokens are chosen and come to the host stands in pen.py
and ahead.py.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from xtcli.generate.ahead import pen_for
from xtcli.generate.feed import Feed
from xtcli.generate.pen import choose
from xtcli.generate.rules import Rules
from xtcli.generate.sampling import random_numbers
from xtcli.generate.stops import Text

__all__ = ["Choice", "Finish", "Piece", "Row", "Rules", "Timing", "choose", "decode"]

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


def decode(feed: Feed, rows: Sequence[Row], repeats: int, rules: Rules, timing: Timing) -> Iterator[Piece]:
    """Write all rows; each of the feed's prompts has `repeats` rows, one behind the other."""
    began = time.perf_counter()
    logits = feed.start()
    if repeats > 1:
        feed.select(torch.arange(len(rows) // repeats, device=logits.device).repeat_interleave(repeats))
        logits = logits.repeat_interleave(repeats, dim=0)
    alive = list(rows)
    most = max(row.budget for row in rows)
    numbers = None
    if not rules.sampling.greedy:
        numbers = random_numbers(rules.seed, [row.number for row in rows], most, logits.device)
    pen = pen_for(feed, rules, logits, numbers, [row.budget for row in rows])
    for step in range(most):
        host = pen.take(step, [row.budget for row in alive])
        if step == 0:
            timing.prefill_seconds += time.perf_counter() - began
            began = time.perf_counter()
        if rules.lens:
            _note(pen.logits, pen.chosen, [row if row.finish is None else None for row in alive], rules.lens)
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
        if 2 * len(going) <= len(alive):
            alive = [alive[at] for at in going]
            pen.select(going)
    timing.decode_seconds += time.perf_counter() - began


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
