"""Shell completion of presets, sizes and dotted keys, from YAML and schema.json alone: no torch, no pydantic."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from xtcli.config import library
from xtcli.config.document import read
from xtcli.errors import UserError

Choice = tuple[str, str]
"""What the shell may insert, and its help."""


def complete_preset(incomplete: str) -> list[Choice]:
    """Names of shipped presets; preset files and run folders when a path was begun."""
    if "/" in incomplete or incomplete.startswith("."):
        base = Path(incomplete).expanduser() if incomplete.endswith("/") else Path(incomplete).expanduser().parent
        found = sorted(base.iterdir()) if base.is_dir() else []
        head = incomplete[: incomplete.rfind("/") + 1]
        fits = [item for item in found if item.is_dir() or item.suffix in library.SUFFIXES]
        return [(f"{head}{item.name}{'/' if item.is_dir() else ''}", "") for item in fits if item.name[0] != "."]
    return [(entry.name, entry.title) for entry in library.list_presets() if entry.name.startswith(incomplete)]


def complete_inspected(ctx: Any, incomplete: str) -> list[Choice]:
    """Presets, or after --parts slots and their kinds."""
    if not (getattr(ctx, "params", None) or {}).get("parts"):
        return complete_preset(incomplete)
    names = [name for name in _schema().get("$defs", {}) if "." in name and not name.startswith(("slot.", "kinds."))]
    slots = {name.partition(".")[0]: "" for name in names}
    return [(name, "") for name in [*slots, *names] if name.startswith(incomplete)]


def complete_override_or_preset(ctx: Any, incomplete: str) -> list[Choice]:
    """A setting of the preset named first, or another preset to compare with."""
    return [*complete_override(ctx, incomplete), *([] if "=" in incomplete else complete_preset(incomplete))]


def complete_size(ctx: Any, incomplete: str) -> list[str]:
    """Sizes of the preset that the command line names."""
    file = _preset(ctx)
    return [size for size in library.entry(file).sizes if size.startswith(incomplete)] if file else []


def complete_override(ctx: Any, incomplete: str) -> list[Choice]:
    """Dotted keys of the preset that the command line names, level by level, and values where they are words."""
    file = _preset(ctx)
    if file is None:
        return []
    dotted, equals, begun = incomplete.partition("=")
    path = dotted.split(".")
    place = Place(_schema(), _schema(), raw_tree(file))
    for key in path if equals else path[:-1]:
        found = place.child(key)
        if found is None:
            return []
        place = found
    if equals:
        return [(f"{dotted}={word}", "") for word in place.words() if word.startswith(begun)]
    head = "".join(f"{key}." for key in path[:-1])
    choices = []
    for key in place.below():
        below = place.child(key)
        if key.startswith(path[-1]) and below is not None:
            choices.append((f"{head}{key}{'.' if next(below.below(), None) else '='}", below.meaning()))
    return choices


def _preset(ctx: Any) -> Path | None:
    params = getattr(ctx, "params", None) or {}
    stated = params.get("preset") or params.get("target")
    # an option that still lacks its value stops the parser, which leaves the words unread
    words = [stated] if stated else [word for word in getattr(ctx, "args", ()) if not word.startswith("-")]
    for ref in words:
        try:
            return library.find(ref)
        except UserError:
            continue
    return None


@cache
def _schema() -> Any:
    file = library.folder() / "schema.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def raw_tree(file: Path, depth: int = 0) -> Any:
    """A file's YAML over that of the files it extends; what cannot be read is left out."""
    try:
        tree = read(file).tree
        if not isinstance(tree, dict) or depth > 10:
            return {}
        base = tree.pop("extends", None)
        ref = base.get("preset") if isinstance(base, dict) else base
        below = raw_tree(library.find(ref, file.parent), depth + 1) if isinstance(ref, str) else {}
    except UserError:
        return {}
    return _over(below, tree)


def _over(below: Any, above: Any) -> Any:
    if (
        isinstance(below, dict)
        and isinstance(above, dict)
        and above.get("kind", below.get("kind")) == below.get("kind")
    ):
        return below | {key: _over(below.get(key), value) for key, value in above.items()}
    return above


class Place:
    """One place in the schema, beside what the preset holds there."""

    def __init__(self, root: Any, schema: Any, raw: Any) -> None:
        self.root, self.schema, self.raw = root, schema, raw

    def _all(self, schema: Any) -> Iterator[Any]:
        """The schemas that this one stands for."""
        if "$ref" in schema:
            yield from self._all(self.root["$defs"][schema["$ref"].rsplit("/", 1)[-1]])
        for item in schema.get("anyOf", ()):
            yield from self._all(item)
        if "$ref" not in schema and "anyOf" not in schema:
            yield schema

    def _variants(self, schema: Any) -> Iterator[Any]:
        """Those of the kind that the preset names; where only one kind can be, that one."""
        found = list(self._all(schema))
        kinds = [variant.get("properties", {}).get("kind", {}).get("const") for variant in found]
        wanted = self.raw.get("kind") if isinstance(self.raw, Mapping) else self.raw
        if wanted is None and len(set(kinds) - {None}) == 1:
            wanted = next(kind for kind in kinds if kind)
        yield from (variant for variant, kind in zip(found, kinds, strict=True) if kind in (None, wanted))

    def below(self) -> Iterator[str]:
        """Keys below, those that the preset has first."""
        seen = dict.fromkeys(self.raw) if isinstance(self.raw, Mapping) else {}
        for variant in self._variants(self.schema):
            seen |= dict.fromkeys(variant.get("properties", ()))
        if self.schema is self.root:
            for key in ("version", "about", "extends", "size", "sizes", "expect"):
                seen.pop(key, None)
        yield from seen

    def child(self, key: str) -> Place | None:
        """The place below a key, or None."""
        raw = self.raw.get(key) if isinstance(self.raw, Mapping) else None
        if key == "kind":
            named = [
                variant["properties"]["kind"]["const"] for variant in self._all(self.schema) if "properties" in variant
            ]
            return Place(self.root, {"enum": named, "description": "which of the slot's kinds"}, raw)
        for variant in self._variants(self.schema):
            below = variant.get("properties", {}).get(key, variant.get("additionalProperties"))
            if isinstance(below, Mapping):
                default = below.get("default")
                if isinstance(raw, Mapping) and isinstance(default, Mapping) and "kind" in default:
                    raw = {"kind": default["kind"], **raw}
                return Place(self.root, below, default if raw is None else raw)
        return None

    def words(self) -> Iterator[str]:
        """The words that a value may be."""

        by_type = {"boolean": ("true", "false"), "null": ("null",)}
        found: list[Any] = []
        for schema in self._all(self.schema):
            found += [*schema.get("enum", ()), schema.get("const"), *by_type.get(schema.get("type"), ())]
        yield from dict.fromkeys(word for word in found if isinstance(word, str))

    def meaning(self) -> str:
        """The field's description."""
        return str(self.schema.get("description", ""))
