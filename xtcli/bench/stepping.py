"""Training steps on random tokens: the loop of `xt train` itself, with nothing around it.

A `Bench` has the model, its plan and a batch that stays; each call of `step` is one optimizer step. The tokens are
random, so the loss starts near log(vocabulary) and falls as the batch is learnt: a fast wrong step shows. The loop
waits for the device where it writes a line of its log and nowhere else, as in training.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from inspect import signature
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from xtcli.config.preset import Resolved
from xtcli.data.batch import IGNORE, Batch
from xtcli.errors import Problem, UserError, refuse
from xtcli.inspect.cost import places_of, usual_length
from xtcli.model import Model, skeleton
from xtcli.parts.continuous import ContinuousOutput
from xtcli.parts.graphs import Graph
from xtcli.parts.heads import SPEAKING
from xtcli.parts.pooled import SequenceLabels
from xtcli.train.device import Place
from xtcli.train.job import Job, complete, with_weights
from xtcli.train.loop import Trainer
from xtcli.train.plan import Plan, make_plan
from xtcli.train.transforms import ready

Array = np.ndarray[Any, Any]

ENDLESS = 10**9
MASKED = 0.15
"""Share of the places that a masked language model is asked about."""


class Silent:
    """A view that shows nothing."""

    def start(self, plan: str) -> None: ...

    def step(self, metrics: Mapping[str, Any]) -> None: ...

    def validation(self, metrics: Mapping[str, Any]) -> None: ...

    def sample(self, text: str) -> None: ...

    def message(self, text: str) -> None: ...

    def close(self) -> None: ...


@dataclass
class Bench:
    """One preset ready to be trained on one batch."""

    name: str
    resolved: Resolved
    place: Place
    plan: Plan
    batch: Batch
    model: Model
    trainer: Trainer
    losses: list[float] = field(default_factory=list)

    def step(self) -> None:
        """One optimizer step; its loss is noted where the loop logs it."""
        if self.trainer.step(self.batch):
            raise refuse(f"the loss of {self.name} is not finite", "lower train.lr")

    def look(self) -> None:
        """Nothing: the loop has noted the loss itself."""

    def check(self) -> float:
        """The loss of the first micro-batch without dropout: what tells whether two sides are one network."""
        rows = self.batch.split(self.plan.micro_batch)[0]
        self.model.eval()
        with torch.no_grad(), self.trainer.working.lent(), self.place.amp():
            terms = self.model.losses(rows.inputs, rows.targets).values()
            total = sum(float(term.weight * term.sum) / int(term.count) for term in terms)
        self.model.train()
        return total

    @property
    def held(self) -> list[Tensor]:
        """Weights, their working copies and optimizer state."""
        state = self.trainer.optimizer.state.values()
        values = [value for entry in state for value in entry.values() if isinstance(value, Tensor)]
        return [*self.model.parameters(), *self.trainer.working.copies, *values]


def random_batch(model: Graph, rows: int, length: int, seed: int) -> Batch:
    """Random tokens, or images and vectors where a model reads those, and what each head must say of them.

    Raises UserError for a head that answers about more.
    """
    rng = np.random.default_rng(seed)
    accepted = signature(model.hidden).parameters
    blanks = model.blank(rows, length)
    inputs = {name: _normal(rng, blank.shape) for name, blank in blanks.items() if blank.is_floating_point()}
    # What an encoder sees instead of a text has as many places as it has.
    lengths = places_of(getattr(model, "encoder", model)) or length
    following = None
    if not inputs:
        inputs = {"input_ids": rng.integers(0, model.vocab, (rows, length))}
        if model.causal:
            following = np.concatenate([inputs["input_ids"][:, 1:], np.full((rows, 1), IGNORE)], 1)
    if "decoder_input_ids" in accepted:
        following = rng.integers(0, model.vocab, (rows, length))
        start = model.config.start if model.config.start is not None else model.config.pad or 0
        inputs["decoder_input_ids"] = np.concatenate([np.full((rows, 1), start), following[:, :-1]], 1)
        lengths += length
    targets = _answers(model, inputs.get("input_ids"), following, rng, (rows, length))
    if not targets:
        have = ", ".join(model.heads) or "none"
        raise refuse(f"random tokens have no answers for the model's heads ({have})", "give it a head lm or mlm")
    return Batch.of(inputs, targets, range(rows), [lengths] * rows)


def _answers(
    model: Graph, ids: Array | None, following: Array | None, rng: np.random.Generator, size: tuple[int, int]
) -> dict[str, Array]:
    """What the heads must say: of the words that follow, of masked ones, of each text or place."""
    known: dict[str, Array] = {} if following is None else dict.fromkeys(SPEAKING, following)
    if ids is not None:
        masked = np.where(rng.random(size) < MASKED, ids, IGNORE)
        masked[:, 0] = ids[:, 0]
        known = dict.fromkeys(SPEAKING, masked) | known | {"mlm": masked, "nsp": rng.integers(0, 2, size[:1])}
    for name, head in model.heads.items():
        if isinstance(head, SequenceLabels) and head.problem in (None, "one") and len(head.classifier.weight) > 1:
            known[name] = rng.integers(0, len(head.classifier.weight), size[:1])
        elif isinstance(head, ContinuousOutput):
            known[name] = _normal(rng, (*size, head.width))
    return {name: known[name] for name in model.heads if name in known}


def _normal(rng: np.random.Generator, shape: Sequence[int]) -> Array:
    return rng.standard_normal(shape).astype(np.float32)


def prepare(
    resolved: Resolved, place: Place, *, rows: int | None, length: int | None, seed: int, free: int | None = None
) -> tuple[Graph, Plan, Batch]:
    """Skeleton, plan and batch; takes no memory. Without `rows`, one forward pass as large as fits and is asked for."""
    model = skeleton(resolved)
    config = resolved.preset.train
    length = length or usual_length(resolved, model)
    free = place.free() if free is None else free
    batch = random_batch(model, rows or config.batch, length, seed)
    plan = make_plan(
        model,
        batch,
        dtype=place.dtype,
        stored=place.stored,
        micro_batch=config.micro_batch,
        checkpointing=config.checkpointing,
        free=free,
        device=place.device.type,
    )
    if rows is None and plan.micro_batch < plan.batch:
        return prepare(resolved, place, rows=plan.micro_batch, length=length, seed=seed, free=free)
    if plan.peak > free:
        raise UserError(
            Problem(
                f"{resolved.name} does not fit: a step takes {plan.peak / 2**30:.1f} GiB, {free / 2**30:.1f} are free",
                remedy="give a smaller --batch or --length, or train.checkpointing=true",
            )
        )
    return model, plan, batch


def start(
    name: str,
    resolved: Resolved,
    place: Place,
    plan: Plan,
    batch: Batch,
    model: Graph,
    seed: int,
    log_every: int = 1,
) -> Bench:
    """Weights in memory, compiled where training would compile, and a trainer that logs the first and some losses."""
    resolved = complete(resolved, steps=ENDLESS, batch=len(batch), log_every=log_every, init=None, lora=None, seed=seed)
    job = Job(resolved, place, None, None, None, None, model, plan, 0)
    torch.manual_seed(seed)
    weights = with_weights(job, None)
    losses: list[float] = []
    ready(weights, resolved.preset.train, place).train()
    nothing: Any = cast(Any, None)
    trainer = Trainer(job, weights, nothing, Silent(), lambda line: losses.append(line["loss"]))
    moved = batch.to(place.device)
    return Bench(name, resolved, place, plan, moved, weights, trainer, losses)
