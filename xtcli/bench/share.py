"""What each of several sides on one device takes of its memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from xtcli.bench.timing import peak_bytes


class Share:
    """One side's memory. On CUDA: what the allocator held more after whatever ran inside `grows` than before."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.resting = device, 0

    @contextmanager
    def grows(self) -> Iterator[None]:
        """Inside, no other side runs."""
        before = self._allocated()
        yield
        self.resting += self._allocated() - before

    def peak(self, function: Callable[[], Any], held: Iterable[Tensor]) -> int | None:
        """Most bytes of this side during one call, what others hold left out; `held` are its tensors at rest."""
        if self.device.type != "cuda":
            return peak_bytes(function, self.device, held)
        before = self._allocated()
        whole = peak_bytes(function, self.device, ())
        return None if whole is None else whole - before + self.resting

    def _allocated(self) -> int:
        if self.device.type != "cuda":
            return 0
        torch.cuda.synchronize(self.device)
        return torch.cuda.memory_allocated(self.device)
