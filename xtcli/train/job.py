"""Everything a training run needs, made from a resolved preset: data, objective, model, plan.

Order matters for the user's patience: the config is checked against a skeleton on the meta device
before any text is read, text is tokenised before any memory is taken, and the disk and memory are
looked at before the first step.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from xtcli.config.preset import Resolved
from xtcli.data.batch import Batch
from xtcli.data.loader import order_of, validation_batches
from xtcli.errors import Problem, UserError, did_you_mean, refuse
from xtcli.model import Model, build, skeleton
from xtcli.parts.embed import longest_text
from xtcli.parts.graphs import Graph
from xtcli.registry import part_of
from xtcli.train import initial
from xtcli.train.device import Place, choose
from xtcli.train.initial import Fit
from xtcli.train.lora import adapt
from xtcli.train.optim import optimizer_bytes
from xtcli.train.plan import Plan, make_plan

DEFAULT_CONTEXT = 512
"""Tokens of a training sequence where neither the preset nor the model bounds it."""


@dataclass
class Job:
    """What the loop works with. `validation` is None where nothing is held out; `fit` tells which weights a run
    that starts now takes from a checkpoint."""

    resolved: Resolved
    place: Place
    tokenizer: Any
    store: Any
    objective: Any
    validation: Any
    skeleton: Graph
    plan: Plan
    checkpoint_bytes: int
    fit: Fit | None = None

    @property
    def config(self) -> Any:
        """The train section."""
        return self.resolved.preset.train

    def validation_batches(self) -> Any:
        """The fixed batches of one validation, in micro-batches."""
        rows = min(self.plan.micro_batch, len(self.validation))
        limit = -(-self.config.validate_batches * self.plan.batch // rows)
        return validation_batches(self.validation, batch=rows, limit=limit)


def make_job(resolved: Resolved, talk: Callable[[str], None], *, resumed: Path | None = None) -> Job:
    """Check, read and plan; raises UserError for whatever stands in the way. Takes no weights into memory.

    What only the data or the checkpoint of `train.init` can tell is settled in the job's preset. `resumed` is the
    checkpoint that a run goes on from: it has the weights and the tokenizer, so those of `train.init` may be gone.
    """
    place = choose(resolved.preset.train)
    fit = None
    starts = resolved.preset.train.init is not None and resumed is None
    if starts:
        resolved = initial.settle(resolved)
        initial.compare(skeleton(resolved), resolved)  # refused before any text is read
    kind: Any = part_of(resolved.preset.objective)
    named = resolved.preset.tokenizer
    resolved, tokenizer, store = kind.prepare(initial.with_tokenizer(resolved, resumed), skeleton(resolved))
    resolved = replace(resolved, preset=resolved.preset.model_copy(update={"tokenizer": named}))
    model = skeleton(resolved)
    if starts:
        fit = initial.compare(model, resolved)
        for line in fit.report():
            talk(line)
    resolved = _adapted(resolved, model, fit, talk)
    preset = resolved.preset
    config = preset.train
    _vocab_fits(tokenizer, model, resolved)
    context = _context(resolved, model)
    options: dict[str, Any] = {"context": context, "seed": config.seed, "start": _start(model, tokenizer)}
    options |= kind.facts(model)
    objective = kind(preset.objective, store.split("train"), tokenizer, **options)
    held_out = store.split("validation")
    validation = None
    if any(len(stream) for stream in held_out.streams.values()):
        validation = kind(preset.objective, held_out, tokenizer, validation=True, **options)
    rows = np.zeros(config.batch, dtype=np.int64)
    batch: Batch = objective.batch(np.arange(config.batch, dtype=np.int64) % len(objective), rows)
    _heads_fit(batch, model, resolved)
    if objective.carry and getattr(model, "recurrence", None) is None:
        raise refuse(
            "the objective carries memories from batch to batch, and the model keeps none",
            "set model.stack.recurrence, or objective.carry=false",
            place=resolved.place("objective"),
            path="objective",
        )
    if objective.carry and model.recurrence.length is None:  # type: ignore[union-attr]
        raise refuse(
            "memories that keep everything would grow without end in training",
            "set model.stack.recurrence.length",
            place=resolved.place("model.stack.recurrence"),
            path="model.stack.recurrence",
        )
    order_of(objective, config.batch, config.seed)  # refused before anything is made
    plan = make_plan(
        model,
        batch,
        dtype=place.dtype,
        stored=place.stored,
        micro_batch=config.micro_batch,
        checkpointing=config.checkpointing,
        free=place.free(),
        device=place.device.type,
        carried=objective.carry,
    )
    size = place.stored.itemsize * plan.parameters + optimizer_bytes(model, place.stored)
    return Job(resolved, place, tokenizer, store, objective, validation, model, plan, size, fit)


def _adapted(resolved: Resolved, model: Graph, fit: Fit | None, talk: Callable[[str], None]) -> Resolved:
    """The preset with the settled `train.lora`, whose adapters are put on the skeleton."""
    config = resolved.preset.train.lora
    if config is None:
        return resolved
    if config.whole is None:
        config = config.model_copy(update={"whole": () if fit is None else fit.modules()})
        resolved = complete(resolved, lora=config)
    layers = adapt(model, config, place=resolved.place("train.lora"))
    whole = f"; trained whole: {', '.join(config.whole or ())}" if config.whole else ""
    talk(f"adapters of rank {config.rank} on {len(layers)} linear layers{whole}")
    if resolved.preset.train.init is None:
        talk("without train.init the weights under the adapters are random and stay so")
    return resolved


def _heads_fit(batch: Batch, model: Graph, resolved: Resolved) -> None:
    """The objective's targets must have heads that answer them."""
    missing = [head for head in batch.targets if head not in model.heads]
    if missing:
        have = ", ".join(model.heads) or "none"
        raise UserError(
            Problem(
                f"objective '{resolved.preset.objective.kind}' needs the head '{missing[0]}'; the model has: {have}",
                resolved.place("objective"),
                "objective",
                f"add it under model.heads, or {did_you_mean(missing[0], model.heads)}",
            )
        )


