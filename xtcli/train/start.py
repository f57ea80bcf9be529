"""Starting and resuming: from a preset or a run folder to a finished, stopped or refused run."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from xtcli import fast
from xtcli.config.preset import Resolved, load_preset
from xtcli.errors import Problem, UserError, refuse
from xtcli.fast import cublaslt
from xtcli.model import Model
from xtcli.registry import tree
from xtcli.runs import environment
from xtcli.runs.checkpoint import checkpoints, load_checkpoint, step_of
from xtcli.runs.metrics import read_metrics
from xtcli.runs.run import ENVIRONMENT, Run, check_disk, gib
from xtcli.runs.state import restore
from xtcli.train.board import open_board
from xtcli.train.job import Job, complete, make_job, with_weights
from xtcli.train.lines import logged
from xtcli.train.loop import Trainer
from xtcli.train.plan import lines
from xtcli.train.signals import Stopper
from xtcli.train.transforms import ready
from xtcli.train.view import View, make_view

Record = Callable[[dict[str, Any]], None]

FIXED = (
    "model",
    "objective",
    "tokenizer",
    "data",
    "train.seed",
    "train.context",
    "train.batch",
    "train.init",
    "train.lora",
)
"""What a resumed run cannot change: other weights, other text or another order of it."""


def describe(job: Job) -> dict[str, str]:
    """The plan of a run as label -> figure."""
    place, config = job.place, job.config
    free = place.free()
    text = dict(lines(job.plan, job.checkpoint_bytes, f"{place.name}, {place.precision}", free))
    text["objective"] = job.objective.describe()
    text["data"] = job.store.report()
    text["steps"] = f"{config.steps:,}, {config.steps * job.plan.tokens:,} tokens in all"
    return text


def facts(job: Job) -> dict[str, Any]:
    """The plan of a run as plain data, with units in the names."""
    place, plan, config = job.place, job.plan, job.config
    free = place.free()
    return {
        "parameters": plan.parameters,
        "trained_parameters": plan.trained,
        "active_parameters": plan.active or plan.parameters,
        "steps": config.steps,
        "tokens": config.steps * plan.tokens,
        "batch": plan.batch,
        "micro_batch": plan.micro_batch,
        "tokens_per_step": plan.tokens,
        "flop_per_step": plan.flops,
        "memory_bytes": {
            "peak": plan.peak,
            "weights": plan.weights,
            "gradients": plan.gradients,
            "optimizer": plan.optimizer,
            "activations": plan.activations,
            "free": free,
        },
        "fits": plan.peak <= free,
        "checkpoint_bytes": job.checkpoint_bytes,
        "device": place.name,
        "precision": place.precision,
        "objective": job.objective.describe(),
        "data": job.store.report().splitlines(),
    }


def table(facts: dict[str, str]) -> str:
    """Label and figure a line; further lines of a figure stand under its first."""
    margin = "\n" + " " * 13
    return "\n".join(f"{name:>11}  {margin.join(value.splitlines())}" for name, value in facts.items())


def new(
    resolved: Resolved, *, out: Path | None, command: Sequence[str], record: Record, talk: Callable[[str], None]
) -> tuple[int, Path]:
    """Train a preset from fresh weights or those of `train.init`; returns the exit code and the run's folder."""
    job = make_job(resolved, talk)
    _choose_kernels(job)
    folder = out or Path("runs") / resolved.name
    talk(check_disk(folder, job.checkpoint_bytes, job.config.keep, best=job.config.keep_best))
    with Stopper() as stopper:
        run = Run.create(
            resolved.name,
            # What was chosen by the memory that is free now must not be chosen anew when the run goes on.
            preset_yaml=complete(job.resolved, micro_batch=job.plan.micro_batch).to_yaml(),
            command=command,
            environment=_environment(job),
            out=out,
        )
        with run:
            view = make_view(job.config.steps)
            trainer = _trainer(job, None, run, view, record)
            return _go(trainer, stopper), run.path


def resume(
    path: Path, overrides: Sequence[str], *, command: Sequence[str], record: Record, talk: Callable[[str], None]
) -> tuple[int, Path]:
    """Go on with a run from its newest whole checkpoint, or from its beginning when it has none yet."""
    with Stopper() as stopper, Run.open(path) as run:
        resolved = _changed(path, overrides, talk)
        folder = run.newest() if checkpoints(path) else None
        job = make_job(resolved, talk, resumed=folder)
        _choose_kernels(job)
        weights, state, step = None, None, 0
        if folder is not None:
            loaded = load_checkpoint(folder, trainer=True)
            weights, state, step = loaded.weights, loaded.trainer, step_of(folder) or 0
        run.rewind(step)
        if overrides:
            run.change_preset(step, job.resolved.to_yaml())
        _same_text(path, job)
        for difference in run.resumed(step, command, _environment(job)):
            talk(f"not the same as at the start: {difference}")
        view = make_view(job.config.steps)
        trainer = _trainer(job, weights, run, view, record)
        if state is not None:
            for note in restore(trainer.parts, state):
                talk(note)
            trainer.done = logged(read_metrics(path), step)
            trainer.done.saved = step
            trainer.done.sampled = step if run.has_sample(step) else -1
        talk(f"resuming {path} at step {step} of {job.config.steps:,}")
        return _go(trainer, stopper), run.path


