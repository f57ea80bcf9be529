"""A resolved preset as text: its tree in short, or every value with its origin and its meaning."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from xtcli.config.document import Path
from xtcli.config.emit import flow, lines, scalar
from xtcli.config.layers import Origin
from xtcli.config.preset import Preset, Resolved
from xtcli.config.shape import walk
from xtcli.registry import Config

GAP = 2
MAX_CELL = 80


@dataclass(frozen=True)
class Value:
    """One value of a resolved preset."""

    path: str
    value: Any
    origin: Origin
    meaning: str


def values(resolved: Resolved) -> list[Value]:
    """Every value with its origin and its field's one-line meaning, in the order of the file."""
    tree = resolved.to_tree()
    shapes = walk(Preset, tree)
    found = []
    for dotted, path in _leaves(tree):
        info = shapes[path].info if path in shapes else None
        meaning = (info.description if info else None) or ("which of the slot's kinds" if path[-1] == "kind" else "")
        found.append(Value(dotted, _at(tree, path), resolved.origins[dotted], meaning))
    return found


def _leaves(tree: Any, path: Path = ()) -> Iterator[tuple[str, Path]]:
    for key, value in tree.items() if isinstance(tree, Mapping) else enumerate(tree):
        here = (*path, key)
        nested = isinstance(value, list) and any(isinstance(item, Mapping) for item in value)
        if (isinstance(value, Mapping) and value) or nested:
            yield from _leaves(value, here)
        else:
            yield ".".join(map(str, here)), here


def _at(tree: Any, path: Path) -> Any:
    for key in path:
        tree = tree[key]
    return tree


def resolved_yaml(resolved: Resolved) -> str:
    """The resolved preset as YAML with the origin of each value in a comment."""
    rows = []
    for path, line in lines(resolved.to_tree()):
        origin = resolved.origins.get(".".join(map(str, path)))
        rows.append((line, str(origin) if origin else ""))
    width = min(max(len(line) for line, origin in rows if origin), 60)
    return "".join(f"{line:{width}}{' ' * GAP}# {origin}\n" if origin else f"{line}\n" for line, origin in rows)


def explained(resolved: Resolved) -> str:
    """Every value, where it came from and what it means, as a table."""
    rows = [(item.path, flow(item.value), str(item.origin), item.meaning) for item in values(resolved)]
    widths = [min(max(len(row[column]) for row in rows), limit) for column, limit in enumerate((64, 24, 48))]
    return "".join((" " * GAP).join(_pad(row, widths)).rstrip() + "\n" for row in rows)


def _pad(row: tuple[str, ...], widths: list[int]) -> Iterator[str]:
    for index, cell in enumerate(row):
        short = cell if len(cell) <= MAX_CELL or index == len(row) - 1 else cell[: MAX_CELL - 3] + "..."
        yield f"{short:{widths[index]}}" if index < len(widths) else short


def outline(resolved: Resolved, section: str) -> Iterator[str]:
    """One section as an indented outline: a line a node, with its kind and what is stated; defaults are left out."""
    yield from _outline(getattr(resolved.preset, section), section, (section,), resolved)


def _outline(node: Any, name: str, path: Path, resolved: Resolved) -> Iterator[str]:
    def stated(here: Path) -> bool:
        dotted = ".".join(map(str, here))
        return any(
            origin.source != "default" and (at == dotted or at.startswith(f"{dotted}."))
            for at, origin in resolved.origins.items()
        )

    items = (
        node.items() if isinstance(node, Mapping) else ((key, getattr(node, key)) for key in type(node).model_fields)
    )
    shown = [(key, value) for key, value in items if stated((*path, key))]
    nodes = [(key, value) for key, value in shown if isinstance(value, Config | Mapping) and value]
    plain = [f"{key} {flow(value)}" for key, value in shown if not (isinstance(value, Config | Mapping) and value)]
    kind = node.kind if isinstance(node, Config) else ""
    head = f"{'  ' * (len(path) - 1)}{name}" + (f": {scalar(kind)}" if kind and kind != name else "")
    yield f"{head}  {', '.join(plain)}" if plain else head
    for key, value in nodes:
        yield from _outline(value, key, (*path, key), resolved)
