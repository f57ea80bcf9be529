"""Rows of a file, by format; a text file is one document, however large, in pieces.

    text      the whole file, read in pieces
    jsonl     one JSON object a line, its columns are keys
    csv, tsv  a header, then rows
    parquet   row groups, one at a time

Each mistake names the file and the line.
"""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from xtcli.data.text import Tally, from_bytes, from_json, is_valid, pieces, read_pieces, survey
from xtcli.errors import UserError, did_you_mean, refuse

ROW_CHARS = 60

Row = tuple[str, list[Any]]
"""Where a row stands, FILE:LINE for instance, and the values of the columns that were asked for."""


class Piece(NamedTuple):
    """One text per stream of a document, or a part of it; `last` ends the document."""

    texts: tuple[str, ...]
    last: bool


def read(path: Path, form: str, columns: Sequence[str], tally: Tally) -> Iterator[Piece]:
    """The documents of one file; raises UserError with file and line for what cannot be read."""
    if form == "text":
        yield from _document(path, tally)
    else:
        for place, values in rows(path, form, columns, tally):
            yield from row(texts(place, columns, values), tally)


def rows(path: Path, form: str, columns: Sequence[str], tally: Tally) -> Iterator[Row]:
    """The rows of one file with columns: where each stands, and what these columns hold, of any type."""
    return ROWS[form](path, columns, tally)


def texts(place: str, columns: Sequence[str], values: Sequence[Any]) -> list[str | None]:
    """The values of a row as texts; raises UserError for one that is none."""
    for column, value in zip(columns, values, strict=True):
        if value is not None and not isinstance(value, str):
            raise wrong_type(place, column, value)
    return list(values)


def row(values: Sequence[str | None], tally: Tally) -> Iterator[Piece]:
    """A row as a document: in pieces where it is one text, whole where it is a pair; none where a text is missing."""
    if not all(values):
        tally["empty row"] += 1
        return
    texts = tuple(value for value in values if value)
    if len(texts) > 1:
        for text in texts:
            survey(text, True, tally)
        yield Piece(texts, True)
        return
    first = True
    for text, last in pieces(texts[0], tally):
        survey(text, first, tally)
        yield Piece((text,), last)
        first = False


def missing_column(place: str, column: str, have: Sequence[str], first: Any, key: str = "data.column") -> UserError:
    """What to tell about a column that is not there: those that are, the nearest name, the first row."""
    cause = f"has no column {column!r}; its columns are {', '.join(have) or 'none'}; its first row is {shown(first)}"
    near = did_you_mean(column, have)
    return refuse(cause, near if near.startswith("did") else f"set {key} to one of them", place=place)


def wrong_type(place: str, column: str, value: Any, wanted: str = "text") -> UserError:
    """What to tell about a value that is not what its column must hold."""
    held = type(value).__name__
    return refuse(f"column {column!r} holds {held}, not {wanted}", f"name a column of {wanted}", place=place)


def shown(value: Any) -> str:
    """A row on one line, its texts shortened."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {shown(item)}" for key, item in value.items()) + "}"
    text = repr(value)
    return text if len(text) <= ROW_CHARS else text[: ROW_CHARS - 4] + "..." + text[-1]


def _document(path: Path, tally: Tally) -> Iterator[Piece]:
    first = True
    with open(path, "rb") as file:
        for text, last in read_pieces(file, tally):
            if first and last and not text:
                tally["empty file"] += 1
                return
            survey(text, first, tally)
            yield Piece((text,), last)
            first = False


def _jsonl(path: Path, columns: Sequence[str], tally: Tally) -> Iterator[Row]:
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            place = f"{path}:{number}"
            if number == 1 and line.startswith(b"\xef\xbb\xbf"):
                tally["byte order mark"] += 1
                line = line[3:]
            if not line.strip():
                tally["blank line"] += 1
                continue
            text = from_bytes(line)
            valid = is_valid(text)
            try:
                found = json.loads(text)
            except (ValueError, RecursionError) as error:
                raise refuse(f"is not JSON ({error})", "each line must hold one JSON object", place=place) from None
            if not isinstance(found, dict):
                raise refuse(
                    f"holds a JSON {type(found).__name__}, not an object", "each line must hold one", place=place
                )
            yield place, [_cell(found, column, place, valid, tally) for column in columns]


def _cell(found: dict[str, Any], column: str, place: str, valid: bool, tally: Tally) -> Any:
    if column not in found:
        raise missing_column(place, column, list(found), found)
    value = found[column]
    return from_json(value, valid, tally) if isinstance(value, str) and not value.isascii() else value


def _csv(path: Path, columns: Sequence[str], tally: Tally) -> Iterator[Row]:
    csv.field_size_limit(sys.maxsize)
    with open(path, "rb") as raw:
        if raw.read(3) == b"\xef\xbb\xbf":
            tally["byte order mark"] += 1
        else:
            raw.seek(0)
        file = io.TextIOWrapper(raw, encoding="utf-8", errors="surrogateescape", newline="")
        reader = csv.reader(file, delimiter="\t" if path.suffix.lower() == ".tsv" else ",", strict=True)
        try:
            header = next(reader, [])
            first = next(reader, None)
            for column in columns:
                if column not in header:
                    place = f"{path}:1"
                    raise missing_column(place, column, header, dict(zip(header, first or [], strict=False)))
            places = [header.index(column) for column in columns]
            while first is not None:
                if not first:
                    tally["blank line"] += 1
                elif len(first) != len(header):
                    cause = f"has {len(first)} fields where the header has {len(header)}"
                    raise refuse(cause, "quote fields that hold commas", place=f"{path}:{reader.line_num}")
                else:
                    yield f"{path}:{reader.line_num}", [first[at] for at in places]
                first = next(reader, None)
        except csv.Error as error:
            raise refuse(f"is not CSV ({error})", "repair the line", place=f"{path}:{reader.line_num}") from None


def _parquet(path: Path, columns: Sequence[str], tally: Tally) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
        have = file.schema_arrow.names
        for column in columns:
            if column not in have:
                first = next(iter(file.iter_batches(batch_size=1)), None)
                raise missing_column(str(path), column, have, first.to_pylist()[0] if first and len(first) else {})
        number = 0
        for batch in file.iter_batches(batch_size=1024, columns=list(dict.fromkeys(columns))):
            for values in batch.to_pylist():
                number += 1
                yield f"{path}: row {number}", [plain(values[column]) for column in columns]
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise refuse(f"is not Parquet ({str(error).splitlines()[0]})", "repair or remove it", place=str(path)) from None
    finally:
        if "file" in locals():
            file.close()


def plain(value: Any) -> Any:
    """A value in which bytes are the text that they spell."""
    return value.decode("utf-8", "surrogateescape") if isinstance(value, bytes) else value


ROWS = {"jsonl": _jsonl, "csv": _csv, "parquet": _parquet}
