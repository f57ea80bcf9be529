"""Rows of labelled data, read: texts, lists of words or of choices, and the names of their labels.

label in the data      its name
text                   itself
whole number, 3.0      its digits
true, false            "true", "false"
null, ""               none: the row is left out

A text has one label; or, by `problem`, any number of them (a list, empty where none holds; JSON where a table holds
text) or numbers (one, or a list).
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from xtcli.data.batch import IGNORE
from xtcli.data.readers import Row, wrong_type
from xtcli.errors import did_you_mean, refuse
from xtcli.objectives.words import count

Task = Literal["sequence", "token", "choice"]
Problem = Literal["one", "many", "number"]
FEW = 20
"""Labels from which on those that hardly repeat are taken for a mistake."""


@dataclass(frozen=True)
class Item:
    """A row that can be used: its texts and its target (a label, one for each word, a place among the choices;
    several labels; numbers)."""

    number: int
    texts: tuple[str, ...]
    words: tuple[str, ...] = ()
    target: Any = None


def fields_of(config: Any) -> tuple[tuple[str, str], ...]:
    """The columns of a classification, each with the field that names it: text, what goes with it, label."""
    words = config.of == "token"
    text = config.text or ("tokens" if words else "text")
    label = config.label or ("tags" if words else "label")
    middle: tuple[tuple[str, str], ...] = ()
    if config.of == "sequence" and config.pair:
        middle = ((config.pair, "pair"),)
    elif config.of == "choice":
        names = (config.choices,) if isinstance(config.choices, str) else config.choices
        middle = tuple((name, "choices") for name in names)
    return (text, "text"), *middle, (label, "label")


def columns_of(config: Any) -> tuple[str, ...]:
    """The columns of a classification."""
    return tuple(column for column, _ in fields_of(config))


def item_of(config: Any, number: int, row: Row, labelled: bool = True) -> Item | None:
    """A row as an item, None where text or label is missing; raises UserError for what cannot be read."""
    columns = columns_of(config)
    if config.of == "token":
        return _tagged(config, number, row, columns, labelled)
    texts = [text_of(row, 0, columns)]
    if config.of == "choice" and isinstance(config.choices, str):
        texts += _list(row, 1, columns, "texts") or []
    else:
        texts += [text_of(row, at, columns) for at in range(1, len(columns) - 1)]
    known = tuple(text for text in texts if text)
    if len(known) < len(texts) or (config.of == "choice" and len(known) < 3):
        return None
    if not labelled:
        return Item(number, known)
    if config.of == "sequence" and config.problem in ("many", "number"):
        read = numbers_of if config.problem == "number" else _several
        found = read(row, columns[-1], config.labels)
        return None if found is None else Item(number, known, target=found)
    name = name_of(row[1][-1], row[0], columns[-1])
    if name is None:
        return None
    choosing = config.of == "choice"
    target = _place(name, known[1:], row[0]) if choosing else number_of(name, config.labels, row[0], columns[-1])
    return Item(number, known, target=target)


def _tagged(config: Any, number: int, row: Row, columns: Sequence[str], labelled: bool) -> Item | None:
    words = _list(row, 0, columns, "words")
    if not words:
        return None
    # White space within a word would make two of it.
    words = ["_".join(word.split()) or "_" for word in words]
    item = Item(number, (" ".join(words),), tuple(words))
    if not labelled:
        return item
    place, (_, tags) = row
    if tags is None:
        return None
    tags = tags.split() if isinstance(tags, str) else tags
    if not isinstance(tags, list):
        raise wrong_type(place, columns[1], tags, "lists of labels")
    if len(tags) != len(words):
        cause = f"has {count(len(words), 'word')} and {count(len(tags), 'label')}"
        raise refuse(cause, f"column {columns[1]!r} must hold one for each word", place=place)
    names = [name_of(tag, place, columns[1]) for tag in tags]
    target = [IGNORE if name is None else number_of(name, config.labels, place, columns[1]) for name in names]
    return Item(number, item.texts, item.words, target)


def text_of(row: Row, at: int, columns: Sequence[str]) -> str | None:
    """The text in column number `at`, None where there is none; raises UserError for what is no text."""
    place, values = row
    value = values[at]
    if value is not None and not isinstance(value, str):
        raise wrong_type(place, columns[at], value)
    return value if value and not value.isspace() else None


def name_of(value: Any, place: str, column: str) -> str | None:
    """The name of a label, None where there is none; raises UserError for what is no label."""
    if value is None or value == "":
        return None
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        if not value.is_integer():
            cause = f"column {column!r} holds {value}, and a label is a name or a whole number"
            raise refuse(cause, "name a column of labels", place=place)
        value = int(value)
    if not isinstance(value, int | str):
        raise wrong_type(place, column, value, "labels")
    return str(value)


def several_of(row: Row, column: str) -> list[str] | None:
    """The labels that hold for a text, by name; None where the row does not say."""
    place, values = row
    value = values[-1]
    if isinstance(value, str) and value.lstrip().startswith("["):
        value = _json(value, place, column)
    names = [name_of(one, place, column) for one in (value if isinstance(value, list) else [value])]
    if names == [None]:
        return None
    return [name for name in names if name is not None]


def _several(row: Row, column: str, labels: Sequence[str] | None) -> tuple[int, ...] | None:
    """The numbers of the labels that hold for a text."""
    names = several_of(row, column)
    return None if names is None else tuple(number_of(name, labels, row[0], column) for name in names)


def numbers_of(row: Row, column: str, labels: Sequence[str] | None = None) -> tuple[float, ...] | None:
    """The numbers of a row, None where there are none; as many as `labels`, where these are known."""
    place, values = row
    value = values[-1]
    if isinstance(value, str) and value.lstrip().startswith("["):
        value = _json(value, place, column)
    if value is None or value == "":
        return None
    found = tuple(_number(one, place, column) for one in (value if isinstance(value, list) else [value]))
    if labels is not None and len(found) != len(labels):
        cause = f"column {column!r} holds {count(len(found), 'number')}, and the model gives {len(labels)}"
        raise refuse(cause, "give each row as many", place=place)
    return found


def _number(value: Any, place: str, column: str) -> float:
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number) or number == IGNORE:
        cause = f"column {column!r} holds {value!r}, and what is learnt is a finite number other than {IGNORE}"
        raise refuse(cause, "name the column of numbers with objective.label", place=place)
    return number


def _json(text: str, place: str, column: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise refuse(
            f"column {column!r} begins like a JSON list and is none ({error})", "repair it", place=place
        ) from None


def names_in(rows: Sequence[Row], task: Task, column: str, many: bool = False) -> tuple[str, ...]:
    """The labels in the last column of all rows: numbers in order, else by name; raises UserError for no labels."""
    found: Counter[str] = Counter()
    for place, values in rows:
        tags = values[-1]
        if task == "token":
            tags = tags.split() if isinstance(tags, str) else tags
        elif many:
            tags = several_of((place, values), column)
        for tag in tags if (task == "token" or many) and isinstance(tags, list) else [tags]:
            name = name_of(tag, place, column)
            if name is not None:
                found[name] += 1
    if len(found) < 2:
        only = f"only the label {next(iter(found))!r}" if found else "no label"
        cause = f"column {column!r} holds {only} in {count(len(rows), 'row')}"
        raise refuse(cause, "name another column with objective.label, or read more rows", path="objective.label")
    if found.total() >= FEW and len(found) > found.total() / 2:
        cause = f"column {column!r} holds {len(found):,} different values in {count(len(rows), 'row')}: no labels"
        remedy = "name the column of labels with objective.label, or list them in objective.labels"
        raise refuse(cause, remedy, path="objective.label")
    whole = all(name.removeprefix("-").isdecimal() for name in found)
    return tuple(sorted(found, key=int) if whole else sorted(found))


def _list(row: Row, at: int, columns: Sequence[str], what: str) -> list[str] | None:
    """A list of texts; one text is a list of its words."""
    place, values = row
    value = values[at]
    if isinstance(value, str) and what == "words":
        return value.split()
    if value is not None and not (isinstance(value, list) and all(isinstance(one, str) for one in value)):
        raise wrong_type(place, columns[at], value, f"lists of {what}")
    return value


def number_of(label: str, names: Sequence[str] | None, place: str, column: str) -> int:
    """The number of a label among the names; raises UserError for one that is none of them."""
    if names is None:
        return 0
    if label not in names:
        cause = f"column {column!r} holds {label!r}, which is none of the {len(names)} labels of the model"
        remedy = f"{did_you_mean(label, names)}; objective.labels=null collects them from the data"
        raise refuse(cause, remedy, place=place)
    return names.index(label)


def _place(label: str, choices: Sequence[str], place: str) -> int:
    if label in choices:
        return choices.index(label)
    if label.isdecimal() and int(label) < len(choices):
        return int(label)
    cause = f"{label!r} is neither one of the {len(choices)} choices nor a number from 0 to {len(choices) - 1}"
    raise refuse(cause, "name the column that says which is right with objective.label", place=place)