def _vocab_fits(tokenizer: Any, model: Graph, resolved: Resolved) -> None:
    vocab = resolved.preset.model.vocab  # type: ignore[attr-defined]
    if model.reads_text and tokenizer.vocab > vocab:
        raise refuse(
            f"the tokenizer has {tokenizer.vocab:,} ids, the model {vocab:,} rows",
            f"set model.vocab={tokenizer.vocab} or a smaller tokenizer.vocab",
            place=resolved.place("model.vocab"),
            path="model.vocab",
        )


def _context(resolved: Resolved, model: Model) -> int:
    asked = resolved.preset.train.context
    limit = model.context
    learned = longest_text(model)
    if asked is not None and learned is not None and asked > learned:
        raise refuse(
            f"sequences of {asked} tokens do not fit into {learned} positions",
            f"set train.context to {learned} or less, or raise model.context",
            place=resolved.place("train.context"),
            path="train.context",
        )
    return asked or limit or DEFAULT_CONTEXT


def _start(model: Model, tokenizer: Any) -> int | None:
    """The id that a decoder's text starts with: the model's, else the tokenizer's bos or pad."""
    configured: int | None = getattr(model, "start", None)
    special: dict[str, int] = tokenizer.special
    return configured if configured is not None else special.get("bos", special.get("pad"))


def with_weights(job: Job, weights: dict[str, torch.Tensor] | None) -> Model:
    """The model in memory on its device, adapters included: the weights with which a run starts, or the given ones."""
    config, seed = job.config, job.config.seed
    if weights is None:
        model = build(job.resolved, seed=seed, device="cpu")
        if job.fit is not None:
            initial.fill(model, job.fit)
        if config.lora is not None:
            adapt(model, config.lora, seed)
        return stored_in(model, job.place.stored).to(job.place.device)
    model = skeleton(job.resolved)
    if config.lora is not None:
        adapt(model, config.lora)
    stored_in(model, job.place.stored).to_empty(device=job.place.device)
    with torch.no_grad():
        model.load_state_dict(weights, strict=True)
    return model


def stored_in(model: Model, dtype: torch.dtype) -> Model:
    """The model with its parameters in `dtype`, in place; buffers, which nothing trains, keep their own."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model


def complete(resolved: Resolved, **train: Any) -> Resolved:
    """The preset with settings of `train` replaced by what was settled."""
    preset = resolved.preset
    return replace(resolved, preset=preset.model_copy(update={"train": preset.train.model_copy(update=train)}))
