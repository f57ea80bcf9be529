"""Places for the counters by which kernels of cuBLASLt hand out their tiles.

Such a kernel wants four bytes of scratch, and the library clears them by an operation of its own before each launch. A
place is no other product's for a long while, so a recorded graph can clear all of them once, at its beginning:

    norm -> clear -> product -> clear -> product           as the library has it: each waits for the one before
    clear all -> norm -> product -> product                as `clear_at_once` leaves it

The graph stays the same otherwise. Reference: https://docs.nvidia.com/cuda/cuda-driver-api/, "Graph Management".
"""

from __future__ import annotations

import ctypes
from ctypes import byref, c_int, c_size_t, c_uint, c_uint64, c_void_p
from functools import cache

import torch

from xtcli.fast.hopper.build import call

SIZE, PLACES = 256, 4096
"""Bytes of a place, which the library wants aligned to them, and how many there are on a device."""
_MEMSET = 2
_BEFORE, _BEHIND = "cuGraphNodeGetDependencies", "cuGraphNodeGetDependentNodes"


class _Cleared(ctypes.Structure):
    """CUDA_MEMSET_NODE_PARAMS."""

    _fields_ = [
        ("at", c_uint64),
        ("pitch", c_size_t),
        ("value", c_uint),
        ("element", c_uint),
        ("width", c_size_t),
        ("height", c_size_t),
    ]


class Counters:
    """The places of one device, given away in turn."""

    def __init__(self, device: torch.device) -> None:
        self.memory = torch.zeros(SIZE * PLACES, dtype=torch.uint8, device=device)
        self.next = 0

    def place(self) -> int:
        """The address of the next place."""
        at = self.memory.data_ptr() + self.next * SIZE
        self.next = (self.next + 1) % PLACES
        return at

    def holds(self, address: int) -> bool:
        """Whether an address is of a place."""
        return 0 <= address - self.memory.data_ptr() < SIZE * PLACES


@cache
def counters(device: int) -> Counters:
    """The places of a device."""
    return Counters(torch.device("cuda", device))


def clear_at_once(graph: int, places: Counters) -> int:
    """Let a graph that is not yet instantiated clear its places at its beginning, and not one by one; returns how many.

    Raises Failed of hopper/build.py where the driver refuses. The graph is a right one at every point: who waits for a
    clearing waits for all that it did before the clearing goes.
    """
    found: dict[int, int] = {}
    for node in _list("cuGraphGetNodes", graph):
        at = _cleared(node)
        # Where a place has come around, the second product needs a clearing of its own.
        if at is not None and places.holds(at) and at not in found.values():
            found[node] = at
    if not found:
        return 0
    around = {node: (_list(_BEFORE, node), _list(_BEHIND, node)) for node in found}
    known = {behind: set(_list(_BEFORE, behind)) for _, all_behind in around.values() for behind in all_behind}
    roots = [node for node in _list("cuGraphGetRootNodes", graph) if node not in found]
    first, context = c_void_p(), c_void_p()
    # No more than from the first to the last of them: others may be in use elsewhere.
    begin, end = min(found.values()), max(found.values()) + SIZE
    whole = _Cleared(begin, 0, 0, 1, end - begin, 1)
    call("cuCtxGetCurrent", byref(context))
    call("cuGraphAddMemsetNode", byref(first), c_void_p(graph), None, c_size_t(0), byref(whole), context)
    start = int(first.value or 0)
    for root in roots:
        _join(graph, start, root)
    for before, all_behind in around.values():
        for behind in all_behind:
            for one in before or [start]:
                if one not in known[behind]:
                    known[behind].add(one)
                    _join(graph, one, behind)
    for node in found:
        call("cuGraphDestroyNode", c_void_p(node))
    return len(found)


def _list(name: str, of: int) -> list[int]:
    """Nodes of a graph, or beside a node."""
    count = c_size_t()
    call(name, c_void_p(of), None, byref(count))
    nodes = (c_void_p * count.value)()
    if count.value:
        call(name, c_void_p(of), nodes, byref(count))
    return [int(node or 0) for node in nodes]


def _cleared(node: int) -> int | None:
    """The address that a node fills with zeros, if that is what it does."""
    kind, told = c_int(), _Cleared()
    call("cuGraphNodeGetType", c_void_p(node), byref(kind))
    if kind.value != _MEMSET:
        return None
    call("cuGraphMemsetNodeGetParams", c_void_p(node), byref(told))
    return int(told.at) if told.value == 0 and told.width * told.element <= SIZE and told.height == 1 else None


def _join(graph: int, before: int, behind: int) -> None:
    one, two = c_void_p(before), c_void_p(behind)
    call("cuGraphAddDependencies", c_void_p(graph), byref(one), byref(two), c_size_t(1))
