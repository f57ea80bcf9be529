"""Where presets lie: by path, by name, or inside a run or checkpoint folder.

Listing reads only the lines it needs of each file, so that `xt inspect` and completion stay instant.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xtcli.errors import UserError, did_you_mean, nearest, refuse

SUFFIXES = (".yaml", ".yml")
RECORDED = "preset.yaml"
"""The name of the resolved preset inside a run or checkpoint folder."""


@dataclass(frozen=True)
class Entry:
    """One shipped preset: its name, file, sizes and what its `about` says."""

    name: str
    file: Path
    title: str = ""
    paper: str = ""
    year: int | None = None
    url: str = ""
    new: str = ""
    sizes: tuple[str, ...] = ()


def folder() -> Path:
    """The folder of the shipped presets: beside the package in a source tree, inside it when installed from a wheel."""
    package = Path(__file__).resolve().parent.parent
    beside = package.parent / "presets"
    return beside if (package.parent / "pyproject.toml").is_file() and beside.is_dir() else package / "presets"


def names() -> list[str]:
    """The names of the shipped presets, sorted."""
    return sorted(file.stem for file in folder().glob("*.yaml"))


def list_presets() -> list[Entry]:
    """All shipped presets by name, with what their `about` says."""
    return [entry(folder() / f"{name}.yaml") for name in names()]


def entry(file: Path) -> Entry:
    """What a preset file says of itself, over what those that it extends say; only the blocks needed are parsed."""
    blocks = _blocks(file)
    about, sizes = _about(blocks, file), blocks.get("sizes")
    return Entry(file.stem, file, **about, sizes=tuple(sizes) if isinstance(sizes, dict) else ())


def _blocks(file: Path) -> dict[str, Any]:
    from xtcli.config.document import parse

    try:
        text = file.read_text(encoding="utf-8")
        tree = parse("".join(_block(text, key) for key in ("about", "extends", "sizes")), str(file)).tree
    except (OSError, UnicodeDecodeError, UserError):
        return {}
    return tree if isinstance(tree, dict) else {}


def _about(blocks: dict[str, Any], file: Path, depth: int = 0) -> dict[str, Any]:
    about, base = blocks.get("about"), blocks.get("extends")
    ref = base.get("preset") if isinstance(base, dict) else base
    known: dict[str, Any] = {}
    if isinstance(ref, str) and depth < 10:
        try:
            below = find(ref, file.parent)
            known = _about(_blocks(below), below, depth + 1)
        except UserError:
            known = {}
    stated = about if isinstance(about, dict) else {}
    return known | {key: stated[key] for key in ("title", "paper", "year", "url", "new") if stated.get(key) is not None}


def _block(text: str, key: str) -> str:
    """The lines of one top-level key."""
    taken: list[str] = []
    for line in text.splitlines(keepends=True):
        if taken and line.strip() and not line[0].isspace():
            break
        if taken or line.startswith(f"{key}:"):
            taken.append(line)
    return "".join(taken)


def find(ref: str | Path, beside: Path | None = None) -> Path:
    """The file that a path, a name or a run folder means; `beside` is the folder that relative paths start from.

    Raises UserError with the nearest name when there is none.
    """
    text = os.fspath(ref)
    shipped = folder() / f"{text}.yaml"
    if os.sep not in text and "/" not in text and not text.endswith(SUFFIXES) and shipped.is_file():
        return shipped
    path = (beside or Path()) / Path(text).expanduser()
    if path.is_dir():
        if (path / RECORDED).is_file():
            return path / RECORDED
        if shipped.is_file():
            return shipped
        raise refuse(
            f"the folder '{text}' holds no {RECORDED}", "name a preset, its file, or a run or checkpoint folder"
        )
    if path.is_file():
        return path
    if path.suffix in SUFFIXES or "/" in text or os.sep in text:
        stem = path.stem if path.suffix in SUFFIXES else path.name
        if stem in names():
            raise refuse(f"there is no file '{text}'", f"did you mean the preset '{stem}'?")
        siblings = [item.name for item in path.parent.iterdir()] if path.parent.is_dir() else []
        close = nearest(path.name, siblings)
        if close:
            raise refuse(f"there is no file '{text}'", f"did you mean '{text.removesuffix(path.name)}{close}'?")
        raise refuse(f"there is no file '{text}'", "`xt inspect` lists the presets")
    begun = [name for name in names() if text and name.startswith(text)]
    if len(begun) > 1:
        raise refuse(f"there is no preset '{text}'", f"did you mean one of: {', '.join(begun)}?")
    if nearest(text, names()):
        raise refuse(f"there is no preset '{text}'", did_you_mean(text, names()))
    raise refuse(f"there is no preset '{text}'", "`xt inspect` lists them; a file's name ends in .yaml")


def shown(file: Path) -> str:
    """A file's name for messages: relative below the working folder, else in full."""
    try:
        return str(file.resolve().relative_to(Path.cwd()))
    except ValueError:
        return str(file)
