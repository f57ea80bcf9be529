"""The training side of a peer: the batches, rates and clipping of ours, its own model, optimizer and number format."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from xtcli.bench.stepping import Bench
from xtcli.data.batch import Batch
from xtcli.train.device import Place
from xtcli.train.plan import Plan

Loss = Callable[..., Tensor]


@dataclass(frozen=True)
class Setting:
    """What both sides train on: device and number format, batch, micro-batches, the train section, learning rates."""

    place: Place
    batch: Batch
    plan: Plan
    config: Any
    rate: Callable[[int], float]
    causal: bool

    @classmethod
    def of(cls, bench: Bench) -> Setting:
        """That of a bench of ours."""
        trainer = bench.trainer
        return cls(bench.place, bench.batch, bench.plan, trainer.config, trainer.rate, bench.model.causal)


class Stepped:
    """`step` is one optimizer step; the host asks for no value, so that it may be as far ahead as theirs would be.

    loss(**given) is the mean loss of a micro-batch, `plain` the same without a compiler. parts: (given, its share of
    the targets) of each micro-batch. rate: step from 0 -> learning rate.
    """

    def __init__(
        self,
        architecture: str,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        parts: Sequence[tuple[dict[str, Tensor], float]],
        *,
        loss: Loss,
        plain: Loss,
        rate: Callable[[int], float],
        clip: float | None,
        amp: Callable[[], AbstractContextManager[Any]] = nullcontext,
        note: str = "",
    ) -> None:
        self.architecture, self.model, self.optimizer, self.parts = architecture, model, optimizer, parts
        self.loss, self.plain, self.rate, self.clip, self.amp, self.note = loss, plain, rate, clip, amp, note
        self.device = next(model.parameters()).device
        self.losses: list[float] = []
        self.count = 0
        self.last: Tensor | None = None

    def check(self) -> float:
        """The loss of the first micro-batch without dropout."""
        self.model.eval()
        with torch.no_grad(), self.amp():
            loss = float(self.plain(**self.parts[0][0]))
        self.model.train()
        return loss

    def step(self) -> None:
        """One optimizer step."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate(self.count)
        total: Tensor | None = None
        for given, weight in self.parts:
            with self.amp():
                loss = self.loss(**given)
                loss = loss if weight == 1.0 else loss * weight
            loss.backward()
            total = loss.detach() if total is None else total + loss.detach()
        if self.clip is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.last = total
        self.count += 1

    def look(self) -> None:
        """Note the loss of the last step, which waits for it."""
        assert self.last is not None
        self.losses.append(float(self.last))

    @property
    def held(self) -> list[Tensor]:
        """Weights, buffers and optimizer state."""
        state = self.optimizer.state.values()
        values = [value for entry in state for value in entry.values() if isinstance(value, Tensor)]
        return [*self.model.parameters(), *self.model.buffers(), *values]


def groups(model: nn.Module, decay: float) -> list[dict[str, Any]]:
    """Parameters of two or more dimensions, which decay, and the others, which do not."""
    decayed = [p for p in model.parameters() if p.ndim >= 2]
    plain = [p for p in model.parameters() if p.ndim < 2]
    return [{"params": decayed, "weight_decay": decay}, {"params": plain, "weight_decay": 0.0}]


def described(place: Place, compiled: bool) -> str:
    """Number format and compiler of one that trains float32 weights."""
    kind = "fp32" if place.precision == "fp32" else f"{place.precision.removesuffix('-true')} autocast"
    return f"{kind}, {'compiled whole' if compiled else 'not compiled'}"
