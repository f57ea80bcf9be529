"""pydantic's error list as sentences: place, path, cause, remedy; every mistake of a file in one pass."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ValidationError

from xtcli.config.document import Path
from xtcli.config.layers import Layers, Obstacle, Origin
from xtcli.config.sentences import LENGTHS, LIMITS, WANTED, sentence
from xtcli.config.shape import Shape, walk
from xtcli.errors import Problem, nearest

MANY = 12


@dataclass(frozen=True)
class Mistake:
    """One pydantic error at its path in the raw tree. `arm` is the union member that complained, if any."""

    path: Path
    error: Mapping[str, Any]
    parent: Shape
    arm: str = ""
    of_key: bool = False

    @property
    def type(self) -> str:
        return str(self.error["type"])


def problems(error: ValidationError, layers: Layers) -> list[Problem]:
    """All that pydantic refused in the tree of `layers`, as problems with places."""
    mistakes = [locate(layers.root, layers.tree, item) for item in error.errors(include_url=False)]
    unknown = {(m.path[:-1], nearest(str(m.path[-1]), m.parent.keys)) for m in mistakes if m.type == "extra_forbidden"}
    misnamed = {mistake.path for mistake in mistakes if mistake.of_key}
    found: dict[tuple[Path, str], Problem] = {}
    for mistake in _of_unions(mistakes):
        if mistake.type == "missing" and (mistake.path[:-1], mistake.path[-1]) in unknown:
            continue  # the misspelt key beside it says the same
        if mistake.path in misnamed and not mistake.of_key:
            continue  # what stands below a wrong name may be right below the right one
        problem = _problem(mistake, mistakes, layers)
        found.setdefault((mistake.path, problem.cause), problem)
    return list(found.values())


def locate(root: type[BaseModel], raw: Any, error: Mapping[str, Any]) -> Mistake:
    """The path in the raw tree that an error's `loc` means: union arms and function names are left out."""
    place, parent = Shape("node", root), Shape()
    path: Path = ()
    arm, of_key = "", False
    for part in error["loc"]:
        if part == "[key]":
            of_key = True
            break
        if isinstance(raw, str) and place.shorthand:
            raw = {place.shorthand: raw}
        held = part in raw if isinstance(raw, Mapping) else isinstance(raw, list) and part in range(len(raw))
        value = raw[part] if held else None
        below = place.child(part, value)
        if not held and (below is None or place.form == "map"):
            arm = str(part)
            continue
        path, parent, place, raw = (*path, part), place, below or Shape(), value
    return Mistake(path, error, parent if path else place, arm, of_key)


def _of_unions(mistakes: list[Mistake]) -> Iterable[Mistake]:
    """Of a union's members, those that understood the value best: further down, or its type but not its size."""
    for mistake in mistakes:
        others = [m for m in mistakes if m.arm and m is not mistake and m.path[: len(mistake.path)] == mistake.path]
        deeper = any(len(m.path) > len(mistake.path) for m in others)
        closer = mistake.type in WANTED and any(m.type in LIMITS or m.type in LENGTHS for m in others)
        if not mistake.arm or not (deeper or closer):
            yield mistake


def _problem(mistake: Mistake, all_of_them: list[Mistake], layers: Layers) -> Problem:
    path = mistake.path[:-1] if mistake.type == "missing" else mistake.path
    origin, place = layers.origin(path), layers.name
    kind = layers.origins.get((*path, "kind"))
    if kind and (mistake.type == "slot_kind_unknown" or (mistake.type == "missing" and kind.source != "preset")):
        place = kind.place
    elif origin:
        place = origin.key if mistake.type == "extra_forbidden" or mistake.of_key else origin.place
    dotted = ".".join(map(str, path))
    if mistake.type == "extra_forbidden" or mistake.of_key:
        return _unknown_key(mistake, layers, place, dotted)
    beside = [other.error for other in all_of_them if other.path == mistake.path]
    fields = mistake.parent.config.model_fields if mistake.parent.config else {}
    cause, remedy = sentence(mistake.error, beside, fields.get(str(mistake.path[-1])) if mistake.path else None)
    return Problem(cause, place, dotted, remedy)


