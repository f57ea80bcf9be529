"""What a file of a family must hold, and whether it does.

A plan is made from the family, one of its forms and a config tree: from the names and shapes of our model the
name rules give the names and shapes of theirs, so that nothing about a file is written down twice. `claim`
holds the names of a file against a plan: every name is claimed once, or there is a problem that names it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from torch import Tensor

from xtcli.convert.family import Drop, Family, Form, Shapes
from xtcli.convert.rules import Move, Rule, match, moves
from xtcli.errors import Problem, did_you_mean, nearest
from xtcli.registry import Config


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
        for rule in family.trunk(config)
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
        {prefix + name: shape for name, shape in family.dead(config).items()},
        form.spare(config),
        family.ties(config, prefix),
        [Drop(prefix + drop.template, drop.holds, drop.check) for drop in family.drops],
    )


@dataclass
class Claims:
    """What the names of a file turned out to be: `source` (name of the plan -> name in the file), the plan's names
    of those that are `tied`, `dropped` and `kept`, those that were `renamed`, and the problems."""

    source: dict[str, str] = field(default_factory=dict)
    tied: list[str] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)
    renamed: list[str] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)


def claim(plan: Plan, names: Sequence[str], place: str) -> Claims:
    """Find the place of every name of a file; `problems` is empty when the file fits the plan."""
    options = [_claim(plan, names, place, prefix) for prefix in (plan.form.prefix, *plan.family.prefixes)]
    return min(options, key=lambda claims: len(claims.problems))


def _claim(plan: Plan, names: Sequence[str], place: str, prefix: str) -> Claims:
    """The claims where the file calls the trunk `prefix`."""
    claims = Claims()
    known = plan.known
    unknown: list[str] = []
    for given in names:
        name = _now(given, plan, prefix)
        drop = plan.drop(name)
        if name not in known and drop is None:
            unknown.append(given)
        elif name in claims.source:
            claims.problems.append(Problem(f"'{given}' and '{claims.source[name]}' are one tensor", place))
        else:
            claims.source[name] = given
            if name != given:
                claims.renamed.append(given)
            if drop is not None and name not in known:
                claims.dropped.append(name)
    for alias, main in plan.ties.items():
        if alias in claims.source:
            claims.tied.append(alias)
            if main not in claims.source:
                claims.source[main] = claims.source[alias]
    claims.kept = list(plan.kept(claims.source))
    missing = [name for name in (*plan.shapes, *plan.dead) if name not in claims.source]
    for group in plan.spare:
        there = [name for name in group if name in claims.source]
        if there:
            missing += [name for name in group if name not in claims.source]
    for given in unknown:
        near = nearest(_now(given, plan, prefix), missing)
        remedy = f"nearest that is missing: '{near}'" if near else did_you_mean(given, known) if not missing else ""
        claims.problems.append(Problem(f"tensor '{given}' has no place in {plan.form.name}", place, remedy=remedy))
    for name in missing:
        near = nearest(name, unknown)
        remedy = f"nearest that is there: '{near}'" if near else ""
        claims.problems.append(Problem(f"tensor '{name}' is missing", place, remedy=remedy))
    return claims


def _now(given: str, plan: Plan, prefix: str) -> str:
    """The plan's name for a name of a file whose trunk is called `prefix`, throughout."""
    name = given
    for old, new in plan.family.aliases:
        if name == old or name.endswith("." + old):
            name = name[: len(name) - len(old)] + new
    if prefix == plan.form.prefix or plan.is_head(name):
        return name
    return plan.form.prefix + name[len(prefix) :] if name.startswith(prefix) else f"{prefix}?{name}"
