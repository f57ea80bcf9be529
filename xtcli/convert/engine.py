"""The name-map engine: tensors of theirs -> ours and back, one move of the plan at a time.

`get` gives a tensor of the source when it is needed and not before, so that a checkpoint larger than memory
passes through in pieces.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from xtcli.convert.plan import Plan
from xtcli.convert.rules import Move

Get = Callable[[str], Tensor]


def to_ours(move: Move, get: Get, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of ours that one move makes, each in memory of its own; `get` takes names of the plan."""
    return dict(zip(move.ours, map(packed, forward(move, get, like)), strict=True))


def to_theirs(move: Move, get: Get) -> dict[str, Tensor]:
    """The tensors of theirs that one move makes, each in memory of its own; `get` takes names of ours."""
    return dict(zip(move.theirs, map(packed, backward(move, get)), strict=True))


def forward(move: Move, get: Get, like: Mapping[str, Tensor]) -> list[Tensor]:
    """What one move makes of theirs, perhaps as views."""
    return move.operation.forward([get(name) for name in move.theirs], [like[name] for name in move.ours])


def backward(move: Move, get: Get) -> list[Tensor]:
    """What one move makes of ours, perhaps as views."""
    return move.operation.backward([get(name) for name in move.ours])


def packed(tensor: Tensor) -> Tensor:
    """The tensor, contiguous and without the memory of others."""
    whole = tensor.untyped_storage().nbytes() == tensor.nbytes
    return tensor if whole and tensor.is_contiguous() else tensor.clone(memory_format=torch.contiguous_format)


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors hold the same bits in the same shape and type; a nan equals itself."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[one.dtype.itemsize]
    return torch.equal(one.view(bits), other.view(bits))


def state_of(plan: Plan, get: Get, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """All tensors of ours at once."""
    return {name: tensor for move in plan.moves for name, tensor in to_ours(move, get, like).items()}
