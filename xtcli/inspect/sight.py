"""What each attention of a model sees: masks, biases and rotations, computed by the model's own parts.

    mask     share of the query-key pairs of each cell of a grid that are seen
    bias     what is added to the scores of one query, (heads, cells of keys), and the grid of its first head
    turn     cosines of the angles by place, (pairs of dimensions, cells of places)

How the values come about stands in grids.py.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import nn

from xtcli.inspect import units
from xtcli.inspect.grids import (
    BiasView,
    MaskView,
    TurnView,
    Weights,
    bias_view,
    is_numbered,
    kind_of,
    mask_grid,
    turn_view,
)
from xtcli.parts.attention import Persistent
from xtcli.parts.prefix import Prefix
from xtcli.parts.recurrence import Recurrence
from xtcli.parts.shared import Shared
from xtcli.parts.stack import Stack
from xtcli.registry import Config, part_of


@dataclass(frozen=True)
class Sight:
    """How one attention sees: its mask's rule, and the numbers of its bias and rotation in the stack."""

    rule: Config | None
    bias: int | None = None
    turn: int | None = None
    relative: str = ""
    position: str = ""
    memory: bool = False
    kept: int = 0
    note: str = ""  # what no picture shows
    more: tuple[int, ...] = ()  # numbers of biases that are not stored for all pairs

    def words(self) -> tuple[str, ...]:
        """The sight in words, for the module tree."""
        kept = (f"{units.plural(self.kept, 'persistent key')}",) if self.kept else ()
        if self.memory:
            return ("mask every key of the memory", *kept)
        if self.rule is None:
            return ()
        return (f"mask {rule_words(self.rule)}", *([f"position {self.position}"] if self.position else []), *kept)


@dataclass(frozen=True)
class Views:
    """Everything that the attentions of a model share, and what is said in words alone."""

    masks: tuple[MaskView, ...]
    biases: tuple[BiasView, ...]
    turns: tuple[TurnView, ...]
    words: tuple[str, ...]


def rule_words(rule: Config) -> str:
    """A mask's rule as text: `window(left=3, right=0)`."""
    names = getattr(part_of(rule), "rule_fields", type(rule).model_fields)
    fields = {name: getattr(rule, name) for name in names if getattr(rule, name) is not None}
    if not fields:
        return rule.kind
    inner = []
    for name, value in fields.items():
        if isinstance(value, tuple) and all(isinstance(item, Config) for item in value):
            inner += [rule_words(item) for item in value]
        else:
            inner.append(f"{name}={rule_words(value) if isinstance(value, Config) else value}")
    return f"{rule.kind}({', '.join(inner)})"


def sight_of(stack: Stack, module: nn.Module) -> Sight:
    """How a sublayer of `stack` sees; one without masks has no rule."""
    if getattr(module, "reads_memory", False):
        return Sight(None, memory=True, kept=_kept(module))
    view, rule, note = (getattr(module, name, None) for name in ("view", "rule", "sees"))
    if not isinstance(view, int):
        # Attentions that store no mask say which rule theirs would follow.
        if not isinstance(rule, Config):
            return Sight(None)
        biased: tuple[int, ...] = getattr(module, "biased", ())
        own = getattr(module, "relative", None)
        kinds = [kind_of(stack.shared.biases[number]) for number in biased]
        position = " + ".join([*kinds, *([kind_of(own)] if isinstance(own, nn.Module) else [])])
        return Sight(rule, position=position, kept=_kept(module), note=note or "", more=biased)
    found = stack.shared.views[view]
    queries = getattr(module, "turn_queries", None)
    turn = queries.keywords.get("number") if isinstance(queries, functools.partial) else None
    relative = getattr(module, "relative", None)
    kinds = [
        kind_of(part)
        for part in (
            None if turn is None else stack.shared.turns[turn],
            None if found.bias is None else stack.shared.biases[found.bias],
            relative,
            getattr(module, "place", None),
        )
        if isinstance(part, nn.Module)
    ]
    named = kind_of(relative) if isinstance(relative, nn.Module) else ""
    return Sight(found.rule, found.bias, turn, named, " + ".join(kinds), kept=_kept(module), note=note or "")


def _kept(module: nn.Module) -> int:
    """How many keys of its own an attention has."""
    memory = getattr(module, "memory", None)
    return memory.k.shape[1] if isinstance(memory, Persistent) else 0


