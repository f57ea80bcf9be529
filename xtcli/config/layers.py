"""A raw config tree that remembers, for each value, which layer put it there.

    default < preset (what it extends first) < size < --tiny < override

Every layer writes through `put`: a dotted path and a value. `put` opens what stands in the way: a
shorthand (`norm: rms` becomes `{kind: rms}`) or a node that was left to its default. Setting `x.kind`
keeps the other keys of x; setting x replaces the node; null removes an entry of an open map.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any, Literal

from pydantic import BaseModel

from xtcli.config.document import Document, Path, parse
from xtcli.config.shape import Shape, seed
from xtcli.errors import Problem, UserError

Source = Literal["default", "preset", "size", "tiny", "override"]


@dataclass(frozen=True)
class Origin:
    """Where a value came from. `place` is file:line:col or the override's text, `key` the place of its key."""

    source: Source
    place: str = ""
    key: str = ""
    name: str = ""

    def __str__(self) -> str:
        if self.source in ("default", "tiny"):
            return {"default": "default", "tiny": "--tiny"}[self.source]
        return f"size {self.name} ({self.place})" if self.source == "size" else self.place


class Obstacle(Exception):
    """A path that nothing can be written to: the text of a Problem's cause and its remedy."""

    def __init__(self, cause: str, remedy: str = "") -> None:
        self.cause, self.remedy = cause, remedy
        super().__init__(cause)


@dataclass
class Layers:
    """The raw tree, the origin of each path in it, and the name of the file that started it."""

    root: type[BaseModel]
    name: str = ""
    tree: dict[str, Any] = field(default_factory=dict)
    origins: dict[Path, Origin] = field(default_factory=dict)

    def copy(self) -> Layers:
        """An independent copy."""
        return Layers(self.root, self.name, deepcopy(self.tree), dict(self.origins))

    def put(self, path: Path, value: Any, origins: Mapping[Path, Origin]) -> None:
        """Set the value at `path`. `origins` are relative to the value; () is the value itself."""
        holder, place = self._open(path, origins[()])
        key = path[-1]
        for old in [old for old in self.origins if old[: len(path)] == path]:
            del self.origins[old]
        if value is None and place.form == "map" and key in holder:
            below = place.child(key, None)
            if below is not None and not below.optional:
                del holder[key]
                return
        holder[key] = deepcopy(value)
        self.origins |= {(*path, *inner): origin for inner, origin in origins.items()}

    def _open(self, path: Path, origin: Origin) -> tuple[Any, Shape]:
        """The map or list that holds the last key of `path`, made where it is missing, and its shape."""
        value: Any = self.tree
        below: Any
        place = Shape("node", self.root)
        for depth, key in enumerate(path):
            if isinstance(value, list):
                if not isinstance(key, int) or not 0 <= key < len(value):
                    where = ".".join(map(str, path[:depth]))
                    entries = (
                        f"its entries are {where}.0 to {where}.{len(value) - 1}" if value else f"write {where}=[...]"
                    )
                    raise Obstacle(f"'{where}' is a list of {len(value)}", entries)
            elif not isinstance(value, dict):
                where = ".".join(map(str, path[:depth]))
                raise Obstacle(f"'{where}' is one value and has no keys below it", f"write {where}=...")
            if depth == len(path) - 1:
                return value, place
            below = value.get(key) if isinstance(value, dict) else value[key]
            place = place.child(key, below) or Shape()
            if below is None:
                below = value[key] = seed(place)
                if not below:
                    self.origins[path[: depth + 1]] = origin
            elif isinstance(below, str) and place.shorthand:
                below = value[key] = {place.shorthand: below}
                held = self.origins.get(path[: depth + 1])
                if held:
                    self.origins[(*path[: depth + 1], place.shorthand)] = held
            value = below
        raise AssertionError("an empty path holds nothing")

    def merge(self, document: Document, tree: Mapping[str, Any], path: Path = ()) -> None:
        """Lay a file's tree over this one: maps merge; lists, scalars and nodes of another kind replace."""
        for key, value in tree.items():
            here = (*path, key)
            held = self.at(here)
            if (
                isinstance(value, dict)
                and isinstance(held, dict)
                and value.get("kind", held.get("kind")) == held.get("kind")
            ):
                self.origins.setdefault(here, written(document, here)[()])
                self.merge(document, value, here)
            else:
                self.put(here, value, written(document, here))

    def at(self, path: Path) -> Any:
        """The raw value at a path, or None."""
        value: Any = self.tree
        for key in path:
            if isinstance(value, dict):
                value = value.get(str(key))
            elif isinstance(value, list) and isinstance(key, int) and 0 <= key < len(value):
                value = value[key]
            else:
                return None
        return value

    def origin(self, path: Path) -> Origin | None:
        """The origin of a path, or of its nearest ancestor that has one."""
        while path:
            if path in self.origins:
                return self.origins[path]
            path = path[:-1]
        return None


def written(document: Document, path: Path, source: Source = "preset", name: str = "") -> dict[Path, Origin]:
    """The origins of all that a document holds at and below a path, relative to it."""
    size = len(path)
    return {
        at[size:]: Origin(source, place, document.keys.get(at, place), name)
        for at, place in document.values.items()
        if at[:size] == path
    }


@dataclass(frozen=True)
class Override:
    """`a.b=value` of the command line, read as YAML."""

    text: str
    path: Path
    value: Any
    origins: dict[Path, Origin]

    @property
    def place(self) -> str:
        return f"override '{self.text}'"


def parse_override(text: str) -> Override:
    """An override from its text. Raises UserError when it is none."""
    place = f"override '{text}'"
    dotted, equals, written_value = text.partition("=")
    if not equals:
        raise UserError(Problem("is no override", place, remedy="write a.b=value"))
    if not dotted or not all(dotted.split(".")):
        raise UserError(
            Problem("has no key before '='" if not dotted else "has an empty key", place, remedy="write a.b=value")
        )
    try:
        document = parse(written_value, place)
    except UserError as error:
        raise UserError(*(Problem(p.cause, place, dotted, p.remedy) for p in error.problems)) from None
    if not document.values:
        remedy = f"write {dotted}=null for none, {dotted}='\"\"' for an empty text"
        raise UserError(Problem("has no value", place, remedy=remedy))
    document.values = dict.fromkeys(document.values, place)
    document.keys = dict.fromkeys(document.keys, place)
    if document.problems:
        raise UserError(*(Problem(p.cause, place, dotted, p.remedy) for p in document.problems))
    value = document.tree
    if isinstance(value, str) and value == written_value.strip():
        value = written_value  # an unquoted text keeps the blanks at its ends, which a shell quoted on purpose
    return Override(text, split(dotted), value, written(document, (), "override"))


def split(dotted: str) -> Path:
    """A dotted path as keys and indices."""
    return tuple(int(key) if key.isdecimal() else key for key in dotted.split("."))
