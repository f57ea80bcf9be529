"""The one training loop: straight down, step after step.

    before a step   what is due at this step count: validation, sample, checkpoint, stop
    a step          micro-batches forward and backward, clip, look, optimizer
    the loss        sum over heads of (sum of target losses in the step) / (targets in the step)

The position of a run between two steps is wholly in its state (weights, optimizer, random numbers,
cursor); whatever is due before a step and already in the log is not done again. So a run that was
stopped anywhere goes on as if it had not been, bit for bit on a CPU.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from xtcli.data.batch import Batch
from xtcli.data.loader import batches, order_of
from xtcli.errors import EXIT_NON_FINITE
from xtcli.model import Model
from xtcli.parts.chance import settled
from xtcli.runs.run import Run
from xtcli.runs.state import Progress, Stateful, collect, stateful
from xtcli.train.captured import captured
from xtcli.train.carry import Carried
from xtcli.train.job import Job
from xtcli.train.lines import Done, other_unit
from xtcli.train.optim import build_optimizer, set_rate
from xtcli.train.outcome import Outcome, search
from xtcli.train.schedules import schedule
from xtcli.train.signals import Stopper
from xtcli.train.update import update_for
from xtcli.train.view import View
from xtcli.train.working import Working


class Trainer:
    """The state of a run and the things that change it."""

    def __init__(self, job: Job, model: Model, run: Run, view: View, record: Callable[[dict[str, Any]], None]) -> None:
        self.job, self.model, self.run, self.view, self.record = job, model, run, view, record
        self.config = job.config
        self.place = job.place
        self.optimizer = build_optimizer(model, self.config)
        self.working = Working(model, self.place.dtype, several=job.plan.micro_batch < self.config.batch)
        self.scaler = self.place.scaler()
        scaled, limit, seed = self.scaler is not None, self.config.clip, self.config.seed
        self.change = update_for(model, self.optimizer, self.working, limit, scaled, seed)
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
        # On a GPU the host looks at a step while the device is at the next one; what a step leaves must wait for it.
        self.ahead = self.place.device.type == "cuda" and self.scaler is None and not self.carried.on
        self.pending: Outcome | None = None
        said = lambda text: self.view.message(text)  # noqa: E731 - the view may be another by then
        self.passes = captured(self.work, self.change, self.config, self.place.device, said, self.ahead)

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
        code = self.settle()
        if code:
            return code
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
        """One optimizer step; returns an exit code when the run must end, with the weights before the step at fault."""
        started = time.perf_counter()
        progress = self.progress
        set_rate(self.optimizer, self.rate(progress.step))
        losses, norm = self.passes(*self.shared(batch))
        code = self.settle()
        if code:
            return code
        outcome = Outcome.of(progress.step + 1, batch, losses, None if self.scaler is not None else norm)
        self.pending = outcome
        if not self.ahead:
            code = self.settle()
            if code:
                return code
        self.carried.end(not outcome.lost)
        self.update(outcome)
        self.change.clear()
        progress.step += 1
        progress.cursor += self.config.batch
        progress.tokens += batch.tokens
        self.tokens += batch.tokens
        self.padded += batch.padded
        logs = _due(progress.step, self.config.log_every) or progress.step in (1, self.config.steps)
        if logs or self.halts():
            code = self.settle()
            if code:
                return code
            self.place.synchronise()
        self.seconds += time.perf_counter() - started
        if logs:
            self.log({head: loss.item() for head, loss in losses.items()}, float(norm))
        return 0

    def update(self, outcome: Outcome) -> None:
        """Change the weights, unless the step is lost; where the host does not know yet, the device decides."""
        if self.scaler is not None:
            if not outcome.lost:
                self.scaler.step(self.optimizer)
            self.scaler.update()
            self.working.refresh()
        elif self.ahead:
            self.change.apply(outcome.flag)
        elif not outcome.lost:
            self.change.apply()

    def settle(self) -> int:
        """Look at the last step that has not been looked at; returns an exit code when it must be the last."""
        outcome, self.pending = self.pending, None
        if outcome is None or outcome.finite():
            return 0
        progress = self.progress
        if self.config.on_non_finite == "stop":
            if progress.step == outcome.step:
                # The weights were not changed, and the gradients are gone or those of another batch.
                progress.step -= 1
                progress.cursor -= self.config.batch
                progress.tokens -= outcome.batch.tokens
                self.change.clear()
                with self.working.lent():
                    self.backward(*self.shared(outcome.batch))
            self.working.hand_on()
            self.report_non_finite(outcome)
            return EXIT_NON_FINITE
        progress.skipped += 1
        self.run.event("skipped_step", step=outcome.step, samples=outcome.batch.ids)
        return 0

    def halts(self) -> bool:
        """Whether something besides steps is due after this one."""
        step, config = self.progress.step, self.config
        every = (config.validate_every, config.sample_every, config.save_every)
        return step >= config.steps or any(_due(step, each) for each in every)

    def shared(self, batch: Batch) -> tuple[list[Batch], dict[str, int]]:
        """The micro-batches of a batch, and what the sums of its losses are divided by."""
        wanted = batch.supervised() | self.model.units(batch.inputs)
        counts = {head: max(count, 1) for head, count in wanted.items()}
        return batch.split(self.job.plan.micro_batch), counts

    def work(self, parts: Sequence[Batch], counts: Mapping[str, Any]) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """Gradients of a batch in micro-batches; returns the mean loss of each head, and the norm of the gradients."""
        with self.working.lent():
            losses = self.backward(parts, counts)
        self.change.gather()
        if self.scaler is not None:
            self.scaler.unscale_(self.optimizer)
        return losses, self.change.norm()

    def backward(self, parts: Sequence[Batch], counts: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        """Gradients summed over micro-batches; the sum of each term of the loss is divided by its count."""
        sums: dict[str, torch.Tensor] = {}
        self.carried.begin(self.progress.cursor)
        for rows in parts:
            rows = rows.to(self.place.device, non_blocking=True)
            with self.place.amp():
                hidden = self.model.hidden(**self.carried.join(rows.inputs, len(rows)))
                self.carried.take(hidden.mems)
                terms = self.model.terms(hidden, rows.targets, rows.slots) | self.model.routed(hidden)
                loss = torch.stack([term.weight * term.sum / counts[head] for head, term in terms.items()]).sum()
            (loss if self.scaler is None else self.scaler.scale(loss)).backward()
            for head, term in terms.items():
                self.weights[head] = term.weight
                share = term.sum.detach() / counts[head]
                sums[head] = sums[head] + share if head in sums else share
        return sums

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
                    terms = self.model.terms(hidden, rows.targets, rows.slots)
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

    def report_non_finite(self, outcome: Outcome) -> None:
        """Say where the first NaN or infinity arose; weights and checkpoints stay as they were."""

        def passes() -> Iterator[Callable[[], Any]]:
            self.carried.again()
            for rows in outcome.batch.split(self.job.plan.micro_batch):
                moved = rows.to(self.place.device)
                inputs = self.carried.join(moved.inputs, len(moved))
                yield lambda moved=moved, inputs=inputs: self.model.losses(inputs, moved.targets)  # type: ignore[misc]

        with self.working.lent(), self.place.amp():
            fault = search(self.model, outcome, passes(), self.working.gradient)
        self.run.event("non_finite", **fault.facts)
        self.view.message(fault.sentence)


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
