"""The module tree: what it counts, what it folds, how it is printed."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn

from presets import DISTINCT
from xtcli.config.preset import load_preset
from xtcli.inspect import modules, units
from xtcli.model import construct, count, skeleton
from xtcli.parts.stack import Block
from xtcli.registry import find

PRESETS = DISTINCT

TREE = """\
decoder                                                                                            188,736 parameters
  embed  tokens                                                                                     32,768
    tokens                             (512, 64)                                                    32,768
  stack  blocks                                                                                    123,200
    shared.turns 0  rotary  16, theta=10000.0, half, scaling=none                                        0
    blocks 0-1  (2 x 61,568)                                                                       123,136
      attn  attention  heads=4, kv_heads=2, head_dim=16, scale=0.25, mask causal, position rotary   12,288
        q                              (64, 64)                                                      4,096
        k                              (32, 64)                                                      2,048
        v                              (32, 64)                                                      2,048
        o                              (64, 64)                                                      4,096
      ffn  glu                                                                                      49,152
        up                             (256, 64)                                                    16,384
        down                           (64, 256)                                                    16,384
        gate                           (256, 64)                                                    16,384
      wiring  pre                                                                                      128
        norm.attn  rms  64, eps=1e-05  (64)                                                             64
        norm.ffn  rms  64, eps=1e-05   (64)                                                             64
    norm  rms  64, eps=1e-05           (64)                                                             64
  heads.lm                                                                                          32,768
    decoder                            (512, 64)                                                    32,768"""


def tiny_decoder(**stack: Any) -> nn.Module:
    """A decoder of four layers on the meta device, with these settings of its stack."""
    block = {"sublayers": {"attn": {"kind": "attention", "heads": 2}, "ffn": {"kind": "mlp", "hidden": 8}}}
    config = {"vocab": 11, "dim": 4, "context": 16, "stack": {"layers": 4, "block": block} | stack, "heads": {"lm": {}}}
    return construct(find("graph", "decoder").Config.model_validate(config))  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", PRESETS)
def test_tree_and_components_count_every_parameter_once(name: str) -> None:
    model = skeleton(load_preset(name, tiny=True))
    assert modules.tree(model).total == sum(modules.components(model).values()) == count(model)
    folded = [child for child in _below(modules.tree(model)) if "blocks" in child.name]
    assert sum(node.times for node in folded) == sum(isinstance(module, Block) for module in model.modules())


def _below(node: modules.Node) -> list[modules.Node]:
    return [node, *(found for child in node.children for found in _below(child))]


def test_tree_as_printed() -> None:
    assert "\n".join(modules.lines(modules.tree(skeleton(load_preset("tinyllama-1.1b", tiny=True))))) == TREE


def test_ties_are_said_where_they_are() -> None:
    text = modules.lines(modules.tree(skeleton(load_preset("bert-base", tiny=True))))
    assert [line.split("  ")[1:3] for line in text if "heads.mlm" in line] == [["heads.mlm", "tied to the token table"]]
    assert any(line.split()[-3:] == ["bias", "(512)", "4,800"] for line in text)


def test_shares_as_printed() -> None:
    parts = modules.components(skeleton(load_preset("tinyllama-1.1b", tiny=True)))
    assert "\n".join(modules.share_lines(parts)) == (
        "embedding  32,768  parameters  17.36%\n"
        "attention  24,576  parameters  13.02%\n"
        "ffn        98,304  parameters  52.09%\n"
        "norms         320  parameters   0.17%\n"
        "heads      32,768  parameters  17.36%"
    )


FOLDS = [
    ({}, ["blocks 0-3"]),
    ({"block": None, "pattern": ["a", "b"], "blocks": {"a": ("causal", 8), "b": ({"kind": "window", "left": 2}, 8)}}, ["blocks 0, 2", "blocks 1, 3"]),
    ({"block": None, "pattern": ["a", "a", "a", "b"], "blocks": {"a": ("causal", 8), "b": ("causal", 9)}}, ["blocks 0-2", "blocks 3"]),
]  # fmt: skip


@pytest.mark.parametrize(("stack", "names"), FOLDS, ids=("alike", "masks differ", "widths differ"))
def test_layers_fold_only_where_they_are_equal(stack: dict[str, Any], names: list[str]) -> None:
    if "blocks" in stack:
        stack = stack | {"blocks": {key: _block(*value) for key, value in stack["blocks"].items()}}
    found = [node for node in _below(modules.tree(tiny_decoder(**stack))) if node.name.startswith("blocks")]  # type: ignore[arg-type]
    assert [node.name for node in found] == names


def _block(mask: Any, hidden: int) -> dict[str, Any]:
    return {
        "sublayers": {"attn": {"kind": "attention", "heads": 2, "mask": mask}, "ffn": {"kind": "mlp", "hidden": hidden}}
    }


def test_layers_that_differ_in_a_figure_alone_fold_and_show_its_range() -> None:
    attn = {"kind": "attention", "heads": 2, "scale": 2.0, "scale_by_depth": True}
    model = tiny_decoder(block={"sublayers": {"attn": attn}})
    (attention,) = [node for node in _below(modules.tree(model)) if node.kind == "attention"]  # type: ignore[arg-type]
    assert "scale=2 .. 0.5" in attention.detail


def test_a_tensor_that_two_modules_share_counts_where_it_stands_first() -> None:
    model = tiny_decoder()
    before = count(model)
    model.stack.blocks[1].ffn.up.weight = model.stack.blocks[0].ffn.up.weight  # type: ignore[union-attr, index]
    node = modules.tree(model)  # type: ignore[arg-type]
    assert node.total == sum(modules.components(model).values()) == before - 32  # type: ignore[arg-type]
    assert [child.tied for child in _below(node) if child.tied] == [("weight",)]


@pytest.mark.parametrize(
    "numbers, text", [([0], "0"), ([0, 1, 2], "0-2"), ([0, 1, 3], "0-1, 3"), ([1, 3, 5, 7], "1, 3 .. 7")]
)
def test_spans(numbers: list[int], text: str) -> None:
    assert units.spans(numbers) == text
