"""What each of several sides on one device takes of its memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from xtcli.bench.timing import peak_bytes


class Share:
    """One side's memory. On CUDA: what the allocator held more after whatever ran inside `grows` than before.

    Steps that are recorded as a graph take no memory when they are replayed, since the graph keeps its own: what they
    took is seen where they were recorded, in warm-up.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.resting, self.top = device, 0, 0

    @contextmanager
    def grows(self, steps: bool = False) -> Iterator[None]:
        """Inside, no other side runs; `steps`: and what runs are steps like those that follow."""
        before = self._allocated()
        if steps and self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        yield
        if steps and self.device.type == "cuda":
            self.top = max(self.top, torch.cuda.max_memory_allocated(self.device) - before + self.resting)
        self.resting += self._allocated() - before

    def peak(self, function: Callable[[], Any], held: Iterable[Tensor]) -> int | None:
        """Most bytes of this side during one call, what others hold left out; `held` are its tensors at rest."""
        if self.device.type != "cuda":
            return peak_bytes(function, self.device, held)
        before = self._allocated()
        whole = peak_bytes(function, self.device, ())
        return None if whole is None else max(whole - before + self.resting, self.top)

    def _allocated(self) -> int:
        if self.device.type != "cuda":
            return 0
        torch.cuda.synchronize(self.device)
        return torch.cuda.memory_allocated(self.device)
