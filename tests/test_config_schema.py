"""presets/schema.json: it is what the code says, and editors that check against it agree with xt."""

from __future__ import annotations

import copy
from typing import Any

import jsonschema
import pytest

from xtcli.config import library
from xtcli.config.document import parse, read
from xtcli.config.schema import preset_schema, preset_schema_text

SCHEMA = preset_schema()
VALIDATOR = jsonschema.Draft7Validator(SCHEMA)


def test_the_file_is_what_the_code_says() -> None:
    file = library.folder() / "schema.json"
    assert file.read_text(encoding="utf-8") == preset_schema_text(), "run `make schema`"


def test_it_is_a_schema() -> None:
    jsonschema.Draft7Validator.check_schema(SCHEMA)


@pytest.mark.parametrize("name", library.names())
def test_every_preset_satisfies_it_and_points_to_it(name: str) -> None:
    file = library.folder() / f"{name}.yaml"
    assert file.read_text().startswith("# yaml-language-server: $schema=./schema.json\n")
    assert [error.message for error in VALIDATOR.iter_errors(read(file).tree)] == []


GOOD = [
    "model: {norm: rms}",
    "model: {kind: decoder, norm: {kind: rms, eps: 1e-6}}",
    "model: {kind: decoder, heads: {lm: , mlm: {act: gelu}}}",
    "data: ./folder",
    "data: {source: ./folder, validation: 0.1}",
    "data: {validation: ./held-out}",
    "train: {compile: auto, betas: [0.9, 0.95], clip: null}",
    "extends: {preset: gpt2-small, size: medium}",
    "sizes: {small: {}, big: {model.dim: 3, model.stack.layers: 2}}",
    "expect: {parameters: {small: 3}}",
    "objective: clm",
]
BAD = [
    "modle: {}",
    "model: {kind: decodr}",
    "model: {kind: decoder, dmi: 3}",
    "model: {kind: decoder, norm: {kind: rms, esp: 1e-6}}",
    "model: {kind: decoder, heads: {ml: {}}}",
    "model: {kind: decoder, dim: -1}",
    "train: {lr: fast}",
    "train: {schedule: cosin}",
    "train: {compile: maybe}",
    "sizes: {small: {model..dim: 3}}",
    "data: 3",
]


@pytest.mark.parametrize("text", GOOD)
def test_what_a_file_may_hold_is_accepted(text: str) -> None:
    assert [error.message for error in VALIDATOR.iter_errors(parse(text, "f").tree)] == []


@pytest.mark.parametrize("text", BAD)
def test_what_xt_refuses_is_refused(text: str) -> None:
    assert not VALIDATOR.is_valid(parse(text, "f").tree)


def fields(schema: Any, path: str = "") -> Any:
    if isinstance(schema, dict):
        for key, value in schema.get("properties", {}).items():
            if key != "kind":
                yield f"{path}.{key}", value
        for key, value in schema.items():
            yield from fields(value, f"{path}/{key}")
    elif isinstance(schema, list):
        for item in schema:
            yield from fields(item, path)


def test_every_field_of_every_kind_says_what_it_means() -> None:
    silent = [
        path for path, field in fields(copy.deepcopy(SCHEMA)) if "description" not in field and "/kinds." not in path
    ]
    assert silent == []
