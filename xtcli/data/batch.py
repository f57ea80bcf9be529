"""One batch: what the model reads, what it must say, and how much of it is padding.

Targets are aligned with positions (nothing shifts them later) and are keyed by the head that answers;
-100 marks a position without a target. Padding is what lies behind a row's length, never what has the
pad token's id: an end-of-text token that shares its id with padding stays supervised.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import torch
    from torch import Tensor

IGNORE = -100
"""The target of a position that is not supervised."""


def round_up(length: int, multiple: int) -> int:
    """The least multiple of `multiple` that is at least `length`."""
    return -(-length // multiple) * multiple


def slots(count: int, most: int) -> int:
    """Places that are kept for `count` targets: at most an eighth more, and `most` of them.

    So rarely a new number, since what is compiled for one number of places is compiled anew for another.
    """
    return min(round_up(count, 2 ** max(count.bit_length() - 4, 0)), most)


@dataclass(frozen=True, eq=False)
class Batch:
    """Rows for one forward pass; tensors are int64, of values that are no ids float32.

    inputs: name -> (B, T); targets: head -> (B, T) or (B,).
    tokens, padded: positions of `input_ids` and `decoder_input_ids` that are text, and that are padding.
    ids: the index of each row's sample; lengths: text positions of each row (sum = tokens).
    multiple: 0 when the width is fixed; otherwise widths follow the longest row, in steps of this many.
    counts: what `supervised` says, once it is known; a batch that moves to a device takes it along.
    """

    inputs: dict[str, Tensor]
    targets: dict[str, Tensor]
    tokens: int
    padded: int
    ids: list[int]
    lengths: tuple[int, ...] = ()
    multiple: int = 0
    counts: dict[str, int] | None = None

    @classmethod
    def of(
        cls,
        inputs: Mapping[str, np.ndarray[Any, Any]],
        targets: Mapping[str, np.ndarray[Any, Any]],
        ids: Sequence[int],
        lengths: Sequence[int],
        multiple: int = 0,
    ) -> Batch:
        """A batch from arrays (B, ...) and the number of text positions of each row."""
        import torch

        def tensors(arrays: Mapping[str, np.ndarray[Any, Any]]) -> dict[str, Tensor]:
            return {name: torch.from_numpy(np.ascontiguousarray(a, dtype=_type(a))) for name, a in arrays.items()}

        return cls._counted(
            tensors(inputs), tensors(targets), [int(i) for i in ids], [int(n) for n in lengths], multiple
        )

    @classmethod
    def _counted(
        cls,
        inputs: dict[str, Tensor],
        targets: dict[str, Tensor],
        ids: list[int],
        lengths: Sequence[int],
        multiple: int,
    ) -> Batch:
        tokens = sum(lengths)
        read = [name for name in ("input_ids", "decoder_input_ids") if name in inputs]
        places = sum(inputs[name].numel() for name in read) if read else tokens
        return cls(inputs, targets, tokens, places - tokens, ids, tuple(lengths), multiple)

    def __len__(self) -> int:
        return len(self.ids)

    def supervised(self) -> dict[str, int]:
        """Targets that count, for each head."""
        if self.counts is not None:
            return self.counts
        return {head: int((target != IGNORE).sum()) for head, target in self.targets.items()}

    @property
    def slots(self) -> dict[str, int]:
        """Places to be kept for the targets of each head; see `slots`."""
        return {head: slots(count, self.targets[head].numel()) for head, count in self.supervised().items()}

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        """The same batch on `device`."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Batch:
        """The same batch in page-locked memory (the loader's pinning thread calls this by its name)."""
        return self._map(lambda tensor: tensor.pin_memory())

    def _map(self, change: Callable[[Tensor], Tensor]) -> Batch:
        return replace(
            self,
            inputs={name: change(tensor) for name, tensor in self.inputs.items()},
            targets={name: change(tensor) for name, tensor in self.targets.items()},
            counts=self.supervised(),
        )

    def split(self, micro: int) -> list[Batch]:
        """Micro-batches of `micro` rows (the last may be shorter), in order; together they hold every row once.

        Where the width follows the longest row, each micro-batch drops the columns that only pad it.
        """
        if micro < 1:
            raise ValueError(f"micro-batches need at least one row, not {micro}")
        if micro >= len(self.ids):
            return [self]
        return [self._rows(slice(at, at + micro)) for at in range(0, len(self.ids), micro)]

    def _rows(self, rows: slice) -> Batch:
        inputs = {name: tensor[rows] for name, tensor in self.inputs.items()}
        targets = {name: tensor[rows] for name, tensor in self.targets.items()}
        if self.multiple:
            sides = {"": _width(inputs, "attention_mask", self.multiple)}
            sides["decoder_"] = _width(inputs, "decoder_attention_mask", self.multiple)
            answer = "decoder_" if sides["decoder_"] is not None else ""
            inputs = {n: _cut(t, sides["decoder_" if n.startswith("decoder_") else ""]) for n, t in inputs.items()}
            targets = {n: _cut(t, sides[answer]) for n, t in targets.items()}
        return self._counted(inputs, targets, self.ids[rows], self.lengths[rows], self.multiple)


def _type(array: np.ndarray[Any, Any]) -> type[np.generic]:
    return np.float32 if array.dtype.kind == "f" else np.int64


def _width(inputs: Mapping[str, Tensor], mask: str, multiple: int) -> int | None:
    if mask not in inputs:
        return None
    return round_up(int(inputs[mask].sum(1).max()), multiple)


def _cut(tensor: Tensor, width: int | None) -> Tensor:
    return tensor if width is None or tensor.ndim < 2 else tensor[:, :width]
