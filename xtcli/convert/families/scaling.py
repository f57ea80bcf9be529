"""`rope_scaling` of config.json: the kinds of rotary scaling, and the fields of each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from xtcli.convert.options import Custom, Options, Unexpressed
from xtcli.errors import did_you_mean

# their kind -> our kind, {their field: (our field, default or ...)}, fields of theirs that are never read
_KINDS: Mapping[str, tuple[str, Mapping[str, tuple[str, Any]], tuple[str, ...]]] = {
    "default": ("none", {}, ()),
    "linear": ("linear", {"factor": ("factor", ...)}, ()),
    "dynamic": ("dynamic", {"factor": ("factor", ...)}, ("original_max_position_embeddings",)),
    "llama3": (
        "wavelength",
        {
            "factor": ("factor", ...),
            "low_freq_factor": ("low", ...),
            "high_freq_factor": ("high", ...),
            "original_max_position_embeddings": ("original", ...),
        },
        (),
    ),
    "yarn": (
        "yarn",
        {
            "factor": ("factor", ...),
            "original_max_position_embeddings": ("original", None),
            "beta_fast": ("fast", 32.0),
            "beta_slow": ("slow", 1.0),
            "truncate": ("truncate", True),
            "attention_factor": ("gain", None),
            "mscale": ("mscale", None),
            "mscale_all_dim": ("mscale_all", None),
        },
        ("finetuned",),
    ),
    "longrope": (
        "longrope",
        {
            "short_factor": ("short", ...),
            "long_factor": ("long", ...),
            "factor": ("factor", None),
            "attention_factor": ("gain", None),
        },
        ("original_max_position_embeddings",),
    ),
}


def _load(options: Options) -> dict[str, Any]:
    given = options.get("rope_scaling", dict, None)
    original = options.get("original_max_position_embeddings", int, None)
    if not given:
        return {"kind": "none"}
    name = given.get("rope_type", given.get("type"))
    if "type" in given and given["type"] != name:
        options.refuse("rope_scaling", f"names two kinds, {given['type']!r} and {name!r}", "keep one")
    if name not in _KINDS:
        options.refuse("rope_scaling.rope_type", f"is {name!r}", did_you_mean(str(name), _KINDS))
        return {"kind": "none"}
    kind, fields, idle = _KINDS[name]
    for key in given:
        if key not in fields and key not in idle and key not in ("rope_type", "type"):
            options.refuse(f"rope_scaling.{key}", f"is no option of '{name}'", did_you_mean(key, fields))
    node: dict[str, Any] = {"kind": kind}
    for theirs, (ours, default) in fields.items():
        value = given.get(theirs, default)
        if value is ...:
            options.refuse(f"rope_scaling.{theirs}", "is missing", f"'{name}' needs it")
            value = 1.0
        node[ours] = default if isinstance(default, float) and not value else value
    if kind == "longrope":
        _original(node, original, options)
    return node


def _original(node: dict[str, Any], original: int | None, options: Options) -> None:
    """A length of pretraining that stands outside of rope_scaling decides alone over the factor."""
    if original is not None:
        node |= {"original": original, "factor": None}
    elif node["factor"] is None and node["gain"] is None:
        options.refuse("rope_scaling.factor", "is missing", "'longrope' needs it or attention_factor")
    elif node["factor"] is None:
        node["factor"] = 1.0


def _dump(value: Any, found: dict[str, Any]) -> None:
    name = next((name for name, (kind, *_) in _KINDS.items() if kind == value["kind"]), None)
    if name is None:
        raise Unexpressed(f"no rope_scaling stands for '{value['kind']}'")
    kind, fields, _ = _KINDS[name]
    if kind == "none":
        found["rope_scaling"] = None
        return
    stated = {theirs: value[ours] for theirs, (ours, default) in fields.items() if value[ours] != default}
    found["rope_scaling"] = {"rope_type": name} | stated
    if kind == "longrope" and value["original"] is not None:
        found["original_max_position_embeddings"] = value["original"]


SCALING = Custom(_load, _dump)
"""The scaling of rotary positions."""
