"""The token store: documents as memory-mapped ids, split into training and validation.

    document i of a stream = tokens[starts[i] : starts[i] + lengths[i]]

Validation is a fraction of the documents: those whose hash of (seed, index) falls below it, so a document stays on
its side when others are added. Where that fraction is less than one document of plain text, it is the end of the
text instead, cut at a token. Or it is a store of its own.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np

from xtcli.data.files import amount, counted
from xtcli.data.tokenise import HEADER, VERSION, probe
from xtcli.data.tokenizers import Tokenizer
from xtcli.errors import refuse
from xtcli.runs.folder import MANIFEST, Damaged, verify

Array = np.ndarray[Any, Any]
Ints = np.ndarray[Any, np.dtype[np.int64]]
VERIFIED = 4 << 30
"""Bytes of an entry up to which every byte is compared with its digest when it is opened; beyond, 64 blocks."""
CHUNK = 1 << 24
AROUND = 12


class Stream:
    """Documents of one column. `tokens` maps the file; it is opened anew in another process."""

    def __init__(self, path: Path, width: str, starts: Ints, lengths: Ints) -> None:
        self.path, self.width = path, width
        self.starts, self.lengths = starts, lengths

    def __len__(self) -> int:
        return len(self.lengths)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "tokens"}

    @cached_property
    def tokens(self) -> Array:
        """Ids of the whole file (N,), uint16 or uint32."""
        if not self.path.stat().st_size:
            return np.zeros(0, dtype=self.width)
        return np.memmap(self.path, dtype=self.width, mode="r")

    @property
    def ends(self) -> Ints:
        """Where each document ends in `tokens`."""
        return self.starts + self.lengths

    @property
    def total(self) -> int:
        """Tokens of all documents."""
        return int(self.lengths.sum())

    def document(self, index: int) -> Array:
        """The ids of one document, a view."""
        start = int(self.starts[index])
        return self.tokens[start : start + int(self.lengths[index])]

    def only(self, chosen: Array) -> Stream:
        """Some of the documents, by mask or index."""
        return Stream(self.path, self.width, self.starts[chosen], self.lengths[chosen])

    def between(self, start: int, end: int) -> Stream:
        """What lies in tokens [start, end) of the documents; a document at the edge is cut."""
        starts, ends = np.maximum(self.starts, start), np.minimum(self.ends, end)
        kept = starts < ends
        return Stream(self.path, self.width, starts[kept], (ends - starts)[kept])


@dataclass(frozen=True)
class Split:
    """One side of the split: per stream, its documents."""

    name: str
    streams: Mapping[str, Stream]

    def __len__(self) -> int:
        return len(next(iter(self.streams.values())))

    @property
    def tokens(self) -> int:
        """Tokens of all streams."""
        return sum(stream.total for stream in self.streams.values())


class Entry:
    """A committed entry of the token cache; raises Damaged when it is not what was written."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        size = sum(file.stat().st_size for file in folder.iterdir())
        verify(folder, trust=None if size <= VERIFIED else "")
        try:
            self.header = json.loads((folder / HEADER).read_bytes())
            streams = self.header["streams"]
        except (OSError, ValueError, KeyError) as error:
            raise Damaged(folder, HEADER, f"cannot be read ({error})") from None
        if self.header["version"] != VERSION:
            raise Damaged(folder, HEADER, f"has version {self.header['version']}, not {VERSION}")
        self.streams: dict[str, Stream] = {}
        for name, form in streams.items():
            path = folder / f"{name}.tokens"
            if size > VERIFIED and probe(path) != form["probe"]:
                raise Damaged(folder, path.name, "its content has changed (SHA-256 of 64 blocks differs)")
            ends = np.fromfile(folder / f"{name}.ends", dtype="<i8").astype(np.int64)
            starts = np.concatenate([np.zeros(1, np.int64), ends[:-1]]) if ends.size else ends
            self.streams[name] = Stream(path, form["width"], starts, ends - starts)
        self.digest = hashlib.sha256((folder / MANIFEST).read_bytes()).hexdigest()

    @property
    def tokens(self) -> int:
        """Tokens of all streams."""
        return int(sum(form["tokens"] for form in self.header["streams"].values()))


