"""Graphs that hold several models, such as a generator and a discriminator over one embedding.

On the way out each of them becomes a folder of its own below the target, DST/generator and DST/discriminator; what they
share is in both. `members(config)` of a graph names them: name -> (config, what precedes its own tensors).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from xtcli.convert.checks import counted
from xtcli.convert.files import Source
from xtcli.convert.reading import skeleton
from xtcli.convert.report import Report
from xtcli.errors import Problem, UserError
from xtcli.registry import Config


@dataclass(frozen=True)
class Member:
    """One of the models: its config, and its tensors under the names that they have when it stands alone."""

    config: Config
    source: Source


class Renamed(Source):
    """Tensors of a file under other names."""

    def map(self) -> dict[str, Tensor]:
        """All tensors, in memory of their own."""
        return {name: entry.read() for name, entry in self.entries.items()}


def split(found: Mapping[str, tuple[Config, str]], source: Source, place: str) -> dict[str, Member]:
    """The members of a checkpoint; raises UserError for tensors that none of them has."""
    have = {**source.entries, **{alias: source.entries[main] for alias, main in source.ties.items()}}
    members, used = {}, set()
    for name, (config, prefix) in found.items():
        where = {tensor: own if (own := prefix + tensor) in have else tensor for tensor in skeleton(config, place)}
        used |= set(where.values())
        entries = {tensor: have[there] for tensor, there in where.items() if there in have}
        members[name] = Member(config, Renamed(entries, {}, ()))
    spare = sorted(set(have) - used)
    if spare:
        raise UserError(*(Problem(f"tensor '{name}' has no place in the model", place) for name in spare[:20]))
    return members


def joined(parts: Mapping[str, Report], whole: Source, target: str) -> Report:
    """One report of several; tensors and bytes are those of the source."""
    reports = list(parts.values())
    report = Report(
        family=" + ".join(dict.fromkeys(part.family for part in reports)),
        architecture=" + ".join(part.architecture for part in reports),
        to="hf",
        source=reports[0].source,
        target=target,
        tensors=len(whole.entries),
        bytes=whole.nbytes,
        members={name: part.architecture for name, part in parts.items()},
        dtypes=dict(counted(whole)),
    )
    for part in reports:
        for change, count in part.retyped.items():
            report.retyped[change] = report.retyped.get(change, 0) + count
    report.ties = [f"{name}: {tie}" for name, part in parts.items() for tie in part.ties]
    report.invented = [f"{name}/{tensor}" for name, part in parts.items() for tensor in part.invented]
    return report


def settle(report: Report, parts: Mapping[str, Report]) -> None:
    """Enter into the joined report what was found when the members were written."""
    report.companions = sorted({name for part in parts.values() for name in part.companions})
    errors = [part.rounding for part in parts.values() if part.rounding is not None]
    report.rounding = max(errors, key=lambda rounding: rounding["error"], default=None)
    report.bit_exact = all(part.bit_exact for part in parts.values())


def verified(found: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """What comparisons with the reference found, by member; the only one, where there is one."""
    if len(found) == 1:
        return next(iter(found.values()))
    every = list(found.values())
    return every[0] | {
        "outputs": sum(one["outputs"] for one in every),
        "modules": sum(one["modules"] for one in every),
        "worst": max(one["worst"] for one in every),
        "differences": {f"{name}: {key}": off for name in found for key, off in found[name]["differences"].items()},
    }
