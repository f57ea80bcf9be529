"""What a text leaves behind as plain tensors, which the next call takes up: states of one size however long it was.

    state    a list of tensors (B, W, L), L layers: for each block what its last sublayer remembers, then the one before

A model has it where all that its sublayers remember are such states; they name the tensors of it in `remembered`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from xtcli.parts.context import ModelState


def carries(model: nn.Module) -> bool:
    """Whether all that a model remembers of a text has one size and a name."""
    if not any(getattr(module, "remembered", ()) for module in model.modules()):
        return False
    state: ModelState = model.new_state(1, 1, "meta", torch.float32)  # type: ignore[operator]
    return all(hasattr(part, "remembered") for block in state.blocks for part in block.values() if part is not None)


def _places(state: ModelState) -> list[tuple[str, str]]:
    """(sublayer, tensor) in the order of the list."""
    parts: list[tuple[str, Any]] = list(state.blocks[0].items())
    return [(name, tensor) for name, part in reversed(parts) if part is not None for tensor in part.remembered]


def left_behind(state: ModelState) -> list[Tensor]:
    """The state as tensors."""
    return [torch.stack([getattr(b[name], tensor) for b in state.blocks], -1) for name, tensor in _places(state)]


def taken_up(model: Any, given: Sequence[Tensor] | Tensor | None, batch: int, length: int) -> ModelState:
    """A state for `length` tokens that begins with what was given, a list or one stacked tensor, or with nothing.

    Raises ValueError for tensors of other shapes.
    """
    state: ModelState = model.new_state(batch, length)
    places = _places(state)
    if given is None:
        return state
    if len(given) != len(places):
        raise ValueError(f"state: {len(given)} tensors were given, the model remembers {len(places)}")
    for (name, tensor), whole in zip(places, given, strict=True):
        empty = getattr(state.blocks[0][name], tensor)
        wanted = (*empty.shape, len(state.blocks))
        if tuple(whole.shape) != wanted:
            raise ValueError(f"state: a tensor is {tuple(whole.shape)}, not {wanted} (rows, width, layers)")
        for block, values in zip(state.blocks, whole.unbind(-1), strict=True):
            setattr(block[name], tensor, values.to(empty))
    return state
