"""YAML as plain data, with the line and column of every key and value.

The numbers and words are those of YAML 1.2's core schema, so the old traps are closed:

    3e-4  1e5  .5  1_000      numbers (1e5 is the whole number 100000)
    012                       refused: octal to some readers, decimal to others
    no  on  yes  12:30        text
    true  false  null  ~      the only words with a meaning of their own
    {a: 1, a: 2}              refused: a key that stands twice

Mistakes are collected, not raised one by one; only a syntax error ends the reading. Aliases and merge
keys work, within a bound on the number of nodes, so that a small file cannot unfold into a huge tree.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path as File
from typing import Any

from yaml import MarkedYAMLError
from yaml.composer import Composer
from yaml.error import Mark as Spot
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode
from yaml.parser import Parser
from yaml.reader import Reader, ReaderError
from yaml.resolver import BaseResolver
from yaml.scanner import Scanner

from xtcli.errors import Problem, refuse

Path = tuple[str | int, ...]
"""Where a value stands in a tree: map keys and list indices."""

MAX_BYTES = 4 << 20
MAX_NODES = 100_000
MAX_DEPTH = 100

INTEGER = re.compile(r"[-+]?(0|[1-9][0-9]*(_[0-9]+)*)")
WHOLE = re.compile(r"([-+]?[1-9][0-9]*)[eE]\+?([0-9]{1,2})")
LEADING_ZERO = re.compile(r"[-+]?0[0-9_]*[0-9]")
OCTAL = re.compile(r"0o[0-7]+")
HEX = re.compile(r"0x[0-9a-fA-F]+")
FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(_[0-9]+)*(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
WORDS: dict[str, Any] = {
    word: value
    for text, value in (("true", True), ("false", False), ("null", None))
    for word in (text, text.capitalize(), text.upper())
}
WORDS |= {"": None, "~": None, ".nan": float("nan"), ".NaN": float("nan"), ".NAN": float("nan")}
WORDS |= {
    sign + word: float(("-" if sign == "-" else "") + "inf")
    for sign in ("", "+", "-")
    for word in (".inf", ".Inf", ".INF")
}

PLAIN = "plain"
"""Tag of an unquoted scalar whose type its text decides."""

TAGS = {PLAIN: "any", **{f"tag:yaml.org,2002:{name}": name for name in ("str", "int", "float", "bool", "null")}}


def number_or_text(text: str) -> Any:
    """The value of an unquoted scalar. Raises ValueError for a number that has no sure reading."""
    if text in WORDS:
        return WORDS[text]
    if not text[-1:].isalnum() and text[-1:] != ".":
        return text
    if INTEGER.fullmatch(text):
        return int(_digits(text))
    if LEADING_ZERO.fullmatch(text):
        shown = text.replace("_", "").lstrip("+-0") or "0"
        raise ValueError(
            f"{text} starts with a zero, which some read as octal; write {shown}, or quote it if it is text"
        )
    if OCTAL.fullmatch(text) or HEX.fullmatch(text):
        return int(_digits(text), 0)
    whole = WHOLE.fullmatch(text)
    if whole and len(whole[1]) + int(whole[2]) <= 19:
        return int(whole[1]) * 10 ** int(whole[2])
    if FLOAT.fullmatch(text):
        value = float(_digits(text))
        if value in (float("inf"), float("-inf")):
            raise ValueError(f"{text} is larger than any float; write .inf if infinity is meant")
        return value
    return text


def _digits(text: str) -> str:
    if len(text) > 400:
        raise ValueError("a number of more than 400 digits; quote it if it is text")
    return text.replace("_", "")


class _Loader(Reader, Scanner, Parser, Composer, BaseResolver):
    """PyYAML's composer without its YAML 1.1 resolvers, and bounded in depth."""

    def __init__(self, text: str) -> None:
        Reader.__init__(self, text)
        Scanner.__init__(self)
        Parser.__init__(self)
        Composer.__init__(self)
        BaseResolver.__init__(self)
        self.depth = 0

    def resolve(self, kind: Any, value: Any, implicit: Any) -> Any:
        if kind is ScalarNode:
            return PLAIN if implicit[0] else "tag:yaml.org,2002:str"
        return super().resolve(kind, value, implicit)  # type: ignore[no-untyped-call]

    def compose_node(self, parent: Any, index: Any) -> Any:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            spot = self.peek_event().start_mark  # type: ignore[no-untyped-call]
            raise MarkedYAMLError(problem=f"nested more than {MAX_DEPTH} levels deep", problem_mark=spot)
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


@dataclass
class Document:
    """A YAML text as plain data. `keys` and `values` give the place (file:line:col) of each path's key and value."""

    name: str
    tree: Any = None
    keys: dict[Path, str] = field(default_factory=dict)
    values: dict[Path, str] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)

    def place(self, path: Path) -> str:
        """Where a path stands or its nearest ancestor: scalars by value, maps and lists by key."""
        while path and path not in self.values:
            path = path[:-1]
        return self.values.get(path, self.name)


def read(file: File, name: str = "") -> Document:
    """The document in a file. Raises UserError for a file that cannot be read or is no YAML at all."""
    name = name or str(file)
    try:
        if file.stat().st_size > MAX_BYTES:
            raise refuse(f"is larger than {MAX_BYTES >> 20} MiB", "a preset is a short YAML file", place=name)
        text = file.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise refuse(
            f"is not UTF-8 text (byte {error.start})", "a preset is a YAML file in UTF-8", place=name
        ) from None
    except OSError as error:
        raise refuse(f"cannot be read: {error.strerror}", place=name) from None
    return parse(text, name)


