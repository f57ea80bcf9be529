"""How long a call takes, and how much memory.

The first call stands apart: it compiles, loads kernels and fills caches. Then the call is warmed up until its
last five times differ by less than 5 %, and repeated. On a GPU the repeats are queued behind one another between
two synchronisations and each is timed by its own pair of events, so that launching is hidden as it is in use; on
the CPU each is timed by the clock.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from xtcli.train.counting import Alive

REPEATS = 20
FEWEST = 3
"""Repeats where each is long."""

STEADY = 5
SPREAD = 0.05
"""Warm-up ends when the last STEADY times differ by less than this share of the shortest."""

MOST_WARM = 40


@dataclass(frozen=True)
class Times:
    """Seconds of each repeat. `first` is the call before warm-up; `note` says what fell short of the usual rules."""

    raw: tuple[float, ...]
    first: float
    warm: int
    note: str = ""

    @property
    def median(self) -> float:
        """Seconds of the middle repeat."""
        return quantile(self.raw, 0.5)

    @property
    def p5(self) -> float:
        """Seconds that one repeat in twenty stays under."""
        return quantile(self.raw, 0.05)

    @property
    def p95(self) -> float:
        """Seconds that one repeat in twenty exceeds."""
        return quantile(self.raw, 0.95)

    @property
    def extra(self) -> float:
        """Seconds that the first call took beyond an ordinary one: compiling, loading, allocating."""
        return max(self.first - self.median, 0.0)

    def facts(self) -> dict[str, Any]:
        """Plain data, with units in the names."""
        facts: dict[str, Any] = {
            "median_ms": self.median * 1e3,
            "p5_ms": self.p5 * 1e3,
            "p95_ms": self.p95 * 1e3,
            "first_call_extra_ms": self.extra * 1e3,
            "warm_up_calls": self.warm,
            "raw_ms": [second * 1e3 for second in self.raw],
        }
        return facts | ({"note": self.note} if self.note else {})


def quantile(values: Sequence[float], share: float) -> float:
    """The value below which `share` of the values lie, in a straight line between the two nearest."""
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def synchronise(device: torch.device) -> None:
    """Wait for what was queued on `device`."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def clocked(function: Callable[[], Any], device: torch.device) -> float:
    """Seconds of one call, from an idle device to an idle device."""
    synchronise(device)
    began = time.perf_counter()
    function()
    synchronise(device)
    return time.perf_counter() - began


class Clock:
    """Seconds of a step, from blocks of several between two waits for the device: by the clock, and of the processor.

    The processor's seconds are those of all threads of this process together; they tell more than the clock where
    other programs share the machine.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.raw: list[float] = []
        self.processor: list[float] = []

    @contextmanager
    def block(self, steps: int) -> Iterator[None]:
        """Inside, so many steps are taken."""
        synchronise(self.device)
        began, used = time.perf_counter(), time.process_time()
        yield
        synchronise(self.device)
        self.raw.append((time.perf_counter() - began) / steps)
        self.processor.append((time.process_time() - used) / steps)

    def times(self) -> Times:
        """By the clock; the first call is not known here."""
        return Times(tuple(self.raw), self.raw[0], 0)

    def processor_times(self) -> Times:
        """Of the processor."""
        return Times(tuple(self.processor), self.processor[0], 0)


def measure(
    function: Callable[[], Any],
    device: torch.device,
    *,
    repeats: int = REPEATS,
    budget: float = 10.0,
    called: bool = False,
) -> Times:
    """Time `function` on `device` within about `budget` seconds, the first call not counted.

    At least `repeats` repeats where the budget has room for them; otherwise as many as fit, three at least. Where one
    call takes more than half the budget, one repeat without warm-up. The note says what fell short. called: whether the
    function has been called before, so that its first call here is a warm one.
    """
    first = clocked(function, device)
    began = time.perf_counter()
    warm = [first] if called else []
    if first > budget / 2 and not called:
        warm = [clocked(function, device)]
    long = bool(warm) and warm[0] > budget / 2
    while not long and len(warm) < MOST_WARM and not steady(warm):
        warm.append(clocked(function, device))
        if time.perf_counter() - began > budget / 3:
            break
    each = min(warm)
    if long:
        # The only warm call is the measurement.
        return Times((each,), first, 0, f"1 repeat: it takes {each:.2g} s")
    left = budget - (time.perf_counter() - began)
    count = min(repeats, max(int(left / max(each, 1e-9)), FEWEST))
    notes = []
    if count < repeats:
        notes.append(f"{count} repeats: one takes {each:.2g} s")
    if not steady(warm):
        notes.append(f"not steady after {len(warm)} warm-up calls")
    raw = _events(function, device, count) if device.type == "cuda" else _clock(function, device, count)
    return Times(tuple(raw), first, len(warm), "; ".join(notes))


def steady(times: Sequence[float]) -> bool:
    """Whether the last five times differ by less than 5 %."""
    last = times[-STEADY:]
    return len(last) == STEADY and max(last) - min(last) < SPREAD * min(last)


def _clock(function: Callable[[], Any], device: torch.device, count: int) -> list[float]:
    return [clocked(function, device) for _ in range(count)]


def _events(function: Callable[[], Any], device: torch.device, count: int) -> list[float]:
    pairs = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(count)]
    torch.cuda.synchronize(device)
    for start, end in pairs:
        start.record()
        function()
        end.record()
    torch.cuda.synchronize(device)
    return [start.elapsed_time(end) / 1e3 for start, end in pairs]


def peak_bytes(function: Callable[[], Any], device: torch.device, there: Iterable[Tensor]) -> int | None:
    """Most bytes in use during one call, tensors `there` before included; None where it cannot be known.

    CUDA: what the allocator gave out at its peak. CPU: the tensors that operators made and that were alive together;
    the scratch that a kernel takes and gives back within itself is not seen.
    """
    before = list(there)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        function()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device)
    if device.type != "cpu":
        return None
    alive = Alive(before)
    with alive:
        function()
    storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in before}
    return alive.peak + sum(storages.values())


def matmul_rate(device: torch.device, dtype: torch.dtype, *, budget: float = 3.0) -> dict[str, Any]:
    """The rate of a large square matrix product here and now: the yardstick of everything else in the run."""
    size = 8192 if device.type == "cuda" else 1024
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    with torch.no_grad():
        times = measure(lambda: left @ right, device, budget=budget)
    return {"size": size, "flop_per_s": 2 * size**3 / times.median, **times.facts()}


def release(device: torch.device) -> None:
    """Give back to the GPU what the last measurement held."""
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
