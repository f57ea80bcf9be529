"""Bytes that a model holds while it is used, counted on the meta device.

    state      what is remembered between calls: measured on the parts' own `new_state`, after a first step, for two
               capacities and two lengths of an encoder's text; the difference is the growth of a token
    transient  the most bytes alive at once while a text is read, weights and state aside

Nothing here knows a kind of state: every tensor that the state reaches is counted.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from xtcli.parts.graphs import Graph
from xtcli.parts.heads import Head
from xtcli.parts.seq2seq import EncoderDecoder
from xtcli.parts.twostream import in_streams
from xtcli.train.counting import Alive, Kernels


@dataclass(frozen=True)
class State:
    """Bytes of one sequence's state: growth for each token, growth for each token an encoder read, and the rest."""

    token: float
    source: float
    fixed: float


@dataclass(frozen=True)
class Reading:
    """Bytes while `batch` texts are read: the state afterwards, and the peak of everything else but the weights."""

    state: int
    transient: int


def state_bytes(state: Any) -> int:
    """Bytes of every tensor that a state reaches."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors(state))


def tensors(state: Any) -> list[Tensor]:
    """Every tensor that a state reaches, once."""
    found: dict[int, Tensor] = {}

    def visit(value: Any) -> None:
        if isinstance(value, Tensor):
            found[id(value)] = value
        elif isinstance(value, Mapping):
            visit(list(value.values()))
        elif isinstance(value, list | tuple):
            for item in value:
                visit(item)
        elif hasattr(value, "__dict__"):
            visit(vars(value))

    visit(state)
    return list(found.values())


def has_state(model: Graph) -> bool:
    """Whether the model writes token after token; one that reads a whole text at once keeps nothing."""
    return isinstance(model, EncoderDecoder) or model.causal


def measure_state(model: Graph, length: int) -> State | None:
    """The state of one sequence of `length` tokens (2 or more) of a meta model; None for a model that keeps none.

    Growth is that between half the length and the whole, so that a state which stops growing shows it.
    """
    low, high = length // 2, length
    if writes_by_memories(model):
        few, many = (_memories(model, size) for size in (low, high))
        token = (many - few) / (high - low)
        return State(token, 0.0, many - token * high)
    if not has_state(model):
        return None
    full = _remembered(model, high, high)
    token = (full - _remembered(model, low, high)) / (high - low)
    reads = isinstance(model, EncoderDecoder)
    source = (full - _remembered(model, high, low)) / (high - low) if reads else 0.0
    return State(token, source, full - (token + source) * high)


def writes_by_memories(model: Graph) -> bool:
    """Whether a model goes on from memories of its layers' inputs, without caches."""
    return in_streams(model) and getattr(model, "recurrence", None) is not None


def _memories(model: Graph, length: int) -> int:
    """Bytes of what a model that writes by memories keeps of `length` tokens."""
    with torch.no_grad():
        return state_bytes(model.hidden(**model.blank(1, length), use_mems=True).mems)


def _remembered(model: Graph, capacity: int, source: int) -> int:
    """Bytes that the parts remember after a first step; the model's own bookkeeping is not counted."""
    state = model.new_state(1, capacity)  # type: ignore[operator]
    ids = torch.zeros(1, 1, dtype=torch.long, device="meta")
    with torch.no_grad():
        if isinstance(model, EncoderDecoder):
            width = getattr(model.encoder.stack, "width", model.dim)
            memory = torch.empty(1, source, width, dtype=model.dtype, device="meta")
            model.decode(ids, memory, state=state)
        else:
            model.hidden(**model.blank(1, 1), state=state)
    return state_bytes(state.blocks)


def measure_reading(model: Graph, batch: int, length: int) -> Reading:
    """Bytes while a meta model reads `batch` texts of `length` tokens, to go on writing where it can write.

    A model that writes makes the logits of the last place; one that does not, every output at every place. An
    encoder-decoder reads a source of `length` tokens and has room for as many. The model is left in evaluation mode.
    """
    given = model.blank(batch, length)
    model.eval()
    state = model.new_state(batch, length) if has_state(model) else None  # type: ignore[operator]
    before = state_bytes(state)
    kept = [*model.parameters(), *model.buffers(), *tensors(state), *given.values()]
    with torch.no_grad(), Kernels(), Alive(kept) as alive:
        if isinstance(model, EncoderDecoder):
            source = {name: value for name, value in given.items() if name not in ("input_ids", "decoder_input_ids")}
            memory = model.encode(given.get("input_ids"), extras=source)
            hidden = model.decode(given["decoder_input_ids"][:, :1], memory, state=state)
        elif state is not None:
            hidden = model.hidden(**given, state=state)
        else:
            hidden = model.hidden(**given)
        if state is not None:
            hidden.states = hidden.states[:, -1:]
        for name, head in model.heads.items():
            assert isinstance(head, Head)
            head.outputs(model.read_by(name, hidden))
    after = state_bytes(state)
    if writes_by_memories(model):
        return Reading(batch * _memories(model, length), alive.peak)
    return Reading(after, max(alive.peak - (after - before), 0))
