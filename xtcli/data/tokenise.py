"""Documents to an entry of the token cache, in bounded memory.

    <stream>.tokens   ids of all documents end to end, little-endian, 2 bytes each, 4 where an id exceeds 65,535
    <stream>.ends     where each document ends, 8-byte integers
    header.json       width, largest id and counts of each stream; bytes and policies of the source
    manifest.json     size and SHA-256 of each file, written last

The entry's bytes follow from the documents and the tokenizer alone; one that is killed leaves nothing under the
entry's name.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from xtcli.data.progress import Meter
from xtcli.data.readers import Piece
from xtcli.data.sources import Source
from xtcli.data.text import Tally, to_bytes
from xtcli.data.tokenizers import Tokenizer, threads

HEADER = "header.json"
VERSION = 1
BATCH = 1 << 22
"""Characters that are given to the tokenizer at a time."""
NARROW, WIDE = "<u2", "<u4"
PROBES, PROBE = 64, 1 << 16


class Writer:
    """One stream of an entry as it grows."""

    def __init__(self, folder: Path, name: str) -> None:
        self.path, self.ends_path = folder / f"{name}.tokens", folder / f"{name}.ends"
        self.tokens = open(self.path, "wb")  # noqa: SIM115
        self.ends = open(self.ends_path, "wb")  # noqa: SIM115
        self.width = NARROW
        self.count = self.documents = 0
        self.largest = -1

    def add(self, ids: np.ndarray[Any, Any], last: bool) -> None:
        """Append ids to the document; `last` ends it."""
        if ids.size:
            self.largest = max(self.largest, int(ids.max()))
            if self.width == NARROW and self.largest > np.iinfo(np.uint16).max:
                self._widen()
            self.tokens.write(ids.astype(self.width).tobytes())
            self.count += int(ids.size)
        if last:
            self.ends.write(np.array([self.count], dtype="<i8").tobytes())
            self.documents += 1

    def close(self) -> None:
        """Write out what is buffered."""
        self.tokens.close()
        self.ends.close()

    def _widen(self) -> None:
        """Rewrite what is there with 4 bytes an id."""
        self.tokens.close()
        wide = self.path.with_suffix(".wide")
        with open(self.path, "rb") as old, open(wide, "wb") as new:
            while data := old.read(1 << 24):
                new.write(np.frombuffer(data, dtype=NARROW).astype(WIDE).tobytes())
        wide.replace(self.path)
        self.tokens = open(self.path, "ab")  # noqa: SIM115
        self.width = WIDE


def write_entry(
    folder: Path, source: Source, streams: Sequence[str], tokenizer: Tokenizer, meter: Callable[[], Meter]
) -> None:
    """Fill an empty folder with the tokens of a source: the `write` of a folder commit."""
    writers = {name: Writer(folder, name) for name in streams}
    tally = Tally()
    read = 0
    try:
        with meter() as progress, threads():
            for batch in _batches(source.documents(tally)):
                found = iter(tokenizer.encode_batch([text for piece in batch for text in piece.texts]))
                size = 0
                for piece in batch:
                    for name, text in zip(streams, piece.texts, strict=True):
                        size += len(text) if text.isascii() else len(to_bytes(text))
                        writers[name].add(next(found), piece.last)
                read += size
                progress.add(size)
    finally:
        for writer in writers.values():
            writer.close()
    header = {
        "version": VERSION,
        "bytes": read,
        "tally": dict(sorted((name, count) for name, count in tally.items() if count)),
        "streams": {
            name: {
                "width": writer.width,
                "largest": writer.largest,
                "tokens": writer.count,
                "documents": writer.documents,
                "probe": probe(writer.path),
            }
            for name, writer in writers.items()
        },
    }
    (folder / HEADER).write_text(json.dumps(header, indent=1) + "\n", encoding="utf-8")


def probe(path: Path) -> str:
    """SHA-256 of 64 blocks spread over a file: quick to take from a file of any size."""
    digest = hashlib.sha256()
    size = path.stat().st_size
    with open(path, "rb") as file:
        for number in range(PROBES):
            file.seek(max(size - PROBE, 0) * number // (PROBES - 1))
            digest.update(file.read(PROBE))
    return digest.hexdigest()


def _batches(documents: Iterator[Piece]) -> Iterator[list[Piece]]:
    batch: list[Piece] = []
    size = 0
    for piece in documents:
        batch.append(piece)
        # A short text costs its own overhead besides its characters.
        size += sum(len(text) + 64 for text in piece.texts)
        if size >= BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