def stacks(model: nn.Module) -> Mapping[str, Stack]:
    """The stacks of a model by their path."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Stack)}


def look(model: nn.Module, length: int, cells: int, weights: Weights | None = None) -> Views:
    """Every distinct mask, bias and rotation over `length` tokens, in at most `cells` cells an axis.

    A stack that reads inputs of one size, such as images, is shown over their places. `model` may be on the meta
    device. Raises UserError where `weights` lacks a tensor.
    """
    found: tuple[list[MaskView], list[BiasView], list[TurnView], list[str]] = ([], [], [], [])
    most, widest = length, cells
    for name, stack in stacks(model).items():
        embed = getattr(model.get_submodule(name.rpartition(".")[0]), "embed", None)
        length = getattr(embed, "places", None) or most
        cells = min(widest, length)
        users = _users(stack)
        shared = stack.shared
        rules = dict.fromkeys(sight.rule for sight in users if sight.rule is not None)
        for rule in rules:
            who = _who(users, lambda sight, rule=rule: sight.rule == rule)  # type: ignore[misc]
            grid, seen = mask_grid(rule, length, cells)
            found[0].append(MaskView(name, who, rule_words(rule), length, seen, grid))
        for number, bias in enumerate(shared.biases):
            who = _who(users, lambda sight, number=number: number in (sight.bias, *sight.more))  # type: ignore[misc]
            path = f"{name}.shared.biases.{number}"
            if weights is None and not is_numbered(bias):
                found[3].append(f"{name}: {who}: position {kind_of(bias)} is learned, a checkpoint shows it")
                continue
            found[1].append(bias_view(bias, name, who, path, length, cells, weights))
        for number, turn in enumerate(shared.turns):
            if getattr(turn, "reach", "") != "turn":
                continue
            who = _who(users, lambda sight, number=number: sight.turn == number)  # type: ignore[misc]
            found[2].append(turn_view(turn, name, who, length, cells))
        found[3].extend(_rest(name, users, shared))
        if stack.recurrence is not None:
            found[3].append(f"{name}: {_earlier(stack.recurrence)}")
    masks_, biases, turns, words = found
    words += _places(model)
    return Views(tuple(masks_), tuple(biases), tuple(turns), tuple(words))


Users = dict[Sight, dict[str, list[int]]]
"""Sight -> sublayer's name -> numbers of the layers."""


def _users(stack: Stack) -> Users:
    users: Users = {}
    for number, block in enumerate(stack.run):
        for name, sublayer in block.sublayers.items():
            sight = sight_of(stack, sublayer)
            if sight.memory or sight.rule is not None:
                users.setdefault(sight, {}).setdefault(name, []).append(number)
    return users


def _who(users: Users, wanted: Callable[[Sight], bool]) -> str:
    names: dict[str, list[int]] = {}
    for sight, by_name in users.items():
        for name, numbers in by_name.items() if wanted(sight) else ():
            names.setdefault(name, []).extend(numbers)
    return "; ".join(f"{name} of layers {units.spans(sorted(numbers))}" for name, numbers in names.items())


def _rest(name: str, users: Users, shared: Shared) -> list[str]:
    """What is not drawn, in words."""
    said = []
    for sight, by_name in users.items():
        who = "; ".join(f"{key} of layers {units.spans(numbers)}" for key, numbers in by_name.items())
        if sight.memory:
            said.append(f"{name}: {who}: every real key of the encoder's memory")
        elif sight.relative:
            said.append(f"{name}: {who}: position {sight.relative} depends on the queries")
        if sight.note:
            said.append(f"{name}: {who}: {sight.note}")
        if sight.kept:
            said.append(f"{name}: {who}: {units.plural(sight.kept, 'persistent key')}, which every query sees")
    return said


def _earlier(recurrence: Recurrence) -> str:
    """What is seen of the segments before, in words."""
    kept = "all" if recurrence.length is None else f"the newest {units.plural(recurrence.length, 'input')}"
    first = ", zeros before a text" if recurrence.lead else ""
    reuse = f", of the first {recurrence.reuse:,} places of each" if recurrence.reuse else ""
    return f"behind memories of earlier segments: {kept}{reuse}{first}"


def _places(model: nn.Module) -> list[str]:
    """The positions that enter with the tokens, in words."""
    said = []
    for name, module in model.named_modules():
        if isinstance(module, Prefix):
            reads = "everything" if module.sees else "those before them alone"
            said.append(f"{name}: {units.plural(module.count, 'memory token')} in front, seen by all; they see {reads}")
        if getattr(getattr(type(module), "Config", None), "slot", "") == "absolute" and kind_of(module) != "none":
            limit = getattr(module, "limit", None)
            said.append(
                f"{name}: {kind_of(module)}, " + (units.plural(limit, "place") if limit else "any number of places")
            )
    return said
