"""Local files as a source: which ones of a folder, what identifies them, their documents in order.

Order is that of the paths below the folder, by code points. What identifies the source is the list of formats and
contents, not where the files lie or what they are called: SHA-256 of the bytes of all files where they are
1 GiB or less together, else size, time of change and SHA-256 of 64 blocks of each file.

Left out, and counted: hidden names, binary files, files in UTF-16. A file is binary when more than 30 % of its
first 64 KiB are control characters or no UTF-8.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from xtcli.data.readers import Piece, Row, read, rows
from xtcli.data.text import Tally
from xtcli.errors import UserError, nearest, refuse

WHOLE = 1 << 30
BLOCKS, BLOCK = 64, 1 << 16
HEAD = 1 << 16
BINARY_SHARE = 0.3
FORMATS = {".jsonl": "jsonl", ".ndjson": "jsonl", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet"}
BINARY = set(
    ".7z .a .avi .bin .bz2 .class .dll .doc .docx .dylib .eot .exe .gif .gz .ico .jar .jpeg .jpg .mkv .mov .mp3 .mp4 "
    ".npy .npz .o .ogg .onnx .otf .pdf .pickle .pkl .png .ppt .pptx .pt .pth .pyc .rar .safetensors .so .sqlite .tar "
    ".tgz .tif .tiff .ttf .wav .webm .webp .whl .woff .woff2 .xls .xlsx .xz .zip .zst".split()
)
WIDE = (b"\xff\xfe", b"\xfe\xff")
_CONTROL = bytes(set(range(32)) - {7, 8, 9, 10, 12, 13, 27}) + b"\x7f"


@dataclass(frozen=True)
class File:
    """One file of a source."""

    path: Path
    form: str
    size: int


class Files:
    """A source of local files. `size` is in bytes; `skipped` counts what was left out, by reason."""

    def __init__(
        self, files: Sequence[File], columns: Sequence[str], limit: int | None, name: str, skipped: Counter[str]
    ) -> None:
        self.files = files
        self.columns = tuple(columns)
        self.limit = limit
        self.name = name
        self.skipped = skipped
        self.size: int | None = sum(file.size for file in files)

    def describe(self) -> str:
        """The source in words, with counts."""
        count = f"{counted(len(self.files), 'file')}, " if len(self.files) != 1 else ""
        left = ", ".join(counted(number, reason) for reason, number in sorted(self.skipped.items()))
        return f"{self.name}: {count}{amount(self.size or 0)}" + (f" (left out: {left})" if left else "")

    def fingerprint(self) -> Any:
        """What identifies the texts: contents and every option of reading, as plain data."""
        return self._fingerprint

    @cached_property
    def _fingerprint(self) -> Any:
        # Taken first, so that a change while the digests are made is noticed after reading.
        assert len(self._state) == len(self.files)
        whole = (self.size or 0) <= WHOLE
        digests = [[file.form, file.size, _digest(file, whole)] for file in self.files]
        return {"files": digests, "columns": self.columns, "limit": self.limit}

    def documents(self, tally: Tally) -> Iterator[Piece]:
        """The documents, in pieces; raises UserError for a file that cannot be read or that changes meanwhile."""
        before = self._state
        yield from self._read(tally)
        for file, old, new in zip(self.files, before, self._states(), strict=True):
            if old != new:
                raise refuse("was changed while it was read", "start again", place=str(file.path))

    def records(self, tally: Tally) -> Iterator[Row]:
        """The rows, at most `limit`, with values of any type."""
        number = 0
        for file in self.files:
            try:
                for found in rows(file.path, file.form, self.columns, tally):
                    if number == self.limit:
                        return
                    yield found
                    number += 1
            except OSError as error:
                raise unreadable(file.path, error) from None

    def _read(self, tally: Tally) -> Iterator[Piece]:
        number = 0
        for file in self.files:
            try:
                for piece in read(file.path, file.form, self.columns, tally):
                    yield piece
                    number += piece.last
                    if number == self.limit:
                        return
            except OSError as error:
                raise unreadable(file.path, error) from None

    @cached_property
    def _state(self) -> list[tuple[int, int]]:
        """Size and time of change of each file when the source was first used."""
        return self._states()

    def _states(self) -> list[tuple[int, int]]:
        return [(status.st_size, status.st_mtime_ns) for status in (os.stat(file.path) for file in self.files)]


def open_files(path: Path, columns: Sequence[str], glob: str | None, limit: int | None, key: str) -> Files:
    """A file or a folder as a source; raises UserError for a folder without text, an empty or a binary file."""
    if path.is_dir():
        return _open_folder(path, columns, glob, limit, key)
    if glob is not None:
        raise refuse(
            f"is a file, so glob {glob!r} picks nothing", "set data.glob=null", place=str(path), path="data.glob"
        )
    suffix = path.suffix.lower()
    form = "jsonl" if suffix == ".json" else FORMATS.get(suffix, "text")
    size = _size(path)
    if size == 0:
        raise refuse("is empty (0 bytes)", "give a file with text", place=str(path), path=key)
    reason = None if form == "parquet" else _unreadable(path)
    if reason:
        remedy = "convert it to UTF-8 text" if "UTF-16" in reason else "give a text, jsonl, csv or parquet file"
        raise refuse(f"is {reason}", remedy, place=str(path), path=key)
    if form == "text" and len(columns) > 1:
        raise refuse("is plain text, and pairs need two columns", "give a jsonl, csv or parquet file", place=str(path))
    return Files([File(path, form, size)], columns, limit, str(path), Counter())


def _open_folder(path: Path, columns: Sequence[str], glob: str | None, limit: int | None, key: str) -> Files:
    skipped: Counter[str] = Counter()
    files, suffixes = [], Counter[str]()
    chosen = _matcher(glob)
    json_rows = glob is not None and glob.endswith(".json")
    for file in walk(path, skipped):
        if not chosen(file.relative_to(path).as_posix()):
            continue
        suffix = file.suffix.lower()
        suffixes[suffix or "no suffix"] += 1
        form = "jsonl" if suffix == ".json" and json_rows else FORMATS.get(suffix, "text")
        size = _size(file)
        reason = "binary file" if suffix in BINARY else _unreadable(file) if form == "text" and size else None
        if reason is None and size == 0:
            reason = "empty file"
        if reason is None and form == "text" and len(columns) > 1:
            reason = "plain text file"
        if reason:
            skipped["UTF-16 file" if "UTF-16" in reason else "binary file" if "binary" in reason else reason] += 1
            continue
        files.append(File(file, form, size))
    if not files:
        found = ", ".join(f"{count} {suffix}" for suffix, count in suffixes.most_common(4))
        if glob and not suffixes:
            raise refuse(f"no file matches glob {glob!r}", "try '**/*.txt'", place=str(path), path="data.glob")
        cause = f"holds no text ({found})" if suffixes else "holds no files"
        raise refuse(cause, "give a folder with text, code, jsonl, csv or parquet files", place=str(path), path=key)
    return Files(files, columns, limit, str(path), skipped)


def walk(folder: Path, skipped: Counter[str]) -> Iterator[Path]:
    """The files below a folder in order; hidden ones are counted, links to folders not followed."""
    found = []
    for parent, folders, names in os.walk(folder):
        for name in [name for name in folders if name.startswith(".")]:
            folders.remove(name)
            skipped["hidden folder"] += 1
        for name in names:
            if name.startswith("."):
                skipped["hidden file"] += 1
            elif os.path.isfile(os.path.join(parent, name)):
                found.append(Path(parent, name))
    yield from sorted(found, key=lambda path: path.relative_to(folder).as_posix())


def missing_path(source: str, key: str, also: str = "") -> UserError:
    """What to tell about a path that is not there: the nearest name beside it."""
    path = Path(source).expanduser()
    parent = path.parent
    while not parent.is_dir():
        path, parent = parent, parent.parent
    try:
        near = nearest(path.name, os.listdir(parent))
    except OSError:
        near = None
    remedy = f"did you mean '{parent / near}'?" if near else "check the path"
    return refuse(f"no such file or folder{also}", remedy, place=source, path=key)


def unreadable(path: Path, error: OSError) -> UserError:
    """What to tell about a file that the system does not give."""
    return refuse(f"cannot be read ({error.strerror})", "check its permissions", place=str(path))


def counted(number: int, noun: str) -> str:
    """A number with its noun."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def amount(size: int) -> str:
    """Bytes in the unit that suits."""
    for unit, scale in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if size >= scale:
            return f"{size / scale:.1f} {unit}"
    return counted(size, "byte")


