"""`xt bench train A B C --budget 5m`: architectures trained on the same text and tokenizer, at equal budget.

The first preset gives data, tokenizer and, for every model, the size of the vocabulary; tokens per step must agree.
Each has the same seconds of training (validation, building and the first, compiling step are not counted) or the same
tokens. The schedule of the learning rate is laid over the steps that the budget will hold, which a few steps before
the race tell.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, cast

import torch

from xtcli.bench import results
from xtcli.bench.asked import Asked, labels, one_place
from xtcli.bench.stepping import Silent
from xtcli.bench.timing import clocked, release
from xtcli.config.preset import Resolved, load_preset
from xtcli.data.loader import batches
from xtcli.errors import Problem, UserError, refuse
from xtcli.train.job import Job, complete, make_job, with_weights
from xtcli.train.loop import Trainer
from xtcli.train.signals import Stopper
from xtcli.train.transforms import ready

Talk = Callable[[str], None]
TRIAL = 4
"""Steps that tell how long a step takes; the first does not count."""

CHECKS = 8
"""Validations of one run, the last included."""


@dataclass(frozen=True, kw_only=True)
class Config(Asked):
    """What is asked for; either `seconds` or `tokens` is the budget of each."""

    seconds: float | None = None
    tokens: int | None = None
    batch: int | None = None
    length: int | None = None
    seed: int = 0


def run(config: Config, talk: Talk) -> dict[str, Any]:
    """Race; the result as results.py keeps it. Ctrl-C is a stop without a result."""
    presets = _alike(config)
    place = one_place(presets)
    jobs = [make_job(resolved, talk) for resolved in presets]
    _same_steps(jobs)
    rows = []
    for name, job in zip(labels(config.presets), jobs, strict=True):
        rows.append(_race(name, job, config, talk))
        release(place.device)
    return results.result(
        "race",
        asdict(config),
        {"device": place.name, "dtype": place.precision, "tokens_per_step": jobs[0].plan.tokens},
        {
            "data": jobs[0].store.digest,
            "tokenizer": jobs[0].tokenizer.digest,
            "resolved": {row["name"]: job.resolved.to_tree() for row, job in zip(rows, jobs, strict=True)},
            "rows": rows,
        },
    )


def _alike(config: Config) -> list[Resolved]:
    """The presets over the data, tokenizer, vocabulary, batch and context of the first."""
    first: Any = None
    found = []
    for ref, overrides in config.presets:
        changes = list(overrides)
        changes += [f"train.batch={config.batch}"] if config.batch else []
        changes += [f"train.context={config.length}"] if config.length else []
        if first is not None:
            changes.append(f"model.vocab={first.preset.model.vocab}")
        resolved = load_preset(ref, changes, size=config.size, tiny=config.tiny)
        first = first or resolved
        if resolved.preset.objective != first.preset.objective:
            raise refuse(
                f"{resolved.name} learns another thing ({resolved.preset.objective.kind}) than {first.name} "
                f"({first.preset.objective.kind}), so their losses do not compare",
                "race presets of one objective",
            )
        shared = {"data": first.preset.data, "tokenizer": first.preset.tokenizer}
        resolved = replace(resolved, preset=resolved.preset.model_copy(update=shared))
        found.append(complete(resolved, seed=config.seed, init=None, lora=None))
    return found


def _same_steps(jobs: Sequence[Job]) -> None:
    first = jobs[0]
    problems = [
        Problem(
            f"{job.resolved.name} takes {job.plan.tokens:,} tokens a step, {first.resolved.name} {first.plan.tokens:,}",
            remedy="give --batch and --length, which hold for all",
        )
        for job in jobs[1:]
        if job.plan.tokens != first.plan.tokens
    ]
    if problems:
        raise UserError(*problems)


def _trainer(job: Job, record: Callable[[dict[str, Any]], None]) -> Trainer:
    torch.manual_seed(job.config.seed)
    model = ready(with_weights(job, None), job.config, job.place).train()
    return Trainer(job, model, cast(Any, None), Silent(), record)


def _race(name: str, job: Job, config: Config, talk: Talk) -> dict[str, Any]:
    """One run: its curve and its end."""
    place, plan = job.place, job.plan
    steps = _steps(job, config)
    short = min(job.config.warmup, max(steps // 10, 1))
    job = replace(job, resolved=complete(job.resolved, steps=steps, warmup=short, log_every=1))
    losses: list[float] = []
    validated: list[float] = []

    def record(line: dict[str, Any]) -> None:
        if "loss" in line:
            losses.append(line["loss"])
        if "val_loss" in line:
            validated.append(line["val_loss"])

    trainer = _trainer(job, record)
    stream = _stream(job)
    seconds, compiling, curve, checks = 0.0, 0.0, [], []
    every = max(steps // CHECKS, 1)
    began = time.perf_counter()
    with Stopper() as stopper:
        try:
            while trainer.progress.step < steps and (config.seconds is None or seconds < config.seconds):
                took = clocked(lambda: _step(trainer, stream, name), place.device)
                step = trainer.progress.step
                compiling, seconds = (took, seconds) if step == 1 else (compiling, seconds + took)
                curve.append([step * plan.tokens, seconds, step * plan.flops, losses[-1]])
                if step % every == 0 and job.validation is not None:
                    trainer.validate(stopper)
                    if validated:
                        checks.append([*curve[-1][:3], validated[-1]])
                    talk(f"{name}: step {step:,} of {steps:,}, loss {losses[-1]:.4f}, {seconds:.1f} s")
                if stopper.requested is not None:
                    raise KeyboardInterrupt
        finally:
            stream.close()
        if job.validation is not None and (not checks or checks[-1][0] != curve[-1][0]):
            trainer.validate(stopper)
            checks.append([*curve[-1][:3], validated[-1]])
    return {
        "name": name,
        "parameters": plan.parameters,
        "steps": len(curve),
        "planned_steps": steps,
        "tokens": curve[-1][0],
        "seconds": seconds,
        "first_step_s": compiling,
        "wall_s": time.perf_counter() - began,
        "flop": curve[-1][2],
        "flop_per_token": plan.flops / plan.tokens,
        "tok_s": (curve[-1][0] - plan.tokens) / seconds if seconds else None,
        "memory_bytes": place.memory()[0],
        "final_loss": _tail(losses),
        "validation_loss": checks[-1][3] if checks else None,
        "columns": ["tokens", "seconds", "flop", "loss"],
        "training": curve,
        "validation": checks,
    }


def _tail(losses: Sequence[float]) -> float:
    """The mean of the last tenth, since single steps scatter."""
    last = losses[-max(len(losses) // 10, 1) :]
    return math.fsum(last) / len(last)


def _stream(job: Job) -> Any:
    return batches(job.objective, batch=job.config.batch, seed=job.config.seed, workers=0, pin=False)


def _step(trainer: Trainer, stream: Any, name: str) -> None:
    if trainer.step(next(stream)):
        raise refuse(f"the loss of {name} is not finite", "lower train.lr")


def _steps(job: Job, config: Config) -> int:
    """How many steps the budget holds."""
    if config.tokens is not None:
        return max(config.tokens // job.plan.tokens, 1)
    assert config.seconds is not None
    trainer, stream = _trainer(job, lambda line: None), _stream(job)
    took = [clocked(lambda: _step(trainer, stream, job.resolved.name), job.place.device) for _ in range(TRIAL)]
    stream.close()
    # A step or two more than are expected, so that the clock and not the count ends the run.
    return max(math.ceil(config.seconds / min(took[1:]) * 1.02), 2)
