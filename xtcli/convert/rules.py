"""Name rules: which tensors of a checkpoint of theirs are which tensors of ours, in both directions.

A rule pairs path templates, `h.{layer}.attn.c_attn.weight` with `stack.blocks.{layer}.attn.q.weight`, and names
the operation between them. Placeholders stand for one whole number. Operations only move elements: each has an
exact inverse, and the way back is the same rule read from the other side.

    Same        one tensor as it is
    Transpose   the two axes of each matrix change places
    Split       one tensor of theirs is several of ours, laid end to end along an axis
    Interleave  the same, but the pieces alternate in groups, one group for each head
    Stack       one tensor of ours is a numbered series of theirs, laid along a new first axis
    Unit        theirs has axes of length one that ours lacks
    Heads       theirs has an axis for the heads
    Copies      one tensor of ours stands several times in theirs
    Chain       one operation after the other

`like` are tensors of the right shape, which tell `Split` where to cut; they may be on the meta device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from xtcli.errors import refuse

Binding = dict[str, int]


def match(template: str, name: str) -> Binding | None:
    """The numbers that a name puts in a template's placeholders; None where it does not fit."""
    wanted, given = template.split("."), name.split(".")
    if len(wanted) != len(given):
        return None
    binding: Binding = {}
    for want, have in zip(wanted, given, strict=True):
        if want.startswith("{"):
            if not have.isdecimal() or str(int(have)) != have or binding.setdefault(want[1:-1], int(have)) != int(have):
                return None
        elif want != have:
            return None
    return binding


def fill(template: str, binding: Binding) -> str:
    """The template with its placeholders replaced."""
    for key, value in binding.items():
        template = template.replace("{" + key + "}", str(value))
    return template


class Operation(Protocol):
    """Moves elements between tensors of theirs and tensors of ours."""

    def forward(self, theirs: Sequence[Tensor], like: Sequence[Tensor]) -> list[Tensor]:
        """Theirs -> ours, in the shapes of `like`."""

    def backward(self, ours: Sequence[Tensor]) -> list[Tensor]:
        """Ours -> theirs."""


@dataclass(frozen=True)
class Same:
    """Nothing moves."""

    def forward(self, theirs: Sequence[Tensor], like: Sequence[Tensor]) -> list[Tensor]:
        return list(theirs)

    def backward(self, ours: Sequence[Tensor]) -> list[Tensor]:
        return list(ours)


@dataclass(frozen=True)
class Transpose:
    """(in, out) <-> (out, in)."""

    def forward(self, theirs: Sequence[Tensor], like: Sequence[Tensor]) -> list[Tensor]:
        return [tensor.t() for tensor in theirs]

    def backward(self, ours: Sequence[Tensor]) -> list[Tensor]:
        return [tensor.t() for tensor in ours]


def joined(tensors: Sequence[Tensor], axis: int) -> Tensor:
    """Tensors end to end along `axis`, which may be on the meta device."""
    first = tensors[0]
    if not first.is_meta:
        return torch.cat(list(tensors), axis)
    # There PyTorch's own would first load the decompositions of all operators, which takes a second or two.
    shape = list(first.shape)
    shape[axis] = sum(tensor.shape[axis] for tensor in tensors)
    if any(
        tensor.shape[:axis] + tensor.shape[axis + 1 :] != first.shape[:axis] + first.shape[axis + 1 :]
        for tensor in tensors
    ):
        raise AssertionError(f"{[tuple(tensor.shape) for tensor in tensors]} do not fit along axis {axis}")
    return first.new_empty(shape)


@dataclass(frozen=True)
class Split:
    """One of theirs is ours end to end along `axis`."""

    axis: int = 0

    def forward(self, theirs: Sequence[Tensor], like: Sequence[Tensor]) -> list[Tensor]:
        (whole,) = theirs
        return list(whole.split([tensor.shape[self.axis] for tensor in like], self.axis))

    def backward(self, ours: Sequence[Tensor]) -> list[Tensor]:
        return [joined(ours, self.axis)]


