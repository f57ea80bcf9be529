"""Extractive question answering: where in a text the answer to a question starts and ends.

    [CLS] question [SEP] a window of the context [SEP]

A context that is too long for one row is read in windows that overlap; a window without the whole answer is to point
at the first token of the row, which also says that a question has no answer. Answers are found by the number of their
first character where that is given, else by their text, first occurrence first. Rows of a training epoch are windows,
those of a validation are questions with all their windows, since a question is answered by its best window.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from xtcli import registry
from xtcli.data.batch import Batch
from xtcli.data.order import Ints
from xtcli.data.readers import Row, wrong_type
from xtcli.objectives.base import Sample
from xtcli.objectives.labelled import Labelled, in_pieces, nothing_left
from xtcli.objectives.labels import text_of
from xtcli.objectives.words import clauses, count
from xtcli.registry import field, part

if TYPE_CHECKING:
    from xtcli.config.preset import Preset, Resolved
    from xtcli.data.records import Records, Side

Answer = tuple[str, int | None]
"""The text of an answer and the number of its first character, where that is known."""


@dataclass(frozen=True)
class Question:
    """A row: a question, its context and the expected answers; `span` are the characters of the one that is taught."""

    question: str
    context: str
    answers: tuple[str, ...] = ()
    span: tuple[int, int] | None = None


@dataclass(frozen=True)
class Window:
    """Tokens [start, start + length) of the context of question number `question`."""

    question: int
    start: int
    length: int


@part("objective", "extract")
class Extract(Labelled):
    """Answers in a text; `targets.span` is (2,): the places of the first and the last token of the answer."""

    class Config(registry.Config):
        """Extractive question answering."""

        question: str = field("column of the question", "question", min_length=1)
        context: str = field("column of the text that holds the answer", "context", min_length=1)
        answers: str = field(
            "column of the answers: a text, a list of texts, or a map {text, answer_start}; none: it has no answer",
            "answers",
            min_length=1,
        )
        start: str | None = field("column of the number of an answer's first character, where answers has none", None)
        stride: int = field(
            "tokens from the start of a window to that of the next; half a window where that is less",
            128,
            gt=0,
        )
        longest: int = field("tokens of an answer, at most", 30, gt=0)
        unanswerable: bool | None = field("questions may have no answer; null: told by the data", None)
        multiple: int = field("rows are padded to the longest of a batch, rounded up to this many", 8, gt=0)

    def __init__(self, config: Any, split: Side, tokenizer: Any, *, validation: bool = False, **options: Any) -> None:
        super().__init__(config, tokenizer, **options)
        self.whole = validation or self.predict
        columns = self.columns(config)
        found = [(question_of(config, row, not self.predict), row) for row in split.rows]
        known = [(question, row) for question, row in found if question is not None]
        self.left_out = len(found) - len(known)
        if not known:
            raise nothing_left(split.rows, columns, "has a question, a context and an answer in it", validation)
        texts = list(dict.fromkeys(question.context for question, _ in known))
        contexts = dict(zip(texts, in_pieces(tokenizer.encode_spans, texts), strict=True))
        asked = in_pieces(tokenizer.encode_batch, [question.question for question, _ in known])
        room = self.frame.room(2)
        self.shortened = 0
        self.questions: list[Question] = []
        self.used: list[Row] = []
        self.asked: list[Ints] = []
        self.contexts: list[tuple[Ints, Ints]] = []
        self.taught: list[tuple[int, int] | None] = []
        self.windows: list[Window] = []
        self.windows_of: list[range] = []
        for (question, row), ids in zip(known, asked, strict=True):
            context = contexts[question.context]
            place = None if question.span is None else _tokens(context[1], *question.span)
            if question.span is not None and place is None:
                self.left_out += 1
                continue
            first = len(self.windows)
            self.shortened += len(ids) > room // 2
            ids = ids[: room // 2]
            self._cut(len(self.questions), len(context[0]), room - len(ids))
            self.windows_of.append(range(first, len(self.windows)))
            self.questions.append(question)
            self.used.append(row)
            self.asked.append(ids)
            self.contexts.append(context)
            self.taught.append(place)
        if not self.questions:
            raise nothing_left(split.rows, columns, "has an answer that tokens can tell", validation)
        self.cut_short = self.shortened > 0  # contexts are read in windows, whole

    def _cut(self, question: int, length: int, room: int) -> None:
        """The windows of one context."""
        step = min(self.config.stride, max(room // 2, 1))
        start = 0
        self.windows.append(Window(question, 0, min(room, length)))
        while start + room < length:
            start += step
            self.windows.append(Window(question, start, min(room, length - start)))

    @classmethod
    def fields(cls, config: Any) -> tuple[tuple[str, str], ...]:
        names = ("question", "context", "answers", *(["start"] if config.start else []))
        return tuple((getattr(config, name), name) for name in names)

    @classmethod
    def texts(cls, config: Any, row: Row) -> Sequence[str]:
        columns = cls.columns(config)
        return [text for text in (text_of(row, at, columns) for at in (0, 1)) if text]

    @classmethod
    def settle(cls, resolved: Resolved, config: Any, records: Records) -> tuple[Preset, Any]:
        if config.unanswerable is None:
            columns = cls.columns(config)
            none = any(not answers_of(row, columns) for row in records.rows)
            config = config.model_copy(update={"unanswerable": none})
        return resolved.preset, config

    def __len__(self) -> int:
        return len(self.questions) if self.whole else len(self.windows)

    def sample(self, index: int, epoch: int) -> Sample:
        """Window number `index`."""
        window = self.windows[index]
        asked, context = self.asked[window.question], self.contexts[window.question][0]
        ids, types = self.frame.row(asked, context[window.start : window.start + window.length])
        sample = self.made(index, ids, types)
        if not self.predict:
            sample["targets.span"] = np.array(self._target(index), dtype=np.int64)
        return sample

    def _target(self, index: int) -> tuple[int, int]:
        window = self.windows[index]
        place = self.taught[window.question]
        if place is None or place[0] < window.start or place[1] >= window.start + window.length:
            return 0, 0
        before = self.places(index).start - window.start
        return place[0] + before, place[1] + before

    def places(self, index: int) -> range:
        """Where the tokens of the context stand in the row of a window."""
        window = self.windows[index]
        start = self.frame.before(2, len(self.asked[window.question]))
        return range(start, start + window.length)

    def characters(self, index: int, first: int, last: int) -> tuple[int, int]:
        """The characters [start, end) of the context that two places of a window's row stand for."""
        window = self.windows[index]
        spans = self.contexts[window.question][1]
        shift = window.start - self.places(index).start
        return int(spans[first + shift, 0]), int(spans[last + shift, 1])

    def batch(self, indices: Ints, epochs: Ints) -> Batch:
        if self.whole:
            indices = np.array([window for index in indices for window in self.windows_of[int(index)]], dtype=np.int64)
        return self.collate([self.sample(int(index), 0) for index in indices])

    def collate(self, samples: Sequence[Sample]) -> Batch:
        """As for every objective; the targets (B, 2) are places, not a row, and are not padded."""
        import torch

        batch = super().collate([{name: row for name, row in s.items() if name != "targets.span"} for s in samples])
        if self.predict:
            return batch
        return replace(batch, targets={"span": torch.from_numpy(np.stack([s["targets.span"] for s in samples]))})

    def expected(self, index: int) -> str:
        return repr(next(iter(self.questions[index].answers), ""))

    def scorer(self) -> Any:
        from xtcli.train.scores import SpanScores

        return SpanScores(self)

    def describe(self) -> str:
        questions, windows = len(self.questions), len(self.windows)
        none = sum(place is None for place in self.taught)
        tokens = sum(len(context[0]) for context in self.contexts)
        return clauses(
            f"answers in a text: {count(questions, 'question')} on {count(tokens, 'token')} of context",
            f"{count(windows, 'window')}, each a question and a piece of its context, padded to the longest of a batch",
            f"{count(none, 'question')} without an answer" if none else "",
            f"{count(self.shortened, 'question')} cut at half a row" if self.shortened else "",
            f"{count(self.left_out, 'row')} without a text, or whose answer is not in it, left out"
            if self.left_out
            else "",
        )


