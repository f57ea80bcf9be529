"""The module tree of a model with shapes and counts, equal layers folded, and what each component counts.

A node stands for one module, or for a run of numbered siblings that are equal: the same kinds, shapes, masks and
settings. What differs between them in nothing but a figure of their description (a scale that falls with the
layer) is folded too, and the description shows its range. A tensor that two modules share counts where it
stands first.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from types import FunctionType
from typing import Any

from torch import nn

from xtcli.inspect import units
from xtcli.inspect.sight import sight_of
from xtcli.parts.attention import Heads
from xtcli.parts.graphs import Graph
from xtcli.parts.pooled import Pooler
from xtcli.parts.shared import Shared
from xtcli.parts.stack import Stack
from xtcli.registry import Config

COMPONENTS = {
    "embed": "embedding",
    "absolute": "embedding",
    "position": "attention",
    "score": "attention",
    "out": "attention",
    "ffn": "ffn",
    "router": "routers",
    "expert": "experts",
    "norm": "norms",
    "head": "heads",
    "transform": "heads",
}
"""Slot -> the component that its parameters count for; a mixer that is not attention counts under its kind."""

UNSAID = ("", "none", "softmax")
"""Kinds that are what one expects and hold nothing."""

ORDER = ("embedding", "attention", "ffn", "norms", "heads")


@dataclass(frozen=True)
class Node:
    """One module of the tree, or `times` equal ones; a module that fills no slot has its class for its kind.

    tensors: its own parameters, name -> shape. `tied` are those of another module, not counted. `parameters`
    counts one of the equal modules with everything below it. `loose` names the figures of the description in which
    equal modules may differ, `settings` is everything else that they share.
    """

    name: str
    slot: str
    kind: str
    detail: tuple[str, ...] = ()
    tensors: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    tied: tuple[str, ...] = ()
    parameters: int = 0
    times: int = 1
    children: tuple[Node, ...] = ()
    loose: tuple[str, ...] = ()
    settings: str = ""

    @property
    def total(self) -> int:
        """Parameters of all the equal modules."""
        return self.times * self.parameters

    @property
    def signature(self) -> Any:
        """What equal modules have in common."""
        below = tuple((child.name, child.times, child.signature) for child in self.children)
        names = tuple(key if (key := text.partition("=")[0]) in self.loose else text for text in self.detail)
        return self.kind, names, tuple(self.tensors.items()), self.tied, self.settings, below

    def facts(self) -> dict[str, Any]:
        """The node as plain data."""
        return {
            "name": self.name,
            "slot": self.slot or None,
            "kind": self.kind,
            "detail": list(self.detail),
            "times": self.times,
            "parameters": self.parameters,
            "tensors": {name: list(shape) for name, shape in self.tensors.items()},
            "tied": list(self.tied),
            "children": [child.facts() for child in self.children],
        }


def slot_and_kind(module: nn.Module) -> tuple[str, str]:
    """The slot that a module fills and its kind; two empty words where it is no registered part."""
    config = getattr(type(module), "Config", None)
    if isinstance(config, type) and issubclass(config, Config) and config.kind:
        return config.slot, config.kind
    return "", ""


def tree(model: Graph) -> Node:
    """The tree of a whole model."""
    return _node("", model, None, set(), model)


def _node(name: str, module: nn.Module, stack: Stack | None, seen: set[int], model: Graph) -> Node:
    slot, kind = slot_and_kind(module)
    stack = module if isinstance(module, Stack) else stack
    own = dict(module.named_parameters(recurse=False))
    tied = tuple(key for key, parameter in own.items() if id(parameter) in seen)
    count = sum(parameter.numel() for key, parameter in own.items() if key not in tied)
    seen |= {id(parameter) for parameter in own.values()}
    children = tuple(_fold(_children(module, stack, seen, model)))
    detail = _detail(module)
    if stack is not None and slot == "mixer":
        detail += sight_of(stack, module).words()
    if slot == "head" and getattr(model.config.heads.get(kind), "tied", False):
        detail += ("tied to the token table",)
    return Node(
        name,
        slot,
        kind or type(module).__name__,
        detail,
        {key: tuple(parameter.shape) for key, parameter in own.items()},
        tied,
        count + sum(child.total for child in children),
        1,
        children,
        tuple(key for text in detail if isinstance(getattr(module, key := text.partition("=")[0], None), float)),
        _settings(module, detail),
    )


def _children(module: nn.Module, stack: Stack | None, seen: set[int], model: Graph) -> Iterator[Node]:
    """The children that hold parameters or are parts; plain containers give way to what they hold."""
    for name, child in module.named_children():
        if isinstance(child, nn.ModuleList | nn.ModuleDict | Shared) and slot_and_kind(child) == ("", ""):
            for below in _children(child, stack, seen, model):
                yield replace(below, name=f"{name}.{below.name}")
            continue
        node = _node(name, child, stack, seen, model)
        if node.parameters or node.tied or node.children or slot_and_kind(child)[1] not in UNSAID:
            yield node


def _fold(nodes: Iterator[Node]) -> Iterator[Node]:
    """Numbered siblings of one signature as one node, where the first of them stood."""
    groups: dict[Any, list[Node]] = {}
    for node in nodes:
        base, _, last = node.name.rpartition(".")
        groups.setdefault((base, node.signature) if last.isdigit() else node.name, []).append(node)
    for found in groups.values():
        base, _, last = found[0].name.rpartition(".")
        if not last.isdigit():
            yield found[0]
            continue
        numbers = units.spans([int(node.name.rpartition(".")[2]) for node in found])
        yield replace(_merged(found), name=f"{base} {numbers}" if base else numbers, times=len(found))


def _merged(nodes: list[Node]) -> Node:
    """The first of equal nodes, figures that differ shown as a range."""
    first, last = nodes[0], nodes[-1]
    detail = tuple(
        a if all(node.detail[i] == a for node in nodes) else f"{a} .. {last.detail[i].partition('=')[2]}"
        for i, a in enumerate(first.detail)
    )
    below = tuple(_merged([node.children[i] for node in nodes]) for i in range(len(first.children)))
    return replace(first, detail=detail, children=below)


def _detail(module: nn.Module) -> tuple[str, ...]:
    """What a part of ours says of itself; the descriptions of PyTorch's modules repeat their shapes."""
    if not str(type(module).extra_repr.__module__).startswith("xtcli."):
        return ()
    return tuple(text for text in module.extra_repr().split(", ") if text)


