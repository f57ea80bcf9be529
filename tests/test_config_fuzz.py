"""Whatever stands in a preset or an override: it loads, or it is refused in words; nothing else is ever raised."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from base_preset import BASE
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from xtcli.config.document import parse
from xtcli.config.emit import dump
from xtcli.config.preset import load_preset
from xtcli.errors import UserError

TREE = parse(BASE, "p.yaml").tree
WORDS = st.sampled_from(
    ["kind", "layer", "rms", "attention", "glu", "auto", "no", "", "null", "model.dim", "small", "clm"]
)
JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | WORDS | st.text(max_size=5),
    lambda below: st.lists(below, max_size=3) | st.dictionaries(WORDS | st.text(max_size=5), below, max_size=3),
    max_leaves=5,
)


def paths(tree: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    below = tree.items() if isinstance(tree, dict) else ()
    return [path] * bool(path) + [deep for key, value in below for deep in paths(value, (*path, key))]


def put(tree: Any, path: tuple[Any, ...], value: Any) -> Any:
    if not path or not isinstance(tree, dict):
        return value
    return tree | {path[0]: put(tree.get(path[0], {}), path[1:], value)}


PATHS = paths(TREE)
FUZZ = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def load(text: str, *overrides: str, **options: Any) -> None:
    Path("p.yaml").write_text(text, encoding="utf-8", errors="surrogatepass")
    try:
        found = load_preset("p.yaml", overrides, **options)
    except UserError as error:
        assert error.problems
        assert all(problem.cause and (problem.place or problem.path) for problem in error.problems)
    else:
        assert set(found.origins) and found.to_yaml()


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@FUZZ
@given(
    st.lists(st.tuples(st.sampled_from(PATHS), JUNK), min_size=1, max_size=3),
    st.sampled_from([None, "small", "big"]),
    st.booleans(),
)
def test_any_value_anywhere_in_a_file(changes: list[tuple[Any, Any]], size: str | None, tiny: bool) -> None:
    tree = TREE
    for path, value in changes:
        tree = put(tree, path, value)
    load(dump(tree), size=size, tiny=tiny)


@FUZZ
@given(st.sampled_from(PATHS), JUNK, st.text(max_size=6), st.booleans())
def test_any_override(path: tuple[Any, ...], value: Any, tail: str, tiny: bool) -> None:
    dotted = ".".join(path)
    load(BASE, f"{dotted}={dump({'x': value})[2:].strip()}", f"{dotted}{tail}", f"{dotted}.{tail}={tail}", tiny=tiny)


@FUZZ
@given(st.integers(0, len(BASE)), st.integers(0, 30), st.text(max_size=6))
def test_any_damage_to_the_text(start: int, length: int, text: str) -> None:
    load(BASE[:start] + text + BASE[start + length :])
