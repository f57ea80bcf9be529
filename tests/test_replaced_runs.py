"""Runs of replaced-token detection: they go on as if never stopped, both members leave, texts are looked through."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml
from checkpoints import opens_cleanly
from references import ids
from test_train import RESUME, comparable, stop_after
from typer.testing import CliRunner

import xtcli
from xtcli.cli import app
from xtcli.config.preset import load_preset
from xtcli.convert import convert
from xtcli.errors import UserError
from xtcli.generate.detect import detect, detects
from xtcli.generate.engine import generate
from xtcli.model import build, load, save_model
from xtcli.registry import tree
from xtcli.train.start import new, resume


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    for number in range(12):
        lines = [f"def add_{i}(a, b):\n    return a + b + {i % 7}\n\n" for i in range(number, number + 60)]
        (folder / f"{number}.py").write_text("".join(lines), encoding="utf-8")
    return folder


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XT_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


def train(out: Path, *options: str) -> tuple[int, list[dict[str, Any]]]:
    lines: list[dict[str, Any]] = []
    resolved = load_preset("electra-small", options, tiny=True)
    code, _ = new(resolved, out=out, command=["xt"], record=lines.append, talk=lambda text: None)
    return code, lines


def test_a_resumed_run_draws_what_it_would_have_drawn(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = [f"data={text}", "data.validation=0.1", *RESUME, "train.steps=12"]
    train(tmp_path / "whole", *options)
    for step in (4, 7):
        stop_after(step, monkeypatch)
        if step == 4:
            code, _ = train(tmp_path / "cut", *options)
        else:
            code, _ = resume(tmp_path / "cut", [], command=["xt"], record=lambda line: None, talk=lambda text: None)
        assert code == 128 + signal.SIGTERM
    stop_after(None, monkeypatch)
    assert resume(tmp_path / "cut", [], command=["xt"], record=lambda line: None, talk=lambda text: None)[0] == 0
    assert comparable(tmp_path / "cut") == comparable(tmp_path / "whole")
    ours, theirs = load(tmp_path / "cut").state_dict(), load(tmp_path / "whole").state_dict()
    assert all(torch.equal(a, theirs[name]) for name, a in ours.items())


@pytest.fixture(scope="module")
def run(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XT_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
        out = tmp_path_factory.mktemp("run") / "run"
        code, lines = train(out, f"data={text}", "train.steps=30", "train.log_every=1", "train.micro_batch=5")
    assert code == 0
    logged = [line for line in lines if "losses" in line]
    assert all(
        line["loss"] == pytest.approx(line["losses"]["mlm"] + 50 * line["losses"]["replaced"]) for line in logged
    )
    assert logged[-1]["losses"]["replaced"] < logged[0]["losses"]["replaced"]
    said = next((out / "samples").iterdir()).read_text()
    assert "replaced token" in said.splitlines()[-1]
    return out


def test_both_members_are_exported(run: Path, tmp_path: Path) -> None:
    report = convert(run, tmp_path / "hf", to="hf", verify=True)
    assert report.members == {"generator": "ElectraForMaskedLM", "discriminator": "ElectraForPreTraining"}
    assert report.bit_exact
    model = load(run).eval()
    given = {"input_ids": ids(2, 17)}
    with torch.no_grad():
        hidden = model.hidden(**given)
        ours = {name: model.heads[head].outputs(model.read_by(head, hidden)) for name, head in HEADS.items()}
        for name, cls in report.members.items():
            theirs = opens_cleanly(tmp_path / "hf" / name, getattr(transformers, cls))
            (made,) = ours[name].values()
            torch.testing.assert_close(theirs(**given).logits, made, atol=2e-5, rtol=1e-5)
    back = convert(tmp_path / "hf/discriminator", tmp_path / "back")
    assert back.architecture == "ElectraForPreTraining"
    again = load(tmp_path / "back").eval()
    with torch.no_grad():
        torch.testing.assert_close(again(**given).logits, ours["discriminator"]["logits"])


HEADS = {"generator": "mlm", "discriminator": "replaced"}


def test_an_export_may_replace_one_that_is_there(run: Path, tmp_path: Path) -> None:
    convert(run, tmp_path / "hf", to="hf")
    with pytest.raises(UserError, match="exists"):
        convert(run, tmp_path / "hf", to="hf")
    convert(run, tmp_path / "hf", to="hf", force=True, dtype="bf16")
    config = json.loads((tmp_path / "hf/generator/config.json").read_text())
    assert config["dtype"] == "bfloat16"
    dry = convert(run, tmp_path / "dry", to="hf", dry_run=True)
    assert dry.members
    assert not (tmp_path / "dry").exists()


def test_wide_members_are_of_one_family(tmp_path: Path) -> None:
    """A generator as wide as its table reads like a BERT; it goes where its discriminator goes."""
    options = ["model.generator.dim=64", "model.generator.stack.block.sublayers.attn.heads=4"]
    resolved = load_preset("electra-base", options, tiny=True)
    save_model(build(resolved), tmp_path / "ours", resolved.to_yaml())
    report = convert(tmp_path / "ours", tmp_path / "hf", to="hf", verify=True)
    assert list(report.members.values()) == ["ElectraForMaskedLM", "ElectraForPreTraining"]


def test_training_for_labels_starts_from_the_discriminator(run: Path, text: Path, tmp_path: Path) -> None:
    rows = [{"text": f"add {i} return a", "label": "even" if i % 2 == 0 else "odd"} for i in range(40)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = type(load(run)).members(load(run).config)["discriminator"][0]
    body = tree(config) | {"heads": {"sequence": {"pick": "first", "hidden": True, "act": "gelu"}}}
    preset = {
        "version": 1,
        "about": {"title": "labels"},
        "model": body,
        "objective": {"kind": "classify"},
        "tokenizer": {"kind": "file", "path": str(run / "checkpoints/step-30/tokenizer.json")},
        "data": {"source": str(tmp_path / "rows.jsonl")},
        "train": {"init": str(run), "steps": 3, "batch": 4, "context": 32, "device": "cpu", "precision": "fp32"},
    }
    (tmp_path / "labels.yaml").write_text(yaml.safe_dump(preset))
    said: list[str] = []
    code, out = new(
        load_preset(tmp_path / "labels.yaml"),
        out=tmp_path / "labels",
        command=["xt"],
        record=lambda line: None,
        talk=said.append,
    )
    assert code == 0
    assert any("left out" in line and "generator" in line for line in said), said
    assert list(load(out).heads) == ["sequence"]


def test_masks_are_filled_and_other_texts_looked_through(run: Path) -> None:
    model, tokenizer = load(run), xtcli.data.tokenizers.Tokenizer.load(run / "checkpoints/step-30")
    filled = generate(model, tokenizer, ["def add [MASK] return"]).filled
    assert len(filled) == 1
    assert len(filled[0].masks) == 1
    prompts = ["def add return a", "return"]
    assert detects(model, tokenizer, prompts)
    assert not detects(model, tokenizer, ["def [MASK]", "return"])
    together = detect(model, tokenizer, prompts).results
    for prompt, whole in zip(prompts, together, strict=True):
        (alone,) = detect(model, tokenizer, [prompt]).results
        assert [word for word, _ in alone.words] == [word for word, _ in whole.words]
        assert len(alone.words) == len(tokenizer.encode(prompt))
        for (_, one), (_, other) in zip(alone.words, whole.words, strict=True):
            assert one.label == other.label in ("replaced", "original")
            assert one.probability == pytest.approx(other.probability, abs=1e-5)
            assert one.probability >= 0.5


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (["--prompt", "def [MASK] return"], "mask 1"),
        (["--prompt", "def add return"], "%"),
        (["--prompt", "def add return", "--json"], '"probability"'),
        (["--prompt", "def add return", "--context", "more"], "is for models that read two texts"),
        (["--prompt", ""], "is empty"),
        (["--prompt", "add " * 400], "the model takes 128"),
    ],
    ids=["mask", "text", "json", "context", "empty", "long"],
)
def test_the_command_says_it(words: list[str], wanted: str, run: Path) -> None:
    done = CliRunner().invoke(app, ["generate", "--ckpt", str(run), *words])
    text = done.output + str(done.exception or "")
    assert wanted in text, text


def test_a_discriminator_alone_labels_whatever_it_is_given(run: Path, tmp_path: Path) -> None:
    convert(run, tmp_path / "hf", to="hf")
    convert(tmp_path / "hf/discriminator", tmp_path / "alone")
    done = CliRunner().invoke(app, ["generate", "--ckpt", str(tmp_path / "alone"), "--prompt", "def [MASK] return"])
    assert done.exit_code == 0, done.output
    assert "[MASK]" in done.output
