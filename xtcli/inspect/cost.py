"""What a model costs: FLOPs and state for each token, memory to use it and to train it.

FLOPs are those of matrix products in the built graph, as train/plan.py counts them: attention over the whole
length whatever the mask hides, every head at every place, the backward pass as two forwards. Memory is given for
weights and matrix products in float32 and in bfloat16; training keeps float32 weights, gradients and AdamW's two
running values, or bfloat16 ones where the preset's train.precision is bf16-true. Context of the device, its libraries
and fragments are beside these figures.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from xtcli.config.preset import Resolved
from xtcli.data.batch import IGNORE, Batch
from xtcli.errors import refuse
from xtcli.inspect import units
from xtcli.inspect.memory import State, measure_reading, measure_state
from xtcli.model import skeleton
from xtcli.parts.embed import longest_text
from xtcli.parts.graphs import Graph
from xtcli.parts.seq2seq import EncoderDecoder
from xtcli.runs.run import gib
from xtcli.train.device import STORED
from xtcli.train.job import DEFAULT_CONTEXT
from xtcli.train.plan import WORKSPACE, Plan, make_plan, measure

PRECISIONS: Mapping[str, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Use:
    """Bytes at one precision."""

    weights: int
    state: State | None
    states: int  # of the whole batch
    inference: int
    training: Plan


@dataclass(frozen=True)
class Costs:
    """All costs at `batch` texts of `length` tokens; FLOPs are for one token of one text."""

    batch: int
    length: int
    tokens: int  # of one text and, in an encoder-decoder, of its answer
    sides: int
    forward: float
    training: float
    checkpointing: bool
    use: Mapping[str, Use]

    def facts(self) -> dict[str, Any]:
        """The costs as plain data, with units in the names."""
        return {
            "batch": self.batch,
            "length_tokens": self.length,
            "forward_flop_per_token": self.forward,
            "training_flop_per_token": self.training,
            "memory_bytes": {name: _use_facts(use) for name, use in self.use.items()},
        }


def _use_facts(use: Use) -> dict[str, Any]:
    return {
        "weights": use.weights,
        "state_per_token": None if use.state is None else use.state.token,
        "state_per_source_token": None if use.state is None else use.state.source,
        "state_fixed": None if use.state is None else use.state.fixed,
        "state": use.states,
        "inference": use.inference,
        "training": use.training.peak,
        "training_parts": {
            key: value
            for key, value in asdict(use.training).items()
            if key in ("weights", "gradients", "optimizer", "activations")
        },
    }


def usual_length(resolved: Resolved, model: Graph) -> int:
    """The length that costs are given for unless the user names one: that of training, else the model's context."""
    if (places := places_of(model)) is not None:
        return places
    usual = resolved.preset.train.context or model.context or DEFAULT_CONTEXT
    return max(2, min(usual, position_limit(model) or usual))


def measure_costs(resolved: Resolved, *, batch: int = 1, length: int | None = None) -> Costs:
    """The costs of a preset's model; raises UserError for a length that the model cannot read."""
    model = skeleton(resolved)
    check_length(model, length)
    length = length or usual_length(resolved, model)
    one, wide = synthetic(model, 1, length), torch.float32
    forward = measure(model, one, wide)
    share = getattr(resolved.preset.objective, "supervised", 1.0)
    step = synthetic(model, batch, length, share)
    trained = forward if share == 1.0 else measure(model, step.split(1)[0], wide)
    stored, use = STORED.get(resolved.preset.train.precision), {}
    for name, dtype in PRECISIONS.items():
        typed = model if dtype == torch.float32 else skeleton(resolved, dtype)
        weights = sum(parameter.numel() * parameter.element_size() for parameter in typed.parameters())
        reading = measure_reading(typed, batch, length)
        plan = make_plan(
            model,
            step,
            dtype=dtype,
            stored=dtype if dtype == stored else wide,
            micro_batch=batch,
            checkpointing=resolved.preset.train.checkpointing,
            free=0,
            cost=trained if dtype == wide else measure(model, step.split(1)[0], dtype),
        )
        inference = int((weights + reading.state + reading.transient) * (1 + WORKSPACE))
        use[name] = Use(weights, measure_state(typed, length), reading.state, inference, plan)
    return Costs(
        batch,
        length,
        one.tokens,
        2 if isinstance(model, EncoderDecoder) else 1,
        forward.flops / one.tokens,
        3 * trained.flops / one.tokens,
        resolved.preset.train.checkpointing,
        use,
    )


