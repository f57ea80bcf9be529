"""The name-map engine: tensors of theirs -> ours and back, by a plan, one move at a time.

`get` gives a tensor of the source by the plan's name when it is needed and not before, so that a checkpoint
larger than memory passes through in pieces.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from xtcli.convert.plan import Plan
from xtcli.convert.rules import Move

Get = Callable[[str], Tensor]


def to_ours(plan: Plan, move: Move, get: Get, like: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """The tensors of ours that one move makes; each in memory of its own."""
    made = move.operation.forward([get(name) for name in move.theirs], [like[name] for name in move.ours])
    yield from zip(move.ours, map(packed, made), strict=True)


def to_theirs(plan: Plan, move: Move, get: Get) -> Iterator[tuple[str, Tensor]]:
    """The tensors of theirs that one move makes; each in memory of its own."""
    made = move.operation.backward([get(name) for name in move.ours])
    yield from zip(move.theirs, map(packed, made), strict=True)


def packed(tensor: Tensor) -> Tensor:
    """The tensor, contiguous and without the memory of others."""
    whole = tensor.untyped_storage().nbytes() == tensor.nbytes
    return tensor if whole and tensor.is_contiguous() else tensor.clone(memory_format=torch.contiguous_format)


def state_of(plan: Plan, get: Get, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """All tensors of ours at once."""
    return {name: tensor for move in plan.moves for name, tensor in to_ours(plan, move, get, like)}
