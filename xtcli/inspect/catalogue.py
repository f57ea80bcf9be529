"""The slots, the kinds that fill them, and the fields of each kind: everything a preset may say, from the registry."""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import annotated_types
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from xtcli.config.emit import flow
from xtcli.errors import did_you_mean, refuse
from xtcli.inspect import units
from xtcli.registry import UNIONS, Config, Kinds, Slot, kinds, slots, tree

NAMES = {int: "int", float: "number", str: "text", bool: "true or false", NoneType: "null"}
MAX_CELL = 32
"""Columns of a type or a default before it goes on in the next line."""
MIN_MEANING = 40
"""Columns of a meaning, at least, on however narrow a terminal."""


@dataclass(frozen=True)
class Field:
    """One field of a kind: its dotted name below the kind, type, default (None: it must be stated) and meaning."""

    name: str
    type: str
    default: str | None
    meaning: str


@dataclass(frozen=True)
class Kind:
    """One kind of a slot."""

    slot: str
    name: str
    doc: str
    fields: tuple[Field, ...]


def catalogue(path: str = "") -> dict[str, list[Kind]]:
    """Slot -> its kinds: all of them, those of `SLOT`, or the one of `SLOT.KIND`; raises UserError for another name."""
    slot, _, kind = path.partition(".")
    known = sorted({*slots(), *UNIONS})
    if not path:
        return {name: [_kind(name, *item) for item in sorted(slots()[name].items())] for name in sorted(slots())}
    if slot not in known:
        owners = [name for name in slots() if slot in slots()[name]]
        remedy = f"'{slot}' is a kind: write {owners[0]}.{slot}" if owners else did_you_mean(slot, known)
        raise refuse(f"there is no slot '{slot}'", remedy)
    table = kinds(slot)
    if kind and kind not in table:
        raise refuse(f"{slot} has no kind '{kind}'", did_you_mean(kind, table))
    return {slot: [_kind(slot, *item) for item in sorted(table.items()) if kind in ("", item[0])]}


def _kind(slot: str, name: str, cls: type) -> Kind:
    config: type[Config] = cls.Config  # type: ignore[attr-defined]
    return Kind(slot, name, _doc(cls) or _doc(config), tuple(fields(config)))


def _doc(cls: type) -> str:
    """The first paragraph of a class's own docstring, on one line."""
    text = inspect.cleandoc(cls.__doc__ or "").split("\n\n")[0]
    return " ".join(text.split())


def fields(config: type[BaseModel], path: str = "") -> Iterator[Field]:
    """The fields of a config class; those of a node without kinds follow under its name."""
    for name, info in config.model_fields.items():
        annotation = Annotated[info.annotation, *info.metadata] if info.metadata else info.annotation
        default = None if info.is_required() else _default(info)
        yield Field(f"{path}{name}", spell(annotation), default, info.description or "")
        for below in _nodes(annotation):
            yield from fields(below, f"{path}{name}.")


def _default(info: FieldInfo) -> str:
    value = tree(info.get_default(call_default_factory=True, validated_data={}))
    if isinstance(value, Mapping) and "kind" in value and info.default is not None:
        stated = {key: tree(getattr(info.default, key)) for key in info.default.model_fields_set}
        return flow({"kind": value["kind"], **stated}) if stated else str(value["kind"])
    return flow(value)


def _nodes(annotation: Any) -> Iterator[type[BaseModel]]:
    """Config classes without kinds that a type names directly or as one of several."""
    annotation, marks = _unwrap(annotation)
    if any(isinstance(mark, Slot | Kinds) for mark in marks):
        return
    if get_origin(annotation) in (Union, UnionType):
        for arm in get_args(annotation):
            yield from _nodes(arm)
    elif isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation


def _unwrap(annotation: Any) -> tuple[Any, list[Any]]:
    marks: list[Any] = []
    while get_origin(annotation) is Annotated:
        annotation, *more = get_args(annotation)
        marks += more
    return annotation, marks


