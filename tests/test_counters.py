"""Places for counters, and a graph whose clearings of them become one. The driver is a stand-in that keeps a graph in
Python."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
import torch

from xtcli.fast import counters
from xtcli.fast.counters import PLACES, SIZE, Counters, clear_at_once
from xtcli.fast.hopper.build import Failed

KERNEL, MEMSET = 0, 2


class Driver:
    """Graphs by node: what each does (None a kernel, else address and bytes that it clears) and what it waits for."""

    def __init__(self) -> None:
        self.does: dict[int, tuple[int, int] | None] = {}
        self.waits: dict[int, set[int]] = {}
        self.refuses: str | None = None

    def add(self, before: Iterable[int] = (), clears: tuple[int, int] | None = None) -> int:
        node = len(self.does) + 1
        self.does[node], self.waits[node] = clears, set(before)
        return node

    def __call__(self, name: str, *arguments: Any) -> None:
        if name == self.refuses:
            raise Failed(name)
        getattr(self, name)(*arguments)

    def _list(self, nodes: Iterable[int], into: Any, count: Any) -> None:
        found = sorted(nodes)
        if into is None:
            count._obj.value = len(found)
        else:
            into[:] = found

    def cuGraphGetNodes(self, graph: Any, into: Any, count: Any) -> None:
        self._list(self.does, into, count)

    def cuGraphGetRootNodes(self, graph: Any, into: Any, count: Any) -> None:
        self._list((node for node, before in self.waits.items() if not before), into, count)

    def cuGraphNodeGetDependencies(self, node: Any, into: Any, count: Any) -> None:
        self._list(self.waits[node.value], into, count)

    def cuGraphNodeGetDependentNodes(self, node: Any, into: Any, count: Any) -> None:
        self._list((other for other, before in self.waits.items() if node.value in before), into, count)

    def cuGraphNodeGetType(self, node: Any, kind: Any) -> None:
        kind._obj.value = KERNEL if self.does[node.value] is None else MEMSET

    def cuGraphMemsetNodeGetParams(self, node: Any, told: Any) -> None:
        does = self.does[node.value]
        assert does is not None
        told._obj.at, told._obj.width = does
        told._obj.element, told._obj.height = 1, 1

    def cuCtxGetCurrent(self, context: Any) -> None:
        context._obj.value = 5

    def cuGraphAddMemsetNode(self, node: Any, graph: Any, before: Any, count: Any, told: Any, context: Any) -> None:
        assert count.value == 0 and context.value == 5
        node._obj.value = self.add((), (told._obj.at, told._obj.width * told._obj.element * told._obj.height))

    def cuGraphDestroyNode(self, node: Any) -> None:
        del self.does[node.value], self.waits[node.value]
        for before in self.waits.values():
            before.discard(node.value)

    def cuGraphAddDependencies(self, graph: Any, one: Any, two: Any, count: Any) -> None:
        before, behind = one._obj.value, two._obj.value
        assert before in self.does and before not in self.waits[behind], "an edge comes twice"
        self.waits[behind].add(before)


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    made = Driver()
    monkeypatch.setattr(counters, "call", made)
    return made


@pytest.fixture
def places() -> Counters:
    return Counters(torch.device("cpu"))


def chain(driver: Driver, steps: Iterable[tuple[int, int] | None]) -> list[int]:
    """Nodes of which each waits for the one before."""
    nodes: list[int] = []
    for does in steps:
        nodes.append(driver.add(nodes[-1:], does))
    return nodes


def test_places_come_in_turn_and_come_around(places: Counters) -> None:
    found = [places.place() for _ in range(PLACES + 1)]
    assert len(set(found)) == PLACES and found[0] == found[-1] and found[1] - found[0] == SIZE
    assert all(places.holds(at) for at in found) and not places.holds(found[0] - 1)
    assert not places.holds(found[0] + SIZE * PLACES)


def test_clearings_become_one_at_the_beginning(driver: Driver, places: Counters) -> None:
    _, one, _, two = (places.place() for _ in range(4))
    norm, _, up, _, down = chain(driver, [None, (one, 4), None, (two, 4), None])
    assert clear_at_once(1, places) == 2
    (first,) = (node for node, does in driver.does.items() if does is not None)
    assert driver.does[first] == (one, two + SIZE - one)
    assert driver.waits == {first: set(), norm: {first}, up: {norm}, down: {up}}


def test_a_graph_that_begins_with_a_clearing_waits_for_all_of_them(driver: Driver, places: Counters) -> None:
    _, product = chain(driver, [(places.place(), 4), None])
    clear_at_once(1, places)
    (first,) = (node for node, does in driver.does.items() if does is not None)
    assert driver.waits == {first: set(), product: {first}}


def test_what_waits_already_is_not_told_twice(driver: Driver, places: Counters) -> None:
    norm = driver.add()
    clearing = driver.add([norm], (places.place(), 4))
    product = driver.add([norm, clearing])
    clear_at_once(1, places)
    assert driver.waits[product] == {norm}


@pytest.mark.parametrize("kept", ["another's memory", "too large", "again"])
def test_other_clearings_stay(driver: Driver, places: Counters, kept: str) -> None:
    at = places.place()
    other = {"another's memory": (at + SIZE * PLACES, 4), "too large": (at, 2 * SIZE), "again": (at, 4)}[kept]
    steps: list[tuple[int, int] | None] = [None, (at, 4), None, other, None] if kept == "again" else [None, other, None]
    nodes = chain(driver, steps)
    assert clear_at_once(1, places) == (1 if kept == "again" else 0)
    assert driver.does[nodes[-2]] == other and driver.waits[nodes[-1]] == {nodes[-2]}


@pytest.mark.parametrize("asked", ["cuGraphGetNodes", "cuGraphNodeGetDependencies", "cuGraphNodeGetDependentNodes"])
def test_a_driver_that_tells_nothing_leaves_the_graph(driver: Driver, places: Counters, asked: str) -> None:
    chain(driver, [None, (places.place(), 4), None])
    before = {node: set(waits) for node, waits in driver.waits.items()}
    driver.refuses = asked
    with pytest.raises(Failed, match=asked):
        clear_at_once(1, places)
    assert driver.waits == before


@pytest.mark.parametrize("steps", range(6))
def test_a_graph_is_right_wherever_the_driver_stops(
    driver: Driver, places: Counters, steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kernels run in their order, and each product behind a clearing of its place."""
    at = [places.place(), places.place()]
    norm, _, up, _, down = chain(driver, [None, (at[0], 4), None, (at[1], 4), None])
    changes = ("cuGraphAddMemsetNode", "cuGraphAddDependencies", "cuGraphDestroyNode")
    made = 0

    def call(name: str, *arguments: Any) -> None:
        nonlocal made
        made += name in changes
        if made > steps:
            raise Failed(name)
        driver(name, *arguments)

    def behind(node: int) -> set[int]:
        return driver.waits[node].union(*(behind(other) for other in driver.waits[node]))

    monkeypatch.setattr(counters, "call", call)
    # One clearing is added, three times one waits for another, two clearings go.
    with pytest.raises(Failed, match=r"cuGraph(Add|Destroy)"):
        clear_at_once(1, places)
    assert norm in behind(up) and up in behind(down)
    for product, place in ((up, at[0]), (down, at[1])):
        cleared = [driver.does[node] for node in behind(product) if driver.does[node] is not None]
        assert any(start <= place < start + size for start, size in cleared if size)  # type: ignore[misc]