def _unknown_key(mistake: Mistake, layers: Layers, place: str, dotted: str) -> Problem:
    key, keys = str(mistake.path[-1]), mistake.parent.keys
    own, kind = layers.origin(mistake.path), layers.origins.get((*mistake.path[:-1], "kind"))
    if own and kind and own.source == "preset" and kind.source in ("size", "override"):
        node = ".".join(map(str, mistake.path[:-1]))
        name = layers.at((*mistake.path[:-1], "kind"))
        return Problem(
            f"kind '{name}' has no key '{key}', which {own.key} states",
            kind.place,
            dotted,
            f"replace the whole node: {node}={{kind: {name}, ...}}",
        )
    if own and own.source == "override":
        return Problem("unknown key", place, *_nearest_path(mistake.path, keys, layers))
    best = nearest(key, keys) or by_meaning(key, mistake.parent)
    return Problem("unknown key", place, dotted, f"did you mean '{best}'?" if best else _list(keys))


def by_meaning(key: str, place: Shape) -> str | None:
    """The field whose description has the words of `key`: learning_rate is lr, 'peak learning rate'."""
    words = key.lower().replace("-", "_").replace("_", " ")
    fields = place.config.model_fields if place.config else {}
    return next((name for name, info in fields.items() if words in (info.description or "").lower()), None)


def _nearest_path(path: Path, keys: list[str], layers: Layers) -> tuple[str, str]:
    """The whole dotted path that an override wrote at the unknown key `path`, and a remedy that names the nearest."""
    wrote = path
    while isinstance(layers.at(wrote), dict) and len(layers.at(wrote)) == 1 and wrote in layers.origins:
        below = (*wrote, next(iter(layers.at(wrote))))
        if layers.origins.get(below) is None:
            break
        wrote = below
    dotted = ".".join(map(str, wrote))
    known = [".".join(map(str, item)) for item in known_paths(layers)]
    best = nearest(str(path[-1]), keys)
    near = ".".join(map(str, (*path[:-1], best, *wrote[len(path) :]))) if best else ""
    last = [item for item in known if item.split(".")[-1] == str(wrote[-1])]
    choices = (
        near if near in known else "",
        nearest(dotted, last),
        last[0] if len(last) == 1 else "",
        nearest(dotted, known),
    )
    found = next(filter(None, choices), None) or near or _meant(str(wrote[-1]), layers)
    return dotted, f"did you mean '{found}'?" if found else _list(keys)


def _meant(key: str, layers: Layers) -> str:
    shapes = walk(layers.root, {"train": {}, "data": {}} | layers.tree)
    found = ((path, by_meaning(key, place)) for path, place in shapes.items())
    return next((".".join(map(str, (*path, name))) for path, name in found if name), "")


def in_order(found: Iterable[Problem]) -> list[Problem]:
    """Problems without repetition, by file, line and column; those of overrides keep their order and come last."""

    def key(problem: Problem) -> tuple[str, int, int]:
        name, *numbers = problem.place.rsplit(":", 2)
        known = len(numbers) == 2 and all(number.isdecimal() for number in numbers)
        return (name, int(numbers[0]), int(numbers[1])) if known else ("\U0010ffff", 0, 0)

    return sorted(dict.fromkeys(found), key=key)


def obstacle(layers: Layers, path: Path, origin: Origin, error: Obstacle) -> Problem:
    """A path that could not be written to."""
    return Problem(error.cause, origin.key or origin.place, ".".join(map(str, path)), error.remedy)


def _list(keys: list[str]) -> str:
    if not keys:
        return "nothing is set here"
    return f"known: {', '.join(keys[:MANY])}" + (f" and {len(keys) - MANY} more" if len(keys) > MANY else "")


def known_paths(layers: Layers) -> list[Path]:
    """Every path that could be set in the tree as it stands."""
    found: list[Path] = []
    for path, place in walk(layers.root, layers.tree).items():
        found += [path] if path else []
        stated = layers.at(path)
        for key in place.keys:
            if not isinstance(stated, Mapping) or key not in stated or key == "kind":
                below = place.child(key, None)
                found += [(*path, key), *((*path, key, name) for name in (below.keys if below else ()))]
    return found
