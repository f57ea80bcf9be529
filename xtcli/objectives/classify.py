"""Classification: one label for a text or a pair of texts, for each word of a text, or for the text that fits best.

    of         a row holds                                  the model says
    sequence   a text (and a second one), a label           one of the labels                  head `sequence`
               the same, a list of labels                   each label that holds, or not      with problem `many`
               the same, a number or a list of them         numbers                            with problem `number`
    token      a list of words, a list of as many labels    a label at the first token of      head `token`
                                                            each word
    choice     a text, a list of texts that may follow,     one score for each of them         head `choice`
               the number or the text of the right one

The labels are the values of their column: numbers in order, else by name. They are settled when training starts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
from pydantic import Strict

from xtcli import registry
from xtcli.data.batch import IGNORE, Batch, round_up
from xtcli.data.order import Ints
from xtcli.data.readers import Row
from xtcli.errors import Problem as Mistake
from xtcli.errors import UserError, refuse
from xtcli.objectives.base import Sample
from xtcli.objectives.labelled import Labelled, in_pieces, is_stated, nothing_left, settled_head
from xtcli.objectives.labels import Item, Problem, Task, fields_of, item_of, names_in, numbers_of
from xtcli.objectives.words import clauses, count, truncated
from xtcli.registry import field, part

if TYPE_CHECKING:
    from xtcli.config.preset import Preset, Resolved
    from xtcli.data.records import Records, Side

TASKS: tuple[Task, ...] = ("sequence", "token", "choice")
SHOWN = 8
"""Labels that are named in one line."""


@part("objective", "classify")
class Classify(Labelled):
    """Labels; `targets.<of>` is () or, for tokens, (T,). For choices `input_ids` is (choices, T).

    Where a text has several labels or numbers, `targets.sequence` is (1, outputs), floats: the axis that other targets
    have for places is there, so that a batch that loses columns of padding does not lose labels.
    """

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
        problem: Problem | None = field(
            "of=sequence: one label of several, any number of labels, or numbers; null: told by the model's head", None
        )
        multiple: int = field("rows are padded to the longest of a batch, rounded up to this many", 8, gt=0)

    def __init__(self, config: Any, split: Side, tokenizer: Any, *, validation: bool = False, **options: Any) -> None:
        super().__init__(config, tokenizer, **options)
        self.of: Task = config.of
        found = [item_of(config, number, row, not self.predict) for number, row in enumerate(split.rows)]
        self.items: list[Item] = [item for item in found if item is not None]
        self.left_out = len(found) - len(self.items)
        if not self.items:
            raise nothing_left(split.rows, self.columns(config), "has both text and label", validation)
        self.used = [split.rows[item.number] for item in self.items]
        if self.of == "choice" and not self.predict:
            self._check_choices()
        self.firsts: list[Ints] = []
        self.rows = self._words(tokenizer) if self.of == "token" else self._texts(tokenizer)
        self.sizes = np.array([sum(map(len, texts)) for row in self.rows for texts in row], dtype=np.int64)
        self.cut_short = int(self.sizes.max()) > self.frame.room(len(self.rows[0][0]))

    @classmethod
    def fields(cls, config: Any) -> tuple[tuple[str, str], ...]:
        return fields_of(config)

    @classmethod
    def texts(cls, config: Any, row: Row) -> Sequence[str]:
        item = item_of(config, 0, row, labelled=False)
        return () if item is None else item.texts

    @classmethod
    def begin(cls, resolved: Resolved, model: Any) -> Any:
        config: Any = resolved.preset.objective
        have = [head for head in TASKS if head in model.heads] if config.of is None else [config.of]
        if len(have) != 1:
            heads = ", ".join(model.heads) or "none"
            cause = f"one of the heads {', '.join(TASKS)} is to be trained; the model has: {heads}"
            remedy = "say which with objective.of" if have else "set model.heads='{sequence: {}}' for instance"
            raise UserError(Mistake(cause, resolved.place("objective"), "objective", remedy))
        config = config.model_copy(update={"of": have[0]})
        return config.model_copy(update={"problem": cls._problem(resolved, config)})

    @classmethod
    def _problem(cls, resolved: Resolved, config: Any) -> Problem | None:
        """What the head and the objective say together of the problem; null where it is for the data to tell."""
        model: Any = resolved.preset.model
        head = model.heads.get(config.of)
        if config.of != "sequence" or head is None:
            if config.problem not in (None, "one"):
                cause = f"is '{config.problem}', and of={config.of} has one label"
                raise refuse(cause, "leave it out", place=resolved.place("objective.problem"), path="objective.problem")
            return "one"
        path = f"model.heads.{config.of}.problem"
        said: Problem | None = head.problem
        if config.problem is None:
            return "number" if said is None and head.labels == 1 else said
        if said not in (None, config.problem) and is_stated(resolved, path):
            cause = f"is '{said}', and objective.problem is '{config.problem}'"
            raise refuse(cause, f"set {path}={config.problem}", place=resolved.place(path), path=path)
        return config.problem  # type: ignore[no-any-return]

    @classmethod
    def settle(cls, resolved: Resolved, config: Any, records: Records) -> tuple[Preset, Any]:
        if config.of == "choice":
            return resolved.preset, config
        column = cls.columns(config)[-1]
        if config.problem is None:
            # The head leaves it open: lists are several labels.
            lists = any(isinstance(values[-1], list) for _, values in records.rows)
            config = config.model_copy(update={"problem": "many" if lists else "one"})
        if config.problem == "number":
            found = (numbers_of(row, column) for row in records.rows)
            width = len(next((numbers for numbers in found if numbers), (0.0,)))
            names = config.labels or tuple(map(str, range(width)))
        else:
            names = config.labels or names_in(records.rows, config.of, column, config.problem == "many")
        more = {"problem": config.problem} if config.of == "sequence" else {}
        preset = settled_head(resolved, config.of, names, **more)
        return preset, config.model_copy(update={"labels": names})

    def _check_choices(self) -> None:
        """The choices of a batch are one tensor, so every row has as many."""
        first = len(self.items[0].texts)
        for item, (place, _) in zip(self.items, self.used, strict=True):
            if len(item.texts) != first:
                cause = f"has {len(item.texts) - 1} choices, the first row has {first - 1}"
                raise refuse(cause, "give each row as many", place=place)

    def _texts(self, tokenizer: Any) -> list[list[tuple[Ints, ...]]]:
        """The ids of each row: one text, two, or a pair for each choice."""
        flat = iter(in_pieces(tokenizer.encode_batch, [text for item in self.items for text in item.texts]))
        ids = [tuple(next(flat) for _ in item.texts) for item in self.items]
        if self.of == "choice":
            return [[(first, other) for other in others] for first, *others in ids]
        return [[texts] for texts in ids]

    def _words(self, tokenizer: Any) -> list[list[tuple[Ints, ...]]]:
        """The ids of each row; `firsts` has the number of the word that an id begins, -1 for all other ids."""
        rows: list[list[tuple[Ints, ...]]] = []
        encoded = in_pieces(tokenizer.encode_spans, [item.texts[0] for item in self.items])
        for item, (ids, spans) in zip(self.items, encoded, strict=True):
            ends = np.cumsum([len(word) + 1 for word in item.words])
            # A token belongs to the word that holds its last character: a space in front may be part of it.
            word = np.searchsorted(ends, np.maximum(spans[:, 1] - 1, 0), side="right")
            self.firsts.append(np.where(np.diff(word, prepend=-1) > 0, word, -1))
            rows.append([(ids,)])
        return rows

    def __len__(self) -> int:
        return len(self.items)

    def sample(self, index: int, epoch: int) -> Sample:
        texts = self.frame.cut(*self.rows[index][0])
        sample = self.made(index, *self.frame.row(*texts))
        if not self.predict:
            sample[f"targets.{self.of}"] = self._target(index, sample["input_ids"].size)
        return sample

    def _target(self, index: int, width: int) -> np.ndarray[Any, Any]:
        if self.config.problem == "number":
            return np.array([self.items[index].target], dtype=np.float32)
        if self.config.problem == "many":
            held = np.zeros((1, len(self.config.labels)), dtype=np.float32)
            held[0, list(self.items[index].target)] = 1.0
            return held
        target = np.array(self.items[index].target, dtype=np.int64)
        if self.of == "sequence":
            return target
        row = np.full(width, IGNORE, dtype=np.int64)
        places = self.places(index)
        row[places[places >= 0]] = target[places >= 0]
        return row

    def places(self, index: int) -> Ints:
        """of=token: where each word has its label in the row; -1 for one that was cut off or has no token."""
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
        ids = np.full((*sizes.shape, width), self.pad, dtype=np.int64)
        types = np.zeros_like(ids)
        for at, row in enumerate(rows):
            for choice, (one, kinds) in enumerate(row):
                ids[at, choice, : one.size], types[at, choice, : one.size] = one, kinds
        inputs = {"input_ids": ids, "attention_mask": np.arange(width) < sizes[..., None]}
        if self.segments:
            inputs["token_type_ids"] = types
        targets = {} if self.predict else {"choice": np.array([self.items[int(i)].target for i in indices])}
        return Batch.of(inputs, targets, indices.tolist(), sizes.sum(1).tolist())

    def expected(self, index: int) -> str:
        target, names = self.items[index].target, self.config.labels
        if self.of == "token":
            return " ".join("?" if one == IGNORE else names[one] for one in target)
        if self.config.problem == "number":
            return ", ".join(f"{one:g}" for one in target)
        if self.config.problem == "many":
            return ", ".join(names[one] for one in target) or "none"
        return str(self.items[index].texts[1 + target] if self.of == "choice" else names[target])

    def scorer(self) -> Any:
        from xtcli.train.scores import LabelScores, NumberScores, SetScores

        if self.config.problem in ("many", "number"):
            return (SetScores if self.config.problem == "many" else NumberScores)(self.of)
        return LabelScores(self.of, self.config.labels if self.of != "choice" else None)

    def describe(self) -> str:
        texts = len(self.rows[0][0])
        noun = "question" if self.of == "choice" else "text" if texts == 1 else "pair"
        told = f"{count(len(self.config.labels or ()), 'label')} ({self._shares()})"
        kind = "classification"
        if self.config.problem == "number":
            kind, told = "regression", self._spread()
        elif self.config.problem == "many":
            kind, told = "classification", f"any number of {told}"
        return clauses(
            f"{self.of} {kind}: {count(len(self.items), noun)}",
            f"one of {len(self.rows[0])} texts is right" if self.of == "choice" else told,
            "rows padded to the longest of a batch",
            truncated(self.sizes, self.frame.room(texts), "row"),
            f"{count(self.left_out, 'row')} without text or label left out" if self.left_out else "",
        )

    def _spread(self) -> str:
        """What the numbers are like."""
        numbers = np.array([item.target for item in self.items], dtype=np.float64)
        each = "a number" if numbers.shape[1] == 1 else f"{numbers.shape[1]} numbers"
        return f"{each} for each (mean {numbers.mean():.4g}, standard deviation {numbers.std():.4g})"

    def _shares(self) -> str:
        """The labels with the numbers of their targets."""
        names = self.config.labels or ()
        found: Counter[int] = Counter()
        for item in self.items:
            found.update(item.target if isinstance(item.target, list | tuple) else [item.target])
        shares = [f"{name} {found[number]:,}" for number, name in enumerate(names[:SHOWN])]
        return ", ".join(shares) + (", ..." if len(names) > SHOWN else "")
