"""Training that starts from a checkpoint: what is loaded, what is fresh, what is refused; adapters on the way."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from labelled import ENCODER, SMALL, rows, train, write

import xtcli
from xtcli.cli import app
from xtcli.config.preset import load_preset
from xtcli.data.tokenizers import Bpe, Tokenizer, WordPiece
from xtcli.data.train_tokenizer import train as learn
from xtcli.errors import UserError
from xtcli.model import build, find_checkpoint, save_model
from xtcli.train.job import make_job, with_weights

TEXTS = [row["text"] for row in rows("sequence")]
TOKENIZER = learn(WordPiece.Config(vocab=300), TEXTS)
BODY = 21
"""Tensors of the body of the small encoder."""


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XT_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with rows and presets, and a checkpoint `base` of the small encoder with masked-language-model heads."""
    write(tmp_path, rows("sequence"))
    checkpoint(tmp_path, "base", "model.heads={mlm: {}, nsp: {}}", "objective={kind: mlm, next_sentence: true}")
    return tmp_path


def checkpoint(folder: Path, name: str, *overrides: str, tokenizer: Tokenizer | None = TOKENIZER) -> Path:
    """A checkpoint with fresh weights of another seed."""
    resolved = load_preset(folder / "small.yaml", overrides)
    return save_model(build(resolved, seed=7), folder / name, resolved.to_yaml(), tokenizer)


def job(folder: Path, *overrides: str, base: str = "base") -> tuple[Any, list[str]]:
    talk: list[str] = []
    options = [f"data.source={folder / 'rows.jsonl'}", f"train.init={folder / base}", *overrides]
    return make_job(load_preset(folder / "small.yaml", options), talk.append), talk


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return xtcli.load(folder).state_dict()


def test_body_is_the_checkpoints_and_the_head_is_fresh(folder: Path) -> None:
    made, talk = job(folder)
    assert talk[:3] == [
        f"starting from {folder / 'base'}: {BODY + 2} tensors loaded",
        "fresh, for want of weights: heads.sequence (2 tensors)",
        "left out, for want of a place: heads.mlm (5 tensors), heads.nsp (2 tensors)",
    ]
    have, base = with_weights(made, None).state_dict(), weights(folder / "base")
    fresh = build(made.resolved, seed=made.config.seed).state_dict()
    for name, tensor in have.items():
        assert torch.equal(tensor, fresh[name] if name.startswith("heads.") else base[name]), name
    assert made.tokenizer.digest == TOKENIZER.digest
    preset: Any = made.resolved.preset
    assert preset.tokenizer.path == str(folder / "base" / "tokenizer.json")
    assert preset.train.init == str(folder / "base")


