"""Plain data as YAML that `document` reads back as the same data, one line at a time.

Maps are blocks; lists of scalars stay on one line. Each line carries the path of its value, so that
a caller can put a comment beside it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from xtcli.config.document import Path, number_or_text

WORD = re.compile(r"[A-Za-z_./][A-Za-z0-9_./+ -]*")


def lines(tree: Any, path: Path = (), indent: int = 0) -> Iterator[tuple[Path, str]]:
    """(path, line) for every line of the YAML of a map; maps that hold something have a line of their own."""
    for key, value in tree.items():
        here = (*path, key)
        head = f"{'  ' * indent}{scalar(key)}:"
        if isinstance(value, Mapping) and value:
            yield here, head
            yield from lines(value, here, indent + 1)
        elif isinstance(value, list | tuple) and any(isinstance(item, Mapping | list | tuple) for item in value):
            yield here, head
            yield from _items(value, here, indent + 1)
        else:
            yield here, f"{head} {flow(value)}"


def _items(values: Any, path: Path, indent: int) -> Iterator[tuple[Path, str]]:
    for index, value in enumerate(values):
        here = (*path, index)
        if isinstance(value, Mapping) and value:
            body = list(lines(value, here, indent + 1))
            first = body[0][1].lstrip()
            yield body[0][0], f"{'  ' * indent}- {first}"
            yield from body[1:]
        else:
            yield here, f"{'  ' * indent}- {flow(value)}"


def dump(tree: Any) -> str:
    """A map as YAML text."""
    return "".join(f"{line}\n" for _, line in lines(tree))


def flow(value: Any) -> str:
    """Any value on one line."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{scalar(key)}: {flow(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(flow, value)) + "]"
    return scalar(value)


def scalar(value: Any) -> str:
    """One scalar; text that would read as something else is quoted."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        return _float(value)
    if isinstance(value, str):
        return value if _plain(value) else '"' + "".join(map(_escaped, value)) + '"'
    return str(value)


def _escaped(character: str) -> str:
    if character in '"\\':
        return "\\" + character
    if character.isprintable():
        return character
    code = ord(character)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def _float(value: float) -> str:
    if value != value:
        return ".nan"
    if value in (float("inf"), float("-inf")):
        return "-.inf" if value < 0 else ".inf"
    mantissa, e, exponent = repr(value).partition("e")
    if e and "." not in mantissa and not exponent.startswith("-"):
        mantissa += ".0"
    return mantissa + e + re.sub(r"^([-+]?)0+", r"\1", exponent)


def _plain(text: str) -> bool:
    if not WORD.fullmatch(text) or text != text.rstrip():
        return False
    try:
        return bool(number_or_text(text) == text)
    except ValueError:
        return False
