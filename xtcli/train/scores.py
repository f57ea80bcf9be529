"""What is measured at a validation beside the loss: how often the model's answer is right.

    accuracy       share of the targets whose likeliest label is theirs
    f1, labels     mean over the labels of 2 TP / (2 TP + FP + FN) (macro-F1); a label that is neither expected nor
                   predicted does not count
    exact_match    share of the questions whose answer equals one of the expected ones
    f1, answers    mean over the questions of 2 PR / (P + R) over words, the best of the expected answers

Answers are compared as SQuAD does (Rajpurkar et al. 2016, arXiv:1606.05250): lower case, without punctuation, without
the articles a, an, the, words parted by one space. All scores lie between 0 and 1.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from torch import Tensor

from xtcli.data.batch import IGNORE, Batch

Outputs = Mapping[str, Mapping[str, Tensor]]
"""The outputs of each head that has targets, by head and by name."""

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


class Scorer(Protocol):
    """Counts over the batches of one validation."""

    def add(self, batch: Batch, outputs: Outputs) -> None:
        """Count one batch."""

    def result(self) -> dict[str, float]:
        """The scores by name; none where nothing was counted."""


class LabelScores:
    """Accuracy and macro-F1 of one head's labels; accuracy alone where labels are places (`names` is None)."""

    def __init__(self, head: str, names: Sequence[str] | None) -> None:
        self.head, self.named = head, names is not None
        self.right = self.total = 0
        self.confusion = np.zeros((len(names or ()), len(names or ())), dtype=np.int64)

    def add(self, batch: Batch, outputs: Outputs) -> None:
        (logits,) = outputs[self.head].values()
        expected = batch.targets[self.head].reshape(-1)
        predicted = logits.argmax(-1).reshape(-1)
        kept = expected != IGNORE
        self.count(expected[kept].cpu().numpy(), predicted[kept].cpu().numpy())

    def count(self, expected: np.ndarray[Any, Any], predicted: np.ndarray[Any, Any]) -> None:
        """Count labels, by number."""
        self.right += int((expected == predicted).sum())
        self.total += expected.size
        if self.named:
            np.add.at(self.confusion, (expected, predicted), 1)

    def result(self) -> dict[str, float]:
        if not self.total:
            return {}
        found = {"accuracy": self.right / self.total}
        return found | ({"f1": macro_f1(self.confusion)} if self.named else {})


def macro_f1(confusion: np.ndarray[Any, Any]) -> float:
    """The mean F1 of the labels that occur; rows are expected, columns predicted labels."""
    hits = np.diagonal(confusion)
    both = confusion.sum(0) + confusion.sum(1)
    occurs = both > 0
    return float((2 * hits[occurs] / both[occurs]).mean()) if occurs.any() else 0.0


class AnswerScores:
    """Exact match and F1 of answers in words."""

    def __init__(self) -> None:
        self.exact = self.overlap = 0.0
        self.total = 0

    def count(self, predicted: str, expected: Sequence[str]) -> None:
        """Count one question; `expected` is empty or holds "" where it has no answer."""
        self.total += 1
        wanted = list(expected) or [""]
        self.exact += max(float(normal(predicted) == normal(answer)) for answer in wanted)
        self.overlap += max(word_f1(predicted, answer) for answer in wanted)

    def result(self) -> dict[str, float]:
        """Both means."""
        if not self.total:
            return {}
        return {"exact_match": self.exact / self.total, "f1": self.overlap / self.total}


def normal(answer: str) -> str:
    """An answer as it is compared."""
    return " ".join(_ARTICLES.sub(" ", answer.lower().translate(_PUNCTUATION)).split())


def word_f1(predicted: str, expected: str) -> float:
    """The overlap of two answers in words; 1 where both are empty."""
    ours, theirs = normal(predicted).split(), normal(expected).split()
    if not ours or not theirs:
        return float(ours == theirs)
    shared = sum((Counter(ours) & Counter(theirs)).values())
    return 2 * shared / (len(ours) + len(theirs))