def _matcher(glob: str | None) -> Any:
    """Whether a relative path matches: * stays within a name, **/ crosses folders, one without / fits anywhere."""
    if glob is None:
        return lambda path: True
    text = glob if "/" in glob else f"**/{glob}"
    parts = re.split(r"(\*\*/|\*\*|\*|\?|\[[^\]]+\])", text)
    known = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    pattern = "".join(
        known.get(part, part if part.startswith("[") and part.endswith("]") else re.escape(part)) for part in parts
    )
    return re.compile(pattern, re.DOTALL).fullmatch


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError as error:
        raise unreadable(path, error) from None


def _unreadable(path: Path) -> str | None:
    """Why a file is no text, None when it is."""
    try:
        with open(path, "rb") as file:
            head = file.read(HEAD)
    except OSError as error:
        raise unreadable(path, error) from None
    if head.startswith(WIDE):
        return "in UTF-16"
    control = len(head) - len(head.translate(None, _CONTROL))
    text = head.decode("utf-8", "surrogateescape")
    broken = 0 if text.isascii() else len(re.findall("[\udc80-\udcff]", text))
    return "binary or not in UTF-8" if control + broken > BINARY_SHARE * len(head) else None


def _digest(file: File, whole: bool) -> str:
    try:
        with open(file.path, "rb") as handle:
            if whole:
                return hashlib.file_digest(handle, "sha256").hexdigest()
            digest = hashlib.sha256(str(os.fstat(handle.fileno()).st_mtime_ns).encode())
            for number in range(BLOCKS):
                handle.seek(max(file.size - BLOCK, 0) * number // (BLOCKS - 1))
                digest.update(handle.read(BLOCK))
            return digest.hexdigest()
    except OSError as error:
        raise unreadable(file.path, error) from None
