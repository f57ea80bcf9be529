"""Classification: one label for a text or a pair of texts, for each word of a text, or for the text that fits best.

    of         a row holds                                  the model says
    sequence   a text (and a second one), a label           one of the labels                  head `sequence`
    token      a list of words, a list of as many labels    a label at the first token of      head `token`
                                                            each word
    choice     a text, a list of texts that may follow,     one score for each of them         head `choice`
               the number or the text of the right one

The labels are the values of their column: numbers in order, else by name. They are settled when training starts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from pydantic import Strict

from xtcli import registry
from xtcli.data.batch import IGNORE, Batch, round_up
from xtcli.data.order import Ints
from xtcli.data.readers import Row, wrong_type
from xtcli.errors import Problem, UserError, did_you_mean, refuse
from xtcli.objectives.base import Sample
from xtcli.objectives.labelled import Labelled, nothing_left, settled_head, text_of
from xtcli.objectives.words import clauses, count, truncated
from xtcli.registry import field, part

if TYPE_CHECKING:
    from xtcli.config.preset import Preset, Resolved
    from xtcli.data.records import Records, Side

Task = Literal["sequence", "token", "choice"]
TASKS: tuple[Task, ...] = ("sequence", "token", "choice")
SHOWN = 8
"""Labels that are named in one line."""
FEW = 20
"""Rows from which on labels that hardly repeat are taken for a mistake."""


@dataclass(frozen=True)
class Item:
    """One row that can be used: its texts and its target (a label, one for each word, or a place among the choices)."""

    number: int
    texts: tuple[str, ...]
    words: tuple[str, ...] = ()
    target: Any = None


@part("objective", "classify")
class Classify(Labelled):
    """Labels; `targets.<of>` is () or, for tokens, (T,). For choices `input_ids` is (choices, T)."""

    class Config(registry.Config):
        """Classification."""

        of: Task | None = field("what gets a label; null: told by the model's head", None)
        text: str | None = field("column of the text; null: 'text', for of=token 'tokens'", None)
        pair: str | None = field("of=sequence: column of a second text", None)
        choices: str | Annotated[tuple[str, ...], Strict(False)] = field(
            "of=choice: column that lists the texts, or several columns of one text each", "choices"
        )
        label: str | None = field("column of the label; null: 'label', for of=token 'tags'", None)
        labels: Annotated[tuple[str, ...], Strict(False)] | None = field(
            "names of the labels in the order of the outputs; null: collected from the data", None
        )
        multiple: int = field("rows are padded to the longest of a batch, rounded up to this many", 8, gt=0)

    def __init__(
        self,
        config: Any,
        split: Side,
        tokenizer: Any,
        *,
        context: int,
        seed: int,
        start: int | None = None,
        validation: bool = False,
        pad: int | None = None,
        segments: bool = False,
        decoder: bool = False,
        predict: bool = False,
    ) -> None:
        super().__init__(
            config,
            tokenizer,
            context=context,
            seed=seed,
            start=start,
            pad=pad,
            segments=segments,
            decoder=decoder,
            predict=predict,
        )
        self.of: Task = config.of
        found = [_item(config, number, row, predict) for number, row in enumerate(split.rows)]
        self.items = [item for item in found if item is not None]
        self.left_out = len(found) - len(self.items)
        if not self.items:
            raise nothing_left(split.rows, self.columns(config), "has text and label", validation)
        if self.of == "token":
            self._read_words(tokenizer)
        else:
            self._read_texts(tokenizer)

    @classmethod
    def columns(cls, config: Any) -> tuple[str, ...]:
        text, label = config.text, config.label
        if config.of == "token":
            return text or "tokens", label or "tags"
        middle = (config.pair,) if config.of == "sequence" and config.pair else ()
        if config.of == "choice":
            middle = (config.choices,) if isinstance(config.choices, str) else config.choices
        return text or "text", *middle, label or "label"

    @classmethod
    def texts(cls, config: Any, row: Row) -> Sequence[str]:
        item = _item(config, 0, row, True)
        return () if item is None else item.texts

    @classmethod
    def begin(cls, resolved: Resolved, model: Any) -> Any:
        config: Any = resolved.preset.objective
        have = [head for head in model.heads if head in TASKS] if config.of is None else [config.of]
        if len(have) != 1:
            heads = ", ".join(model.heads) or "none"
            cause = f"one head of {', '.join(TASKS)} is to be trained; the model has: {heads}"
            remedy = "set objective.of" if have else "set model.heads='{sequence: {}}' for instance"
            raise UserError(Problem(cause, resolved.place("objective"), "objective", remedy))
        return config.model_copy(update={"of": have[0]})

    @classmethod
    def settle(cls, resolved: Resolved, config: Any, records: Records) -> tuple[Preset, Any]:
        if config.of == "choice":
            return resolved.preset, config
        names = config.labels
        if not names:
            names = _names(config, records, cls.columns(config)[-1])
        config = config.model_copy(update={"labels": names})
        model: Any = resolved.preset.model
        return settled_head(resolved, config.of, names) if config.of in model.heads else resolved.preset, config

    def _read_texts(self, tokenizer: Any) -> None:
        """The ids of all texts; a row is one text, two, or as many pairs as there are choices."""
        flat = iter(tokenizer.encode_batch([text for item in self.items for text in item.texts]))
        ids = [tuple(next(flat) for _ in item.texts) for item in self.items]
        if self.of == "choice":
            self.rows = [[(first, other) for other in others] for first, *others in ids]
        else:
            self.rows = [[texts] for texts in ids]
        self.sizes = np.array([sum(map(len, texts)) for row in self.rows for texts in row], dtype=np.int64)
        self.texts_of_row = len(self.rows[0][0])
        sizes = {len(row) for row in self.rows}
        if self.of == "choice" and len(sizes) > 1 and not self.predict:
            odd = next(at for at, row in enumerate(self.rows) if len(row) != len(self.rows[0]))
            cause = f"has {len(self.rows[odd])} choices, the first row has {len(self.rows[0])}"
            raise refuse(cause, "give each row as many", place=f"row {self.items[odd].number + 1}", path="data.source")

    def _read_words(self, tokenizer: Any) -> None:
        """The ids of all texts, and for each id the number of the word that it is the first token of, else -1."""
        self.rows, self.firsts = [], []
        for item, (ids, spans) in zip(
            self.items, tokenizer.encode_spans([item.texts[0] for item in self.items]), strict=True
        ):
            ends = np.cumsum([len(word) + 1 for word in item.words])
            # A token belongs to the word that holds its last character: a space in front may be part of it.
            word = np.searchsorted(ends, np.maximum(spans[:, 1] - 1, 0), side="right")
            fresh = np.diff(word, prepend=-1) > 0
            self.rows.append([(ids,)])
            self.firsts.append(np.where(fresh, word, -1))
        self.sizes = np.array([len(row[0][0]) for row in self.rows], dtype=np.int64)
        self.texts_of_row = 1

    def __len__(self) -> int:
        return len(self.items)

    def sample(self, index: int, epoch: int) -> Sample:
        if self.of == "choice":
            raise AssertionError("choices are batched by `collate`, row by row")
        texts = self.frame.cut(*self.rows[index][0])
        sample = self.made(index, *self.frame.row(*texts))
        if not self.predict:
            sample[f"targets.{self.of}"] = self._target(index, sample["input_ids"].size, len(texts[0]))
        return sample

    def _target(self, index: int, width: int, length: int) -> Ints:
        target = self.items[index].target
        if self.of == "sequence":
            return np.array(target)
        row = np.full(width, IGNORE, dtype=np.int64)
        words = self.firsts[index][:length]
        begin = self.frame.before(1)
        row[begin : begin + length] = np.where(words >= 0, np.array(target, dtype=np.int64)[words], IGNORE)
        return row

    def word_places(self, index: int) -> Ints:
        """of=token: where each word has its label in the row; -1 for a word that was cut off or has no token."""
        places = np.full(len(self.items[index].words), -1, dtype=np.int64)
        words = self.firsts[index][: self.frame.room(1)]
        at = np.flatnonzero(words >= 0)
        places[words[at]] = at + self.frame.before(1)
        return places

    def batch(self, indices: Ints, epochs: Ints) -> Batch:
        return self._choices(indices) if self.of == "choice" else super().batch(indices, epochs)

    def _choices(self, indices: Ints) -> Batch:
        """Inputs (B, choices, T), targets (B,)."""
        rows = [[self.frame.row(*self.frame.cut(*texts)) for texts in self.rows[int(index)]] for index in indices]
        sizes = np.array([[ids.size for ids, _ in row] for row in rows])
        width = min(round_up(int(sizes.max()), self.multiple), self.context)
        shape = (*sizes.shape, width)
        ids, types = np.full(shape, self.pad, dtype=np.int64), np.zeros(shape, dtype=np.int64)
        for at, row in enumerate(rows):
            for choice, (one, kinds) in enumerate(row):
                ids[at, choice, : one.size], types[at, choice, : one.size] = one, kinds
        inputs = {"input_ids": ids, "attention_mask": np.arange(width) < sizes[..., None]}
        if self.segments:
            inputs["token_type_ids"] = types
        targets = {} if self.predict else {"choice": np.array([self.items[int(i)].target for i in indices])}
        return Batch.of(inputs, targets, indices.tolist(), sizes.sum(1).tolist())

    def scorer(self) -> Any:
        from xtcli.train.scores import LabelScores

        return LabelScores(self.of, self.config.labels if self.of != "choice" else None)

    def describe(self) -> str:
        rows, names = len(self.items), self.config.labels or ()
        what = {"sequence": "text" if self.texts_of_row == 1 else "pair of texts", "token": "text", "choice": "question"}
        told = f"{count(len(names), 'label')} ({self._shares()})" if self.of != "choice" else "one of several texts"
        return clauses(
            f"{self.of} classification: {count(rows, what[self.of]).replace('pair of textss', 'pairs of texts')}, {told}",
            "rows padded to the longest of a batch",
            truncated(self.sizes, self.frame.room(self.texts_of_row), "row"),
            f"{count(self.left_out, 'row')} without text or label left out" if self.left_out else "",
        )

    def _shares(self) -> str:
        """Each label with the number of its targets."""
        names = self.config.labels or ()
        found: Counter[int] = Counter()
        for item in self.items:
            found.update(item.target if self.of == "token" else [item.target])
        shares = [f"{name} {found[number]:,}" for number, name in enumerate(names[:SHOWN])]
        return ", ".join(shares) + (", ..." if len(names) > SHOWN else "")


def _item(config: Any, number: int, row: Row, predict: bool) -> Item | None:
    """A row as an item, None where text or label is missing; raises UserError for what cannot be read."""
    columns = Classify.columns(config)
    if config.of == "token":
        return _tagged(config, number, row, columns, predict)
    texts = [text_of(row, 0, columns)]
    if config.of == "choice" and isinstance(config.choices, str):
        texts += _list(row, 1, columns, "texts") or []
    else:
        texts += [text_of(row, at, columns) for at in range(1, len(columns) - 1)]
    if any(text is None for text in texts) or (config.of == "choice" and len(texts) < 3):
        return None
    known = tuple(text for text in texts if text is not None)
    if predict:
        return Item(number, known)
    label = name_of(row, columns)
    if label is None:
        return None
    place = _place(label, known[1:], row) if config.of == "choice" else _number(label, config.labels, row, columns)
    return Item(number, known, target=place)


def _tagged(config: Any, number: int, row: Row, columns: Sequence[str], predict: bool) -> Item | None:
    words = _list(row, 0, columns, "words")
    if not words:
        return None
    # White space within a word would make two of it.
    words = ["_".join(word.split()) or "_" for word in words]
    item = Item(number, (" ".join(words),), tuple(words))
    if predict:
        return item
    tags = row[1][1].split() if isinstance(row[1][1], str) else row[1][1]
    if tags is None:
        return None
    if not isinstance(tags, list):
        raise wrong_type(row[0], columns[1], tags)
    if len(tags) != len(words):
        cause = f"has {count(len(words), 'word')} and {count(len(tags), 'label')}"
        raise refuse(cause, f"column {columns[1]!r} must hold one for each word", place=row[0])
    names = [name_of((row[0], [tag]), columns[-1:]) for tag in tags]
    target = [IGNORE if name is None else _number(name, config.labels, row, columns) for name in names]
    return Item(number, item.texts, item.words, target)


def _list(row: Row, at: int, columns: Sequence[str], what: str) -> list[str] | None:
    """A list of texts; one text is a list of its words."""
    place, values = row
    value = values[at]
    if value is None:
        return None
    if isinstance(value, str) and what == "words":
        return value.split()
    if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
        held = f"a list of {type(value[0]).__name__}" if isinstance(value, list) and value else type(value).__name__
        cause = f"column {columns[at]!r} holds {held}, not a list of {what}"
        raise refuse(cause, "name a column that lists them", place=place)
    return value


def name_of(row: Row, columns: Sequence[str]) -> str | None:
    """The name of the label in the last column, None where there is none; raises UserError for what is no label."""
    place, values = row
    value, column = values[-1], columns[-1]
    if value is None or value == "":
        return None
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, int | str):
        return str(value)
    if isinstance(value, float):
        raise refuse(f"column {column!r} holds {value}, and a label is a name or a whole number", place=place)
    cause = f"column {column!r} holds {type(value).__name__}, and a row has one label"
    raise refuse(cause, "name a column of labels", place=place)


def _number(label: str, names: Sequence[str] | None, row: Row, columns: Sequence[str]) -> int:
    if names is None:
        return 0
    if label not in names:
        known = f"column {columns[-1]!r} holds the label {label!r}, which is none of the {len(names)} of the model"
        raise refuse(known, did_you_mean(label, names), place=row[0])
    return names.index(label)


def _place(label: str, choices: Sequence[str], row: Row) -> int:
    if label in choices:
        return choices.index(label)
    if label.isdecimal() and int(label) < len(choices):
        return int(label)
    cause = f"{label!r} is neither one of the {len(choices)} choices nor a number from 0 to {len(choices) - 1}"
    raise refuse(cause, "name the column that says which is right with objective.label", place=row[0])


def _names(config: Any, records: Records, column: str) -> tuple[str, ...]:
    """The labels in the data, in order."""
    found: Counter[str] = Counter()
    for place, values in records.rows:
        tags = values[-1]
        if config.of == "token":
            tags = tags.split() if isinstance(tags, str) else tags or []
        for tag in tags if config.of == "token" and isinstance(tags, list) else [tags]:
            name = name_of((place, [tag]), [column])
            if name is not None:
                found[name] += 1
    if len(found) < 2:
        only = f"only the label {next(iter(found))!r}" if found else "no label"
        cause = f"column {column!r} holds {only} in {count(len(records.rows), 'row')}"
        raise refuse(cause, "name another column with objective.label, or raise data.limit", path="objective.label")
    if found.total() >= FEW and len(found) > found.total() / 2:
        cause = f"column {column!r} holds {len(found):,} different values in {found.total():,}, which are no labels"
        remedy = "name the column of labels with objective.label, or list them in objective.labels"
        raise refuse(cause, remedy, path="objective.label")
    whole = all(name.lstrip("-").isdecimal() for name in found)
    return tuple(sorted(found, key=int) if whole else sorted(found))
