"""The JSON Schema of a preset file, from the types; presets/schema.json is this and editors read it.

A slot is `anyOf` its kinds: a name for those that need nothing else, or a map with `kind`. Nothing is
`required`: a file that extends another states only what it changes, and `xt` itself names what is missing.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, get_args

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from xtcli.config.preset import PresetFile
from xtcli.registry import UNIONS, Config, Kinds, Slot, kinds, slots, tree

DRAFT = "http://json-schema.org/draft-07/schema#"
DROPPED = ("title", "required", "minItems", "maxItems", "prefixItems", "tiny", "x-slot", "x-kinds", "x-default")


def preset_schema() -> dict[str, Any]:
    """The schema as plain data, in a fixed order."""
    tables = {slot: dict(sorted(kinds(slot).items())) for slot in sorted({*slots(), *UNIONS})}
    parts: dict[str, type[Config]] = {
        f"{slot}.{kind}": cls.Config
        for slot, table in tables.items()
        for kind, cls in table.items()
        if slot not in UNIONS
    }
    tops: list[type[BaseModel]] = [PresetFile, *parts.values()]
    models = list(dict.fromkeys(model for top in tops for model in _below(top)))
    refs, raw = models_json_schema([(model, "validation") for model in models], ref_template="{model}")
    names = {refs[model, "validation"]["$ref"]: model.__name__ for model in models}
    names |= {refs[model, "validation"]["$ref"]: name for name, model in parts.items()}
    assert len(set(names.values())) == len(names), "two config classes share a name"
    found = {}
    for model in models:
        ref = refs[model, "validation"]["$ref"]
        found[names[ref]] = _node(raw["$defs"][ref], model, names)
    for slot, table in tables.items():
        links = {kind: {"$ref": f"#/$defs/{cls.Config.slot}.{kind}"} for kind, cls in table.items()}
        short = [kind for kind, cls in table.items() if not _needs(cls.Config)]
        found[f"slot.{slot}"] = {"anyOf": [*([{"enum": short}] if short else []), *links.values()]}
        found[f"kinds.{slot}"] = {
            "type": "object",
            "additionalProperties": False,
            "properties": {kind: {"anyOf": [link, {"type": "null"}]} for kind, link in links.items()},
        }
    root = found.pop(PresetFile.__name__)
    root["properties"]["sizes"]["additionalProperties"]["propertyNames"] = {"pattern": r"^[^.]+(\.[^.]+)*$"}
    used = _reachable(root, found)
    return {"$schema": DRAFT, "title": "A preset of xt", **root, "$defs": {name: found[name] for name in sorted(used)}}


def preset_schema_text() -> str:
    """The schema as presets/schema.json holds it."""
    return json.dumps(preset_schema(), indent=1, ensure_ascii=True) + "\n"


def _below(model: type[BaseModel], seen: set[type] | None = None) -> list[type[BaseModel]]:
    """A model and those that its fields name; slots name none."""
    seen = set() if seen is None else seen
    if model in seen:
        return []
    seen.add(model)
    found = [model]
    todo: list[Any] = [(info.annotation, *info.metadata) for info in model.model_fields.values()]
    while todo:
        annotation = todo.pop(0)
        arguments = annotation if isinstance(annotation, tuple) else get_args(annotation)
        if any(isinstance(argument, Slot | Kinds) for argument in arguments):
            continue
        todo += [argument for argument in arguments if not isinstance(argument, str | int)]
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            found += _below(annotation, seen)
    return found


def _needs(model: type[Config]) -> bool:
    return any(info.is_required() for info in model.model_fields.values())


def _node(schema: Mapping[str, Any], model: type[BaseModel], names: Mapping[str, str]) -> dict[str, Any]:
    """One config class: its fields, `kind` where it has one, and its shorthand."""
    properties = {"kind": {"const": model.kind}} if issubclass(model, Config) and model.kind else {}
    for name, info in model.model_fields.items():
        below = _clean(schema["properties"][name], names)
        if below.get("default") is None or "$ref" not in below:
            below.pop("default", None)
        if info.description:
            below["description"] = info.description
        if not info.is_required():
            below["default"] = tree(info.get_default(call_default_factory=True, validated_data={}))
        properties[name] = below
    result: dict[str, Any] = {"type": "object", "additionalProperties": False, "properties": properties}
    if model.__doc__:
        result = {"description": model.__doc__.splitlines()[0], **result}
    return {"anyOf": [{"type": "string"}, result]} if getattr(model, "shorthand", "") else result


def _clean(schema: Any, names: Mapping[str, str]) -> Any:
    """pydantic's schema of one field with our references, and without what is noise to an editor."""
    if isinstance(schema, list):
        return [_clean(item, names) for item in schema]
    if not isinstance(schema, Mapping):
        return schema
    if "x-slot" in schema:
        usual = {"default": {"kind": schema["x-default"]}} if schema.get("x-default") else {}
        return {"$ref": f"#/$defs/slot.{schema['x-slot']}"} | usual
    if "x-kinds" in schema:
        return {"$ref": f"#/$defs/kinds.{schema['x-kinds']}"}
    result = {key: _clean(value, names) for key, value in schema.items() if key not in DROPPED}
    if "$ref" in result:
        result["$ref"] = f"#/$defs/{names[result['$ref']]}"
    return result


def _reachable(root: Any, defs: Mapping[str, Any]) -> set[str]:
    """The names of the definitions that the root leads to."""
    found: set[str] = set()
    todo = [root]
    while todo:
        item = todo.pop()
        if isinstance(item, Mapping):
            name = str(item.get("$ref", "")).rsplit("/", 1)[-1]
            if name and name not in found:
                found.add(name)
                todo.append(defs[name])
            todo += item.values()
        elif isinstance(item, list):
            todo += item
    return found
