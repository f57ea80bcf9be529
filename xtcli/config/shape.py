"""What may stand at a place in the config tree: the types of a preset, walked beside its raw YAML.

pydantic says that a value is wrong; the shape of its place says what would be right: the fields of the
node, its slot, the entries of a map. Overrides use it to write below a shorthand (`norm: rms`) or
below a node that the preset leaves to its default.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from xtcli.config.document import Path
from xtcli.registry import Config, Kinds, Slot, kinds, tree


@dataclass(frozen=True)
class Shape:
    """One place: a node with fields (`config`), a map, a list (`item`: type of the entries), or a scalar.

    A map takes any key unless `names` lists the keys; with `of_kinds` its keys are the kinds of that slot.
    """

    form: Literal["node", "map", "list", "scalar"] = "scalar"
    config: type[BaseModel] | None = None
    slot: Slot | None = None
    item: Any = None
    names: tuple[str, ...] = ()
    of_kinds: str = ""
    optional: bool = False
    info: FieldInfo | None = None

    @property
    def keys(self) -> list[str]:
        """Every key that may stand here; none for scalars and maps that take any key."""
        if self.of_kinds:
            return list(kinds(self.of_kinds))
        if self.config is None:
            return ["kind"] if self.slot else list(self.names)
        return (["kind"] if self.slot else []) + list(self.config.model_fields)

    @property
    def shorthand(self) -> str:
        """The key that a plain text at this place stands for, or nothing."""
        return "kind" if self.slot else getattr(self.config, "shorthand", "")

    def child(self, key: str | int, raw: Any) -> Shape | None:
        """The shape below `key`, where `raw` is the value there; None when there can be none."""
        if self.of_kinds:
            found = kinds(self.of_kinds).get(str(key))
            return Shape("node", found.Config) if found else None
        if self.form == "node" and self.config and key in self.config.model_fields:
            info = self.config.model_fields[str(key)]
            annotated = Annotated[info.annotation, *info.metadata] if info.metadata else info.annotation
            return shape(annotated, raw, info)
        if (self.form == "map" and isinstance(key, str)) or (self.form == "list" and isinstance(key, int)):
            return shape(self.item, raw)
        return None


def shape(annotation: Any, raw: Any, info: FieldInfo | None = None) -> Shape:
    """The shape of a place with this type that holds `raw` (None: the default of `info`)."""
    if raw is None and info is not None:
        default = info.get_default(call_default_factory=True, validated_data={})
        raw = tree(default) if isinstance(default, Config | Mapping | tuple) else None
    annotation, metadata = _unwrap(annotation)
    slot = next((mark for mark in metadata if isinstance(mark, Slot)), None)
    if slot is not None:
        return Shape("node", _kind(slot, raw), slot, info=info)
    of_kinds = next((mark.name for mark in metadata if isinstance(mark, Kinds)), "")
    if of_kinds:
        return Shape("map", of_kinds=of_kinds, info=info)
    origin = get_origin(annotation)
    if origin in (Union, UnionType):
        return _union(get_args(annotation), raw, info)
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return Shape("node", annotation, info=info)
    if isinstance(origin, type) and issubclass(origin, Mapping):
        key, item = get_args(annotation)
        return Shape("map", item=item, names=get_args(key) if get_origin(key) is Literal else (), info=info)
    if origin in (tuple, list):
        return Shape("list", item=get_args(annotation)[0], info=info)
    return Shape(info=info)


def _union(arms: tuple[Any, ...], raw: Any, info: FieldInfo | None) -> Shape:
    optional = NoneType in arms
    found = [shape(arm, raw, info) for arm in arms if arm is not NoneType]
    wanted = "list" if isinstance(raw, list | tuple) else "node map" if isinstance(raw, Mapping) else "scalar"
    best = next((item for item in found if item.form in wanted.split()), None)
    best = best or next((item for item in found if item.form == "node"), found[0])
    return replace(best, optional=optional)


def _unwrap(annotation: Any) -> tuple[Any, list[Any]]:
    metadata: list[Any] = []
    while get_origin(annotation) is Annotated:
        annotation, *more = get_args(annotation)
        metadata += more
    return annotation, metadata


def _kind(slot: Slot, raw: Any) -> type[BaseModel] | None:
    kind = raw if isinstance(raw, str) else raw.get("kind", slot.default) if isinstance(raw, Mapping) else slot.default
    found = kinds(slot.name).get(kind) if isinstance(kind, str) else None
    return found.Config if found else None


def seed(place: Shape) -> dict[str, Any] | list[Any]:
    """What stands for a place's default: a list, or a map of its kind and what the default states explicitly."""
    default = place.info.get_default(call_default_factory=True, validated_data={}) if place.info else None
    if isinstance(default, tuple):
        return [tree(item) for item in default]
    if not isinstance(default, Config):
        return {}
    stated = {
        name: tree(getattr(default, name)) for name in type(default).model_fields if name in default.model_fields_set
    }
    return ({"kind": default.kind} if default.kind else {}) | stated


def walk(root: type[BaseModel], raw: Any) -> dict[Path, Shape]:
    """The shape of every place of a raw tree that the types know."""
    found: dict[Path, Shape] = {}

    def visit(place: Shape, value: Any, path: Path) -> None:
        found[path] = place
        if isinstance(value, str) and place.shorthand:
            value = {place.shorthand: value}
        items = (
            value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list | tuple) else ()
        )
        for key, item in items:
            below = place.child(key, item)
            if below is not None:
                visit(below, item, (*path, key))

    visit(Shape("node", root), raw, ())
    return found
