"""Two presets side by side, and the catalogue of parts: what is said, in exact words."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Annotated, Any, Literal

import pytest

from presets import DISTINCT
from xtcli.config.preset import load_preset
from xtcli.errors import UserError
from xtcli.inspect import catalogue, compare
from xtcli.model import count, skeleton
from xtcli.registry import UNIONS, Config, Kinds, Slot, field, slots

LLAMA = """\
model: vocab 50,257 -> 32,000; dim 768 -> 2,048; context 1,024 -> 2,048; dropout 0.1 -> 0.0
model.norm: layer -> rms
model.init: residual true -> false
model.heads.lm: tied true -> false
model.embed: segments tokens -> null
model.embed.positions: learned -> none
model.stack: 12 -> 22 layers
model.stack.block.sublayers.attn: 12 heads -> 32 heads over 4 key/value heads; bias true -> false
model.stack.block.sublayers.ffn: mlp -> glu; hidden 3,072 -> 5,632; act gelu_tanh -> silu; bias true -> false
model.stack.position: none -> rotary"""

BERT = """\
model: decoder -> encoder; vocab 50,257 -> 30,522; context 1,024 -> 512; pad null -> 0
model.norm: eps 1e-5 -> 1e-12
model.init: residual true -> false
model.heads.lm: lm -> absent
model.heads.mlm: absent -> mlm(output prediction_logits)
model.heads.nsp: absent -> nsp
model.embed: segments tokens -> 2
model.embed.norm: none -> inherit
model.stack.block.wiring: pre -> post
model.stack.block.sublayers.ffn: act gelu_tanh -> gelu
model.stack.norm: inherit -> none
model.pooler: absent -> present"""

WORDS = [
    (("gpt2-small",), ("tinyllama-1.1b",), LLAMA),
    (("gpt2-small",), ("bert-base",), BERT),
    (("gpt2-small",), ("gpt2-small", "train.steps=7"), "train: 600,000 -> 7 steps"),
    (("gpt2-small",), ("gpt2-small", "model.stack.position.kind=rotary"), "model.stack.position: none -> rotary"),
    (
        ("gpt2-small", "model.stack.position={kind: rotary, theta: 5}"),
        ("gpt2-small", "model.stack.position=alibi"),
        "model.stack.position: rotary -> alibi; theta 5.0 -> absent",
    ),
    (("llama-7b",), ("llama-7b",), ""),
    (("llama-7b",), ("llama-7b", "model.stack.block.sublayers.attn.kv_heads=32"), ""),
]


@pytest.mark.parametrize(("a", "b", "words"), WORDS, ids=lambda value: " ".join(value)[:30])
def test_differences_in_words(a: tuple[str, ...], b: tuple[str, ...], words: str) -> None:
    found = compare.differences(*(load_preset(ref, overrides) for ref, *overrides in (a, b)))
    wanted = words.split(": ")[0].split(".")[0]
    assert "\n".join(str(item) for item in found if item.path.split(".")[0] == wanted or not words) == words


@pytest.mark.parametrize("name", DISTINCT)
def test_a_preset_does_not_differ_from_itself_and_differs_from_its_tiny_self(name: str) -> None:
    plain, small = load_preset(name), load_preset(name, tiny=True)
    assert compare.differences(plain, plain) == []
    there, back = compare.differences(plain, small), compare.differences(small, plain)
    assert [(item.before, item.after) for item in there] == [(item.after, item.before) for item in back] != []


SIDES = """\
                            tinyllama-1.1b         gpt2-small
parameters                         188,736            141,056  x 0.7474
  embedding                         32,768             40,960    x 1.25
  attention                         24,576             33,280   x 1.354
  ffn                               98,304             66,176  x 0.6732
  norms                                320                640       x 2
  heads                             32,768                  0