def parse(text: str, name: str) -> Document:
    """The document in a text. Raises UserError with file:line:col where the YAML syntax breaks."""
    try:
        node = _composed(text)
    except ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        column = error.position - (text.rfind("\n", 0, error.position) + 1) + 1
        raise refuse(
            f"holds the unprintable character U+{ord(text[error.position]):04X}",
            "remove it or write an escape",
            place=f"{name}:{line}:{column}",
        ) from None
    except MarkedYAMLError as error:
        raise _syntax(error, name) from None
    document = Document(name)
    if node is not None:
        document.tree = _Builder(document).build(node, ())
    return document


@lru_cache(maxsize=128)
def _composed(text: str) -> Node | None:
    """The nodes of a text. They are only read, so whoever loads a preset again is spared most of the time of it."""
    return _Loader(text).get_single_node()


def _syntax(error: MarkedYAMLError, name: str) -> Exception:
    spot = error.problem_mark or error.context_mark
    cause = f"is not YAML: {error.problem or error.context}"
    if error.context_mark and spot and error.context_mark.line != spot.line:
        cause += f", {error.context} that starts at line {error.context_mark.line + 1}"
    remedy = "quote the value if it is text"
    if "'\\t'" in cause:
        remedy = "indent with spaces, not tabs"
    elif "mapping values" in cause:
        remedy = "check the indentation here and on the line before, or quote a text that holds ': '"
    elif "block" in cause:
        remedy = "check the indentation"
    elif "flow" in cause:
        remedy = "look for a missing comma or closing bracket"
    return refuse(cause, remedy, place=_place(name, spot))


def _place(name: str, spot: Spot | None) -> str:
    return f"{name}:{spot.line + 1}:{spot.column + 1}" if spot else name


class _Builder:
    """Nodes -> plain data; notes places and mistakes in the document."""

    def __init__(self, document: Document) -> None:
        self.document = document
        self.count = 0
        self.open: list[Node] = []

    def build(self, node: Node, path: Path) -> Any:
        self.count += 1
        place = _place(self.document.name, node.start_mark)
        if self.count > MAX_NODES:
            raise refuse(f"unfolds into more than {MAX_NODES} values", "use fewer aliases", place=place)
        if any(node is outer for outer in self.open):
            raise refuse("holds an alias of itself", "remove the alias", place=place)
        block = not isinstance(node, ScalarNode) and not getattr(node, "flow_style", False)
        self.document.values[path] = self.document.keys.get(path, place) if block else place
        if isinstance(node, ScalarNode):
            return self.scalar(node, place)
        self.open.append(node)
        try:
            if isinstance(node, SequenceNode):
                return [self.build(item, (*path, index)) for index, item in enumerate(node.value)]
            assert isinstance(node, MappingNode)
            return self.map(node, path)
        finally:
            self.open.pop()

    def scalar(self, node: ScalarNode, place: str) -> Any:
        wanted = TAGS.get(node.tag)
        if wanted is None:
            self.problem(
                place, f"the tag {node.tag.replace('tag:yaml.org,2002:', '!!')} has no meaning here", "remove it"
            )
            return node.value
        if wanted == "str":
            return node.value
        try:
            value = number_or_text(node.value)
        except ValueError as error:
            cause, _, remedy = str(error).partition("; ")
            self.problem(place, cause, remedy)
            return int(node.value.replace("_", "")) if LEADING_ZERO.fullmatch(node.value) else 0
        if wanted == "float" and type(value) is int:
            return float(value)
        if wanted != "any" and wanted != {type(None): "null"}.get(type(value), type(value).__name__):
            self.problem(place, f"'{node.value}' is no {wanted}", f"remove the tag !!{wanted}")
        return value

    def map(self, node: MappingNode, path: Path) -> dict[str, Any]:
        result: dict[str, Any] = {}
        merged: list[MappingNode] = []
        for key, value in node.value:
            place = _place(self.document.name, key.start_mark)
            if not isinstance(key, ScalarNode):
                self.problem(place, "a list or map cannot be a key", "write a plain word")
                continue
            if key.value == "<<" and key.tag == PLAIN:
                merged += self.sources(value, place)
                continue
            if key.value in result:
                first = self.document.keys[(*path, key.value)].rsplit(":", 2)[-2]
                self.problem(
                    place, "stands twice in one map", f"the first is on line {first}; keep one", (*path, key.value)
                )
                continue
            self.document.keys[(*path, key.value)] = place
            result[key.value] = self.build(value, (*path, key.value))
        for source in merged:
            for key, value in source.value:
                if isinstance(key, ScalarNode) and key.value not in result:
                    self.document.keys[(*path, key.value)] = _place(self.document.name, key.start_mark)
                    result[key.value] = self.build(value, (*path, key.value))
        return result

    def sources(self, node: Node, place: str) -> list[MappingNode]:
        nodes = node.value if isinstance(node, SequenceNode) else [node]
        maps = [item for item in nodes if isinstance(item, MappingNode)]
        if len(maps) < len(nodes):
            self.problem(place, "'<<' takes a map or a list of maps", "name an alias of a map")
        return maps

    def problem(self, place: str, cause: str, remedy: str, path: Path = ()) -> None:
        self.document.problems.append(Problem(cause, place, ".".join(map(str, path)), remedy))
