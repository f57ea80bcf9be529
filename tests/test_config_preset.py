"""Layers of a preset: defaults, files that extend files, sizes, --tiny, overrides; where each value came from."""

from __future__ import annotations

from pathlib import Path

import pytest
from base_preset import ATTN, BASE, FFN

from xtcli.config.preset import Preset, load_preset
from xtcli.errors import UserError


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base.yaml").write_text(BASE)
    return Path("base.yaml")


def at(preset: Preset, dotted: str) -> object:
    value: object = preset
    for key in dotted.split("."):
        value = value[key] if isinstance(value, dict) else getattr(value, key)  # type: ignore[index]
    return value


def refused(*args: object, **kwargs: object) -> list[str]:
    with pytest.raises(UserError) as caught:
        load_preset(*args, **kwargs)  # type: ignore[arg-type]
    return str(caught.value).splitlines()


PRECEDENCE = [
    # path, overrides, size, tiny, value, origin
    ("train.batch", [], None, False, 32, "default"),
    ("train.lr", [], None, False, 3e-4, "base.yaml:23:26"),
    ("model.dim", [], None, False, 96, "base.yaml:7:8"),
    ("model.dim", [], "big", False, 192, "size big (base.yaml:20:20)"),
    ("model.dim", [], "big", True, 64, "--tiny"),
    ("model.dim", ["model.dim=48"], "big", True, 48, "override 'model.dim=48'"),
    ("model.dim", ["model.dim=48", "model.dim=24"], None, False, 24, "override 'model.dim=24'"),
    ("model.norm.kind", [], "big", False, "rms", "size big (base.yaml:20:60)"),
    ("model.norm.eps", [], "big", False, 1e-6, "default"),
    (f"{FFN}.act", [], None, True, "relu", "base.yaml:16:44"),
    ("train.lr", [], None, True, 1e-3, "--tiny"),
    ("train.steps", ["train.steps=5"], None, True, 5, "override 'train.steps=5'"),
]


@pytest.mark.parametrize(("path", "overrides", "size", "tiny", "value", "origin"), PRECEDENCE)
def test_later_layers_win_and_say_so(
    base: Path, path: str, overrides: list[str], size: str | None, tiny: bool, value: object, origin: str
) -> None:
    found = load_preset(base, overrides, size=size, tiny=tiny)
    assert at(found.preset, path) == value
    assert str(found.origins[path]) == origin


def test_every_value_has_an_origin_and_a_place(base: Path) -> None:
    found = load_preset(base, ["train.lr=1e-3"], size="big")
    assert found.size == "big" and found.sizes == ("small", "big")
    assert {origin.source for origin in found.origins.values()} == {"default", "preset", "size", "override"}
    assert found.place(f"{ATTN}.heads") == "base.yaml:15:40"
    assert found.place(f"{ATTN}.bias") == "base.yaml:15:15"  # a default: where its node stands
    assert found.place("train.lr") == "override 'train.lr=1e-3'"
    assert found.place("model.dim") == "base.yaml:20:20"
    assert found.place("nothing.at.all") == "base.yaml"


OVERRIDES = [
    ("train.lr=3e-4", "train.lr", 3e-4),
    ("train.betas=[0.8, 0.9]", "train.betas", (0.8, 0.9)),
    ("train.betas.1=0.5", "train.betas", (0.9, 0.5)),
    ("train.clip=null", "train.clip", None),
    ("train.compile=false", "train.compile", False),
    ("train.sample_prompts=[def , class ]", "train.sample_prompts", ("def", "class")),
    ("data=./some/folder", "data.source", "./some/folder"),
    ("data.limit=7", "data.limit", 7),
    ("data.source= two words ", "data.source", " two words "),
    ("data.source='quoted '", "data.source", "quoted "),
    ("model.norm.eps=1e-3", "model.norm.eps", 1e-3),
    ("model.norm.kind=rms", "model.norm.eps", 1e-6),
    ("model.norm=rms", "model.norm.eps", 1e-6),
    ("tokenizer={kind: bytes}", "tokenizer.kind", "bytes"),
    (f"{FFN}.kind=glu", f"{FFN}.hidden", 384),
    ("model.stack.norm.kind=rms", "model.stack.norm.kind", "rms"),
    ("model.heads.lm.bias=true", "model.heads.lm.bias", True),
    ("about.title=1.5 million", "about.title", "1.5 million"),
]


