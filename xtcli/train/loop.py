"""The one training loop: straight down, step after step.

    before a step   what is due at this step count: validation, sample, checkpoint, stop
    a step          micro-batches forward and backward, clip, look, optimizer
    the loss        sum over heads of (sum of target losses in the step) / (targets in the step)

The position of a run between two steps is wholly in its state (weights, optimizer, random numbers,
cursor); whatever is due before a step and already in the log is not done again. So a run that was
stopped anywhere goes on as if it had not been, bit for bit on a CPU.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from xtcli.data.batch import Batch
from xtcli.data.loader import batches, order_of
from xtcli.errors import EXIT_NON_FINITE
from xtcli.model import Model
from xtcli.parts.chance import settled
from xtcli.runs.run import Run
from xtcli.runs.state import Progress, Stateful, collect, stateful
from xtcli.train.carry import Carried
from xtcli.train.job import Job
from xtcli.train.optim import build_optimizer, clip, first_non_finite, non_finite_gradients, set_rate
from xtcli.train.schedules import schedule
from xtcli.train.signals import Stopper
from xtcli.train.view import View
from xtcli.train.working import Working


@dataclass
class Done:
    """What has already happened at the current step, so that a resumed run does not repeat it."""

    validated: int = -1
    sampled: int = -1
    saved: int = -1
    val_loss: float | None = None


class Trainer:
    """The state of a run and the things that change it."""

    def __init__(self, job: Job, model: Model, run: Run, view: View, record: Callable[[dict[str, Any]], None]) -> None:
        self.job, self.model, self.run, self.view, self.record = job, model, run, view, record
        self.config = job.config
        self.place = job.place
        self.optimizer = build_optimizer(model, self.config)
        self.working = Working(model, self.place.dtype)
        self.scaler = self.place.scaler()
        self.progress = Progress()
        self.rate = schedule(self.config)
        self.done = Done()
        carries = job.objective is not None and job.objective.carry
        order = order_of(job.objective, self.config.batch, self.config.seed) if carries else None
        self.carried = Carried(order, self.place.device)
        self.seconds = 0.0  # of steps since the last logged line
        self.tokens = 0  # real tokens read since then
        self.padded = 0
        self.weights: dict[str, float] = {}  # of the terms of the loss, where they are not 1

    @property
    def parts(self) -> tuple[Stateful, ...]:
        """Every stateful part, weights aside."""
        return stateful(self.model, self.optimizer, self.progress, self.scaler) + self.carried.state

    def train(self, stopper: Stopper) -> int:
        """Run to the end or until stopped; returns the exit code. Weights and state are saved in both cases."""
        progress, config = self.progress, self.config
        stream = batches(
            self.job.objective,
            batch=config.batch,
            start=progress.cursor,
            workers=config.workers,
            seed=config.seed,
            pin=self.place.device.type == "cuda",
        )
        self.model.train()
        try:
            while True:
                self.attend_to_step(stopper)
                if stopper.requested is not None or progress.step >= config.steps:
                    break
                code = self.step(next(stream))
                if code:
                    return code
        finally:
            stream.close()
        self.save()
        return stopper.exit_code

    def attend_to_step(self, stopper: Stopper) -> None:
        """Validate, sample and save where the step count says so."""
        step, config = self.progress.step, self.config
        last = step >= config.steps
        saving = step > 0 and _due(step, config.save_every)
        if self.done.validated != step and (_due(step, config.validate_every) or last or (saving and config.keep_best)):
            self.validate(stopper)
        if stopper.requested is not None:
            return
        if saving or last:
            self.save()
        if self.done.sampled != step and (last or (step > 0 and _due(step, config.sample_every))):
            self.sample()

    def step(self, batch: Batch) -> int:
        """One optimizer step; returns an exit code when it must be the last, before anything is changed."""
        started = time.perf_counter()
        progress = self.progress
        set_rate(self.optimizer, self.rate(progress.step))
        with self.working.lent():
            losses = self.backward(batch)
        if self.scaler is not None:
            self.scaler.unscale_(self.optimizer)
        norm = clip(self.model, self.config.clip)
        finite = all(math.isfinite(value) for value in losses.values()) and (
            self.scaler is not None or math.isfinite(norm.item())
        )
        if not finite and self.config.on_non_finite == "stop":
            self.report_non_finite(batch, losses)
            return EXIT_NON_FINITE
        self.carried.end(finite)
        if not finite:
            progress.skipped += 1
            self.run.event("skipped_step", step=progress.step + 1, samples=batch.ids)
        elif self.scaler is not None:
            self.scaler.step(self.optimizer)
        else:
            self.optimizer.step()
        if self.scaler is not None:
            self.scaler.update()
        self.working.refresh()
        self.optimizer.zero_grad(set_to_none=True)
        progress.step += 1
        progress.cursor += self.config.batch
        progress.tokens += batch.tokens
        self.place.synchronise()
        self.seconds += time.perf_counter() - started
        self.tokens += batch.tokens
        self.padded += batch.padded
        if _due(progress.step, self.config.log_every) or progress.step in (1, self.config.steps):
            self.log(losses, float(norm))
        return 0

    def backward(self, batch: Batch) -> dict[str, float]:
        """Gradients of the whole batch, summed over its micro-batches; returns the mean loss of each head."""
        wanted = batch.supervised() | self.model.units(batch.inputs)
        counts = {head: max(count, 1) for head, count in wanted.items()}
        sums: dict[str, torch.Tensor] = {}
        self.carried.begin(self.progress.cursor)
        for rows in batch.split(self.job.plan.micro_batch):
            rows = rows.to(self.place.device, non_blocking=True)
            with self.place.amp():
                hidden = self.model.hidden(**self.carried.join(rows.inputs, len(rows)))
                self.carried.take(hidden.mems)
                terms = self.model.terms(hidden, rows.targets) | self.model.routed(hidden)
                loss = torch.stack([term.weight * term.sum / counts[head] for head, term in terms.items()]).sum()
            (loss if self.scaler is None else self.scaler.scale(loss)).backward()
            for head, term in terms.items():
                self.weights[head] = term.weight
                share = term.sum.detach() / counts[head]
                sums[head] = sums[head] + share if head in sums else share
        return {head: total.item() for head, total in sums.items()}

    def total(self, losses: dict[str, float]) -> float:
        """The loss that is learnt from: that of each head by its weight."""
        return sum(self.weights.get(head, 1.0) * value for head, value in losses.items())

    def log(self, losses: dict[str, float], norm: float) -> None:
        """A line of metrics."""
        progress, plan = self.progress, self.job.plan
        rate = self.tokens / self.seconds if self.seconds else 0.0
        steps = self.tokens / max(plan.tokens, 1)
        line: dict[str, Any] = {"step": progress.step, "loss": self.total(losses)}
        line |= other_unit(self.model.heads, losses)
        if len(losses) > 1:
            line["losses"] = losses
        line |= {
            "lr": self.rate(progress.step - 1),
            "grad_norm": norm,
            "tokens": progress.tokens,
            "tok_s": round(rate, 1),
            "seconds": round(self.seconds, 4),
        }
        if self.padded:
            line["padded_tok_s"] = round(self.padded / self.seconds, 1)
        if self.place.peak is not None and self.seconds:
            line["mfu"] = round(plan.flops * steps / self.seconds / self.place.peak, 4)
        line["memory"] = self.place.memory()[0]
        line["eta"] = round((self.config.steps - progress.step) * self.seconds / max(steps, 1e-9), 1)
        if progress.best is not None:
            line["best"] = progress.best
        if progress.skipped:
            line["skipped"] = progress.skipped
        self.seconds, self.tokens, self.padded = 0.0, 0, 0
        self.record(line)
        self.view.step(line)

    def validate(self, stopper: Stopper) -> None:
        """Mean loss and scores of the held-out batches, without touching any random state; gives way to a stop."""
        step = self.progress.step
        if self.job.validation is None:
            self.done.validated = step
            return
        sums: dict[str, float] = {}
        counts: dict[str, int] = {}
        scorer = self.job.validation.scorer()
        carried = Carried(self.carried.order, self.place.device)
        self.model.eval()
        try:
            for rows in self.job.validation_batches():
                if stopper.requested is not None:
                    return
                rows = rows.to(self.place.device)
                with torch.no_grad(), self.working.lent(), self.place.amp(), settled(self.model):
                    carried.again()
                    hidden = self.model.hidden(**carried.join(rows.inputs, len(rows)))
                    carried.take(hidden.mems)
                    carried.end()
                    terms = self.model.terms(hidden, rows.targets)
                    if scorer is not None:
                        read = {head: self.model.read_by(head, hidden) for head in terms}
                        scorer.add(rows, {head: self.model.heads[head].outputs(read[head]) for head in terms})  # type: ignore[operator]
                for head, term in terms.items():
                    self.weights[head] = term.weight
                    sums[head] = sums.get(head, 0.0) + float(term.sum)
                    counts[head] = counts.get(head, 0) + int(term.count)
        finally:
            self.model.train()
        losses = {head: total / max(counts[head], 1) for head, total in sums.items()}
        line: dict[str, Any] = {"step": step, "val_loss": self.total(losses), "val_tokens": sum(counts.values())}
        line |= other_unit(self.model.heads, losses)
        if len(losses) > 1:
            line["val_losses"] = losses
        if scorer is not None:
            line |= {f"val_{name}": score for name, score in scorer.result().items()}
        if self.progress.best is not None:
            line["best"] = self.progress.best
        self.done.validated, self.done.val_loss = step, line["val_loss"]
        self.record(line)
        self.view.validation(line)

    def sample(self) -> None:
        """Text from the model as it is, kept beside the run."""
        from xtcli.train.samples import draw

        self.model.eval()
        try:
            with self.working.lent(), self.place.amp():
                text = draw(self.model, self.job)
        finally:
            self.model.train()
        self.done.sampled = self.progress.step
        if text:
            self.run.sample(self.progress.step, text)
            self.view.sample(text)

    def save(self) -> None:
        """A checkpoint of the state between two steps, once."""
        progress = self.progress
        measured = self.done.val_loss if self.done.validated == progress.step else None
        if measured is not None and (progress.best is None or measured < progress.best):
            progress.best, progress.best_step = measured, progress.step
        if self.done.saved == progress.step:
            return
        self.run.save(
            progress.step,
            model=self.model,
            tokenizer=self.job.tokenizer,
            trainer=collect(self.parts),
            keep=self.config.keep,
            best=progress.best_step if self.config.keep_best else None,
        )
        self.done.saved = progress.step

    def report_non_finite(self, batch: Batch, losses: dict[str, float]) -> None:
        """Say where the first NaN or infinity arose; weights and checkpoints stay as they were."""
        gradients = non_finite_gradients(self.model)
        where = None
        self.carried.again()
        for rows in batch.split(self.job.plan.micro_batch):
            moved = rows.to(self.place.device)
            inputs = self.carried.join(moved.inputs, len(moved))

            def forward(moved: Batch = moved, inputs: dict[str, Any] = inputs) -> Any:
                with self.working.lent(), self.place.amp():
                    return self.model.losses(inputs, moved.targets)

            where = where or first_non_finite(self.model, forward)
        step = self.progress.step + 1
        shown = ", ".join(f"{head} {value}" for head, value in losses.items())
        self.run.event(
            "non_finite", step=step, losses=losses, module=where, gradients=gradients[:20], samples=batch.ids
        )
        source = f"first in the output of {where}" if where else f"in the gradient of {', '.join(gradients[:3])}"
        ids = ", ".join(map(str, batch.ids[:8])) + (" ..." if len(batch.ids) > 8 else "")
        self.view.message(
            f"stopped before step {step}: not finite, {source}; loss {shown}; samples {ids}. "
            f"The weights are those of step {step - 1}; checkpoints are untouched. "
            "Lower train.lr, lengthen train.warmup, or set train.on_non_finite=skip."
        )


def other_unit(heads: Any, names: Iterable[str]) -> dict[str, str]:
    """What the losses of these heads are counted in, for a line of metrics; nothing where it is nats."""
    found = sorted({heads[name].unit for name in names if name in heads} - {"nats"})
    return {"unit": " and ".join(found)} if found else {}


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def logged(lines: Iterator[dict[str, Any]] | list[dict[str, Any]], step: int) -> Done:
    """What the log says has been done at `step`."""
    done = Done()
    for line in lines:
        if "val_loss" in line and line["step"] == step:
            done.validated, done.val_loss = step, line["val_loss"]
    return done
