"""Gap sentences: what is hidden, what is written, and which sentences are important."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from fakes import FakeSplit, FakeTokenizer

from xtcli.data.batch import IGNORE
from xtcli.errors import UserError
from xtcli.objectives import GapSentences
from xtcli.objectives.gaps import importance

END = 17
TOKENIZER = FakeTokenizer(pad=0, eos=1, sentinels=8)
TOKENIZER.decode = lambda ids: "." if ids == [END] else "w"  # type: ignore[method-assign]


def gaps(texts: list[list[int]], context: int = 64, **options: Any) -> GapSentences:
    config = GapSentences.Config(**options)
    return GapSentences(config, FakeSplit(text=texts), TOKENIZER, context=context, seed=0)


def sentences(rng: np.random.Generator, number: int) -> list[int]:
    return [t for _ in range(number) for t in (*rng.integers(20, 60, size=rng.integers(2, 7)).tolist(), END)]


def test_gap_sentences_are_whole_sentences_of_the_text() -> None:
    rng = np.random.default_rng(0)
    texts = [sentences(rng, 8) for _ in range(20)]
    made = gaps(texts)
    shares = []
    for epoch in range(5):
        for index in range(len(made)):
            sample = made.sample(index, epoch)
            document, first, last = made.cuts.at(index)
            text = texts[document][first:last]
            inputs, said = sample["input_ids"].tolist(), sample["targets.lm"].tolist()
            assert inputs[-1] == said[-1] == 1
            assert sample["decoder_input_ids"].tolist() == [0, *said[:-1]]
            assert IGNORE not in said
            hidden, rest = [], said[:-1]
            for token in inputs[:-1]:
                if token == 15:
                    cut = rest.index(END) + 1 if END in rest else len(rest)
                    hidden.append(rest[:cut])
                    rest = rest[cut:]
            assert not rest
            back = iter(hidden)
            assert [t for token in inputs[:-1] for t in (next(back) if token == 15 else [token])] == text
            shares.append(len(hidden) / max(text.count(END), 1))
    assert 0.15 < np.mean(shares) < 0.45


def test_importance_is_what_the_rest_says_too() -> None:
    parts_of = [np.array(part) for part in ([20, 21, 21, 22], [21, 23], [30, 31], [20, 22, 21])]
    text = np.concatenate(parts_of)
    found = importance(text, parts_of)
    # Overlap with the rest: 20, 21, 21, 22 -> 4; 21 -> 1; nothing; 20, 22, 21 -> 3. ROUGE-1 F1 is 2 o / 11.
    assert found.tolist() == pytest.approx([8 / 11, 2 / 11, 0.0, 6 / 11])
    made = gaps(
        [[*[20, 21, 21, 22, END], *[21, 23, END], *[30, 31, END], *[20, 22, 21, END]]], noise=0.0, least=0, most=0.2
    )
    assert made.sample(0, 0)["targets.lm"].tolist() == [20, 21, 21, 22, END, 1]


def test_gap_sentences_keep_their_limits() -> None:
    made = gaps([[20 + i % 30 for i in range(300)]], context=40, longest=8, target=12)
    for index in range(len(made)):
        sample = made.sample(index, 0)
        assert sample["input_ids"].size <= 40
        assert sample["targets.lm"].size <= 12
    assert made.sample(0, 0)["targets.lm"].size > 1
    assert any(
        not np.array_equal(made.sample(0, 0)["targets.lm"], made.sample(0, e)["targets.lm"]) for e in range(1, 6)
    )
    assert "gap sentences: 0.15 to 0.45" in made.describe()
    with pytest.raises(UserError, match="a mask token or a sentinel"):
        bare = FakeTokenizer(pad=0, eos=1, sentinels=0)
        GapSentences(GapSentences.Config(), FakeSplit(text=[[20, 21]]), bare, context=32, seed=0)
