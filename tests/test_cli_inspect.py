"""xt inspect and xt build: what they print, and that they never overwrite."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from base_preset import BASE
from typer.testing import CliRunner

from xtcli import cli
from xtcli.config import library
from xtcli.config.preset import load_preset
from xtcli.errors import UserError


@pytest.fixture(autouse=True)
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").write_text(BASE.replace("expect: {parameters: {small: 11, big: 22}}\n", ""))
    return tmp_path


def xt(*words: str) -> tuple[str, str]:
    """stdout and stderr of a command that must not fail."""
    done = CliRunner().invoke(cli.app, list(words), catch_exceptions=False)
    assert done.exit_code == 0
    return done.stdout, done.stderr


def refused(*words: str) -> str:
    done = CliRunner().invoke(cli.app, list(words))
    assert isinstance(done.exception, UserError)
    assert done.stdout == ""
    return str(done.exception)


def test_the_list_has_every_preset_with_what_is_new() -> None:
    out, err = xt("inspect")
    assert [line.split()[0] for line in out.splitlines()] == library.names()
    assert all(len(line.split()) > 4 for line in out.splitlines())
    assert err == f"next: xt inspect {library.names()[0]}\n"
    rows = json.loads(xt("inspect", "--json")[0])
    assert [row["name"] for row in rows] == library.names()
    assert all(row["title"] and row["year"] and row["paper"] for row in rows)


OUTLINE = """\
Base (mine, size small)
  other sizes: big

model: decoder  vocab 1000, dim 48, context 256
  norm: layer  eps 1e-6
  heads
    lm  tied true
  embed: tokens
    positions: learned
  stack: blocks  layers 6
    block
      sublayers
        attn: attention  heads 6
        ffn: mlp  hidden 384, act relu
objective: clm
tokenizer: bytes
data
train  steps 1000, lr 0.0003

