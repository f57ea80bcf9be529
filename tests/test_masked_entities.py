"""Masked words and masked entities: which names count, where they are mentioned, what is hidden, and training on it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fakes import FakeSplit

from xtcli.config.preset import load_preset
from xtcli.data.batch import IGNORE
from xtcli.data.train_tokenizer import train
from xtcli.errors import UserError
from xtcli.objectives.entities import FIRST, HIDDEN, MaskedEntities, frequent, is_name
from xtcli.registry import find
from xtcli.train.start import new

TEXT = "import os_path\nclass Reader(Base):\n    def read_all(self, maxSize):\n        return Reader.read_all(x, maxSize)\n"
NAMES = ("Reader", "read_all", "maxSize", "Base")
ROLES = {"pad": "<pad>", "cls": "<s>", "sep": "</s>", "unk": "<unk>", "mask": "<mask>"}


def tokenizer(kind: str = "bytes", text: str = TEXT) -> Any:
    options = {"special": ROLES, "frame": "none"} | ({} if kind == "bytes" else {"vocab": 330})
    return train(find("tokenizer", kind).Config.model_validate(options), [text] * 20)


def made(kind: str = "bytes", text: str = TEXT, context: int = 130, seed: int = 0, **options: Any) -> MaskedEntities:
    words = tokenizer(kind)
    split = FakeSplit(text=[words.encode(text)] * 4)
    config = MaskedEntities.Config.model_validate({"names": NAMES} | options)
    return MaskedEntities(config, split, words, context=context, seed=seed, rows=9)


@pytest.mark.parametrize(
    ("word", "counts"),
    [
        ("Reader", True),
        ("URL", True),
        ("read_all", True),
        ("maxSize", True),
        ("__init__", False),
        ("_private", False),
        ("_two_parts", True),
        ("reader", False),
        ("Ab", False),
        ("1_000", False),
        ("123", False),
        ("Élan", True),
    ],
)
def test_what_is_a_name(word: str, counts: bool) -> None:
    assert is_name(word) is counts


def test_the_most_frequent_names_come_first_and_ties_stand_in_order() -> None:
    assert frequent([TEXT, "Zed Zed Zed self x"], 9) == ("Zed", "Reader", "maxSize", "read_all", "Base", "os_path")
    assert frequent([TEXT], 2) == ("Reader", "maxSize")


@pytest.mark.parametrize("kind", ["bytes", "bpe"])
def test_mentions_are_whole_words(kind: str) -> None:
    objective = made(kind)
    words = objective.mentions.tokenizer
    text = "Reader(Base).read_all Readers _Reader xmaxSize maxSize, Base"
    ids = np.array(words.encode(text))
    found = objective.mentions.find(ids)
    named = [(NAMES[row - FIRST], words.decode(ids[begin:end].tolist()).strip()) for row, begin, end in found]
    assert [name for name, _ in named] == ["Reader", "Base", "read_all", "maxSize", "Base"]
    assert all(name == covered.lstrip("(.") for name, covered in named), named


def test_samples_are_pure_and_hide_a_share_of_the_mentions() -> None:
    objective, again = made(), made()
    for index in range(len(objective)):
        for epoch in range(3):
            one, two = objective.sample(index, epoch), again.sample(index, epoch)
            assert one.keys() == two.keys() and all(np.array_equal(one[key], two[key]) for key in one)
    before, after = (objective.sample(0, epoch) for epoch in (0, 1))
    assert not np.array_equal(before["targets.mep"], after["targets.mep"])
    for epoch in range(20):
        sample = objective.sample(0, epoch)
        tokens = np.where(sample["targets.mlm"] == IGNORE, sample["input_ids"], sample["targets.mlm"])
        real = sample["entity_attention_mask"] == 1
        hidden = sample["targets.mep"] != IGNORE
        rows = np.where(hidden, sample["targets.mep"], sample["entity_ids"])
        expected = objective.mentions.find(tokens)
        assert [
            (row, row_places(p)) for row, p in zip(rows[real], sample["entity_position_ids"][real], strict=True)
        ] == [(row, list(range(begin, end))) for row, begin, end in expected]
        assert (
            hidden.sum() == max(1, int(len(expected) * 0.15 + 0.5)) and (sample["entity_ids"][hidden] == HIDDEN).all()
        )
        assert not rows[~real].any() and (sample["entity_position_ids"][~real] == -1).all()


def row_places(places: np.ndarray) -> list[int]:
    return [int(place) for place in places if place >= 0]


def test_what_does_not_fit_is_drawn_or_cut() -> None:
    objective = made(most=3, longest=2)
    seen = set()
    for epoch in range(30):
        sample = objective.sample(0, epoch)
        assert sample["entity_ids"].shape == (3,) and sample["entity_position_ids"].shape == (3, 2)
        seen.add(tuple(sample["entity_position_ids"][:, 0]))
    assert len(seen) > 5
    assert "3 at most" in objective.describe()


@pytest.mark.parametrize("pack", ["stream", "none"])
def test_batches_are_their_rows_and_a_text_without_mentions_has_none(pack: str) -> None:
    objective = made(text="nothing to name here\n" * 8, pack=pack)
    batch = objective.batch(np.arange(len(objective)), np.zeros(len(objective), dtype=np.int64))
    assert not batch.inputs["entity_attention_mask"].any() and (batch.targets["mep"] == IGNORE).all()
    assert (batch.targets["mlm"] != IGNORE).any() and batch.padded >= 0
    halves = batch.split(1)
    assert all(half.inputs["entity_position_ids"].shape[1:] == (32, 30) for half in halves)


def test_names_must_fit_the_table_and_the_model_must_read_entities() -> None:
    config = MaskedEntities.Config.model_validate({"names": NAMES})
    split = FakeSplit(text=[tokenizer().encode(TEXT)])
    with pytest.raises(UserError, match="4 names, the model 6 rows"):
        MaskedEntities(config, split, tokenizer(), context=64, seed=0, rows=6)
    with pytest.raises(UserError, match="a model that reads entities"):
        MaskedEntities(config, split, tokenizer(), context=64, seed=0)


def test_training_learns_both_and_settles_the_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XT_CACHE", str(tmp_path / "cache"))
    data = tmp_path / "text"
    data.mkdir()
    for number in range(6):
        lines = [f"class Name{i % 5}:\n    low_part = High{i % 5}(other)\n\n" for i in range(number, number + 60)]
        (data / f"{number}.py").write_text("".join(lines), encoding="utf-8")
    said = [f"data={data}", "train.steps=30", "train.validate_every=15", "train.log_every=1", "train.save_every=0"]
    words = {"kind": "bytes", "frame": "cls-sep", "special": ROLES}
    said += ["train.context=64", f"tokenizer={json.dumps(words)}"]
    lines: list[dict[str, Any]] = []
    resolved = load_preset("luke-base", [*said, "train.sample_every=0", "train.sample_tokens=2"], tiny=True)
    code, _ = new(resolved, out=tmp_path / "run", command=["xt"], record=lines.append, talk=lambda text: None)
    losses = [line["losses"] for line in lines if "losses" in line]
    assert code == 0 and len(losses) == 30
    for head in ("mlm", "mep"):
        assert sum(loss[head] for loss in losses[-5:]) / 5 < losses[0][head] * 0.95, head
    kept: Any = load_preset(tmp_path / "run").preset.objective
    assert set(kept.names) == {"low_part", *(f"{word}{i}" for word in ("Name", "High") for i in range(5))}
    assert any("val_loss" in json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