@dataclass(frozen=True)
class Interleave:
    """One of theirs holds, for each of `groups` groups, a piece of each of ours, along the first axis."""

    groups: int

    def forward(self, theirs: Sequence[Tensor], like: Sequence[Tensor]) -> list[Tensor]:
        (whole,) = theirs
        rows = [tensor.shape[0] // self.groups for tensor in like]
        pieces = whole.unflatten(0, (self.groups, sum(rows))).split(rows, 1)
        return [piece.flatten(0, 1) for piece in pieces]

    def backward(self, ours: Sequence[Tensor]) -> list[Tensor]:
        return [joined([tensor.unflatten(0, (self.groups, -1)) for tensor in ours], 1).flatten(0, 1)]


@dataclass(frozen=True)
class Stack:
    """A numbered series of theirs is one of ours."""

    def forward(self, theirs: Sequence[Tensor], like: Sequence[Tensor]) -> list[Tensor]:
        return [joined([tensor[None] for tensor in theirs], 0)]

    def backward(self, ours: Sequence[Tensor]) -> list[Tensor]:
        (whole,) = ours
        return list(whole.unbind())


@dataclass(frozen=True)
class Unit:
    """Theirs has axes of length one, counted in theirs and in rising order, that ours lacks."""

    axes: tuple[int, ...] = (0,)

    def forward(self, theirs: Sequence[Tensor], like: Sequence[Tensor]) -> list[Tensor]:
        return [tensor.squeeze(self.axes) for tensor in theirs]

    def backward(self, ours: Sequence[Tensor]) -> list[Tensor]:
        made = list(ours)
        for axis in self.axes:
            made = [tensor.unsqueeze(axis) for tensor in made]
        return made


@dataclass(frozen=True)
class Heads:
    """Theirs has the heads on an axis of their own, (rows, heads, width), ours (rows, heads x width)."""

    heads: int

    def forward(self, theirs: Sequence[Tensor], like: Sequence[Tensor]) -> list[Tensor]:
        return [tensor.flatten(1) for tensor in theirs]

    def backward(self, ours: Sequence[Tensor]) -> list[Tensor]:
        return [tensor.unflatten(1, (self.heads, -1)) for tensor in ours]


@dataclass(frozen=True)
class Copies:
    """One tensor of ours stands several times in theirs."""

    count: int

    def forward(self, theirs: Sequence[Tensor], like: Sequence[Tensor]) -> list[Tensor]:
        if any(not torch.equal(tensor, theirs[0]) for tensor in theirs[1:] if not tensor.is_meta):
            raise refuse("tensors that are one tensor in the network differ in the file", "convert from the original")
        return [theirs[0]]

    def backward(self, ours: Sequence[Tensor]) -> list[Tensor]:
        return [ours[0]] * self.count


@dataclass(frozen=True)
class Chain:
    """From theirs to ours through each operation in turn."""

    steps: tuple[Operation, ...]

    def forward(self, theirs: Sequence[Tensor], like: Sequence[Tensor]) -> list[Tensor]:
        shapes = [[torch.empty_like(tensor, device="meta") for tensor in like]]
        for step in reversed(self.steps[1:]):
            shapes.insert(0, step.backward(shapes[0]))
        now = list(theirs)
        for step, shape in zip(self.steps, shapes, strict=True):
            now = step.forward(now, shape)
        return now

    def backward(self, ours: Sequence[Tensor]) -> list[Tensor]:
        now = list(ours)
        for step in reversed(self.steps):
            now = step.backward(now)
        return now


SAME = Same()
TRANSPOSE = Transpose()


@dataclass(frozen=True)
class Rule:
    """Templates of theirs and of ours. `each` is a placeholder of theirs that runs through a series (see Stack).

    A rule of which a model has no tensor is idle, so that one table serves every configuration of a family.
    """

    theirs: tuple[str, ...]
    ours: tuple[str, ...]
    operation: Operation = field(default=SAME)
    each: str | None = None


def one(theirs: str, ours: str, operation: Operation = SAME) -> Rule:
    """One tensor of each side."""
    return Rule((theirs,), (ours,), operation)


def layer(theirs: str, ours: str, weight: Operation = SAME) -> tuple[Rule, Rule]:
    """Weight and bias of a linear layer or a norm; either may be absent."""
    return one(f"{theirs}.weight", f"{ours}.weight", weight), one(f"{theirs}.bias", f"{ours}.bias")


@dataclass(frozen=True)
class Move:
    """A rule with its numbers filled in: these tensors are those."""

    theirs: tuple[str, ...]
    ours: tuple[str, ...]
    operation: Operation


def moves(rules: Sequence[Rule], ours: dict[str, Tensor]) -> list[Move]:
    """Every move that makes the tensors of `ours` (name -> a tensor of its shape), in their order.

    Each name is made by exactly one rule; anything else is a mistake of the table.
    """
    found: dict[str, Move] = {}
    for rule in rules:
        for name in ours:
            binding = match(rule.ours[0], name)
            if binding is None:
                continue
            series = range(ours[name].shape[0]) if rule.each else range(1)
            theirs = [fill(t, binding | ({rule.each: i} if rule.each else {})) for i in series for t in rule.theirs]
            move = Move(tuple(theirs), tuple(fill(template, binding) for template in rule.ours), rule.operation)
            for made in move.ours:
                if made in found or made not in ours:
                    raise AssertionError(
                        f"{made} is made by {found.get(made)} and {move}, or is no tensor of the model"
                    )
                found[made] = move
    unmade = [name for name in ours if name not in found]
    if unmade:
        raise AssertionError(f"no rule makes {unmade}")
    return list(dict.fromkeys(found[name] for name in ours))
