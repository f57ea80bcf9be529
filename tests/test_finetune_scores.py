"""The scores of a validation, against counting by hand."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from xtcli.data.batch import IGNORE, Batch
from xtcli.train.scores import (
    AnswerScores,
    LabelScores,
    NumberScores,
    SetScores,
    SpanScores,
    best_spans,
    normal,
    word_f1,
)
from xtcli.train.view import validation_text


def batch(head: str, targets: Any) -> Batch:
    return Batch({}, {head: torch.as_tensor(targets)}, 0, 0, list(range(len(targets))))


def test_accuracy_and_macro_f1() -> None:
    scores = LabelScores("sequence", ["a", "b", "c", "never"])
    expected, predicted = [0, 0, 0, 1, 1, 2], [0, 0, 1, 1, 2, 2]
    logits = torch.eye(4)[predicted]
    for half in (slice(0, 4), slice(4, 6)):
        scores.add(batch("sequence", expected[half]), {"sequence": {"logits": logits[half]}})
    by_label = []
    for label in range(3):
        hit = sum(e == p == label for e, p in zip(expected, predicted, strict=True))
        by_label.append(2 * hit / (expected.count(label) + predicted.count(label)))
    assert scores.result() == {"accuracy": pytest.approx(4 / 6), "f1": pytest.approx(sum(by_label) / 3)}


def test_only_supervised_tokens_count() -> None:
    scores = LabelScores("token", ["a", "b"])
    logits = torch.tensor([[[1.0, 0], [0, 1], [0, 1]], [[0, 1], [1, 0], [1, 0]]])
    scores.add(batch("token", [[0, IGNORE, 0], [1, IGNORE, IGNORE]]), {"token": {"logits": logits}})
    assert (scores.right, scores.total) == (2, 3)
    assert LabelScores("token", ["a"]).result() == {}


def test_micro_f1_counts_all_labels_of_all_texts() -> None:
    scores = SetScores("sequence")
    assert scores.result() == {}
    expected = torch.tensor([[[1.0, 0, 1]], [[0, 0, 0]]])
    scores.add(batch("sequence", expected), {"sequence": {"logits": torch.tensor([[2.0, 1, -1], [-1, -1, 3]])}})
    assert scores.result() == {"micro_f1": 2 * 1 / (2 + 3)}


def test_mean_squared_error_and_correlation() -> None:
    scores = NumberScores("sequence")
    expected, logits = torch.randn(7, 1, 2), torch.randn(7, 2)
    for rows in (slice(0, 3), slice(3, 7)):
        scores.add(batch("sequence", expected[rows]), {"sequence": {"logits": logits[rows]}})
    pairs = list(zip(expected[:, 0].T.numpy(), logits.T.numpy(), strict=True))
    assert scores.result() == {
        "mse": pytest.approx(float(np.mean([(a - b) ** 2 for a, b in pairs]))),
        "pearson": pytest.approx(float(np.mean([np.corrcoef(a, b)[0, 1] for a, b in pairs]))),
    }
    scores = NumberScores("sequence")
    scores.add(batch("sequence", torch.ones(3, 1, 1)), {"sequence": {"logits": logits[:3, :1]}})
    assert list(scores.result()) == ["mse"]


def test_choices_have_no_f1() -> None:
    scores = LabelScores("choice", None)
    scores.add(batch("choice", [2, 0]), {"choice": {"logits": torch.tensor([[0.0, 1, 2], [0, 1, 2]])}})
    assert scores.result() == {"accuracy": 0.5}


@pytest.mark.parametrize(
    ("answer", "compared"),
    [
        ("The  Cat, sat.", "cat sat"),
        ("an apple a day", "apple day"),
        ("U.S.A.", "usa"),
        ("theatre", "theatre"),
        ("the", ""),
        ("\u00c9t\u00e9", "\u00e9t\u00e9"),
    ],
)
def test_answers_are_compared_as_squad_does(answer: str, compared: str) -> None:
    assert normal(answer) == compared


@pytest.mark.parametrize(
    ("predicted", "expected", "value"),
    [
        ("the cat sat", "cat sat", 1.0),
        ("cat sat down", "cat", 0.5),
        ("cat cat", "cat", 2 / 3),
        ("dog", "cat", 0.0),
        ("", "cat", 0.0),
        ("", "", 1.0),
        ("the", "", 1.0),
    ],
)
def test_overlap_of_words(predicted: str, expected: str, value: float) -> None:
    assert word_f1(predicted, expected) == pytest.approx(value)


def test_best_of_the_expected_answers_counts() -> None:
    scores = AnswerScores()
    scores.count("cat sat", ["dog", "the cat"])
    scores.count("Cat", ["dog", "the cat"])
    scores.count("", [])
    scores.count("cat", [])
    assert scores.result() == {"exact_match": 0.5, "f1": pytest.approx((2 / 3 + 1 + 1 + 0) / 4)}


@pytest.mark.parametrize("longest", [1, 3, 50])
def test_best_span_is_the_best_of_all(longest: int) -> None:
    generator = torch.Generator().manual_seed(longest)
    start, end = torch.randn(5, 12, generator=generator), torch.randn(5, 12, generator=generator)
    inside = torch.zeros(5, 12, dtype=torch.bool)
    for row, (first, last) in enumerate([(0, 12), (3, 9), (5, 6), (11, 12), (4, 4)]):
        inside[row, first:last] = True
    scores, first, last = best_spans(start, end, inside, longest)
    for row in range(5):
        places = np.flatnonzero(inside[row].numpy())
        pairs = [(i, j) for i in places for j in places if i <= j < i + longest]
        if not pairs:
            assert scores[row] == -math.inf
            continue
        i, j = max(pairs, key=lambda pair: float(start[row, pair[0]] + end[row, pair[1]]))
        assert (int(first[row]), int(last[row])) == (i, j)
        assert float(scores[row]) == pytest.approx(float(start[row, i] + end[row, j]))


class Windows:
    """Two windows of one question, over the characters of "abcdef": places 2, 3 and 4 of a row are its context."""

    def __init__(self, unanswerable: bool) -> None:
        self.config = SimpleNamespace(longest=10, unanswerable=unanswerable)
        self.windows = [SimpleNamespace(question=0), SimpleNamespace(question=0)]
        self.questions = [SimpleNamespace(context="abcdef", answers=("e",))]

    def places(self, window: int) -> range:
        return range(2, 5)

    def characters(self, window: int, first: int, last: int) -> tuple[int, int]:
        return 3 * window + first - 2, 3 * window + last - 1


@pytest.mark.parametrize("unanswerable", [False, True])
@pytest.mark.parametrize("empty", [2.0, 9.0])
def test_answer_is_that_of_the_best_window(unanswerable: bool, empty: float) -> None:
    scores = SpanScores(Windows(unanswerable))
    logits = torch.tensor([[empty, 9.0, 1.0, 0.0, 0.0], [5.0, 9.0, 0.0, 3.0, 0.0]])
    outputs = {"span": {"start_logits": logits, "end_logits": logits}}
    scores.add(batch("span", [[0, 0], [3, 3]]), outputs)
    span = scores.answer(0)
    # The window that is least sure that there is no answer decides on that: 2 x 2 or 2 x 5, against 2 x 3.
    none = unanswerable and empty == 9.0
    assert (span.start, span.end) == ((0, 0) if none else (4, 5))
    assert scores.result() == ({"exact_match": 0.0, "f1": 0.0} if none else {"exact_match": 1.0, "f1": 1.0})
    assert 0 < span.probability < 1


def test_view_says_scores_in_place_of_a_perplexity() -> None:
    line = {"step": 5, "val_loss": 0.5, "val_accuracy": 0.9125, "val_f1": 0.5, "best": 0.5}
    assert validation_text(line) == "validation loss 0.5000 nats (accuracy 91.2 %, F1 50.0 %), the best so far"
    line = {"step": 5, "val_loss": 0.25, "val_mse": 0.25, "val_pearson": 0.5, "unit": "squared error"}
    said = "validation loss 0.2500 squared error (mean squared error 0.25, Pearson's correlation 0.500)"
    assert validation_text(line) == said
    line = {"step": 5, "val_loss": 0.5, "val_exact_match": 1.0, "val_f1": 1.0}
    assert validation_text(line) == "validation loss 0.5000 nats (exact match 100.0 %, F1 100.0 %)"