CASES: dict[str, tuple[list[str], list[str], list[str]]] = {
    "the same": (["model.heads={sequence: {}}"], [], []),
    "no pooler there": (
        ["model.heads={sequence: {pick: first}}", "model.pooler=null"],
        [],
        ["fresh, for want of weights: pooler (2 tensors)"],
    ),
    "no pooler here": (
        ["model.heads={sequence: {}}"],
        ["model.pooler=null", "model.heads={sequence: {pick: first}}"],
        ["left out, for want of a place: pooler (2 tensors)"],
    ),
    "other labels": (
        ["model.heads={sequence: {labels: 3}}", "objective={kind: classify, labels: [a, b, c]}"],
        [],
        [
            "fresh, for want of weights: heads.sequence (2 tensors)",
            "heads.sequence.classifier.weight has shape (3, 32) in the checkpoint and (2, 32) here",
            "heads.sequence.classifier.bias has shape (3,) in the checkpoint and (2,) here",
        ],
    ),
    "labels by other names": (
        ["model.heads={sequence: {}}", "objective={kind: classify, labels: [yes, 'no']}"],
        [],
        ["the labels of its head were yes, no; they are to become negative, positive"],
    ),
    "partly other": (
        ["model.heads={sequence: {hidden: true, labels: 3}}"],
        ["model.heads={sequence: {hidden: true}}"],
        [
            "fresh, for want of weights: heads.sequence.classifier (2 tensors)",
            "heads.sequence.classifier.weight has shape (3, 32) in the checkpoint and (2, 32) here",
            "heads.sequence.classifier.bias has shape (3,) in the checkpoint and (2,) here",
        ],
    ),
    "another dropout": (["model.heads={sequence: {}}"], ["model.dropout=0.3"], []),
    "another network": (
        ["model.heads={sequence: {}}", "model.stack.block.sublayers.attn.heads=2"],
        [],
        ["the checkpoint was made with another network: stack.blocks.0.attn has groups 2, not 4 as in this preset"],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_what_is_said(case: str, folder: Path) -> None:
    there, here, expected = CASES[case]
    checkpoint(folder, "other", *there)
    _, talk = job(folder, *here, base="other")
    assert [line for line in talk[1:] if not line.startswith("sequence classification")] == expected


REFUSED = {
    "missing": (
        ["model.stack.layers=1"],
        ["model.stack.layers=2"],
        "tensor 'stack.blocks.1.attn.q.weight' is missing in the checkpoint; "
        "train the preset that the checkpoint was made with",
    ),
    "left over": (
        ["model.stack.layers=2"],
        [],
        "tensor 'stack.blocks.1.attn.q.weight' of the checkpoint has no place in the preset's model; "
        "train the preset that the checkpoint was made with",
    ),
    "shape": (
        ["model.vocab=299"],
        [],
        "tensor 'embed.tokens.weight' has shape (299, 32) in the checkpoint, the preset wants (300, 32); "
        "train the preset that the checkpoint was made with",
    ),
    "kind": (
        ["model.stack.block.sublayers.ffn={kind: glu, hidden: 64}"],
        [],
        "tensor 'stack.blocks.0.ffn.gate.weight' of the checkpoint has no place in the preset's model; "
        "train the preset that the checkpoint was made with",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_body_that_does_not_fit_is_refused(case: str, folder: Path) -> None:
    there, here, expected = REFUSED[case]
    checkpoint(folder, "other", *there)
    with pytest.raises(UserError) as caught:
        job(folder, *here, base="other")
    place = f"override 'train.init={folder / 'other'}': train.init: "
    assert place + expected in str(caught.value).splitlines()


def test_tokenizer_with_other_ids_is_refused(folder: Path) -> None:
    other = learn(Bpe.Config(vocab=300), TEXTS)
    (folder / "bpe").mkdir()
    other.save(folder / "bpe")
    (folder / "same").mkdir()
    TOKENIZER.save(folder / "same")
    file = "tokenizer={{kind: file, path: {}}}"
    with pytest.raises(UserError, match=r"id 0 is '\[PAD\]' in the checkpoint and '<\|endoftext\|>' in .*bpe"):
        job(folder, file.format(folder / "bpe"))
    with pytest.raises(UserError, match="a new one would have others; leave it out: the checkpoint has one"):
        job(folder, "tokenizer=bytes")
    made, _ = job(folder, file.format(folder / "same"))
    assert made.resolved.preset.tokenizer.path == str(folder / "same")
    checkpoint(folder, "none", tokenizer=None)
    with pytest.raises(UserError, match="the weights need a tokenizer with the same ids"):
        job(folder, base="none")
    made, _ = job(folder, file.format(folder / "same"), base="none")
    assert made.tokenizer.digest == TOKENIZER.digest


def test_a_checkpoint_is_a_preset_too(folder: Path) -> None:
    """Its tokenizer is named by a path beside it, as converted checkpoints name theirs."""
    text = (SMALL + ENCODER).replace("{kind: wordpiece, vocab: 300}", "{kind: file, path: tokenizer.json}")
    resolved = load_preset(folder / "small.yaml", ["tokenizer={kind: file, path: tokenizer.json}"])
    made = save_model(build(resolved, seed=3), folder / "own", text, TOKENIZER)
    lines = train(
        made, f"data.source={folder / 'rows.jsonl'}", f"train.init={made}", "train.steps=1", out=folder / "run"
    )
    assert lines[-1]["val_accuracy"] <= 1
    assert find_checkpoint(folder / "run").name == "step-1"


def test_init_option(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [str(folder / "small.yaml"), f"data.source={folder / 'rows.jsonl'}", "train.steps=1"]
    with pytest.raises(SystemExit) as ended:
        app(["train", *words, "--init", str(folder / "base"), "--out", str(folder / "run")])
    assert ended.value.code == 0
    assert f"starting from {folder / 'base'}" in capsys.readouterr().err
    with pytest.raises(UserError, match="--init and --out belong to a new run"):
        app(["train", str(folder / "run"), "--init", str(folder / "base")], standalone_mode=False)
    with pytest.raises(UserError, match="cannot change in a resumed run"):
        app(["train", str(folder / "run"), f"train.init={folder / 'other'}"], standalone_mode=False)
    with pytest.raises(UserError, match=r"no such run or checkpoint; did you mean '.*base'\?"):
        app(["train", *words, "--init", str(folder / "bas")], standalone_mode=False)
    (folder / "theirs").mkdir()
    (folder / "theirs" / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"is a checkpoint of transformers; convert it first: xt convert auto .*theirs"):
        app(["train", *words, "--init", str(folder / "theirs")], standalone_mode=False)
    with pytest.raises(SystemExit):
        app(["train", *words, "--init", str(folder / "base"), "--dry-run"])
    assert "sequence classification: 120 texts; 2 labels" in capsys.readouterr().out


def test_adapters_and_fresh_heads_are_trained_and_nothing_else(folder: Path) -> None:
    options = [f"data.source={folder / 'rows.jsonl'}", f"train.init={folder / 'base'}", "train.steps=40"]
    options += ["train.lora={rank: 4, alpha: 16}", "train.lr=2e-2"]
    talk: list[str] = []
    lines = train(folder / "small.yaml", *options, out=folder / "run", talk=talk)
    assert "adapters of rank 4 on 2 linear layers; trained whole: heads.sequence" in talk
    assert lines[-1]["val_accuracy"] > 0.9
    preset: Any = load_preset(folder / "run").preset
    assert preset.train.lora.whole == ("heads.sequence",)
    base = weights(folder / "base")
    apart = xtcli.load(folder / "run", merge=False).state_dict()
    adapted = {name.split(".lora.")[0] for name in apart if ".lora." in name}
    assert adapted == {"stack.blocks.0.attn.q", "stack.blocks.0.attn.v"}
    assert all(torch.equal(apart[name], base[name]) for name in base if name in apart and not name.startswith("heads."))
    merged = weights(folder / "run")
    changed = {name for name in merged if name in base and not torch.equal(merged[name], base[name])}
    assert changed == {f"{layer}.weight" for layer in adapted}
    ids = torch.arange(24).reshape(2, 12)
    one, two = (xtcli.load(folder / "run", merge=merge).eval()(input_ids=ids).logits for merge in (True, False))
    torch.testing.assert_close(one, two, atol=1e-5, rtol=1e-5)
    # The next run starts from the merged weights.
    made, _ = job(folder, base="run")
    again = with_weights(made, None).state_dict()
    assert all(torch.equal(again[name], merged[name]) for name in merged)


def test_wrong_adapters_are_refused_before_anything_is_made(folder: Path) -> None:
    text = f"data.source={folder / 'rows.jsonl'}"
    with pytest.raises(UserError) as caught:
        train(folder / "small.yaml", text, "train.lora={on: ['**.atn.q']}", out=folder / "run")
    assert str(caught.value) == (
        "override 'train.lora={on: ['**.atn.q']}': train.lora.on: '**.atn.q' names no linear layer of the model; "
        "did you mean '**.attn.q'?"
    )
    with pytest.raises(UserError, match="rank"):
        load_preset(folder / "small.yaml", ["train.lora={rank: 0}"])
    with pytest.raises(UserError, match=r"did you mean 'train\.lora\.alpha'"):
        load_preset(folder / "small.yaml", ["train.lora={alhpa: 0}"])
    assert not (folder / "run").exists()
    talk: list[str] = []
    train(folder / "small.yaml", text, "train.lora.rank=2", "train.steps=1", out=folder / "run", talk=talk)
    assert "without train.init the weights under the adapters are random and stay so" in talk


def test_export_of_a_run_with_adapters(folder: Path) -> None:
    """To transformers go the merged weights, and the names of the labels."""
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=300, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
        max_position_embeddings=48,
    )  # fmt: skip
    transformers.BertModel(config).save_pretrained(folder / "theirs")
    TOKENIZER.save(folder / "theirs")
    xtcli.convert(folder / "theirs", folder / "ours", family="auto")
    options = [f"data.source={folder / 'rows.jsonl'}", f"train.init={folder / 'ours'}", "model.heads={sequence: {}}"]
    options += ["objective=classify", "train.lora={rank: 3, on: ['**.attn.*', '**.ffn.up']}", "train.lr=1e-2"]
    options += ["train.steps=6", "train.warmup=0", "train.sample_every=0", "train.device=cpu"]
    train(folder / "ours", *options, out=folder / "run")
    xtcli.convert(folder / "run", folder / "back", to="hf")
    made = transformers.AutoModelForSequenceClassification.from_pretrained(folder / "back").eval()
    ids = torch.arange(5, 29).reshape(2, 12)
    with torch.no_grad():
        apart = xtcli.load(folder / "run", merge=False).eval()(input_ids=ids).logits
        torch.testing.assert_close(made(input_ids=ids).logits, apart, atol=1e-5, rtol=1e-5)
    assert made.config.id2label == {0: "negative", 1: "positive"}