def check_length(model: Graph, length: int | None) -> None:
    """Refuse a length given by the user that the model has no positions for."""
    limit, places = position_limit(model), places_of(model)
    if length is not None and places is not None and length != places:
        cause = f"the model reads inputs of one size, which are {units.plural(places, 'token')}"
        raise refuse(cause, "leave it out", place="--length")
    if length is not None and limit is not None and length > limit:
        raise refuse(
            f"{units.plural(length, 'token')} do not fit into {units.plural(limit, 'position')}",
            f"use {limit} or less, or raise model.context",
            place="--length",
        )


def position_limit(model: Graph) -> int | None:
    """The most tokens that a model's positions can tell apart, or None."""
    return places_of(model) or longest_text(model)


def places_of(model: Graph) -> int | None:
    """The places of a model of one stack whose inputs have one size, such as images."""
    places: int | None = getattr(getattr(model, "embed", None), "places", None)
    return places


def synthetic(model: Graph, batch: int, length: int, share: float = 1.0) -> Batch:
    """Rows of `length` tokens for every input and every head of a model.

    share: how many of the places have a target, for heads that look at those alone.
    """
    inputs = {name: blank.numpy() for name, blank in model.blank(batch, length, torch.device("cpu")).items()}
    sides = max(1, sum(name.endswith("input_ids") for name in inputs))
    # What an encoder sees instead of a text has as many places as it has.
    seen = getattr(getattr(model, "encoder", None), "embed", None)
    tokens = length * sides + (getattr(seen, "places", None) or 0)
    targets = np.full((batch, length), IGNORE, dtype=np.int64)
    targets[:, : max(1, round(share * length))] = 0
    return Batch.of(inputs, dict.fromkeys(model.heads, targets), range(batch), [tokens] * batch)


def flop_rows(costs: Costs) -> list[tuple[str, float]]:
    """Label and FLOPs."""
    return [("FLOPs per token, forward", costs.forward), ("FLOPs per token, training", costs.training)]


def memory_rows(costs: Costs) -> list[tuple[str, list[str]]]:
    """Label and a figure for each precision."""
    uses = list(costs.use.values())
    rows = [("weights", [gib(use.weights) for use in uses])]
    states = [use.state for use in uses if use.state is not None]
    if states:
        rows.append(("state per token", [units.size(state.token) for state in states]))
        if any(state.source for state in states):
            rows.append(("state per source token", [units.size(state.source) for state in states]))
        if any(round(state.fixed) for state in states):
            rows.append(("state of any length", [units.size(state.fixed) for state in states]))
        rows.append(("state in all", [gib(use.states) for use in uses]))
    else:
        rows.append(("state", ["none" for _ in uses]))
    rows.append(("memory for inference", [gib(use.inference) for use in uses]))
    how = "memory for training" + (", recomputing" if costs.checkpointing else "")
    rows.append((how, [gib(use.training.peak) for use in uses]))
    return rows


def occasion(costs: Costs) -> str:
    """What the costs are those of."""
    text = f"{units.plural(costs.batch, 'text')} of {units.plural(costs.length, 'token')}"
    return text + (", each with an answer of as many" if costs.sides > 1 else "")


def lines(costs: Costs) -> list[str]:
    """The costs as text."""
    where = f"in a text of {units.plural(costs.length, 'token')}"
    flops = [(label, units.flop(amount), where) for label, amount in flop_rows(costs)]
    rows = [(occasion(costs), *costs.use), *((label, *cells) for label, cells in memory_rows(costs))]
    return [*units.table(flops, right=(1,)), "", *units.table(rows, right=tuple(range(1, len(costs.use) + 1)))]
