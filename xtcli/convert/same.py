"""Whether two configs mean the same network: the modules that they build are compared, not their words.

Two configs may say the same in different ways (a dropout stated or inherited, a head count of null). What they
build cannot: types, sizes and every number that a forward reads must be equal, module by module.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from types import MethodType
from typing import Any

from torch import Tensor, nn

from xtcli.model import construct
from xtcli.registry import Config

_WORKINGS = frozenset(nn.Module().__dict__) | {"config"}


def difference(one: Config, other: Config) -> str:
    """The first place where the modules of two configs differ, in words; empty where they are one network."""
    if one == other:
        return ""
    return _compare(construct(one), construct(other), "")


def unlike(one: Any, other: Any, path: str = "model") -> str:
    """The first place where two config trees differ, in words; initialisation is no part of a network."""
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        found = (
            unlike(one.get(key), other.get(key), f"{path}.{key}") for key in one if (path, key) != ("model", "init")
        )
        return next((text for text in found if text), "")
    return "" if one == other else f"{path} is {one!r}, their config.json can only say {other!r}"


def _compare(one: nn.Module, other: nn.Module, path: str) -> str:
    name = path or "the model"
    if type(one) is not type(other):
        return f"{name} is {type(one).__name__}, not {type(other).__name__}"
    for key in sorted(set(one.__dict__) | set(other.__dict__)):
        a, b = one.__dict__.get(key), other.__dict__.get(key)
        if key not in _WORKINGS and not _equal(a, b):
            return f"{name} has {key} {_said(a)}, not {_said(b)}"
    if path and getattr(one, "config", None) != getattr(other, "config", None):
        return f"{name} is {one.config}, not {other.config}"
    a, b = _tensors(one), _tensors(other)
    if {key: value.shape for key, value in a.items()} != {key: value.shape for key, value in b.items()}:
        return f"{name} has tensors {_shapes(a)}, not {_shapes(b)}"
    mine, theirs = dict(one.named_children()), dict(other.named_children())
    if list(mine) != list(theirs):
        odd = sorted(set(mine) ^ set(theirs)) or list(mine)
        return f"{name} {'has' if odd[0] in mine else 'lacks'} '{odd[0]}'"
    for key, child in mine.items():
        found = _compare(child, theirs[key], f"{path}.{key}" if path else key)
        if found:
            return found
    return ""


def _equal(a: Any, b: Any) -> bool:
    """Equality of what modules remember; bound functions and partial ones by what they are made of."""
    if isinstance(a, partial) and isinstance(b, partial):
        return a.func is b.func and _equal(a.args, b.args) and _equal(a.keywords, b.keywords)
    if isinstance(a, MethodType) and isinstance(b, MethodType):
        return a.__func__ is b.__func__
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_equal(value, b[key]) for key, value in a.items())
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(map(_equal, a, b))
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and a.dtype == b.dtype
    return bool(a == b)


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    """A module's own parameters and buffers."""
    return dict(module.named_parameters(recurse=False)) | dict(module.named_buffers(recurse=False))


def _said(value: Any) -> str:
    return getattr(value, "__name__", None) or repr(value)


def _shapes(tensors: dict[str, Tensor]) -> str:
    return ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in tensors.items()) or "none"
