"""What a file of a family must hold, and whether it does.

A plan is made from the family, one of its forms and a config tree: from the names and shapes of our model the
name rules give the names and shapes of theirs, so that nothing about a file is written down twice. `claim`
holds the names of a file against a plan: every name is claimed once, or `explain` names it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from xtcli.convert.family import Drop, Family, Form, Shapes
from xtcli.convert.rules import Move, Rule, match, moves
from xtcli.errors import Problem, did_you_mean, nearest
from xtcli.registry import Config

SHOWN = 10
"""Names of a kind that are explained; the rest is counted."""


@dataclass(frozen=True)
class Plan:
    """What a file holds: `shapes` of the tensors that make ours, `dead` ones that it must hold though nothing
    reads them, groups of `spare` ones that it may hold, `ties` (name -> the name it stands for), `drops`."""

    family: Family
    form: Form
    config: Config
    moves: Sequence[Move]
    shapes: Shapes
    dead: Shapes
    spare: Sequence[Shapes]
    ties: Mapping[str, str]
    drops: Sequence[Drop]

    @cached_property
    def known(self) -> set[str]:
        """Every exact name that a file may hold."""
        return {*self.shapes, *self.dead, *self.ties, *(name for group in self.spare for name in group)}

    def kept(self, names: Iterable[str]) -> dict[str, tuple[int, ...]]:
        """Those of the names that are kept beside the model, with their shapes."""
        beside = {**self.dead, **{name: shape for group in self.spare for name, shape in group.items()}}
        return {name: beside[name] for name in names if name in beside}

    def invented(self, name: str) -> Tensor:
        """What a dead tensor holds that came with no file: zeros, where nothing is known of it."""
        known = self.family.known(self.config).get(name.removeprefix(self.form.prefix))
        return torch.zeros(self.dead[name]) if known is None else known

    def is_head(self, name: str) -> bool:
        """Whether a name is known and not one of the trunk's."""
        if self.form.prefix:
            return name in self.known and not name.startswith(self.form.prefix)
        return any(match(template, name) is not None for rule in self.family.heads for template in rule.theirs)

    def drop(self, name: str) -> Drop | None:
        """The entry of the drop list that a name falls under."""
        return next((drop for drop in self.drops if match(drop.template, name) is not None), None)


def make_plan(family: Family, form: Form, config: Any, ours: Mapping[str, Tensor]) -> Plan:
    """The plan of a model with the tensors `ours` (on the meta device will do)."""
    prefix = form.prefix
    trunk = [
        Rule(tuple(prefix + name for name in rule.theirs), rule.ours, rule.operation, rule.each)
        for rule in (form.trunk or family.trunk)(config)
    ]
    found = moves([*trunk, *family.heads], {name: tensor.detach().to("meta") for name, tensor in ours.items()})
    shapes: dict[str, tuple[int, ...]] = {}
    for move in found:
        theirs = move.operation.backward([ours[name].detach().to("meta") for name in move.ours])
        for name, tensor in zip(move.theirs, theirs, strict=True):
            if name in shapes:
                raise AssertionError(f"two rules claim {name}")
            shapes[name] = tuple(tensor.shape)
    return Plan(
        family,
        form,
        config,
        found,
        shapes,
        {prefix + name: shape for name, shape in (form.dead or family.dead)(config).items()},
        form.spare(config),
        (form.ties or family.ties)(config, prefix),
        [Drop(prefix + drop.template, drop.holds, drop.check) for drop in family.drops],
    )


@dataclass
class Claims:
    """What the names of a file turned out to be: `source` (name of the plan -> name in the file), the plan's names
    of those that are `tied`, `dropped` and `kept`, those that were `renamed`; names of the file that are `unknown`
    or stand for a tensor that another has (`double`), and the plan's names that are `missing`."""

    prefix: str
    source: dict[str, str] = field(default_factory=dict)
    tied: list[str] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)
    renamed: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)
    double: list[tuple[str, str]] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)

    @property
    def faults(self) -> int:
        """How many names have no place, or places no name."""
        return len(self.unknown) + len(self.double) + len(self.missing)


def claim(plan: Plan, names: Sequence[str]) -> Claims:
    """Find the place of every name of a file, whose trunk may be called differently; the file fits without faults."""
    prefixes = dict.fromkeys((plan.form.prefix, *plan.family.prefixes))
    return min((_claim(plan, names, prefix) for prefix in prefixes), key=lambda claims: claims.faults)


def _claim(plan: Plan, names: Sequence[str], prefix: str) -> Claims:
    claims = Claims(prefix)
    known = plan.known
    for given in names:
        name = _now(given, plan, prefix)
        drop = None if name in known else plan.drop(name)
        if name not in known and drop is None:
            claims.unknown.append(given)
        elif name in claims.source:
            claims.double.append((given, claims.source[name]))
        else:
            claims.source[name] = given
            if name != given:
                claims.renamed.append(given)
            if drop is not None:
                claims.dropped.append(name)
    for alias, main in plan.ties.items():
        if alias in claims.source:
            claims.tied.append(alias)
            claims.source.setdefault(main, claims.source[alias])
    claims.kept = list(plan.kept(claims.source))
    claims.missing = [name for name in (*plan.shapes, *plan.dead) if name not in claims.source]
    for group in plan.spare:
        if any(name in claims.source for name in group):
            claims.missing += [name for name in group if name not in claims.source]
    return claims


def explain(plan: Plan, claims: Claims, place: str) -> list[Problem]:
    """The faults in words, each with the nearest name on the other side."""
    problems = [Problem(f"'{given}' and '{other}' are one tensor", place) for given, other in claims.double]
    for given in claims.unknown[:SHOWN]:
        near = nearest(_now(given, plan, claims.prefix), claims.missing)
        remedy = f"nearest that is missing: '{near}'" if near else ""
        remedy = remedy or ("" if claims.missing else did_you_mean(given, plan.known))
        problems.append(Problem(f"tensor '{given}' has no place in {plan.form.name}", place, remedy=remedy))
    for name in claims.missing[:SHOWN]:
        near = nearest(name, claims.unknown)
        remedy = f"nearest that is there: '{near}'" if near else ""
        problems.append(Problem(f"tensor '{name}' is missing", place, remedy=remedy))
    unsaid = max(len(claims.unknown) - SHOWN, 0) + max(len(claims.missing) - SHOWN, 0)
    return problems + ([Problem(f"{unsaid} more tensors do not fit", place)] if unsaid else [])


def _now(given: str, plan: Plan, prefix: str) -> str:
    """The plan's name for a name of a file whose trunk is called `prefix`, throughout."""
    name = given
    for old, new in plan.family.aliases:
        if name == old or name.endswith("." + old):
            name = name[: len(name) - len(old)] + new
    if prefix == plan.form.prefix or plan.is_head(name):
        return name
    return plan.form.prefix + name[len(prefix) :] if name.startswith(prefix) else f"{prefix}?{name}"