def _choose_kernels(job: Job) -> None:
    """Kernels that give the same bits each time, where the run asks for them; before its environment is written down.

    cuBLAS needs workspaces of a fixed size for that, and PyTorch refuses its products without (CUDA's manual of cuBLAS,
    section on reproducibility).
    """
    if job.config.deterministic and job.place.device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(job.config.deterministic)


def _trainer(job: Job, weights: dict[str, torch.Tensor] | None, run: Run, view: View, record: Record) -> Trainer:
    config = job.config
    records: list[Record] = [run.metrics.append, record]
    if config.tensorboard:
        records.append(open_board(run.path))

    def log(line: dict[str, Any]) -> None:
        for each in records:
            each(line)

    torch.manual_seed(config.seed)
    model: Model = with_weights(job, weights)
    ready(model, config, job.place)
    for note in run.notes:
        view.message(note)
    if job.place.device.type == "cuda" and not fast.runs_on(job.place.device):
        view.message("Triton is not installed: PyTorch's own optimizer, loss and products run, which are slower")
    elif job.place.device.type == "cuda" and cublaslt.library() is None:
        view.message(f"none of {', '.join(cublaslt.NAMES)} is found: PyTorch's own products run, which are slower")
    return Trainer(job, model, run, view, log)


def _go(trainer: Trainer, stopper: Stopper) -> int:
    job, view = trainer.job, trainer.view
    view.start(table(describe(job)))
    try:
        return trainer.train(stopper)
    except torch.OutOfMemoryError:
        raise _out_of_memory(trainer) from None
    finally:
        view.close()


def _out_of_memory(trainer: Trainer) -> UserError:
    plan, place = trainer.job.plan, trainer.place
    used, total = place.memory()
    smaller = max(plan.micro_batch // 2, 1)
    return UserError(
        Problem(
            f"out of memory on {place.name}: {gib(used)} in use of {gib(total)}, planned {gib(plan.peak)}",
            remedy=f"set train.micro_batch={smaller}, or train.checkpointing=true, or a smaller train.context",
        )
    )


def _changed(path: Path, overrides: Sequence[str], talk: Callable[[str], None]) -> Resolved:
    """The run's preset with the named changes; refuses those that a resumed run cannot honour."""
    before = load_preset(path)
    if not overrides:
        return before
    after = load_preset(path, overrides)
    changes = dict(_differences(tree(before.preset), tree(after.preset)))
    problems = []
    for name, (old, new) in changes.items():
        if any(name == fixed or name.startswith(fixed + ".") for fixed in FIXED):
            cause = f"cannot change in a resumed run (it is {old!r}, not {new!r})"
            problems.append(Problem(cause, after.place(name), name, "start a new run"))
        else:
            talk(f"changed: {name} {old!r} -> {new!r}")
    if problems:
        raise UserError(*problems)
    return after


def _same_text(path: Path, job: Job) -> None:
    """Refuse text or a tokenizer that is not what the run was started with: its cursor means nothing there."""
    then = environment.recorded(path / ENVIRONMENT)
    for name, digest in (("data", job.store.digest), ("tokenizer", job.tokenizer.digest)):
        if then.get(name) not in (None, digest):
            raise refuse(
                f"the {name} of this run has changed since it was started, so its place in it is lost",
                "restore it, or start a new run from these weights with --init",
                place=str(path),
            )


def _differences(old: Any, new: Any, path: str = "") -> list[tuple[str, tuple[Any, Any]]]:
    if isinstance(old, dict) and isinstance(new, dict):
        found: list[tuple[str, tuple[Any, Any]]] = []
        for key in [*old, *(k for k in new if k not in old)]:
            found += _differences(old.get(key), new.get(key), f"{path}.{key}" if path else key)
        return found
    return [] if old == new else [(path, (old, new))]


def _environment(job: Job) -> dict[str, Any]:
    return environment.describe(
        seed=job.config.seed,
        chosen={"device": job.place.device.type, "precision": job.place.precision},
        data=job.store.digest,
        tokenizer=job.tokenizer.digest,
    )


def command_line() -> list[str]:
    """How this process was called, with `xt` for the program."""
    return ["xt", *sys.argv[1:]]


__all__ = ["command_line", "complete", "describe", "new", "resume"]
