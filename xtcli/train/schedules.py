"""Learning rate as a pure function of the step, so that a resumed run has nothing to restore.

With peak p, warm-up of w steps, n steps in all and floor f (a share of the peak), step s = 0 .. n-1:

    s < w           p (s+1)/(w+1)                        the first step already learns, step w has the peak
    x = (s-w)/(n-w)                                      how far the rest has come; 1 would be step n
    cosine          p (f + (1-f) (1 + cos(pi x)) / 2)    SGDR, https://arxiv.org/abs/1608.03983
    linear          p (1 - (1-f) x)
    wsd             p, and over the last d n steps a line to f p     MiniCPM, https://arxiv.org/abs/2404.06395
    inverse-sqrt    p sqrt((w+1)/(s+1))                  Transformer, https://arxiv.org/abs/1706.03762; no floor, no n
    constant        p

Beyond the last step, where a run is lengthened, the decaying ones stay at their floor.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from xtcli.config.train import TrainConfig


@dataclass(frozen=True)
class Schedule:
    """What every shape knows: `peak` rate, `warmup` and total `steps`, `floor` and wsd's `decay` as shares."""

    peak: float
    warmup: int
    steps: int
    floor: float = 0.0
    decay: float = 0.2

    def _done(self, step: int) -> float:
        return min(1.0, (step - self.warmup) / max(1, self.steps - self.warmup))

    def cosine(self, step: int) -> float:
        return self.floor + (1 - self.floor) * (1 + math.cos(math.pi * self._done(step))) / 2

    def linear(self, step: int) -> float:
        return 1 - (1 - self.floor) * self._done(step)

    def wsd(self, step: int) -> float:
        length = min(max(1, round(self.decay * self.steps)), max(1, self.steps - self.warmup))
        fallen = min(1.0, max(0, step - (self.steps - length)) / length)
        return 1 - (1 - self.floor) * fallen

    def inverse_sqrt(self, step: int) -> float:
        return math.sqrt((self.warmup + 1) / (step + 1))

    def constant(self, step: int) -> float:
        return 1.0


SHAPES: dict[str, Callable[[Schedule, int], float]] = {
    "cosine": Schedule.cosine,
    "linear": Schedule.linear,
    "wsd": Schedule.wsd,
    "inverse-sqrt": Schedule.inverse_sqrt,
    "constant": Schedule.constant,
}


def schedule(config: TrainConfig) -> Callable[[int], float]:
    """The function from step (0 is the first) to learning rate."""
    shape = SHAPES[config.schedule]
    parameters = Schedule(config.lr, config.warmup, config.steps, config.min_lr, config.decay)

    def rate(step: int) -> float:
        if step < parameters.warmup:
            return parameters.peak * (step + 1) / (parameters.warmup + 1)
        return parameters.peak * shape(parameters, step)

    return rate


def describe(config: TrainConfig) -> str:
    """The schedule in words, also when the run ends before its warm-up does."""
    if config.warmup >= config.steps:
        top = config.lr * config.steps / (config.warmup + 1)
        return f"warm-up only, to {top:.2e}: the run of {config.steps:,} steps ends before {config.warmup:,}"
    text = f"{config.schedule}, peak {config.lr:.2e} after {config.warmup:,} steps"
    if config.schedule in ("cosine", "linear", "wsd"):
        text += f", {config.lr * config.min_lr:.2e} at step {config.steps:,}"
    if config.schedule == "wsd":
        text += f", falling over the last {config.decay:.0%}"
    return text
