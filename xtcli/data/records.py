"""Labelled data in memory: the rows of a source with columns, split into training and validation.

The twin of the token store for small sets, whose rows hold labels and lists beside text. Validation is an exact share
of the rows, at least one, chosen by a permutation that (number of rows, seed) determines; or a source of its own.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from xtcli.config.data import DataConfig
from xtcli.data.files import counted
from xtcli.data.order import permute
from xtcli.data.prepare import held_out
from xtcli.data.readers import Piece, Row
from xtcli.data.sources import STDLIB, Source, open_columns
from xtcli.data.text import Tally
from xtcli.errors import Problem, UserError, refuse


@dataclass(frozen=True)
class Side:
    """One side of the split."""

    name: str
    rows: Sequence[Row]

    @property
    def streams(self) -> Mapping[str, Sequence[Row]]:
        """The rows under one name, as a side of the token store has its streams."""
        return {"rows": self.rows}

    def __len__(self) -> int:
        return len(self.rows)


class Records:
    """All rows of the data, each with its place and the values of `columns`; `notes` are sentences about them."""

    def __init__(
        self, columns: Sequence[str], sides: Mapping[str, Sequence[Row]], source: str, how: str, tally: Tally
    ) -> None:
        self.columns, self.source, self.how = tuple(columns), source, how
        self.sides = dict(sides)
        self.notes = tuple(f"in the text: {counted(number, name)}" for name, number in sorted(tally.items()) if number)
        values = {name: [values for _, values in rows] for name, rows in sides.items()}
        text = json.dumps([self.columns, values], sort_keys=True, default=str)
        self.digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()

    @property
    def rows(self) -> list[Row]:
        """Those of both sides."""
        return [row for rows in self.sides.values() for row in rows]

    def split(self, name: Literal["train", "validation"]) -> Side:
        """One side of the split."""
        return Side(name, self.sides[name])

    def report(self) -> str:
        """The source, its rows and how they were split, in lines for a reader."""
        train, held = (counted(len(self.sides[name]), "row") for name in ("train", "validation"))
        counts = f"train {train}; validation {held} ({self.how})"
        return "\n".join([self.source, counts, *self.notes])


class Texts:
    """The texts of rows as a source from which a tokenizer can learn; `texts` gives those of one row."""

    size: int | None = None
    limit: int | None = None

    def __init__(self, of: Records, texts: Callable[[Row], Sequence[str]]) -> None:
        self.of, self.texts = of, texts

    def describe(self) -> str:
        """The source in words."""
        return self.of.source

    def fingerprint(self) -> Any:
        """What identifies the texts."""
        return {"records": self.of.digest}

    def documents(self, tally: Tally) -> Iterator[Piece]:
        """The texts of all rows."""
        for row in self.of.rows:
            for text in self.texts(row):
                yield Piece((text,), True)

    def records(self, tally: Tally) -> Iterator[Row]:
        """The rows themselves."""
        return iter(self.of.rows)


def read_records(data: DataConfig, columns: Sequence[str], seed: int, paths: Mapping[str, str]) -> Records:
    """The rows of a source; `paths` are the settings that name the columns.

    Raises UserError for what cannot be read, a missing column, and data without rows.
    """
    if data.source == STDLIB:
        cause = "stdlib is plain text, and labels need a file with columns"
        raise refuse(cause, "set data to a jsonl, csv or parquet file, or to a dataset of the hub", path="data.source")
    tally: Tally = Tally()
    source, rows = _read(data, columns, "data.source", tally, paths)
    if not rows:
        raise refuse("holds no rows", "give a file with rows", place=data.source, path="data.source")
    if isinstance(data.validation, str):
        _, held = _read(held_out(data), columns, "data.validation", tally, paths)
        if not held:
            raise refuse("holds no rows", "give a file with rows", place=data.validation, path="data.validation")
        sides = {"train": rows, "validation": held}
        return Records(columns, sides, source.describe(), "a source of their own", tally)
    sides, how = split_rows(rows, data.validation, seed)
    return Records(columns, sides, source.describe(), how, tally)


def _read(
    data: DataConfig, columns: Sequence[str], key: str, tally: Tally, paths: Mapping[str, str]
) -> tuple[Source, list[Row]]:
    try:
        source = open_columns(data, columns, key=key)
        return source, list(source.records(tally))
    except UserError as error:
        raise UserError(*(named(problem, paths) for problem in error.problems)) from None


def named(problem: Problem, paths: Mapping[str, str]) -> Problem:
    """What is said about columns, in the words of labelled data: with the setting that names a missing one."""
    path = next((path for column, path in paths.items() if f"no column {column!r}" in problem.cause), None)
    if path is None:
        return replace(problem, cause=problem.cause.replace("pairs need two columns", "labels need columns"))
    near = problem.remedy if problem.remedy.startswith("did") else ""
    return replace(problem, remedy=f"{near} set {path} to one of them".strip())


def split_rows(rows: Sequence[Row], share: float, seed: int) -> tuple[dict[str, list[Row]], str]:
    if not share:
        return {"train": list(rows), "validation": []}, "none held out"
    count = len(rows)
    if count < 2:
        cause = "one row cannot be split into training and validation"
        raise refuse(cause, "give more data, or set data.validation=0", path="data.validation")
    held = min(max(round(count * share), 1), count - 1)
    chosen = permute(np.arange(count, dtype=np.int64), count, seed, 0) < held
    sides = {
        "train": [row for row, out in zip(rows, chosen, strict=True) if not out],
        "validation": [row for row, out in zip(rows, chosen, strict=True) if out],
    }
    return sides, f"{share:.2%} of the rows, by a permutation that the seed gives"