@pytest.mark.parametrize(("override", "path", "value"), OVERRIDES)
def test_overrides_are_yaml_at_a_path(base: Path, override: str, path: str, value: object) -> None:
    assert at(load_preset(base, [override]).preset, path) == value


def test_kind_keeps_its_neighbours_and_a_node_replaces_them(base: Path) -> None:
    kept = load_preset(base, [f"{FFN}.kind=glu"]).preset
    assert at(kept, f"{FFN}.kind") == "glu" and at(kept, f"{FFN}.act") == "relu"
    replaced = load_preset(base, [f"{FFN}={{kind: glu, hidden: 10}}"]).preset
    assert at(replaced, f"{FFN}.act") == "gelu"
    place = f"override '{FFN}.kind=attention'"
    lines = refused(base, [f"{FFN}.kind=attention"])
    assert (
        f"{place}: {FFN}.act: kind 'attention' has no key 'act', which base.yaml:16:39 states; "
        f"replace the whole node: {FFN}={{kind: attention, ...}}" in lines
    )


def test_null_takes_an_entry_out_of_a_map(base: Path) -> None:
    found = load_preset(base, ["model.heads.mlm={}", "model.heads.lm=null"])
    assert list(found.preset.model.heads) == ["mlm"]  # type: ignore[attr-defined]


CHILDREN = [
    # child file, path, value
    ("extends: base\n", "model.dim", 96),
    ("extends: {preset: ./base.yaml, size: big}\n", "model.dim", 192),
    ("extends: ./base.yaml\nmodel: {dim: 48}\n", "model.vocab", 1000),
    ("extends: ./base.yaml\nmodel: {norm: {eps: 1e-3}}\n", "model.norm.kind", "layer"),
    ("extends: ./base.yaml\nmodel: {norm: {kind: rms}}\n", "model.norm.eps", 1e-6),
    ("extends: ./base.yaml\nmodel: {norm: rms}\n", "model.norm.kind", "rms"),
    ("extends: ./base.yaml\nmodel: {heads: {lm: null, mlm: {}}}\n", "model.heads.mlm.act", "gelu"),
    ("extends: ./base.yaml\ndata: ./x\n", "data.source", "./x"),
    ("extends: ./base.yaml\nsizes: {s: {model.dim: 24}}\nsize: s\n", "model.dim", 24),
    ("extends: ./base.yaml\n", "expect.parameters", None),
    ("extends: ./base.yaml\nexpect: {parameters: 7}\n", "expect.parameters", 7),
    ("extends: ./base.yaml\nabout: {title: Child}\n", "about.year", 2019),
    ("extends: ./base.yaml\nabout: {title: Child}\n", "about.title", "Child"),
]


