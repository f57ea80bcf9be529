"""The fastest of several kernels that compute the same, by trial on the device where they will run.

All are launched once, in the order of what is expected of them and within a time limit, which loads them; then they are
timed in turns, a few times all and the best of them more often, so that a device whose clock drifts is fair to all and
a host that is late for once counts for little.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Sequence
from typing import Generic, TypeVar

import torch

LIMIT = 1.0
"""Seconds after which no further kernels are looked at; those that are sure to be tried are tried all the same. Most of
it goes by while kernels are loaded for the first time."""
LOOKS = 3
"""How often all are timed."""
FEW = 6
"""How many of the best are timed again."""
VARIED = 2
"""How many of the best are tried in their variants as well."""
TRIALS = 9
"""How often those are."""

CLOSE = 2.0
"""Products whose rows differ by this factor at most share a kernel."""

Kernel = TypeVar("Kernel")
Clock = Callable[[Sequence[Callable[[], None]]], list[float]]
"""The times that calls take, one after the other, in any unit."""


class Chosen(Generic[Kernel]):
    """Kernels that have been chosen. Texts of many widths make products that differ in their rows alone, and a trial
    for each would cost more than it brings."""

    def __init__(self) -> None:
        self.known: dict[Hashable, dict[int, Kernel]] = {}

    def add(self, family: Hashable, rows: int, kernel: Kernel) -> None:
        """Remember a kernel; `family` is all that a product is but its rows."""
        self.known.setdefault(family, {})[rows] = kernel

    def near(self, family: Hashable, rows: int) -> list[Kernel]:
        """Kernels for about as many rows, those for the nearest number first."""
        apart = {other: max(other, rows) / max(min(other, rows), 1) for other in self.known.get(family, ())}
        close = sorted((factor, other) for other, factor in apart.items() if factor <= CLOSE)
        return [self.known[family][other] for _, other in close]


def fastest(
    run: Callable[[Kernel], None],
    sure: Sequence[Kernel],
    more: Sequence[Kernel],
    variants: Callable[[Kernel], Sequence[Kernel]],
    refusal: type[Exception],
    clock: Clock | None = None,
) -> Kernel | None:
    """The kernel of the shortest time among `sure`, `more` and variants of the best; None where none runs.

    `run` raises `refusal` for a kernel that cannot.
    """
    end = time.perf_counter() + LIMIT

    def runs(kernel: Kernel) -> bool:
        try:
            run(kernel)
        except refusal:
            return False
        return True

    def best(kernels: Sequence[Kernel], often: int) -> list[Kernel]:
        times = (clock or on_gpu)([lambda chosen=kernel: run(chosen) for kernel in [*kernels] * often])  # type: ignore[misc]
        medians = [sorted(times[number :: len(kernels)])[often // 2] for number in range(len(kernels))]
        return [kernels[number] for number in sorted(range(len(kernels)), key=medians.__getitem__)]

    known = [kernel for kernel in sure if runs(kernel)]
    known += [kernel for kernel in more if time.perf_counter() < end and runs(kernel)]
    if not known:
        return None
    known = best(known, LOOKS)
    varied = [other for kernel in known[:VARIED] for other in variants(kernel) if runs(other)]
    return best([*known[:FEW], *varied], TRIALS)[0]


def on_gpu(calls: Sequence[Callable[[], None]]) -> list[float]:
    """Milliseconds of each of some calls that launch one kernel, which are made at once behind two more of the first:
    the device is busy with these while the host launches."""
    calls[0]()
    calls[0]()
    pairs = []
    for call in calls:
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        call()
        end.record()
        pairs.append((begin, end))
    torch.cuda.synchronize()
    return [begin.elapsed_time(end) for begin, end in pairs]
