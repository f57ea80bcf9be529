"""What the keys of a config.json mean in our config tree, stated once and read both ways.

A template is a config tree with marks in the place of values:

    {"kind": "decoder", "dim": Key("n_embd", int, 768), "stack": {"layers": Key("n_layer", int, 12), ...}}

`load` puts what config.json says in the place of the marks; `dump` walks a tree beside the template and
finds what config.json would have to say. What stands in the template without a mark is not compared by
`dump`: whether the two configs mean the same network is checked on the modules they build (same.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from xtcli.errors import Problem, did_you_mean

REQUIRED = object()
MOST_KEYS = 4
OMIT = object()
"""A mark that loads as this leaves its key out of the tree."""

NAMES = {bool: "true or false", int: "a whole number", float: "a number", str: "text", dict: "a map", list: "a list"}


@dataclass
class Options:
    """A config.json while it is read: which keys were asked for, what was wrong with them, what each entry came of."""

    values: Mapping[str, Any]
    place: str
    used: set[str] = field(default_factory=set)
    problems: list[Problem] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)
    origins: dict[str, tuple[str, ...]] = field(default_factory=dict)

    def get(self, name: str, kind: type, default: Any = REQUIRED, aliases: tuple[str, ...] = ()) -> Any:
        """The value of a key or of one of its older names; null is allowed where the default is null."""
        given = [key for key in (name, *aliases) if key in self.values]
        self.used.update(given)
        self.asked.append(given[0] if given else name)
        if any(self.values[key] != self.values[given[0]] for key in given[1:]):
            self.refuse(given[0], f"{self.values[given[0]]!r} and {given[1]} {self.values[given[1]]!r} are one option")
        if not given:
            if default is REQUIRED:
                self.refuse(name, "is missing", did_you_mean(name, self.values))
                return kind()
            return default
        value = self.values[given[0]]
        if value is None and default is None:
            return None
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            return float(value)
        if not isinstance(value, kind) or (kind is not bool and isinstance(value, bool)):
            self.refuse(given[0], f"is {value!r}, not {NAMES[kind]}")
            return kind() if default in (REQUIRED, None) else default
        return value

    def keys_of(self, path: str) -> str:
        """The keys that an entry of the tree was made of; the entry itself where they are none, or too many to help."""
        entry = path
        while entry:
            if keys := self.origins.get(entry):
                return ", ".join(keys) if len(keys) <= MOST_KEYS else path
            entry = entry.rpartition(".")[0]
        # A position that attentions inherit is stated on their stack.
        stack, _, below = path.partition(".block.sublayers.")
        place = below.partition(".")[2]
        if not place.startswith("position."):
            return path
        said = self.keys_of(f"{stack}.{place}")
        return path if said == f"{stack}.{place}" else said

    def refuse(self, name: str, cause: str, remedy: str = "") -> None:
        """Remember what is wrong with one key."""
        self.problems.append(Problem(cause, self.place, name, remedy))


class Unexpressed(Exception):
    """A value of ours that no value of theirs stands for."""


class Mark(Protocol):
    """Stands in a template for what config.json says."""

    def load(self, options: Options) -> Any:
        """The value of the tree."""

    def dump(self, value: Any, found: dict[str, Any], path: str) -> None:
        """Enter what config.json has to say for `value`, which stands at `path`, into `found`; raises Unexpressed."""


@dataclass(frozen=True)
class Code:
    """Two functions, from their value to ours and back."""

    load: Callable[[Any], Any]
    dump: Callable[[Any], Any]


def table(pairs: Mapping[Any, Any]) -> Code:
    """Their values and ours; where several of theirs mean one of ours, the first is written back."""
    back: list[tuple[Any, Any]] = [(ours, theirs) for theirs, ours in pairs.items()]

    def load(value: Any) -> Any:
        if value not in pairs:
            raise Unexpressed(f"is {value!r}, which xt does not express; {did_you_mean(str(value), map(str, pairs))}")
        return pairs[value]

    def dump(value: Any) -> Any:
        for ours, theirs in back:
            if ours == value and type(ours) is type(value):
                return theirs
        raise Unexpressed(f"no option stands for {value!r}")

    return Code(load, dump)


PLAIN = Code(lambda value: value, lambda value: value)


@dataclass(frozen=True)
class Key:
    """One key of config.json."""

    name: str
    kind: type
    default: Any = REQUIRED
    aliases: tuple[str, ...] = ()
    code: Code = PLAIN

    def load(self, options: Options) -> Any:
        try:
            return self.code.load(options.get(self.name, self.kind, self.default, self.aliases))
        except Unexpressed as problem:
            options.refuse(self.name, str(problem))
            return self.code.load(self.default)

    def dump(self, value: Any, found: dict[str, Any], path: str) -> None:
        try:
            found[self.name] = self.code.dump(value)
        except Unexpressed as problem:
            raise Unexpressed(f"{path}: {problem}") from None


@dataclass(frozen=True)
class Part:
    """A whole entry that stands in the tree only where a yes-or-no key says so."""

    key: Key
    body: Any

    def load(self, options: Options) -> Any:
        return load(self.body, options) if self.key.load(options) else OMIT

    def dump(self, value: Any, found: dict[str, Any], path: str) -> None:
        present = value is not None and value is not OMIT
        self.key.dump(present, found, path)
        if present:
            dump(self.body, value, found, path)


@dataclass(frozen=True)
class Switch:
    """One of several templates by the value of a key; `silent` leaves it to others to find the value for `dump`."""

    key: Key
    cases: Mapping[Any, Any]
    silent: bool = False

    def load(self, options: Options) -> Any:
        value = self.key.load(options)
        if value not in self.cases:
            options.refuse(self.key.name, f"is {value!r}", did_you_mean(str(value), map(str, self.cases)))
            value = self.key.default
        return load(self.cases[value], options)

    def dump(self, value: Any, found: dict[str, Any], path: str) -> None:
        if self.silent:
            return
        for theirs, body in self.cases.items():
            if fits(body, value):
                self.key.dump(theirs, found, path)
                dump(body, value, found, path)
                return
        raise Unexpressed(f"{path}: no option stands for it")


@dataclass(frozen=True)
class Custom:
    """Several keys that make one value together."""

    loads: Callable[[Options], Any]
    dumps: Callable[[Any, dict[str, Any]], None]

    def load(self, options: Options) -> Any:
        return self.loads(options)

    def dump(self, value: Any, found: dict[str, Any], path: str) -> None:
        try:
            self.dumps(value, found)
        except Unexpressed as problem:
            raise Unexpressed(f"{path}: {problem}") from None
        except KeyError as missing:
            # The options are those of another kind of value.
            raise Unexpressed(f"{path}: has no {missing}") from None


MARKS = (Key, Part, Switch, Custom)


def load(template: Any, options: Options, path: str = "model") -> Any:
    """The tree that a template and a config.json make; mistakes and origins are collected in `options`."""
    if isinstance(template, MARKS):
        before = len(options.asked)
        value = template.load(options)
        options.origins[path] = tuple(dict.fromkeys(options.asked[before:]))
        return value
    if isinstance(template, Mapping):
        loaded = {key: load(body, options, f"{path}.{key}") for key, body in template.items()}
        return {key: value for key, value in loaded.items() if value is not OMIT}
    return template


def dump(template: Any, tree: Any, found: dict[str, Any], path: str = "model") -> None:
    """Enter into `found` what config.json has to say for `tree`; raises Unexpressed with the path in the tree."""
    if isinstance(template, MARKS):
        template.dump(tree, found, path)
    elif isinstance(template, Mapping):
        if not isinstance(tree, Mapping):
            raise Unexpressed(f"{path}: is {tree!r}, where {', '.join(template)} are expected")
        kind = template.get("kind")
        if isinstance(kind, str) and tree.get("kind") != kind and not fits_itself(template):
            raise Unexpressed(f"{path}: is '{tree.get('kind')}', not '{kind}'")
        for key, body in template.items():
            dump(body, tree.get(key), found, f"{path}.{key}")


def fits(template: Any, tree: Any) -> bool:
    """Whether what stands in the template without a mark stands in the tree."""
    if isinstance(template, MARKS):
        return True
    if isinstance(template, Mapping):
        return isinstance(tree, Mapping) and all(fits(body, tree.get(key)) for key, body in template.items())
    return bool(template == tree)


def fits_itself(template: Mapping[str, Any]) -> bool:
    """Whether a template has no marks: then what else means the same is for the modules to tell."""
    return all(
        fits_itself(body) if isinstance(body, Mapping) else not isinstance(body, MARKS) for body in template.values()
    )


def settle(tree: dict[str, Any]) -> dict[str, Any]:
    """The tree with what its nodes inherit written out: dropouts, positions, head counts and widths."""

    def visit(node: Any, rate: Any, dim: Any) -> Any:
        if isinstance(node, list):
            return [visit(item, rate, dim) for item in node]
        if not isinstance(node, Mapping):
            return node
        if "stack" in node:
            # A side of a model has defaults of its own.
            rate = rate if node.get("dropout") is None else node["dropout"]
            dim = node.get("dim") or dim
        full = {key: visit(value, rate, dim) for key, value in node.items()}
        if "dropout" in full and full["dropout"] is None:
            full["dropout"] = rate
        if "kv_heads" in full:
            full["kv_heads"] = full["kv_heads"] or full["heads"]
            full["head_dim"] = full["head_dim"] or dim // full["heads"]
            full["out_bias"] = full["bias"] if full["out_bias"] is None else full["out_bias"]
        if "layers" in full and "position" in full:
            _place(full)
        return full

    return visit(tree, tree["dropout"], tree["dim"])  # type: ignore[no-any-return]


def _place(stack: dict[str, Any]) -> None:
    """State the one position of a stack's attentions both on the stack and on each of them, whichever had it."""
    blocks = [stack["block"]] if stack.get("block") else list(stack["blocks"].values())
    nodes = [node for block in blocks for node in block["sublayers"].values() if "position" in node]
    for node in nodes:
        if node["position"] == {"kind": "inherit"}:
            node["position"] = stack["position"]
    if nodes and all(node["position"] == nodes[0]["position"] for node in nodes):
        stack["position"] = nodes[0]["position"]
