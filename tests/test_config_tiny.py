"""--tiny: every preset as a small model of the same structure, and what an override states stays."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Self

import pytest
from pydantic import Strict

from presets import NAMES
from xtcli.config.preset import load_preset
from xtcli.config.tiny import tiny
from xtcli.model import build, count
from xtcli.registry import Config, field, tree


class Leaf(Config):
    width: int = field("width", 100, tiny=8)
    free: int = field("uncapped", 100)
    maybe: int | None = field("capped where it is a number", None, tiny=2)
    rate: float = field("a float", 0.5, tiny=1)
    widths: Annotated[tuple[int, ...], Strict(False)] = field("several", (4, 100), tiny=8)


class Grouped(Config):
    """Keeps the ratio of queries to keys."""

    queries: int = field("queries", 32, tiny=4)
    keys: int = field("keys", 8, tiny=4)
    leaf: Leaf = field("below", Leaf())

    def tiny(self) -> Self:
        return self.model_copy(update={"keys": max(1, 4 * self.keys // self.queries)})


class Root(Config):
    nodes: Mapping[str, Leaf] = field("by name", {"a": Leaf(), "b": Leaf(width=3, maybe=9)})
    listed: Annotated[tuple[Leaf, ...], Strict(False)] = field("in order", (Leaf(),))
    grouped: Grouped = field("several fields at once", Grouped())


def test_caps_reach_every_node_and_null_stays_null() -> None:
    small = tiny(Root())
    assert small.nodes["a"] == Leaf(width=8, widths=(4, 8))
    assert small.nodes["b"] == Leaf(width=3, maybe=2, widths=(4, 8))
    assert small.listed == (Leaf(width=8, widths=(4, 8)),)
    assert type(small.nodes["a"].rate) is float


def test_a_tiny_method_takes_precedence_over_caps_and_its_children_shrink() -> None:
    small = tiny(Root()).grouped
    assert (small.queries, small.keys) == (4, 1)
    assert small.leaf.width == 8


def test_tiny_of_tiny_is_itself() -> None:
    assert tiny(tiny(Root())) == tiny(Root())


def kinds(node: Any) -> Any:
    """The structure of a config tree: its keys and kinds, no numbers."""
    if isinstance(node, dict):
        return {key: value if key == "kind" else kinds(value) for key, value in node.items()}
    return [kinds(item) for item in node] if isinstance(node, list) else None


@pytest.mark.parametrize("name", NAMES)
def test_every_preset_shrinks_to_a_small_model_of_the_same_structure(name: str) -> None:
    whole, small = load_preset(name), load_preset(name, tiny=True)
    for section in ("model", "objective", "tokenizer"):
        assert kinds(tree(getattr(whole.preset, section))) == kinds(tree(getattr(small.preset, section)))
    assert count(build(small, device="meta")) < 2_000_000
    assert small.preset.train.steps <= 200 and small.preset.train.batch <= 8
    assert small.preset.train.context is not None and small.preset.train.context <= 64
    assert small.preset.data.limit is not None
    vocab = getattr(small.preset.tokenizer, "vocab", 0)
    assert vocab <= small.preset.model.vocab <= 512  # type: ignore[attr-defined]
    assert {str(origin) for origin in small.origins.values()} >= {"--tiny", "default"}


def test_what_an_override_states_is_not_shrunk() -> None:
    found = load_preset("gpt2-small", ["model.dim=128", "train.steps=900", "data.limit=5000"], tiny=True)
    assert found.preset.model.dim == 128  # type: ignore[attr-defined]
    assert found.preset.train.steps == 900
    assert found.preset.data.limit == 5000


def test_a_node_that_an_override_brings_shrinks_where_the_override_is_silent() -> None:
    path = "model.stack.block.sublayers.ffn"
    found = load_preset("gpt2-small", [f"{path}={{kind: glu, hidden: 4000}}"], tiny=True)
    assert found.origins[f"{path}.hidden"].source == "override"
    found = load_preset("gpt2-small", [f"{path}.kind=glu"], tiny=True)
    assert tree(found.preset.model)["stack"]["block"]["sublayers"]["ffn"]["hidden"] < 4000


def test_the_vocabulary_of_a_given_tokenizer_is_kept(tmp_path: Path) -> None:
    found = load_preset("gpt2-small", ["tokenizer={kind: file, path: tokenizer.json}"], tiny=True)
    assert found.preset.model.vocab == 50257  # type: ignore[attr-defined]
