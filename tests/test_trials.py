"""The choice of a kernel by trial."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest

from xtcli.fast import trials


class Refused(Exception):
    """A kernel cannot run."""


class Kernels:
    """Kernels by name, with the times that they take; `counted` has how often each ran."""

    def __init__(self, times: dict[str, float]) -> None:
        self.times, self.counted, self.now = times, dict.fromkeys(times, 0), 0.0

    def run(self, name: str) -> None:
        if name not in self.times:
            raise Refused
        self.counted[name] += 1
        self.now += self.times[name]

    def clock(self, calls: Sequence[Callable[[], None]]) -> list[float]:
        times = []
        for call in calls:
            start = self.now
            call()
            times.append(self.now - start)
        return times


def choose(
    times: dict[str, float], sure: Sequence[str], more: Sequence[str] = (), varied: Sequence[str] = ()
) -> tuple[str | None, Kernels]:
    kernels = Kernels(times)
    made = {name[:-1]: [other for other in varied if other[:-1] == name[:-1]] for name in varied}
    return (
        trials.fastest(kernels.run, sure, more, lambda name: made.get(name, []), Refused, kernels.clock),
        kernels,
    )


def test_the_fastest_is_taken() -> None:
    assert choose({"a": 3.0, "b": 1.0, "c": 2.0}, ["a"], ["b", "c"])[0] == "b"


def test_a_kernel_that_cannot_run_is_left_out() -> None:
    assert choose({"a": 3.0}, ["none", "a"], ["gone"])[0] == "a"
    assert choose({}, ["none"])[0] is None


def test_variants_of_the_best_are_tried() -> None:
    found, kernels = choose(
        {"a": 1.0, "b": 2.0, "c": 5.0, "a1": 0.9, "b1": 1.5, "c1": 0.1}, "abc", (), ["a1", "b1", "c1"]
    )
    assert found == "a1"
    assert kernels.counted["c1"] == 0


def test_few_are_tried_often() -> None:
    times = {f"k{number}": 1.0 + number for number in range(12)}
    found, kernels = choose(times, ["k0"], list(times)[1:])
    assert found == "k0"
    often = [trials.TRIALS] * trials.FEW + [0] * (12 - trials.FEW)
    assert [kernels.counted[name] for name in times] == [1 + trials.LOOKS + more for more in often]


def test_a_clock_that_drifts_is_fair_to_those_that_come_late() -> None:
    names = [f"k{number}" for number in range(9)]
    kernels = Kernels(dict.fromkeys(names, 1.0) | {"k8": 0.9})

    def clock(calls: Sequence[Callable[[], None]]) -> list[float]:
        return [(1 + number / 50) * one for number, one in enumerate(kernels.clock(calls))]

    assert trials.fastest(kernels.run, names, [], lambda name: [], Refused, clock) == "k8"


def test_a_host_that_is_late_once_costs_no_kernel_its_place() -> None:
    names = [f"k{number}" for number in range(9)]
    kernels = Kernels({name: 1.0 + number for number, name in enumerate(names)})
    asked = 0

    def clock(calls: Sequence[Callable[[], None]]) -> list[float]:
        nonlocal asked
        asked += 1
        late = [50.0] + [0.0] * (len(calls) - 1)
        return [one + more for one, more in zip(kernels.clock(calls), late, strict=True)]

    assert trials.fastest(kernels.run, names, [], lambda name: [], Refused, clock) == "k0" and asked == 2


def test_what_is_sure_is_tried_whatever_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trials, "LIMIT", -1.0)
    found, kernels = choose({"a": 3.0, "b": 2.0, "c": 1.0}, ["a", "b"], ["c"])
    assert found == "b" and kernels.counted["c"] == 0


def test_products_of_about_as_many_rows_share_a_kernel() -> None:
    chosen: trials.Chosen[str] = trials.Chosen()
    assert chosen.near("up", 1000) == []
    for rows, kernel in ((1000, "a"), (1600, "b"), (8000, "c")):
        chosen.add("up", rows, kernel)
    chosen.add("down", 1000, "d")
    assert chosen.near("up", 1500) == ["b", "a"]
    assert chosen.near("up", 1100) == ["a", "b"]
    assert chosen.near("up", 3200) == ["b"] and chosen.near("up", 3500) == []
    assert chosen.near("up", 16000) == ["c"] and chosen.near("down", 500) == ["d"]
