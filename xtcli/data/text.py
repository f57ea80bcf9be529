"""Text that came from bytes and can go back: what is done with bytes that are no UTF-8, and where text may be cut.

Every text inside xt is a `str` in which a byte that is no part of valid UTF-8 stands as the lone surrogate
U+DC80 + (byte - 128), Python's "surrogateescape". Hence `to_bytes(from_bytes(data)) == data` for all data.

    in the source             policy                                               counted as
    byte order mark           kept in text files; dropped in front of csv, jsonl   byte order mark
    CRLF                      kept                                                 CRLF line end
    NUL                       kept                                                 NUL
    lone surrogate in JSON    its three bytes, as if written in UTF-8              lone surrogate
    invalid UTF-8             kept byte by byte                                    invalid byte
    blank line                kept in text; skipped between rows of jsonl, csv     blank line
    null or "" in a row       the row is skipped                                   empty row
    word of over 1 Mi chars   cut between two characters                           cut word

What is kept reaches the model whole through the kinds `bytes` and `bpe`; a tokenizer that spells text
in characters sees U+FFFD for each invalid byte, and a normaliser may drop more.
"""

from __future__ import annotations

import codecs
import re
from collections import Counter
from collections.abc import Iterator
from typing import IO

PIECE = 1 << 16
"""Characters after which a text is cut at the next safe place."""
LONGEST = 1 << 20
"""Characters after which it is cut even within a word."""

LONE = re.compile("[\ud800-\udfff]+")
_BLANK = re.compile(r"\n[ \t\r]*(?=\n)")
_FIRST_BLANK = re.compile(r"\ufeff?[ \t\r]*\n")
_SAFE = re.compile(r"(?<=\S)(?<![\s\x00-\x20\x7f-\xa0])(?=[ \t\r\n])")

Tally = Counter[str]
"""Counts by the names in the table above."""


def from_bytes(data: bytes) -> str:
    """Bytes as text; nothing is lost."""
    return data.decode("utf-8", "surrogateescape")


def to_bytes(text: str) -> bytes:
    """The bytes that a text stands for; a lone surrogate that stands for no byte gives its three bytes."""
    try:
        return text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        return b"".join(
            part.encode("utf-8", "surrogateescape" if "\udc80" <= part <= "\udcff" else "surrogatepass")
            for part in re.split("([\ud800-\udfff])", text)
        )


def is_valid(text: str) -> bool:
    """Whether a text is free of surrogates."""
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def from_json(text: str, valid: bool, tally: Tally) -> str:
    """A string out of a line of JSON. Was the line `valid` UTF-8, a surrogate is an escape sequence and no byte."""
    if is_valid(text):
        return text
    if not valid:
        return from_bytes(to_bytes(text))
    tally["lone surrogate"] += sum(len(found) for found in LONE.findall(text))
    return from_bytes(text.encode("utf-8", "surrogatepass"))


def survey(text: str, first: bool, tally: Tally) -> None:
    """Count what the table above names in one piece of a document; `first` for its first piece."""
    if first:
        tally["byte order mark"] += text.startswith("\ufeff")
        tally["blank line"] += _FIRST_BLANK.match(text) is not None
    tally["blank line"] += sum(1 for _ in _BLANK.finditer(text))
    if "\r" in text:
        tally["CRLF line end"] += text.count("\r\n")
    if "\0" in text:
        tally["NUL"] += text.count("\0")
    if not is_valid(text):
        tally["invalid byte"] += sum(len(found) for found in LONE.findall(text))


def cut(text: str, start: int, tally: Tally) -> int:
    """Where the piece that begins at `start` ends, in a text that goes on for more than LONGEST characters.

    A safe place has a visible character before it and white space behind it. No pre-tokenizer here joins the
    two, so the pieces give the tokens of the whole.
    """
    low, high = start + PIECE // 2, start + PIECE
    newline = text.rfind("\n", low, high)
    while newline > 0:
        if _SAFE.match(text, newline):
            return newline
        newline = text.rfind("\n", low, newline)
    found = _SAFE.search(text, low, start + LONGEST)
    if found:
        return found.start()
    tally["cut word"] += 1
    return start + LONGEST


def pieces(text: str, tally: Tally) -> Iterator[tuple[str, bool]]:
    """A text in pieces of at most LONGEST characters, each with whether it is the last."""
    start = 0
    while len(text) - start > LONGEST:
        end = cut(text, start, tally)
        yield text[start:end], False
        start = end
    yield text[start:], True


def read_pieces(file: IO[bytes], tally: Tally) -> Iterator[tuple[str, bool]]:
    """The text of a file of any size in pieces, as `pieces` cuts them."""
    decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
    text, start, done = "", 0, False
    while not done:
        data = file.read(LONGEST)
        done = not data
        text, start = text[start:] + decoder.decode(data, done), 0
        while len(text) - start > LONGEST:
            end = cut(text, start, tally)
            yield text[start:end], False
            start = end
    yield text[start:], True