class Store:
    """Tokens of the data with their split; `notes` are sentences about how they came about."""

    def __init__(
        self,
        entry: Entry,
        *,
        validation: float | Entry,
        seed: int,
        source: str = "",
        notes: tuple[str, ...] = (),
    ) -> None:
        self.entry, self.source, self.notes = entry, source, notes
        self.streams: Mapping[str, Stream] = entry.streams
        self.digest = entry.digest
        if isinstance(validation, Entry):
            self.digest = hashlib.sha256((entry.digest + validation.digest).encode()).hexdigest()
            self._splits = {"train": entry.streams, "validation": validation.streams}
            self.how = "a source of its own"
        else:
            self._splits, self.how = _split(entry.streams, validation, seed)

    def split(self, name: Literal["train", "validation"]) -> Split:
        """One side of the split."""
        return Split(name, self._splits[name])

    def report(self) -> str:
        """Documents, tokens, bytes and what was done to odd text, in lines for a reader."""
        header, tokens = self.entry.header, self.entry.tokens
        documents = next(iter(header["streams"].values()))["documents"]
        what = "document" if len(self.streams) == 1 else "pair"
        lines = [
            self.source,
            f"{counted(documents, what)}, {amount(header['bytes'])}, {counted(tokens, 'token')}, "
            f"{header['bytes'] / max(tokens, 1):.2f} bytes per token",
        ]
        if header["tally"]:
            lines.append("in the text: " + ", ".join(counted(count, name) for name, count in header["tally"].items()))
        train, held = self.split("train"), self.split("validation")
        lines.append(
            f"train {counted(len(train), what)}, {counted(train.tokens, 'token')}; "
            f"validation {counted(len(held), what)}, {counted(held.tokens, 'token')} ({self.how})"
        )
        return "\n".join(line for line in [*lines, *self.notes] if line)

    def check_rows(self, rows: int, tokenizer: Tokenizer) -> None:
        """Raise UserError, with position and text, for a token whose id is not below `rows`, a model's ids."""
        splits = {id(stream): (name, stream) for side in self._splits.values() for name, stream in side.items()}
        for name, stream in splits.values():
            for begin in range(0, len(stream.tokens), CHUNK):
                found = np.flatnonzero(stream.tokens[begin : begin + CHUNK] >= rows)
                if found.size:
                    raise _beyond(name, stream, begin + int(found[0]), rows, tokenizer)


def _beyond(name: str, stream: Stream, at: int, rows: int, tokenizer: Tokenizer) -> Exception:
    number = int(np.searchsorted(stream.ends, at, side="right"))
    start = max(at - AROUND, int(stream.starts[min(number, len(stream) - 1)]) if len(stream) else 0, 0)
    text = tokenizer.decode(stream.tokens[start : at + 1].tolist())
    return refuse(
        f"token {at:,} of stream {name} (document {number:,}, after {text!r}) has id {int(stream.tokens[at]):,}, "
        f"the model has {rows:,} rows",
        f"set model.vocab={tokenizer.vocab} or a smaller tokenizer.vocab",
        path="model.vocab",
    )


def _split(streams: Mapping[str, Stream], fraction: float, seed: int) -> tuple[dict[str, dict[str, Stream]], str]:
    """Both sides and how they were told apart, in words."""
    count = len(next(iter(streams.values())))
    if not fraction:
        nothing = np.zeros(count, dtype=bool)
        return {"train": dict(streams), "validation": {n: s.only(nothing) for n, s in streams.items()}}, "none held out"
    if len(streams) == 1 and count * fraction < 1:
        return _split_end(streams, fraction)
    if count < 2:
        cause = f"{count} pair cannot be split into training and validation"
        raise refuse(cause, "give more data, or set data.validation=0", path="data.validation")
    draw = hashes(seed, count)
    held = draw < np.uint64(int(fraction * 2.0**64))
    if not held.any():
        held[int(draw.argmin())] = True
    elif held.all():
        held[int(draw.argmax())] = False
    sides = {"train": ~held, "validation": held}
    how = f"{fraction:.2%} of the documents, by hash of seed and index"
    return {side: {n: s.only(mask) for n, s in streams.items()} for side, mask in sides.items()}, how


def _split_end(streams: Mapping[str, Stream], fraction: float) -> tuple[dict[str, dict[str, Stream]], str]:
    ((name, stream),) = streams.items()
    total = stream.total
    held = max(1, int(total * fraction))
    if total < 2:
        cause = f"the data has {counted(total, 'token')}, which cannot be split into training and validation"
        raise refuse(cause, "give more text, or set data.validation=0", path="data.validation")
    cut = total - held
    how = f"the last {fraction:.2%} of the text"
    return {"train": {name: stream.between(0, cut)}, "validation": {name: stream.between(cut, total)}}, how


def hashes(seed: int, count: int) -> np.ndarray[Any, np.dtype[np.uint64]]:
    """A well-mixed 64-bit number for each index below `count`, a pure function of (seed, index): SplitMix64."""
    with np.errstate(over="ignore"):
        base = np.uint64(seed % 2**64) * np.uint64(0xD1342543DE82EF95)
        value = base + (np.arange(count, dtype=np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return value ^ (value >> np.uint64(31))
