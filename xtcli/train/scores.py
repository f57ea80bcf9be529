"""What is measured at a validation beside the loss: how often the model's answer is right.

    accuracy       share of the targets whose likeliest label is theirs
    f1, labels     mean over the labels of 2 TP / (2 TP + FP + FN) (macro-F1); a label that is neither expected nor
                   predicted does not count
    micro_f1       2 TP / (2 TP + FP + FN) over all labels of all texts, where any number of them holds
    mse            mean squared error of numbers
    pearson        correlation of expected and predicted numbers, the mean over the outputs; absent where one of them
                   does not vary
    exact_match    share of the questions whose answer equals one of the expected ones
    f1, answers    mean over the questions of 2 PR / (P + R) over words, the best of the expected answers

Answers are compared as SQuAD does (Rajpurkar et al. 2016, arXiv:1606.05250): lower case, without punctuation, without
the articles a, an, the, words parted by one space. All but mse and pearson lie between 0 and 1.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
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


class SetScores:
    """Micro-F1 of labels of which any number holds: one is predicted where its probability is above a half."""

    def __init__(self, head: str) -> None:
        self.head = head
        self.hits = self.both = self.texts = 0

    def add(self, batch: Batch, outputs: Outputs) -> None:
        (logits,) = outputs[self.head].values()
        expected, predicted = batch.targets[self.head].reshape(logits.shape) > 0.5, logits > 0
        self.hits += int((expected & predicted).sum())
        self.both += int(expected.sum() + predicted.sum())
        self.texts += len(logits)

    def result(self) -> dict[str, float]:
        """1 where no label was expected and none predicted."""
        return {"micro_f1": 2 * self.hits / self.both if self.both else 1.0} if self.texts else {}


class NumberScores:
    """Mean squared error and Pearson's correlation."""

    def __init__(self, head: str) -> None:
        self.head = head
        self.pairs: list[Tensor] = []

    def add(self, batch: Batch, outputs: Outputs) -> None:
        (logits,) = outputs[self.head].values()
        expected = batch.targets[self.head].reshape(logits.shape)
        self.pairs.append(torch.stack((expected, logits)).double().cpu())

    def result(self) -> dict[str, float]:
        if not self.pairs:
            return {}
        expected, predicted = torch.cat(self.pairs, 1)
        found = {"mse": float((expected - predicted).square().mean())}
        a, b = expected - expected.mean(0), predicted - predicted.mean(0)
        length = (a.square().sum(0) * b.square().sum(0)).sqrt()
        return found | ({"pearson": float(((a * b).sum(0) / length).mean())} if bool((length > 0).all()) else {})


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


class SpanScores:
    """Exact match and F1 of the answers of an `Extract` objective, each the best of all windows of its question."""

    def __init__(self, objective: Any) -> None:
        self.objective = objective
        self.best: dict[int, Span] = {}
        self.none: dict[int, Span] = {}

    def add(self, batch: Batch, outputs: Outputs) -> None:
        (found,) = outputs.values()
        self.look(batch.ids, found["start_logits"].float(), found["end_logits"].float())

    def look(self, windows: Sequence[int], start: Tensor, end: Tensor) -> None:
        """Take note of the logits (B, T) of some windows."""
        objective = self.objective
        places = [objective.places(window) for window in windows]
        inside = torch.zeros_like(start, dtype=torch.bool)
        for row, place in enumerate(places):
            inside[row, place.start : place.stop] = True
        chances = _shares(start, inside), _shares(end, inside)
        scores, first, last = (part.tolist() for part in best_spans(start, end, inside, objective.config.longest))
        nothing = (start[:, 0] + end[:, 0]).tolist()
        for row, window in enumerate(windows):
            question = objective.windows[window].question
            empty = Span(nothing[row], 0, 0, float(chances[0][row, 0] * chances[1][row, 0]))
            # What speaks for an answer in any window speaks against none: the least of the windows counts.
            if question not in self.none or empty.score < self.none[question].score:
                self.none[question] = empty
            if scores[row] == -float("inf"):
                continue
            chance = float(chances[0][row, first[row]] * chances[1][row, last[row]])
            begin, stop = objective.characters(window, first[row], last[row])
            span = Span(scores[row], begin, stop, chance)
            if question not in self.best or span.score > self.best[question].score:
                self.best[question] = span

    def answer(self, question: int) -> Span:
        """The answer to a question that was looked at; its text is empty where none is the best."""
        none = self.none[question]
        best = self.best.get(question, none)
        return none if self.objective.config.unanswerable and none.score > best.score else best

    def result(self) -> dict[str, float]:
        scores = AnswerScores()
        for number in self.none:
            span, question = self.answer(number), self.objective.questions[number]
            scores.count(question.context[span.start : span.end], question.answers)
        return scores.result()


@dataclass(frozen=True)
class Span:
    """An answer: characters [start, end) of the context, and how likely it is within its window."""

    score: float
    start: int
    end: int
    probability: float


def best_spans(start: Tensor, end: Tensor, inside: Tensor, longest: int) -> tuple[Tensor, Tensor, Tensor]:
    """The highest start[i] + end[j] with i <= j < i + longest, both inside: scores, i and j, each (B,)."""
    begin, close = (logits.masked_fill(~inside, -float("inf")) for logits in (start, end))
    length = start.shape[1]
    scores = torch.full_like(start[:, 0], -float("inf"))
    first, last = (torch.zeros_like(scores, dtype=torch.long) for _ in range(2))
    for more in range(min(longest, length)):
        best, at = (begin[:, : length - more] + close[:, more:]).max(1)
        better = best > scores
        scores = torch.where(better, best, scores)
        first, last = torch.where(better, at, first), torch.where(better, at + more, last)
    return scores, first, last


def _shares(logits: Tensor, inside: Tensor) -> Tensor:
    """The probabilities of the places inside and of place 0, which says that there is no answer."""
    open = inside.clone()
    open[:, 0] = True
    return logits.masked_fill(~open, -float("inf")).softmax(-1)
