"""Where documents come from: `open_source` turns the `data` section into one of

    stdlib            the standard library of this Python              xtcli.data.stdlib
    a path            a file or folder that exists                     xtcli.data.files
    owner/name        a dataset of the Hugging Face hub                xtcli.data.hub

A path wins over a hub name; a folder named stdlib is ./stdlib. A bare word that is no path, or a path into a folder
that exists, is refused and never looked up on the network.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from xtcli.config.data import DataConfig
from xtcli.data.files import missing_path, open_files
from xtcli.data.readers import Piece, Row
from xtcli.data.stdlib import open_stdlib
from xtcli.data.text import Tally

STDLIB = "stdlib"


class Source(Protocol):
    """Documents in a fixed order, `limit` at most. `size` is in bytes, None where it is not known before reading."""

    size: int | None
    limit: int | None

    def describe(self) -> str:
        """The source in words, with counts."""

    def fingerprint(self) -> Any:
        """What identifies the texts: contents and every option of reading, as plain data."""

    def documents(self, tally: Tally) -> Iterator[Piece]:
        """The documents, in pieces; `tally` counts what xtcli.data.text names."""

    def records(self, tally: Tally) -> Iterator[Row]:
        """The rows of a source with columns, each with its place."""


def open_source(config: DataConfig, streams: Sequence[str] = ("text",), *, key: str = "data.source") -> Source:
    """The source that a config names, one column for each stream; `key` is how messages call it.

    Raises UserError for what is missing, empty, without text, or without the column.
    """
    return open_columns(config, columns_of(config, streams), key=key)


def open_columns(config: DataConfig, columns: Sequence[str], *, key: str = "data.source") -> Source:
    """`open_source` with the columns by their names."""
    if config.source == STDLIB:
        return open_stdlib(columns, config.limit)
    path = Path(config.source).expanduser()
    if path.exists():
        return open_files(path, columns, config.glob, config.limit, key)
    from xtcli.data.hub import NAME, Hub

    if not NAME.fullmatch(config.source) or (path.parent.is_dir() and "/" in config.source):
        also = "" if "/" in config.source else ", and a dataset of the hub is named owner/name"
        raise missing_path(config.source, key, also)
    return Hub(config.source, config.subset, config.split, columns, config.streaming, config.limit)


def columns_of(config: DataConfig, streams: Sequence[str]) -> list[str]:
    """The column of each stream: pairs are read from `source` and `target` unless the config says otherwise."""
    names = {
        "text": config.column,
        "source": config.source_column or "source",
        "target": config.target_column or "target",
    }
    return [names[stream] for stream in streams]
