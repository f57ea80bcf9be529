"""Mistakes in presets and overrides: all at once, each with its place, its path, a cause and the right name."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from base_preset import ATTN, BASE, FFN

from presets import DISTINCT
from xtcli.config import library
from xtcli.config.document import Path as TreePath
from xtcli.config.document import parse, read
from xtcli.config.emit import dump
from xtcli.config.preset import PresetFile, load_preset
from xtcli.config.shape import walk
from xtcli.errors import UserError


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def refused(text: str, *overrides: str, **options: Any) -> list[str]:
    Path("p.yaml").write_text(text)
    with pytest.raises(UserError) as caught:
        load_preset("p.yaml", overrides, **options)
    return str(caught.value).splitlines()


# what stands in BASE, what replaces it, the whole message
EDITS = [
    ("heads: 6", "heads: 12.5", "p.yaml:15:40: {attn}.heads: should be a whole number, not 12.5"),
    ("heads: 6", "heads: 6.0", "p.yaml:15:40: {attn}.heads: should be a whole number, not 6.0; did you mean 6?"),
    ("heads: 6", "heads: '6'", "p.yaml:15:40: {attn}.heads: should be a whole number, not the text '6'; remove the quotes"),
    ("heads: 6", "heads: 0", "p.yaml:15:40: {attn}.heads: should be greater than 0, not 0"),
    ("heads: 6", "heads: true", "p.yaml:15:40: {attn}.heads: should be a whole number, not true"),
    ("heads: 6", "heads: six", "p.yaml:15:40: {attn}.heads: should be a whole number, not the text 'six'"),
    ("heads: 6", "head: 6", "p.yaml:15:33: {attn}.head: unknown key; did you mean 'heads'?"),
    ("heads: 6", "heads: 6, bias: no", "p.yaml:15:49: {attn}.bias: should be true or false, not the text 'no'; did you mean false?"),
    ("heads: 6", "heads: 6, bias: ture", "p.yaml:15:49: {attn}.bias: should be true or false, not the text 'ture'; did you mean true?"),
    ("heads: 6", "heads: 6, mask: 3", "p.yaml:15:49: {attn}.mask: should be a kind of mask or a map with 'kind', not 3"),
    ("lr: 3e-4", "lr: fast", "p.yaml:23:26: train.lr: should be a number, not the text 'fast'"),
    ("lr: 3e-4", "lr: '3e-4'", "p.yaml:23:26: train.lr: should be a number, not the text '3e-4'; remove the quotes"),
    ("lr: 3e-4", "learning_rate: 3e-4", "p.yaml:23:22: train.learning_rate: unknown key; did you mean 'lr'?"),
    ("lr: 3e-4", "betas: 0.9", "p.yaml:23:29: train.betas: should be a list, not 0.9"),
    ("lr: 3e-4", "betas: [0.9]", "p.yaml:23:29: train.betas: is a list that ends too early; entry 2 is missing"),
    ("lr: 3e-4", "betas: [0.9, 1.5]", "p.yaml:23:35: train.betas.1: should be less than 1, not 1.5"),
    ("lr: 3e-4", "compile: no", "p.yaml:23:31: train.compile: should be 'auto' or true or false, not the text 'no'; did you mean false?"),
    ("lr: 3e-4", "schedule: cosin", "p.yaml:23:32: train.schedule: should be 'cosine', 'linear', 'wsd', 'inverse-sqrt' or 'constant', not the text 'cosin'; did you mean 'cosine'?"),
    ("lr: 3e-4", "sample_prompts: def", "p.yaml:23:38: train.sample_prompts: should be a list, not the text 'def'; write [def]"),
    ("year: 2019", "zzz: 2019", "p.yaml:2:22: about.zzz: unknown key; known: title, paper, year, url, new"),
    ("year: 2019", "year: '2019'", "p.yaml:2:28: about.year: should be a whole number, not the text '2019'; remove the quotes"),
    ("title: Base", "title: 7", "p.yaml:2:16: about.title: should be text, not 7; quote it: '7'"),
    ("title: Base", "title: ''", "p.yaml:2:16: about.title: is an empty text; give it a value"),
    ("title: Base, ", "", "p.yaml:2:8: about: has no 'title' (name of the architecture, as people know it); add title: ..."),
    ("kind: layer", "kind: layr", "p.yaml:9:16: model.norm: there is no kind of norm named 'layr'; did you mean 'layer'?"),
    ("kind: layer", "knid: layer", "p.yaml:9:9: model.norm: unknown key 'knid'; did you mean 'kind'?"),
    ("attn: {kind", "atn: {kind", "p.yaml:15:9: model.stack.block.sublayers.atn: unknown key; did you mean 'attn'?"),
    ("lm: {tied", "lmn: {tied", "p.yaml:17:11: model.heads.lmn: unknown key; did you mean 'lm'?"),
    ("tokenizer: bytes", "tokenizer: byts", "p.yaml:22:12: tokenizer: there is no kind of tokenizer named 'byts'; did you mean 'bytes'?"),
    ("objective: clm", "objectiv: clm", "p.yaml:21:1: objectiv: unknown key; did you mean 'objective'?"),
    ("size: small", "szie: small", "p.yaml:3:1: szie: unknown key; did you mean 'size'?"),
    ("size: small", "size: smal", "p.yaml:3:7: size: there is no size 'smal'; did you mean 'small'?"),
    ("small: 11", "smal: 11", "p.yaml:24:23: expect.parameters.smal: there is no size 'smal'; did you mean 'small'?"),
    ("small: 11", "small: -1", "p.yaml:24:30: expect.parameters.small: should be greater than 0, not -1"),
    ("model.dim: 192", "model.dmi: 192", "p.yaml:20:9: sizes.big.model.dmi: unknown key; did you mean 'dim'?"),
    ("model.dim: 192", "model.dim: wide", "p.yaml:20:20: sizes.big.model.dim: should be a whole number, not the text 'wide'"),
    ("model.dim: 192", "model.dim.x: 1", "p.yaml:20:9: sizes.big.model.dim.x: 'model.dim' is one value and has no keys below it; write model.dim=..."),
    ("vocab: 1000", "vocab: 01000", "p.yaml:6:10: 01000 starts with a zero, which some read as octal; write 1000, or quote it if it is text"),
    ("vocab: 1000", "vocab: 1000\n  vocab: 1000", "p.yaml:7:3: model.vocab: stands twice in one map; the first is on line 6; keep one"),
]  # fmt: skip


@pytest.mark.parametrize(("before", "after", "message"), EDITS, ids=lambda text: str(text)[:30])
def test_one_mistake_gives_one_sentence(before: str, after: str, message: str) -> None:
    assert BASE.count(before) == 1
    assert refused(BASE.replace(before, after)) == [message.format(attn=ATTN, ffn=FFN)]


OVERRIDES = [
    ("a.b", "is no override; write a.b=value"),
    ("=3", "has no key before '='; write a.b=value"),
    ("a..b=3", "has an empty key; write a.b=value"),
    ("train.lr=", "has no value; write train.lr=null for none, train.lr='\"\"' for an empty text"),
    ("train.lr=#", "has no value; write train.lr=null for none, train.lr='\"\"' for an empty text"),
    ("train.lr=[1", "train.lr: is not YAML: expected ',' or ']', but got '<stream end>'; quote the value if it is text"),
    ("train.lr=fast", "train.lr: should be a number, not the text 'fast'"),
    ("train.steps=010", "train.steps: 010 starts with a zero, which some read as octal; write 10, or quote it if it is text"),
    ("lr=3", "lr: unknown key; did you mean 'train.lr'?"),
    ("layers=3", "layers: unknown key; did you mean 'model.stack.layers'?"),
    ("learning_rate=3", "learning_rate: unknown key; did you mean 'train.lr'?"),
    ("modle.dim=3", "modle.dim: unknown key; did you mean 'model.dim'?"),
    ("model.stak.layers=3", "model.stak.layers: unknown key; did you mean 'model.stack.layers'?"),
    ("model.dmi=3", "model.dmi: unknown key; did you mean 'model.dim'?"),
    ("data.limt=3", "data.limt: unknown key; did you mean 'data.limit'?"),
    ("model.dim.x=3", "model.dim.x: 'model.dim' is one value and has no keys below it; write model.dim=..."),
    ("train.betas.2=3", "train.betas.2: 'train.betas' is a list of 2; its entries are train.betas.0 to train.betas.1"),
    ("train.betas.x=3", "train.betas.x: 'train.betas' is a list of 2; its entries are train.betas.0 to train.betas.1"),
    ("train.sample_prompts.0=x", "train.sample_prompts.0: 'train.sample_prompts' is a list of 0; write train.sample_prompts=[...]"),
    ("model.norm.esp=3", "model.norm.esp: unknown key; did you mean 'model.norm.eps'?"),
    (f"{ATTN}.haeds=3", f"{ATTN}.haeds: unknown key; did you mean '{ATTN}.heads'?"),
    ("model.stack.block.sublayers.atn.heads=3", f"model.stack.block.sublayers.atn.heads: unknown key; did you mean '{ATTN}.heads'?"),
    ("model.norm=layr", "model.norm: there is no kind of norm named 'layr'; did you mean 'layer'?"),
    ("size=big", "size: is set by the preset file alone; use --size big"),
    ("extends=x", "extends: is set by the preset file alone; write a preset file of your own"),
]  # fmt: skip


@pytest.mark.parametrize(("override", "message"), OVERRIDES)
def test_a_wrong_override_names_the_nearest_path(override: str, message: str) -> None:
    assert refused(BASE, override) == [f"override '{override}': {message}"]


def test_everything_wrong_is_said_at_once_in_the_order_of_the_file() -> None:
    text = BASE
    for before, after in (
        ("title: Base", "titel: Base"),
        ("vocab: 1000", "vocab: many"),
        ("kind: layer", "kind: layr"),
        ("heads: 6", "heads: 6, bais: true"),
        ("act: relu", "act: rleu"),
        ("model.norm: rms", "model.norm: rmz"),
        ("tokenizer: bytes", "tokenizer: bites"),
        ("lr: 3e-4", "lr: fast, stpes: 3"),
        ("expect:", "expct:"),
    ):
        text = text.replace(before, after)
    lines = refused(text, "train.batch=0", "modle.dim=3", size="bigg")
    assert [line.split(": ")[0] for line in lines] == [
        "p.yaml:2:9",
        "p.yaml:6:10",
        "p.yaml:9:16",
        "p.yaml:15:43",
        "p.yaml:16:44",
        "p.yaml:20:60",
        "p.yaml:22:12",
        "p.yaml:23:26",
        "p.yaml:23:32",
        "p.yaml:24:1",
        "--size",
        "override 'train.batch=0'",
        "override 'modle.dim=3'",
    ]


def test_nothing_of_pydantic_shows() -> None:
    text = "version: 1\nabout: 3\nmodel: []\nobjective: {kind: [1]}\ntokenizer:\ndata: [1]\ntrain: 7\nexpect: {parameters: [1]}\n"
    for line in refused(text):
        assert re.match(r"p\.yaml:\d+:\d+: \w+(\.\w+)*: (should be|there is|has no)", line), line
        assert not re.search(r"[Ii]nput|valid|permitted|instance|dictionary|Field required", line), line


# every key of every preset, misspelt


def keys(text: str, name: str) -> Iterator[tuple[TreePath, str]]:
    """Every key of a preset that some type knows: those of maps that take any name are no misspelling."""
    shapes = walk(PresetFile, parse(text, name).tree)
    for path in shapes:
        parent = shapes.get(path[:-1])
        if path and parent is not None and isinstance(path[-1], str) and parent.keys:
            yield path, str(path[-1])


def misspelt(key: str) -> str:
    """One letter off: two letters swapped where they differ, else one doubled."""
    middle = max(1, len(key) // 2)
    for i in (*range(middle, len(key)), *range(1, middle)):
        if key[i - 1] != key[i]:
            return key[: i - 1] + key[i] + key[i - 1] + key[i + 1 :]
    return key + key[-1]


def renamed(tree: Any, path: TreePath, name: str) -> Any:
    if not path:
        return tree
    if len(path) == 1:
        return {name if key == path[0] else key: value for key, value in tree.items()}
    if isinstance(tree, list):
        return [renamed(item, path[1:], name) if i == path[0] else item for i, item in enumerate(tree)]
    return {key: renamed(value, path[1:], name) if key == path[0] else value for key, value in tree.items()}


@pytest.mark.parametrize("name", DISTINCT)
def test_every_misspelt_key_of_a_preset_is_refused_with_the_right_name(name: str) -> None:
    text = (library.folder() / f"{name}.yaml").read_text()
    tree = read(library.folder() / f"{name}.yaml").tree
    total, right = 0, 0
    for path, key in keys(text, name):
        wrong = misspelt(key)
        lines = refused(dump(renamed(tree, path, wrong)))
        total += 1
        right += f"did you mean '{key}'?" in lines[0] and wrong in lines[0]
    assert total > 5
    assert right >= 0.95 * total


@pytest.mark.parametrize("name", DISTINCT)
def test_every_misspelt_override_is_refused_with_the_right_path(name: str) -> None:
    found = load_preset(name)
    paths = [path for path in found.origins if not path.startswith(("version", "about", "expect"))]
    total, right = 0, 0
    for dotted in paths[:: max(1, len(paths) // 25)]:
        *head, key = dotted.split(".")
        wrong = ".".join([*head, misspelt(key)])
        with pytest.raises(UserError) as caught:
            load_preset(name, [f"{wrong}=1"])
        total += 1
        right += f"did you mean '{dotted}'?" in str(caught.value)
    assert right >= 0.95 * total
