"""What must hold of the tensors of a source before anything is made of them; every fault is named."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import torch
from torch import Tensor

from xtcli.convert.engine import same_bits
from xtcli.convert.files import Source
from xtcli.convert.plan import Claims, Plan
from xtcli.errors import Problem, UserError


def check(plan: Plan, claims: Claims, source: Source, place: str) -> None:
    """Raise UserError unless shapes, types, ties and dropped buffers are what the plan says."""
    problems = [*_shapes(plan, claims, source, place), *_types(plan, claims, source, place)]
    if not problems:
        problems = [*_ties(plan, claims, source, place), *_drops(plan, claims, source, place)]
        problems += _known(plan, claims, source, place)
    if problems:
        raise UserError(*problems[:20])


def _shapes(plan: Plan, claims: Claims, source: Source, place: str) -> list[Problem]:
    wanted = {**plan.shapes, **plan.kept(claims.source)}
    wanted |= {alias: wanted[main] for alias, main in plan.ties.items() if alias in claims.source}
    problems = []
    for name, shape in wanted.items():
        found = source.entries[claims.source[name]].shape
        if found != shape:
            cause = f"tensor '{claims.source[name]}' has shape {found}, config.json asks for {shape}"
            problems.append(Problem(cause, place))
    return problems


def _types(plan: Plan, claims: Claims, source: Source, place: str) -> list[Problem]:
    """All weights have one floating type, but for those that the family's files may hold wider.

    What the config makes is no weight: it has the type that it is made in, where that is no floating one. Nor is what
    counts.
    """
    known = plan.family.known(plan.config)
    made = {plan.form.prefix + name: value.dtype for name, value in known.items() if not value.is_floating_point()}
    made |= {name: torch.int64 for name in claims.source if plan.family.whole and name.endswith(plan.family.whole)}
    names = [name for name in claims.source if name not in claims.dropped and name not in made]
    types = {name: source.entries[claims.source[name]].dtype for name in names}
    common: torch.dtype = Counter(types.values()).most_common(1)[0][0]
    wide = [name for name in names if name.endswith(plan.family.mixed)] if plan.family.mixed else []
    rest = {types[name] for name in names if name not in wide}
    if wide and len(rest) == 1 and next(iter(rest)).itemsize < 4 and all(types[name] == torch.float32 for name in wide):
        common = rest.pop()
        types |= dict.fromkeys(wide, common)
    problems = []
    for name in made.keys() & claims.source.keys():
        found = source.entries[claims.source[name]].dtype
        if found != made[name]:
            cause = f"tensor '{claims.source[name]}' is {label(found)}, not {label(made[name])}"
            problems.append(Problem(cause, place, remedy="convert from the original file"))
    for name, dtype in types.items():
        if dtype != common or not dtype.is_floating_point:
            said, others = label(dtype), label(common)
            cause = f"tensor '{claims.source[name]}' is {said}, the others are {others}"
            if dtype == common:
                cause = f"tensor '{claims.source[name]}' is {said}, weights are floating-point numbers"
            problems.append(Problem(cause, place, remedy="convert from the original file"))
    return problems


def _ties(plan: Plan, claims: Claims, source: Source, place: str) -> list[Problem]:
    problems = []
    for alias in claims.tied:
        here, there = claims.source[alias], claims.source[plan.ties[alias]]
        if here != there and not same_bits(source.read(here), source.read(there)):
            cause = f"'{here}' and '{there}' are tied, yet two different tensors"
            problems.append(
                Problem(cause, place, remedy="set tie_word_embeddings in config.json if they should differ")
            )
    return problems


def _drops(plan: Plan, claims: Claims, source: Source, place: str) -> list[Problem]:
    problems = []
    for name in claims.dropped:
        drop = plan.drop(name)
        assert drop is not None
        if not drop.check(source.read(claims.source[name]), plan.config):
            cause = f"buffer '{claims.source[name]}' is not {drop.holds}, which is all that it may hold"
            problems.append(Problem(cause, place))
    return problems


def _known(plan: Plan, claims: Claims, source: Source, place: str) -> list[Problem]:
    """Dead tensors must hold what the config says, where it says it: the reference would read them."""
    problems = []
    for short, wanted in plan.family.known(plan.config).items():
        name = plan.form.prefix + short
        if name in claims.source:
            found = source.read(claims.source[name])
            if not _alike(found, wanted.to(found.dtype)):
                problems.append(Problem(f"tensor '{claims.source[name]}' is not what config.json makes of it", place))
    return problems


def _alike(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are equal but for rounding, that of complex numbers against their length of 1."""
    if one.is_complex():
        return bool(((one - other).abs() <= 1e-4).all())
    return torch.allclose(one.float(), other.float(), rtol=1e-3)


def label(dtype: torch.dtype) -> str:
    """A type as people write it."""
    return str(dtype).removeprefix("torch.")


def counted(source: Source) -> Mapping[str, int]:
    """How many tensors there are of each type."""
    return Counter(label(entry.dtype) for entry in source.entries.values())
