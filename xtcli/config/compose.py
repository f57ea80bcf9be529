"""From preset files to layers: the version, what a file extends, and its sizes.

A file lies over the one that it extends, which may extend another. Sizes are lists of writes, made when
one of them is chosen, checked all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path as File
from typing import Any

from pydantic import BaseModel, ValidationError

from xtcli.config import library
from xtcli.config.document import Document, Path, read
from xtcli.config.layers import Layers, Obstacle, Origin, split, written
from xtcli.config.problems import obstacle
from xtcli.errors import Problem, UserError, did_you_mean, nearest
from xtcli.registry import Config, field

VERSION = 1
MIGRATIONS: Mapping[int, Any] = {}
"""version -> function that turns a raw tree of that version into one of the next; applied in order."""

FILE_KEYS = ("extends", "size", "sizes")
"""Keys of a file that resolving takes away."""

Delta = tuple[Path, Any, Mapping[Path, Origin]]


class Base(Config):
    """The preset that a file starts from."""

    preset: str = field("name or relative path of a preset", min_length=1)
    size: str | None = field("which of its sizes; null takes its own default", None)


def compose(
    file: File, root: type[BaseModel], chain: tuple[File, ...] = ()
) -> tuple[Layers, dict[str, list[Delta]], str | None, list[Problem]]:
    """The layers of a file over what it extends; its sizes; its default size; its mistakes so far."""
    name = library.shown(file)
    if file.resolve() in chain:
        raise UserError(Problem("extends itself", name, "extends", "name another preset"))
    document = read(file, name)
    found = list(document.problems)
    if not isinstance(document.tree, dict):
        cause = "is empty" if document.tree is None else "is no map of keys"
        raise UserError(
            *found, Problem(cause, name, remedy="a preset holds version, about, model, objective, tokenizer")
        )
    raw = dict(document.tree)
    _check_version(raw, document)
    parts = {key: raw.pop(key, None) for key in FILE_KEYS}
    layers = Layers(root, name)
    if parts["extends"] is not None:
        found += _extend(layers, document, parts["extends"], (*chain, file.resolve()))
    layers.name = name
    layers.merge(document, raw)
    sizes = _sizes(document, parts["sizes"], found)
    own = parts["size"]
    if own is not None and (not isinstance(own, str) or own not in sizes):
        found.append(unknown_size(own, sizes, document.place(("size",)), "size"))
        own = None
    counts = layers.at(("expect", "parameters"))
    for key in counts if isinstance(counts, dict) else ():
        if key not in sizes:
            path = ("expect", "parameters", key)
            found.append(unknown_size(key, sizes, document.keys.get(path, name), ".".join(path)))
    return layers, sizes, own, found


def _check_version(raw: dict[str, Any], document: Document) -> None:
    place = document.place(("version",))
    if "version" not in raw:
        close = nearest("version", raw)
        if close:
            raise UserError(Problem("unknown key", document.keys[(close,)], close, "did you mean 'version'?"))
        raise UserError(Problem("has no 'version'", document.name, remedy=f"add the line 'version: {VERSION}'"))
    version = raw["version"]
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise UserError(Problem("should be a whole number", place, "version", f"this xt writes 'version: {VERSION}'"))
    if version > VERSION:
        cause = f"is version {version}, and this xt reads up to version {VERSION}"
        raise UserError(Problem(cause, place, "version", "upgrade xt: pip install -U xt-transformers"))
    while raw["version"] < VERSION:
        if raw["version"] not in MIGRATIONS:
            raise UserError(Problem(f"version {version} can no longer be read", place, "version", "use an older xt"))
        raw.update(MIGRATIONS[raw["version"]](raw))


def _extend(layers: Layers, document: Document, extends: Any, chain: tuple[File, ...]) -> list[Problem]:
    """Fill `layers` with the preset that a document extends; without one, nothing else can be judged."""
    extends = {"preset": extends} if isinstance(extends, str) else extends
    unknown = [key for key in extends if key not in Base.model_fields] if isinstance(extends, dict) else []
    if unknown:
        keys = [
            (document.keys["extends", key], f"extends.{key}", did_you_mean(key, Base.model_fields)) for key in unknown
        ]
        raise UserError(*(Problem("unknown key", place, path, remedy) for place, path, remedy in keys))
    try:
        base = Base.model_validate(extends)
    except ValidationError:
        cause = "should be a preset's name, a relative path, or {preset: ..., size: ...}"
        raise UserError(Problem(cause, document.place(("extends",)), "extends")) from None
    try:
        file = library.find(base.preset, chain[-1].parent)
    except UserError as error:
        place = document.place(("extends",))
        raise UserError(*(Problem(p.cause, place, "extends", p.remedy) for p in error.problems)) from None
    below, sizes, own, found = compose(file, layers.root, chain)
    wanted = base.size or own
    if wanted is not None and wanted not in sizes:
        found.append(unknown_size(wanted, sizes, document.place(("extends", "size")), "extends.size"))
    found += apply(below, sizes.get(wanted or "", []))
    below.tree.pop("expect", None)
    layers.tree = below.tree
    layers.origins = {path: origin for path, origin in below.origins.items() if path[0] != "expect"}
    return found


def _sizes(document: Document, sizes: Any, found: list[Problem]) -> dict[str, list[Delta]]:
    """Each size as writes of (path, value, origins)."""
    if sizes is None:
        return {}
    if not isinstance(sizes, dict):
        found.append(Problem("should be a map of named deltas", document.place(("sizes",)), "sizes"))
        return {}
    result: dict[str, list[Delta]] = {}
    for name, deltas in sizes.items():
        result[name] = []
        if not isinstance(deltas, dict):
            if deltas is not None:
                cause = "should be a map of dotted paths, such as model.dim: 1024"
                found.append(Problem(cause, document.place(("sizes", name)), f"sizes.{name}"))
            continue
        for dotted, value in deltas.items():
            at = ("sizes", name, dotted)
            if not all(dotted.split(".")):
                found.append(
                    Problem("has an empty key", document.keys[at], ".".join(at), "write a path such as model.dim")
                )
                continue
            result[name].append((split(dotted), value, written(document, at, "size", name)))
    return result


def unknown_size(name: Any, sizes: Mapping[str, Any], place: str, path: str = "") -> Problem:
    remedy = did_you_mean(str(name), sizes) if sizes else "this preset has no sizes"
    if not isinstance(name, str):
        return Problem("should be the name of a size", place, path, remedy)
    return Problem(f"there is no size '{name}'", place, path, remedy)


def apply(layers: Layers, deltas: Sequence[Delta]) -> list[Problem]:
    """Write deltas in order; those that cannot be written become problems."""
    found = []
    for path, value, origins in deltas:
        try:
            layers.put(path, value, origins)
        except Obstacle as error:
            found.append(obstacle(layers, path, origins[()], error))
    return found
