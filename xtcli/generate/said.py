"""How labels and answers are printed: for one prompt all of it, for several a line each, or as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from xtcli.generate.label import Found, Label, Labels, Said, Words
from xtcli.generate.show import visible

SHOWN, LONG = 16, 80
"""Words, and characters of a text, that `brief` shows."""


def lines(said: Said, top: int) -> list[str]:
    """What goes to standard output; at most `top` labels of a text."""
    if len(said.results) == 1:
        return [visible(line) for line in _whole(said.results[0], top)]
    return [visible(_line(result, top)).replace("\n", " ") for result in said.results]


def notes(said: Said) -> list[str]:
    """What is to be said beside it."""
    found = list(said.notes)
    if len(said.results) == 1 and isinstance(said.results[0], Found):
        one = said.results[0]
        where = f"characters {one.start:,} to {one.end:,} of the context" if one.answer else "the context has no answer"
        found.append(f"{where}, {one.probability:.1%}")
    return found


def document(said: Said, facts: dict[str, Any]) -> dict[str, Any]:
    """The whole answer as JSON."""
    return {"task": "label", **facts, "results": [_plain(result) for result in said.results], "notes": said.notes}


def brief(result: Labels | Words | Found) -> str:
    """A result beside its text, on one line."""
    if isinstance(result, Words):
        return " ".join(f"{word}/{found.label if found else '?'}" for word, found in result.words[:SHOWN])
    if isinstance(result, Found):
        return f"{result.question} => {result.answer!r}"
    text = " | ".join(result.texts)
    return f"{text if len(text) <= LONG else text[: LONG - 4] + ' ...'} => {_best(result)}"


def _best(result: Labels) -> str:
    """The likeliest label, of any number of labels those that hold; numbers as they are."""
    if result.labels[0].probability is None:
        return ", ".join(map(_share, result.labels))
    if not result.many:
        return f"{result.labels[0].label} {_share(result.labels[0])}"
    holds = [one for one in result.labels if (one.probability or 0.0) > 0.5]
    return ", ".join(f"{one.label} {_share(one)}" for one in holds) or "none"


def _whole(result: Labels | Words | Found, top: int) -> list[str]:
    if isinstance(result, Found):
        return [result.answer]
    if isinstance(result, Words):
        rows = [(word, one.label if one else "", _share(one) if one else "") for word, one in result.words]
        return _table(rows)
    return _table([(_share(one), one.label) for one in result.labels[:top]])


def _line(result: Labels | Words | Found, top: int) -> str:
    if isinstance(result, Found):
        return result.answer
    if isinstance(result, Words):
        return " ".join(f"{word}/{one.label if one else ''}" for word, one in result.words)
    return "  ".join(f"{one.label} {_share(one)}" for one in result.labels[:top])


def _share(label: Label) -> str:
    """The probability of a label, or the number that stands in its place."""
    return f"{label.value:.4g}" if label.probability is None else f"{label.probability:.1%}"


def _table(rows: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _plain(result: Labels | Words | Found) -> dict[str, Any]:
    """A result as JSON; what a head does not give is left out."""
    if isinstance(result, Words):
        return {
            "words": [{"word": word, **(_plain_label(one) if one else {"label": None})} for word, one in result.words]
        }
    if isinstance(result, Found):
        return asdict(result)
    return {"texts": list(result.texts), "labels": [_plain_label(one) for one in result.labels]}


def _plain_label(label: Label) -> dict[str, Any]:
    return {key: value for key, value in asdict(label).items() if value is not None}
