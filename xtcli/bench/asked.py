"""Presets of a benchmark: from the words of a command line or a result file, with names that tell them apart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

from xtcli.config.preset import Resolved, load_preset
from xtcli.errors import Problem, UserError
from xtcli.inspect.targets import Target
from xtcli.train.device import Place, choose


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What every benchmark of presets is asked: (preset, overrides) each, what goes over all of them, and peers."""

    presets: tuple[tuple[str, tuple[str, ...]], ...]
    size: str | None = None
    tiny: bool = False
    against: tuple[str, ...] = ()

    @classmethod
    def of(cls, targets: Sequence[Target], **more: Any) -> Self:
        """From the words of a command line."""
        return cls(presets=tuple((target.ref, tuple(target.overrides)) for target in targets), **more)

    @classmethod
    def read(cls, facts: Mapping[str, Any]) -> Self:
        """From a result file."""
        presets = tuple((ref, tuple(overrides)) for ref, overrides in facts["presets"])
        return cls(**{**facts, "presets": presets, "against": tuple(facts["against"])})

    def resolve(self) -> list[Resolved]:
        """The presets, loaded; raises UserError."""
        return [load_preset(ref, overrides, size=self.size, tiny=self.tiny) for ref, overrides in self.presets]


def labels(presets: Sequence[tuple[str, Sequence[str]]]) -> list[str]:
    """What each preset is called in a result: its reference, with its overrides where that alone is said twice."""
    refs = [ref for ref, _ in presets]
    found = [ref if refs.count(ref) == 1 else " ".join([ref, *overrides]) for ref, overrides in presets]
    return [name if found.count(name) == 1 else f"{name} #{at}" for at, name in enumerate(found, 1)]


def one_place(presets: Sequence[Resolved]) -> Place:
    """The device and precision that all the presets ask for; raises UserError where they differ."""
    places = [choose(resolved.preset.train) for resolved in presets]
    for resolved, place in zip(presets, places, strict=True):
        first = places[0]
        if (place.device, place.precision) != (first.device, first.precision):
            raise UserError(
                Problem(
                    f"{resolved.name} would run on {place.name} in {place.precision}, "
                    f"{presets[0].name} on {first.name} in {first.precision}",
                    remedy="set train.device and train.precision alike: other results are not compared",
                )
            )
    return places[0]