FLOPs per token, forward       327.7 kFLOP        278.5 kFLOP    x 0.85
FLOPs per token, training        983 kFLOP        835.6 kFLOP    x 0.85
weights, fp32                    737.2 KiB          551.0 KiB  x 0.7474
state per token, fp32                512 B  1,024 B (1.0 KiB)       x 2
"""


def test_costs_side_by_side() -> None:
    both = compare.sides(*(load_preset(name, tiny=True) for name in ("tinyllama-1.1b", "gpt2-small")), length=32)
    text = "\n".join(compare.side_lines(*both))
    assert text.startswith(SIDES) and text.endswith("\ncosts of 1 text of 32 tokens")
    facts = json.loads(json.dumps(compare.facts([], both)))
    assert [side["costs"]["memory_bytes"]["bf16"]["state_per_token"] for side in facts["sides"]] == [256, 512]


def test_both_are_measured_at_the_shorter_of_their_lengths() -> None:
    both = compare.sides(
        load_preset("gpt2-small", ["train.context=64"], tiny=True), load_preset("gpt2-nano", tiny=True)
    )
    assert {side.costs.length for side in both} == {64}
    assert both[0].parameters == count(skeleton(load_preset("gpt2-small", tiny=True)))


def test_the_catalogue_has_every_kind_with_its_meaning() -> None:
    found = catalogue.catalogue()
    assert {slot: {kind.name for kind in kinds} for slot, kinds in found.items()} == {
        slot: set(table) for slot, table in slots().items()
    }
    for kind in _kinds(found):
        assert kind.doc, kind
        assert all(item.meaning and item.type and "value" not in item.type for item in kind.fields), kind
    json.dumps(catalogue.facts(found))
    assert {kind.name for kind in catalogue.catalogue("sublayer")["sublayer"]} == {
        kind for slot in UNIONS["sublayer"] for kind in slots()[slot]
    }


def _kinds(found: dict[str, list[catalogue.Kind]]) -> Iterator[catalogue.Kind]:
    for kinds in found.values():
        yield from kinds


ONE = """\
norm: rms
  Root mean square over the last axis, then gain.
  field   type        default  meaning
  eps     number > 0  1e-6     added to the mean square
  offset  number      0.0      added to the stored gain before it multiplies"""

MASK = """\
mask: window
  A band around the query.
  field     type      default         meaning
  left      int >= 0  must be stated  slots before the query
  right     int >= 0  0               slots after the query
  dilation  int >= 1  1               only every n-th slot of the band"""


@pytest.mark.parametrize(("path", "text"), [("norm.rms", ONE), ("mask.window", MASK)])
def test_one_kind_as_printed(path: str, text: str) -> None:
    assert "\n".join(catalogue.lines(catalogue.catalogue(path), 100, whole=True)) == text


def test_a_slot_is_printed_within_the_width() -> None:
    for whole in (False, True):
        text = catalogue.lines(catalogue.catalogue(), 140, whole)
        assert max(map(len, text)) <= 140


def test_nested_nodes_are_listed_with_their_paths() -> None:
    (kind,) = catalogue.catalogue("graph.decoder")["graph"]
    names = {item.name: item for item in kind.fields}
    assert names["pooler.act"].default == "tanh"
    (kind,) = catalogue.catalogue("stack.blocks")["stack"]
    names = {item.name: item for item in kind.fields}
    assert names["layers"].type == "int > 0" and names["layers"].default is None
    assert names["block.wiring"].default == "pre" and names["block.wiring"].type == "a kind of wiring"


class Inner(Config):
    a: int = field("a")


TYPES: list[tuple[Any, str]] = [
    (int, "int"),
    (float | None, "number or null"),
    (Literal["a", "b"], "a or b"),
    (float | Literal["sqrt"], "number or sqrt"),
    (tuple[float, ...], "list of number"),
    (tuple[float, float], "list of number"),
    (dict[str, bool], "map from text to true or false"),
    (Annotated[Config, Slot("norm")], "a kind of norm"),
    (Annotated[dict[str, Config], Kinds("head")], "map from kinds of head"),
    (Inner | None, "map or null"),
]


@pytest.mark.parametrize(("annotation", "words"), TYPES, ids=lambda value: str(value)[:30])
def test_types_in_words(annotation: Any, words: str) -> None:
    assert catalogue.spell(annotation) == words


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("nrom", "there is no slot 'nrom'; did you mean 'norm'?"),
        ("rms", "there is no slot 'rms'; 'rms' is a kind: write norm.rms"),
        ("norm.rmss", "norm has no kind 'rmss'; did you mean 'rms'?"),
    ],
)
def test_unknown_parts_are_refused(path: str, message: str) -> None:
    with pytest.raises(UserError) as refused:
        catalogue.catalogue(path)
    assert str(refused.value) == message
