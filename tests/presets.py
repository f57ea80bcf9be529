"""Presets that differ in structure: those that are no more than a size of another have its tiny form."""

from __future__ import annotations

import yaml

from xtcli.config import library

SIZE_KEYS = {"version", "extends", "size", "about", "expect"}


def is_size(name: str) -> bool:
    """Whether a preset says no more than which size of another it is."""
    text = (library.folder() / f"{name}.yaml").read_text(encoding="utf-8")
    return "extends" in (stated := yaml.safe_load(text)) and set(stated) <= SIZE_KEYS


NAMES = library.names()
SIZES = [name for name in NAMES if is_size(name)]
DISTINCT = [name for name in NAMES if name not in SIZES]
