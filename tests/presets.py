"""Presets that differ in structure: those that are no more than a size of another have its tiny form."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import yaml

from xtcli.config import library
from xtcli.config.preset import load_preset

SIZE_KEYS = {"version", "extends", "size", "about", "expect"}


@lru_cache
def tiny_form(name: str) -> tuple[Any, ...]:
    """What a preset builds, learns and reads in tiny form."""
    preset = load_preset(name, tiny=True).preset
    return preset.model, preset.objective, preset.tokenizer


def is_size(name: str) -> bool:
    """Whether a preset says no more than which size of another it is, and has the same tiny form."""
    stated = yaml.safe_load((library.folder() / f"{name}.yaml").read_text(encoding="utf-8"))
    if "extends" not in stated or not set(stated) <= SIZE_KEYS:
        return False
    base = stated["extends"]
    return tiny_form(base if isinstance(base, str) else base["preset"]) == tiny_form(name)


NAMES = library.names()
DISTINCT = [name for name in NAMES if not is_size(name)]