def _settings(module: nn.Module, detail: tuple[str, ...]) -> str:
    """Every plain value a module was built with, except what its description already shows and its layer's number."""
    shown = {text.partition("=")[0] for text in detail} | {"layer", "training"}
    plain = (bool, int, float, str, tuple, Config, FunctionType, functools.partial)
    values = {key: value for key, value in vars(module).items() if key[0] != "_" and key not in shown}
    return repr({key: value for key, value in values.items() if value is None or isinstance(value, plain)})


def lines(root: Node) -> list[str]:
    """The tree as text: what, shapes, parameters."""
    rows = [(root.kind, "", f"{root.total:,} parameters")]
    for child in root.children:
        rows += _rows(child, 1)
    width = max((len(what) for what, shapes, _ in rows if shapes), default=0)
    left = [f"{what:{width}}  {shapes}" if shapes else what for what, shapes, _ in rows]
    middle, right = max(map(len, left)), max(len(count.partition(" ")[0]) for *_, count in rows)
    text = []
    for what, (*_, count) in zip(left, rows, strict=True):
        number, _, unit = count.partition(" ")
        text.append(f"{what:{middle}}  {number:>{right}} {unit}".rstrip())
    return text


def _rows(node: Node, depth: int) -> Iterator[tuple[str, str, str]]:
    kind = node.kind if node.slot and node.name.rpartition(".")[2] != node.kind else ""
    words = [node.name, kind, ", ".join(node.detail)]
    if node.times > 1:
        words.append(f"({node.times} x {node.parameters:,})")
    shapes = " + ".join(
        ("" if name == "weight" or (name == "bias" and "weight" in node.tensors) else f"{name} ")
        + f"({', '.join(map(str, shape))})"
        + (" tied" if name in node.tied else "")
        for name, shape in node.tensors.items()
    )
    yield "  " * depth + "  ".join(word for word in words if word), shapes, f"{node.total:,}"
    for child in node.children:
        yield from _rows(child, depth + 1)


def components(model: Graph) -> dict[str, int]:
    """Parameters of each component, tied ones once; the first components are those of ORDER."""
    found: dict[str, int] = dict.fromkeys(ORDER, 0)
    seen: set[int] = set()

    def visit(module: nn.Module, component: str) -> None:
        own = _component(module)
        # A table that stands in the graph itself is shared by its towers.
        component = own or ("embedding" if component == "other" and isinstance(module, nn.Embedding) else component)
        for parameter in module.parameters(recurse=False):
            if id(parameter) not in seen:
                seen.add(id(parameter))
                found[component] = found.get(component, 0) + parameter.numel()
        for child in module.children():
            visit(child, component)

    visit(model, "other")
    return {name: count for name, count in found.items() if count or name in ORDER}


def _component(module: nn.Module) -> str:
    slot, kind = slot_and_kind(module)
    if slot == "mixer":
        return "attention" if isinstance(module, Heads) else kind
    if slot in COMPONENTS:
        return COMPONENTS[slot]
    if isinstance(module, Pooler):
        return "heads"
    return slot if slot not in ("", "graph") else ""


def share_lines(parts: Mapping[str, int]) -> list[str]:
    """The components with their shares of the whole, as a table."""
    whole = max(sum(parts.values()), 1)
    rows = [(name, f"{count:,}", "parameters", f"{count / whole:.2%}") for name, count in parts.items()]
    return units.table(rows, right=(1, 3))