def spell(annotation: Any) -> str:
    """A field's type and bounds in words: `int > 0`, `a kind of norm`, `pre or post`, `list of number`."""
    annotation, marks = _unwrap(annotation)
    for mark in marks:
        if isinstance(mark, Slot):
            return f"a kind of {mark.name}"
        if isinstance(mark, Kinds):
            return f"map from kinds of {mark.name}"
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        text = " or ".join(flow(value) for value in arguments)
    elif origin in (Union, UnionType):
        text = " or ".join(dict.fromkeys(spell(arm) for arm in arguments if arm is not NoneType))
    elif isinstance(origin, type) and issubclass(origin, Mapping):
        text = f"map from {spell(arguments[0])} to {spell(arguments[1])}"
    elif origin in (tuple, list):
        several = [item for item in arguments if item is not Ellipsis]
        text = f"list of {spell(several[0])}" if len(set(several)) == 1 else f"[{', '.join(map(spell, several))}]"
    elif isinstance(annotation, type) and issubclass(annotation, BaseModel):
        text = "map"
    else:
        text = NAMES.get(annotation, "anything" if annotation is Any else getattr(annotation, "__name__", "value"))
    text = " ".join([text, *_bounds(marks)])
    return f"{text} or null" if NoneType in arguments and origin in (Union, UnionType) else text


def _bounds(marks: Iterable[Any]) -> Iterator[str]:
    words = {
        annotated_types.Gt: (">", "gt"),
        annotated_types.Ge: (">=", "ge"),
        annotated_types.Lt: ("<", "lt"),
        annotated_types.Le: ("<=", "le"),
    }
    for mark in marks:
        if isinstance(mark, FieldInfo):
            yield from _bounds(mark.metadata)
        for cls, (sign, name) in words.items():
            if isinstance(mark, cls):
                yield f"{sign} {getattr(mark, name):g}"


def lines(found: Mapping[str, list[Kind]], width: int, whole: bool) -> list[str]:
    """Slots and kinds, a line each; with `whole` every kind with a table of its fields."""
    text: list[str] = []
    for slot, entries in found.items():
        if not whole:
            text.append(slot)
            room = max(width - max(len(kind.name) for kind in entries) - 4, MIN_MEANING)
            text += units.table(
                [(kind.name, textwrap.shorten(kind.doc, room, placeholder=" ...")) for kind in entries], indent=2
            )
            continue
        for kind in entries:
            text += [
                f"{slot}: {kind.name}",
                *(f"  {line}" for line in textwrap.wrap(kind.doc, width - 2, break_on_hyphens=False)),
            ]
            text += [*_field_lines(kind.fields, width), ""] if kind.fields else ["  no fields", ""]
    return text[:-1] if text and not text[-1] else text


def _field_lines(shown: Iterable[Field], width: int) -> list[str]:
    rows = [("field", "type", "default", "meaning")]
    rows += [(f.name, f.type, "must be stated" if f.default is None else f.default, f.meaning) for f in shown]
    used = [min(max(len(row[column]) for row in rows), MAX_CELL) for column in (1, 2)]
    room = max(width - 8 - max(len(row[0]) for row in rows) - sum(used), MIN_MEANING)
    folded: list[tuple[str, ...]] = []
    for name, *cells in rows:
        parts = [
            textwrap.wrap(cell, limit, break_on_hyphens=False)
            for cell, limit in zip(cells, (MAX_CELL, MAX_CELL, room), strict=True)
        ]
        for number in range(max(map(len, parts))):
            folded.append(
                (name if number == 0 else "", *(part[number] if number < len(part) else "" for part in parts))
            )
    return units.table(folded, indent=2)


def facts(found: Mapping[str, list[Kind]]) -> dict[str, Any]:
    """The catalogue as plain data."""
    return {
        slot: {kind.name: {"doc": kind.doc, "fields": [asdict(item) for item in kind.fields]} for kind in entries}
        for slot, entries in found.items()
    }
