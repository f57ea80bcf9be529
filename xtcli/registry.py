"""Slots and the kinds that fill them.

A slot (`norm`, `mixer`, `ffn` ...) is a place in the config tree with a contract; a kind is one
class that honours it. `@part("mixer", "attention")` enters a class in its slot's table; the class
has a nested `Config` whose fields become the YAML keys below that slot:

    attn: {kind: attention, heads: 12}        the full form
    norm: rms                                 a kind with all its defaults

Nothing here imports torch; the tables fill when `xtcli.parts` is imported, which the first
validation of a slot does by itself.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Annotated, Any, ClassVar, TypeVar

from pydantic import BaseModel, ConfigDict, Field, GetCoreSchemaHandler, GetJsonSchemaHandler, create_model
from pydantic_core import PydanticCustomError, core_schema

from xtcli.errors import did_you_mean, refuse

PROVIDERS = ("xtcli.parts", "xtcli.objectives", "xtcli.data.tokenizers")
"""Modules whose import fills the tables."""


class Config(BaseModel):
    """A frozen node of the config tree; unknown keys and loose types are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, protected_namespaces=())

    slot: ClassVar[str] = ""
    kind: ClassVar[str] = ""


def field(doc: str, default: Any = ..., *, tiny: int | None = None, example: Any = None, **constraints: Any) -> Any:
    """A config field: its one-line meaning, default and constraints.

    tiny: the cap that `--tiny` puts on it. example: a value for tests of a part that has no default here.
    """
    extra = {key: value for key, value in (("tiny", tiny), ("example", example)) if value is not None}
    return Field(default, description=doc, json_schema_extra=extra or None, **constraints)


def example(config: type[Config]) -> dict[str, Any]:
    """The examples of a config's required fields: enough to build the part in a test."""
    found = {}
    for name, entry in config.model_fields.items():
        if entry.is_required():
            extra = entry.json_schema_extra if isinstance(entry.json_schema_extra, dict) else {}
            if "example" not in extra:
                raise AssertionError(f"{config.slot} {config.kind}: required field '{name}' has no example")
            found[name] = extra["example"]
    return found


UNIONS = {"sublayer": ("mixer", "ffn")}
"""Slots that take the kinds of several others: a block joins mixers and feed-forwards alike."""

_tables: dict[str, dict[str, type[Any]]] = {}
_loaded: list[str] = []

Part = TypeVar("Part", bound=type)


def part(slot: str, kind: str) -> Callable[[Part], Part]:
    """Enter a class with a nested `Config` as `kind` of `slot`."""

    def register(cls: Part) -> Part:
        kinds = _tables.setdefault(slot, {})
        if kind in kinds and kinds[kind].__qualname__ != cls.__qualname__:
            raise AssertionError(f"{slot} has two kinds named {kind!r}")
        owner: Any = cls
        config = owner.__dict__.get("Config")
        if config is None:
            inherited = {"__module__": owner.__module__, "__doc__": owner.Config.__doc__}
            config = type("Config", (owner.Config,), inherited)
            owner.Config = config
        config.slot, config.kind = slot, kind
        config.__name__ = cls.__name__ + "Config"
        kinds[kind] = cls
        return cls

    return register


def kinds(slot: str) -> Mapping[str, type[Any]]:
    """The kinds of one slot, by name."""
    _load()
    if slot in UNIONS:
        return {kind: cls for member in UNIONS[slot] for kind, cls in _tables.get(member, {}).items()}
    return _tables.get(slot, {})


def slots() -> Mapping[str, Mapping[str, type[Any]]]:
    """Every slot with its kinds."""
    _load()
    return _tables


def part_of(config: Config) -> Any:
    """The class that a slot's config builds."""
    return _tables[config.slot][config.kind]


def _load() -> None:
    if not _loaded:
        _loaded.append("loading")
        try:
            for module in PROVIDERS:
                importlib.import_module(module)
        except BaseException:
            _loaded.clear()
            raise