341,760 parameters
"""


def test_a_preset_is_shown_with_what_it_states_and_its_parameters() -> None:
    out, err = xt("inspect", "mine.yaml", "model.dim=48")
    assert out.startswith(OUTLINE)
    assert err == "next: xt train mine.yaml model.dim=48 --dry-run\n"


def test_published_counts_are_compared() -> None:
    assert xt("inspect", "gpt2-small")[0].count("\n124,439,808 parameters, as published\n") == 1
    Path("wrong.yaml").write_text(BASE)
    assert xt("inspect", "wrong.yaml")[0].count(" parameters, but 11 were published\n") == 1


def test_resolved_is_the_whole_yaml_with_origins() -> None:
    out, _ = xt("inspect", "mine.yaml", "--resolved", "--size", "big", "train.lr=1e-3")
    lines = {line.split("#")[0].strip(): line.split("# ")[-1] for line in out.splitlines()}
    assert lines["dim: 192"] == "size big (mine.yaml:20:20)"
    assert lines["lr: 0.001"] == "override 'train.lr=1e-3'"
    assert lines["vocab: 1000"] == "mine.yaml:6:10"
    assert lines["batch: 32"] == "default"
    Path("again.yaml").write_text(out)
    assert load_preset("again.yaml").preset == load_preset("mine.yaml", ["train.lr=1e-3"], size="big").preset


def test_explain_gives_each_value_its_origin_and_meaning() -> None:
    out, _ = xt("inspect", "mine.yaml", "--explain", "--tiny")
    rows = {line.split()[0]: line for line in out.splitlines()}
    assert rows["train.lr"].split() == ["train.lr", "0.001", "--tiny", "peak", "learning", "rate"]
    assert "mine.yaml:15:22" in rows["model.stack.block.sublayers.attn.kind"]
    assert "which of the slot's kinds" in rows["model.stack.block.sublayers.attn.kind"]
    assert set(rows) == set(load_preset("mine.yaml", tiny=True).origins)


def test_json_has_everything() -> None:
    facts = json.loads(xt("inspect", "mine.yaml", "--json", "--size", "big")[0])
    assert facts["size"] == "big" and facts["sizes"] == ["small", "big"]
    assert facts["preset"]["model"]["dim"] == 192
    assert facts["origins"]["model.dim"] == "size big (mine.yaml:20:20)"
    assert facts["parameters"] > 0


def test_schema_is_the_file() -> None:
    assert xt("inspect", "--schema")[0] == (library.folder() / "schema.json").read_text()


def test_copy_never_overwrites_and_loads_to_the_same() -> None:
    out, err = xt("inspect", "tinyllama-1.1b", "--copy", "copy.yaml")
    assert out == "copy.yaml\n" and err == "next: xt inspect copy.yaml\n"
    assert load_preset("copy.yaml").preset == load_preset("tinyllama-1.1b").preset
    assert Path("copy.yaml").read_text().startswith("# yaml-language-server: $schema=file://")
    before = Path("copy.yaml").read_text()
    assert refused("inspect", "gpt2-small", "--copy", "copy.yaml") == (
        "the file 'copy.yaml' exists; choose another name; nothing is overwritten"
    )
    assert Path("copy.yaml").read_text() == before
    xt("inspect", "gpt2-small", "--copy", "tiny.yaml", "--tiny", "train.lr=0.5")
    assert load_preset("tiny.yaml").preset == load_preset("gpt2-small", ["train.lr=0.5"], tiny=True).preset


REFUSED = [
    (("inspect", "model.dim=3"), "'model.dim=3' is an override, and no preset was named; write xt inspect PRESET model.dim=3"),
    (("inspect", "mine"), "there is no preset 'mine'; `xt inspect` lists them; a file's name ends in .yaml"),
    (("inspect", "mine.yaml", "--size", "bigg"), "--size: there is no size 'bigg'; did you mean 'big'?"),
    (("inspect", "mine.yaml", "--copy", "x.txt"), "the file 'x.txt' does not end in .yaml; write --copy x.txt.yaml"),
    (("inspect", "mine.yaml", "--copy", "no/x.yaml"), "'no/x.yaml' cannot be written: No such file or directory"),
    (("build", "mine.yaml"), "no folder was named to write to; add --out FOLDER, or --dry-run to write nothing"),
    (("build", "mine.yaml", "--out", "mine.yaml"), "--out: 'mine.yaml' exists; choose another folder; nothing is overwritten"),
]  # fmt: skip


@pytest.mark.parametrize(("words", "message"), REFUSED, ids=lambda value: str(value)[:50])
def test_wrong_words_are_refused(words: tuple[str, ...], message: str) -> None:
    assert refused(*words) == message


def test_an_impossible_value_is_refused_at_its_place() -> None:
    path = "model.stack.block.sublayers.attn.heads"
    assert refused("inspect", "mine.yaml", f"{path}=7").startswith(
        f"override '{path}=7': {path}: 7 heads do not divide"
    )


def test_a_model_larger_than_the_machine_is_refused_before_it_is_made() -> None:
    message = refused("build", "gpt3-175b", "--out", "huge")
    assert message.startswith("the weights take 652.72 GiB and this machine has ")
    assert not Path("huge").exists()


def test_build_writes_a_checkpoint_and_a_dry_run_writes_nothing() -> None:
    out, err = xt("build", "mine.yaml", "--tiny", "--dry-run")
    assert out.startswith("Base: ") and " parameters, " in out and out.endswith(" MiB of weights\n")
    assert err == "next: xt build mine.yaml --tiny --out FOLDER\n"
    assert sorted(path.name for path in Path().iterdir()) == ["mine.yaml"]
    out, err = xt("build", "mine.yaml", "--tiny", "--out", "made", "--json")
    facts = json.loads(out)
    assert facts["folder"] == "made" and facts["bytes"] == 4 * facts["parameters"]
    assert {path.name for path in Path("made").iterdir()} >= {"preset.yaml", "model.safetensors", "manifest.json"}
    assert load_preset("made").preset == load_preset("mine.yaml", tiny=True).preset
    assert err == "next: xt inspect made\n"


def test_the_same_seed_builds_the_same_bytes() -> None:
    for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        xt("build", "mine.yaml", "--tiny", "--out", name, "--seed", seed)
    a, b, c = (Path(name, "model.safetensors").read_bytes() for name in "abc")
    assert a == b and a != c
