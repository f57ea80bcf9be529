"""`--tiny`: any preset as a laptop-size model of the same structure.

Each field that declares `field(..., tiny=n)` is capped at n (null stays null; the numbers in a list are
capped one by one). A config class that must shrink several fields together defines `tiny(self) -> Self`:
it sees the node as the preset has it, and what it changes takes precedence over the caps.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic.fields import FieldInfo

from xtcli.registry import Config

Node = TypeVar("Node", bound=Config)


def tiny(config: Node) -> Node:
    """The same tree with every size capped."""
    fields = type(config).model_fields
    changes = {name: _shrink(getattr(config, name), _cap(info)) for name, info in fields.items()}
    own = getattr(config, "tiny", None)
    if own is not None:
        small = own()
        for name in fields:
            value = getattr(small, name)
            if value != getattr(config, name):
                changes[name] = _shrink(value, None)
    return config.model_copy(update=changes)


def _cap(info: FieldInfo) -> int | None:
    extra = info.json_schema_extra
    cap = extra.get("tiny") if isinstance(extra, Mapping) else None
    return cap if isinstance(cap, int) else None


def _shrink(value: Any, cap: int | None) -> Any:
    if isinstance(value, Config):
        return tiny(value)
    if isinstance(value, Mapping):
        return {key: _shrink(item, cap) for key, item in value.items()}
    if isinstance(value, tuple):
        return tuple(_shrink(item, cap) for item in value)
    if cap is not None and isinstance(value, int | float) and not isinstance(value, bool):
        return min(value, type(value)(cap))
    return value