@pytest.mark.parametrize(("text", "path", "value"), CHILDREN)
def test_a_file_states_only_what_differs_from_the_one_it_extends(
    base: Path, text: str, path: str, value: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("xtcli.config.library.folder", lambda: base.parent.absolute())
    Path("child.yaml").write_text("version: 1\n" + text)
    assert at(load_preset("child.yaml").preset, path) == value


def test_problems_of_an_extended_file_stand_at_their_own_place(base: Path) -> None:
    base.write_text(BASE.replace("vocab: 1000", "vocba: 1000"))
    Path("child.yaml").write_text("version: 1\nextends: ./base.yaml\nmodel: {dmi: 3}\n")
    assert refused("child.yaml") == [
        "base.yaml:6:3: model.vocba: unknown key; did you mean 'vocab'?",
        "child.yaml:3:9: model.dmi: unknown key; did you mean 'dim'?",
    ]


BAD_CHILDREN = [
    ("extends: ./child.yaml\n", "child.yaml: extends: extends itself; name another preset"),
    ("extends: gpt2-smal\n", "child.yaml:2:10: extends: there is no preset 'gpt2-smal'; did you mean 'gpt2-small'?"),
    ("extends: ./bse.yaml\n", "child.yaml:2:10: extends: there is no file './bse.yaml'; did you mean './base.yaml'?"),
    (
        "extends: 3\n",
        "child.yaml:2:10: extends: should be a preset's name, a relative path, or {preset: ..., size: ...}",
    ),
    (
        "extends: {preset: ./base.yaml, size: bigg}\n",
        "child.yaml:2:38: extends.size: there is no size 'bigg'; did you mean 'big'?",
    ),
]


@pytest.mark.parametrize(("text", "message"), BAD_CHILDREN)
def test_what_cannot_be_extended_is_refused(base: Path, text: str, message: str) -> None:
    Path("child.yaml").write_text("version: 1\n" + text)
    assert message in refused("child.yaml")


def test_expect_is_that_of_the_size_and_falls_with_a_changed_model(base: Path) -> None:
    counts = {
        (): 11,
        ("train.lr=1",): 11,
        ("model.dim=48",): None,
    }
    for overrides, expected in counts.items():
        assert load_preset(base, overrides).preset.expect.parameters == expected
    assert load_preset(base, size="big").preset.expect.parameters == 22
    assert load_preset(base, tiny=True).preset.expect.parameters is None


@pytest.mark.parametrize("tiny", [False, True])
@pytest.mark.parametrize("size", [None, "big"])
def test_the_resolved_yaml_loads_to_an_equal_preset(base: Path, size: str | None, tiny: bool) -> None:
    found = load_preset(
        base, ["data.source='a: b #'", "train.sample_prompts=['no', \"a\\nb\", '3e-4']"], size=size, tiny=tiny
    )
    Path("run").mkdir()
    Path("run/preset.yaml").write_text(found.to_yaml())
    again = load_preset("run")
    assert again.preset == found.preset
    assert again.name == "run"
    assert again.to_yaml() == found.to_yaml()


VERSIONS = [
    ("version: 2\n", "new.yaml:1:10: version: is version 2, and this xt reads up to version 1; upgrade xt: "),
    ("about: {title: x}\n", "new.yaml: has no 'version'; add the line 'version: 1'"),
    ("version: one\n", "new.yaml:1:10: version: should be a whole number; this xt writes 'version: 1'"),
    ("version: 0\n", "new.yaml:1:10: version: should be a whole number; this xt writes 'version: 1'"),
    ("", "new.yaml: is empty; a preset holds version, about, model, objective, tokenizer"),
    ("- 1\n", "new.yaml: is no map of keys; a preset holds version, about, model, objective, tokenizer"),
]


@pytest.mark.parametrize(("text", "message"), VERSIONS)
def test_a_file_of_another_version_or_none_is_refused_in_one_sentence(base: Path, text: str, message: str) -> None:
    Path("new.yaml").write_text(text)
    lines = refused("new.yaml")
    assert len(lines) == 1 and lines[0].startswith(message)


REFERENCES = [
    ("nothing.yaml", "there is no file 'nothing.yaml'; `xt inspect` lists the presets"),
    ("bass.yaml", "there is no file 'bass.yaml'; did you mean 'base.yaml'?"),
    (
        "elsewhere/gpt2-small.yaml",
        "there is no file 'elsewhere/gpt2-small.yaml'; did you mean the preset 'gpt2-small'?",
    ),
    ("gpt2-smol", "there is no preset 'gpt2-smol'; did you mean 'gpt2-small'?"),
    ("bert", "there is no preset 'bert'; did you mean one of: bert-base, bert-large?"),
    ("zzz", "there is no preset 'zzz'; `xt inspect` lists them; a file's name ends in .yaml"),
    ("hollow", "the folder 'hollow' holds no preset.yaml; name a preset, its file, or a run or checkpoint folder"),
]


@pytest.mark.parametrize(("ref", "message"), REFERENCES)
def test_a_reference_to_nothing_names_the_nearest(base: Path, ref: str, message: str) -> None:
    Path("hollow").mkdir()
    assert refused(ref) == [message]


def test_a_tokenizer_file_lies_beside_its_preset_or_here_for_an_override(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "presets"
    folder.mkdir()
    (folder / "tokenizer.json").write_text("{}")
    (folder / "own.yaml").write_text(
        "version: 1\nextends: gpt2-nano\nabout: {title: Own}\ntokenizer: {kind: file, path: tokenizer.json}\n"
    )
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    stated = load_preset("presets/own.yaml").preset.tokenizer
    named = load_preset("presets/own.yaml", ["tokenizer.path=tokenizer.json"]).preset.tokenizer
    assert stated.path == str(folder / "tokenizer.json")  # type: ignore[attr-defined]
    assert named.path == str(tmp_path / "tokenizer.json")  # type: ignore[attr-defined]
