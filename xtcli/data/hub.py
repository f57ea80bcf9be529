"""Datasets of the Hugging Face hub as a source, downloaded or streamed; `datasets` is imported only here.

What identifies the texts is the content hash that `datasets` keeps of a downloaded set, or, where rows are
streamed, the commit of the repository; with it the columns and every option of reading.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

from xtcli.data.readers import Piece, Row, missing_column, plain, row, texts
from xtcli.data.text import Tally
from xtcli.errors import UserError, refuse

NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


class Hub:
    """A split of a hub dataset. `size` is in bytes, None where it is not known before reading."""

    def __init__(
        self, name: str, subset: str | None, split: str, columns: Sequence[str], streaming: bool, limit: int | None
    ) -> None:
        self.name, self.subset, self.split = name, subset, split
        self.columns, self.streaming, self.limit = tuple(columns), streaming, limit
        self.rows = _load(name, subset, split, streaming)
        self.size: int | None = None if streaming else int(self.rows.dataset_size or 0) or None
        self._check_columns()

    def describe(self) -> str:
        """The source in words."""
        rows = "streamed" if self.streaming else f"{len(self.rows):,} rows"
        return f"hub dataset {self.name}{f' ({self.subset})' if self.subset else ''}, split {self.split}, {rows}"

    def fingerprint(self) -> Any:
        """What identifies the texts."""
        version = _commit(self.name) if self.streaming else self.rows._fingerprint
        where = [self.name, self.subset, self.split]
        return {"hub": where, "version": version, "columns": self.columns, "limit": self.limit}

    def documents(self, tally: Tally) -> Iterator[Piece]:
        """The documents, in pieces."""
        number = 0
        for place, values in self._read():
            for piece in row(texts(place, self.columns, values), tally):
                yield piece
                number += piece.last
            if number == self.limit:
                return

    def records(self, tally: Tally) -> Iterator[Row]:
        """The rows, at most `limit`, with values of any type; whole numbers that have names are given by name."""
        names = [_names((self.rows.features or {}).get(column)) for column in self.columns]
        for place, values in islice(self._read(), self.limit):
            yield place, [_named(value, name) for value, name in zip(values, names, strict=True)]

    def _read(self) -> Iterator[Row]:
        wanted = list(dict.fromkeys(self.columns))
        for at, values in enumerate(self.rows.select_columns(wanted), 1):
            yield f"{self.name}: row {at}", [plain(values[column]) for column in self.columns]

    def _check_columns(self) -> None:
        first = next(iter(islice(self.rows, 1)), None)
        if first is None:
            raise refuse(f"split {self.split} has no rows", "choose another data.split", place=self.name)
        for column in self.columns:
            if column not in first:
                raise missing_column(self.name, column, list(first), first)


def _names(feature: Any) -> Any:
    """What names the whole numbers of a column, of its lists too; None where they have no names."""
    return getattr(feature, "int2str", None) or getattr(getattr(feature, "feature", None), "int2str", None)


def _named(value: Any, name: Any) -> Any:
    """The name of a label, or those of a list; datasets that hide a label count it -1."""
    if name is not None and isinstance(value, list):
        return [_named(one, name) for one in value]
    if name is None or not isinstance(value, int):
        return value
    return name(value) if value >= 0 else None


def _load(name: str, subset: str | None, split: str, streaming: bool) -> Any:
    import datasets

    try:
        return datasets.load_dataset(name, subset, split=split, streaming=streaming)
    except Exception as error:
        # Network, hub and file errors of four libraries arrive here; each is about what the user asked for.
        raise unreachable(name, error) from error


def unreachable(name: str, error: Exception) -> UserError:
    """What to tell when a dataset cannot be loaded."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    remedy = "check the name, data.subset, data.split and the network; a local path must exist"
    return refuse(f"cannot be loaded from the hub, and is no file or folder here ({lines[0]})", remedy, place=name)


def _commit(name: str) -> str:
    from huggingface_hub import HfApi

    try:
        return str(HfApi().dataset_info(name).sha)
    except Exception as error:
        raise unreachable(name, error) from error