class Slot:
    """Annotation of a config field that any kind of a slot may fill: `Annotated[Config, Slot("norm")]`."""

    def __init__(self, name: str, default: str | None = None) -> None:
        self.name = name
        self.default = default

    def validate(self, value: Any) -> Config:
        """The config of the kind that `value` names; pydantic's errors for whatever is wrong below it."""
        table = kinds(self.name)
        if isinstance(value, Config) and value.kind in table and isinstance(value, table[value.kind].Config):
            return value
        if isinstance(value, str):
            value = {"kind": value}
        if not isinstance(value, Mapping):
            raise PydanticCustomError(
                "slot_type", "should be a kind of {slot} or a map with 'kind'", {"slot": self.name}
            )
        fields = dict(value)
        kind = fields.pop("kind", self.default)
        if kind is None:
            raise PydanticCustomError(
                "slot_kind_missing",
                "needs 'kind', one of: {kinds}",
                {"slot": self.name, "kinds": ", ".join(sorted(table))},
            )
        if not isinstance(kind, str) or kind not in table:
            raise PydanticCustomError(
                "slot_kind_unknown",
                "{slot} has no kind {kind}",
                {"slot": self.name, "kind": repr(kind), "kinds": sorted(table)},
            )
        return table[kind].Config.model_validate(fields)  # type: ignore[no-any-return]

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> core_schema.CoreSchema:
        return core_schema.no_info_plain_validator_function(self.validate)

    def __get_pydantic_json_schema__(self, schema: Any, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return {"x-slot": self.name, "x-default": self.default}


class Kinds:
    """Annotation of a map from kinds of one slot to their fields: `heads: {lm: {tied: true}, nsp: {}}`."""

    def __init__(self, name: str) -> None:
        self.name = name

    def validate(self, value: Any) -> dict[str, Config]:
        """A config for each key; an unknown kind is an unknown key."""
        if not isinstance(value, Mapping):
            raise PydanticCustomError(
                "slot_type", "should be a map from kinds of {slot} to their fields", {"slot": self.name}
            )
        found = _any_of(self.name, tuple(kinds(self.name).items())).model_validate(
            {key: {} if entry is None else entry for key, entry in value.items()}
        )
        return {key: getattr(found, key) for key in value}

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> core_schema.CoreSchema:
        return core_schema.no_info_plain_validator_function(self.validate)

    def __get_pydantic_json_schema__(self, schema: Any, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return {"x-kinds": self.name}


@lru_cache(maxsize=16)
def _any_of(name: str, table: tuple[tuple[str, type[Any]], ...]) -> type[Config]:
    """A config with a field for each kind of a table; made anew when a part has joined it."""
    fields: dict[str, Any] = {kind: (Annotated[Config | None, _OneKind(cls)], None) for kind, cls in table}
    return create_model(name, __base__=Config, **fields)


class _OneKind:
    def __init__(self, cls: type) -> None:
        self.cls = cls

    def validate(self, value: Any) -> Config:
        config: type[Config] = self.cls.Config  # type: ignore[attr-defined]
        if isinstance(value, config):
            return value
        if isinstance(value, Mapping):
            value = {key: entry for key, entry in value.items() if key != "kind" or entry != config.kind}
        return config.model_validate(value)

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> core_schema.CoreSchema:
        return core_schema.no_info_plain_validator_function(self.validate)


def tree(config: Any) -> Any:
    """A config as plain maps, lists and scalars, `kind` first; the inverse of validation."""
    if isinstance(config, Config):
        head = {"kind": config.kind} if config.kind else {}
        return head | {name: tree(getattr(config, name)) for name in type(config).model_fields}
    if isinstance(config, Mapping):
        return {key: tree(value) for key, value in config.items()}
    if isinstance(config, list | tuple):
        return [tree(value) for value in config]
    return config


def find(slot: str, kind: str) -> Any:
    """The class registered as `kind` of `slot`; raises UserError with the nearest name."""
    table = kinds(slot)
    if kind not in table:
        raise refuse(f"{slot} has no kind '{kind}'", did_you_mean(kind, table))
    return table[kind]
