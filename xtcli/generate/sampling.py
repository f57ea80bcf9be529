"""From logits to the next token: penalties, filters, and draws that a seed fixes for each row.

    penalty      l / r where l > 0, l * r where l < 0, for every token already in the row   (arXiv:1909.05858)
    temperature  l / t; 0 stands for greedy, the likeliest token
    top-k        the k likeliest tokens                                                     (arXiv:1805.04833)
    top-p        the fewest likeliest tokens that together have probability p               (arXiv:1904.09751)
    min-p        tokens with at least p times the probability of the likeliest              (arXiv:2407.01082)

They apply in this order. All work on float32 logits (B, V) and leave out a token by -inf.

Draws are made in whole numbers, which add up alike on every device: probabilities become counts of
2^-31, and draw r (31 random bits) takes the token where the running count passes r * total / 2^31.
The bits of row i are a pure function of (seed, i): neither the other rows nor any global state matter.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from xtcli.errors import Problem, UserError

BITS = 31
HEAD = 1024
"""Largest probabilities that the CPU looks at before it sorts a whole vocabulary."""


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen; raises UserError for values that are impossible."""

    temperature: float = 0.8
    top_k: int | None = None
    top_p: float = 0.95
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        wrong = []
        if not (self.temperature >= 0 and math.isfinite(self.temperature)):
            wrong.append(_wrong("temperature", self.temperature, "0 (greedy) or more"))
        if self.top_k is not None and self.top_k < 1:
            wrong.append(_wrong("top-k", self.top_k, "1 or more; leave it out to keep all tokens"))
        if not 0 < self.top_p <= 1:
            wrong.append(_wrong("top-p", self.top_p, "above 0 and at most 1; 1 keeps all tokens"))
        if not 0 <= self.min_p <= 1:
            wrong.append(_wrong("min-p", self.min_p, "between 0 and 1; 0 keeps all tokens"))
        if not (self.repetition_penalty > 0 and math.isfinite(self.repetition_penalty)):
            wrong.append(_wrong("repetition-penalty", self.repetition_penalty, "above 0; 1 is no penalty"))
        if wrong:
            raise UserError(*wrong)

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is taken."""
        return self.temperature == 0

    def probabilities(self, logits: Tensor) -> Tensor:
        """Logits (B, V), penalised already -> what is drawn from, (B, V), rows summing to 1."""
        logits = temper(logits, self.temperature)
        if self.top_k is not None:
            logits = keep_top_k(logits, self.top_k)
        if self.top_p < 1:
            logits = keep_top_p(logits, self.top_p)
        if self.min_p > 0:
            logits = keep_min_p(logits, self.min_p)
        return logits.softmax(-1)


def _wrong(option: str, value: float, wanted: str) -> Problem:
    return Problem(f"{value:g} is not possible", f"--{option}", remedy=f"give a number {wanted}")


def penalise(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Make the tokens of `seen` (B, V) less likely (penalty > 1) or more (penalty < 1)."""
    return torch.where(seen, torch.where(logits < 0, logits * penalty, logits / penalty), logits)


def temper(logits: Tensor, temperature: float) -> Tensor:
    """Divide by the temperature, counted from the largest logit so that no division overflows."""
    if temperature == 1:
        return logits
    return (logits - logits.amax(-1, keepdim=True)) / temperature


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """Only the k largest."""
    if k >= logits.shape[-1]:
        return logits
    least = logits.topk(k).values[:, -1:]
    return logits.masked_fill(logits < least, float("-inf"))


def keep_top_p(logits: Tensor, p: float) -> Tensor:
    """Only the largest whose predecessors, in falling order, do not reach probability p yet."""
    probabilities = logits.softmax(-1)
    order = _falling(probabilities, p)
    kept = probabilities.gather(-1, order)
    wide = torch.float32 if logits.device.type == "mps" else torch.float64
    before = kept.to(wide).cumsum(-1) - kept
    values = logits.gather(-1, order).masked_fill(before >= p, float("-inf"))
    return torch.full_like(logits, float("-inf")).scatter_(-1, order, values)


def _falling(probabilities: Tensor, p: float) -> Tensor:
    """Token ids (B, n) from the likeliest on, at least as many as reach probability p."""
    if probabilities.device.type == "cpu" and probabilities.shape[-1] > 4 * HEAD:
        head = probabilities.topk(HEAD)
        if bool((head.values.sum(-1) > p + 1e-4).all()):
            return head.indices
    return probabilities.argsort(-1, descending=True)


def keep_min_p(logits: Tensor, p: float) -> Tensor:
    """Only those at least p times as likely as the likeliest."""
    return logits.masked_fill(logits < logits.amax(-1, keepdim=True) + math.log(p), float("-inf"))


def draw_seed() -> int:
    """A seed for a user who gave none; short, so that it can be typed again."""
    return secrets.randbits(BITS)


def random_numbers(seed: int, rows: Sequence[int], count: int, device: torch.device | str = "cpu") -> Tensor:
    """31 random bits (len(rows), count), int64; row i depends on (seed, i) alone."""
    bits = [np.random.Philox(key=np.array([seed % 2**64, row], np.uint64)).random_raw(count) for row in rows]
    numbers = (np.stack(bits) >> np.uint64(64 - BITS)).astype(np.int64)
    return torch.from_numpy(numbers).to(device)


def draw(probabilities: Tensor, numbers: Tensor) -> Tensor:
    """One token for each row: probabilities (B, V) and random numbers (B,) -> ids (B,)."""
    counts = (probabilities * 2.0**BITS).round_().long().cumsum(-1)
    total = counts[:, -1]
    places = (numbers * total) >> BITS
    return torch.searchsorted(counts, places[:, None], right=True)[:, 0].clamp_(max=counts.shape[-1] - 1)
