"""The objective of signals: frames are the text's ids as numbers, each answered by the next."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from fakes import FakeSplit, FakeTokenizer, tokens

from xtcli.config.preset import load_preset
from xtcli.errors import UserError
from xtcli.model import build
from xtcli.objectives import Frames
from xtcli.train.start import new

TOKENIZER = FakeTokenizer()


def frames(texts: list[list[int]], context: int = 4, width: int = 3, validation: bool = False) -> Frames:
    options = {"context": context, "seed": 0, "width": width, "validation": validation}
    return Frames(Frames.Config(), FakeSplit(text=texts), TOKENIZER, **options)


def test_every_frame_is_answered_once_and_by_the_next() -> None:
    texts = [tokens(20, 20), tokens(9, 50)]
    made = frames(texts)
    joined = np.array(texts[0] + texts[1])
    signal = (2.0 * joined[: 9 * 3] / (TOKENIZER.vocab - 1) - 1.0).reshape(9, 3)
    samples = [made.sample(index, 0) for index in range(len(made))]
    np.testing.assert_allclose(np.concatenate([s["input_values"] for s in samples]), signal[:8], atol=1e-6)
    np.testing.assert_allclose(np.concatenate([s["targets.continuous"] for s in samples]), signal[1:], atol=1e-6)


def test_the_last_block_is_padded_and_not_answered_there() -> None:
    made = frames([tokens(20, 20)], context=4)
    batch = made.batch(np.arange(2), np.zeros(2, dtype=np.int64))
    assert batch.inputs["input_values"].shape == (2, 4, 3)
    assert batch.inputs["input_values"].dtype == torch.float32
    assert batch.supervised() == {"continuous": 5 * 3}
    assert (batch.targets["continuous"][1, 1:] == -100).all()
    assert (batch.tokens, batch.padded) == (5, 0)


def test_numbers_come_back_as_the_ids_they_were() -> None:
    made = frames([tokens(20, 20)])
    ids = np.arange(TOKENIZER.vocab)
    assert made.written(made.read(ids)) == ids.tolist()


@pytest.mark.parametrize(
    ("texts", "context", "words"),
    [([tokens(5, 20)], 1, "less than two frames of 3"), ([tokens(9, 20)], 4, "one block takes 15")],
)
def test_too_little_text_is_refused(texts: list[list[int]], context: int, words: str) -> None:
    with pytest.raises(UserError, match=words):
        frames(texts, context)


@pytest.mark.parametrize(
    ("preset", "overrides", "words"),
    [
        ("x-decoder", (), "needs vectors in and out"),
        ("x-continuous", ("model.heads.continuous.width=16",), "frames of 32 numbers are answered by vectors of 16"),
    ],
)
def test_models_that_frames_do_not_fit_are_refused(preset: str, overrides: tuple[str, ...], words: str) -> None:
    with pytest.raises(UserError, match=words):
        Frames.facts(build(load_preset(preset, overrides, tiny=True), device="meta"))


def test_losses_are_named_squared_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XT_CACHE", str(tmp_path / "cache"))
    (tmp_path / "text.txt").write_text("a signal of letters, over and over again. " * 400, encoding="utf-8")
    lines: list[dict[str, object]] = []
    said: list[str] = []
    changes = (f"data={tmp_path / 'text.txt'}", "train.steps=2", "train.log_every=1", "data.validation=0")
    resolved = load_preset("x-continuous", (*changes, "train.context=8"), tiny=True)
    code, _ = new(resolved, out=tmp_path / "run", command=["xt"], record=lines.append, talk=said.append)
    assert code == 0
    assert {line["unit"] for line in lines if "loss" in line} == {"squared error"}