def question_of(config: Any, row: Row, labelled: bool = True) -> Question | None:
    """A row as a question, None where a text is missing or no answer is where it is said to be."""
    columns = Extract.columns(config)
    question, context = text_of(row, 0, columns), text_of(row, 1, columns)
    if not question or not context:
        return None
    if not labelled:
        return Question(question, context)
    answers = answers_of(row, columns)
    if not answers:
        return Question(question, context)
    found = [span for span in (_locate(context, *answer) for answer in answers) if span is not None]
    return Question(question, context, tuple(text for text, _ in answers), found[0]) if found else None


def answers_of(row: Row, columns: Sequence[str]) -> list[Answer]:
    """The answers of a row; raises UserError for what is none."""
    place, values = row
    value: Any = values[2]
    column, starts = columns[2], values[3] if len(values) > 3 else None
    if isinstance(value, dict):
        starts = value.get("answer_start", starts)
        value = value.get("text")
    listed = value if isinstance(value, list) else [] if value is None else [value]
    begins = starts if isinstance(starts, list) else [starts] * len(listed)
    if len(begins) != len(listed):
        begins = [None] * len(listed)
    answers: list[Answer] = []
    for text, begin in zip(listed, begins, strict=True):
        if isinstance(text, dict):
            begin, text = text.get("answer_start", begin), text.get("text")
        begin = int(begin) if isinstance(begin, str) and begin.isdecimal() else begin
        if text is not None and not isinstance(text, str):
            raise wrong_type(place, column, value, "answers")
        if begin is not None and (not isinstance(begin, int) or isinstance(begin, bool)):
            raise wrong_type(place, columns[-1], begin, "whole numbers")
        if text and text.strip():
            answers.append((text, begin))
    return answers


def _locate(context: str, text: str, begin: int | None) -> tuple[int, int] | None:
    """The characters of an answer, None where it is not in the context or not where it is said to be."""
    if begin is None:
        begin = context.find(text)
    if begin < 0 or context[begin : begin + len(text)] != text:
        return None
    inner = begin + len(text) - len(text.lstrip())
    return inner, inner + len(text.strip())


def _tokens(spans: Ints, start: int, end: int) -> tuple[int, int] | None:
    """The first and the last token that share a character with [start, end), None where there is none."""
    touching = np.flatnonzero((spans[:, 0] < end) & (spans[:, 1] > start))
    return (int(touching[0]), int(touching[-1])) if touching.size else None
