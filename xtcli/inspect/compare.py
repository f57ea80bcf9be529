"""How two presets differ: kinds and values in words, and what each costs, side by side.

    model.norm: layer -> rms
    model.stack.block.sublayers.attn: 12 heads -> 32 heads over 4 key/value heads

A line stands for one node of the config tree. Where a slot holds another kind, the fields that both kinds have are
compared and those that only one has are named where they are not its default. `about`, `expect` and `version`
describe a preset and are not compared.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from xtcli.config.emit import flow
from xtcli.config.preset import Resolved
from xtcli.inspect import units
from xtcli.inspect.cost import Costs, flop_rows, measure_costs, memory_rows, occasion, usual_length
from xtcli.inspect.modules import components
from xtcli.model import count, skeleton
from xtcli.registry import Config, tree

SECTIONS = ("model", "objective", "tokenizer", "data", "train")
COUNTS = ("heads", "layers", "labels", "buckets", "sentinels", "steps")
"""Fields that name what they count: `12 heads`."""

ABSENT = object()


@dataclass(frozen=True)
class Difference:
    """What differs at one node: its path, and each change in words."""

    path: str
    changes: tuple[str, ...]
    before: Any
    after: Any

    def __str__(self) -> str:
        return f"{self.path}: {'; '.join(self.changes)}"


@dataclass(frozen=True)
class Side:
    """One of the two: its name, parameters by component, and costs."""

    name: str
    parameters: int
    components: Mapping[str, int]
    costs: Costs


def differences(a: Resolved, b: Resolved) -> list[Difference]:
    """Where the two config trees differ, in the order of the file."""
    found: list[Difference] = []
    for section in SECTIONS:
        found += _compare(getattr(a.preset, section), getattr(b.preset, section), section)
    return found


def _compare(a: Any, b: Any, path: str) -> Iterator[Difference]:
    """The node itself first, then what is below it."""
    left, right = _items(a), _items(b)
    changes: list[str] = []
    if isinstance(a, Config) and isinstance(b, Config) and a.kind != b.kind:
        changes.append(f"{a.kind} -> {b.kind}")
    below: list[tuple[str, Any, Any]] = []
    scalars: list[tuple[str, Any, Any]] = []
    for key in [*left, *(key for key in right if key not in left)]:
        x, y = left.get(key, ABSENT), right.get(key, ABSENT)
        if _is_node(x) or _is_node(y):
            below.append((key, x, y))
        elif x is not ABSENT and y is not ABSENT:
            if x != y:
                scalars.append((key, x, y))
        elif isinstance(a, Config) and isinstance(b, Config):
            owner, value = (a, x) if y is ABSENT else (b, y)
            if not _is_default(owner, key, value):
                scalars.append((key, x, y))
        else:
            scalars.append((key, x, y))
    changes += _phrases(scalars, left, right)
    if changes:
        yield Difference(path, tuple(changes), _plain(a), _plain(b))
    for key, x, y in below:
        here = f"{path}.{key}"
        if _is_node(x) and _is_node(y):
            yield from _compare(x, y, here)
            continue
        owner, value = (a, x) if not _is_node(y) else (b, y)
        if isinstance(owner, Config) and a is not b and _kinds_differ(a, b) and _is_default(owner, key, value):
            continue
        yield Difference(here, (f"{brief(x)} -> {brief(y)}",), _plain(x), _plain(y))


def _kinds_differ(a: Any, b: Any) -> bool:
    return getattr(a, "kind", "") != getattr(b, "kind", "")


def _items(node: Any) -> dict[str, Any]:
    if isinstance(node, Config):
        return {name: getattr(node, name) for name in type(node).model_fields}
    return {str(key): value for key, value in node.items()}


def _is_node(value: Any) -> bool:
    return isinstance(value, Config) or (isinstance(value, Mapping) and bool(value))


def _is_default(owner: Config, key: str, value: Any) -> bool:
    info = type(owner).model_fields[key]
    return not info.is_required() and value == info.get_default(call_default_factory=True, validated_data={})


def _plain(value: Any) -> Any:
    return None if value is ABSENT else tree(value)


def _phrases(changed: list[tuple[str, Any, Any]], left: Mapping[str, Any], right: Mapping[str, Any]) -> Iterator[str]:
    """Each changed value in words; heads and key/value heads make one phrase."""
    grouped = {"heads", "kv_heads"}
    together = grouped <= left.keys() and grouped <= right.keys()
    if together and any(key in grouped for key, *_ in changed):
        # As many key/value heads as heads can be said or left out.
        if _heads(left) != _heads(right):
            yield f"{_heads(left)} -> {_heads(right)}"
        changed = [item for item in changed if item[0] not in grouped]
    for key, x, y in changed:
        if key in COUNTS and all(isinstance(value, int) for value in (x, y)):
            yield f"{_number(x)} -> {_number(y)} {key}"
        else:
            yield f"{key} {_value(x)} -> {_value(y)}"


def _heads(fields: Mapping[str, Any]) -> str:
    heads, groups = fields["heads"], fields["kv_heads"]
    text = units.plural(heads, "head")
    return text if groups in (None, heads) else f"{text} over {units.plural(groups, 'key/value head')}"


def _number(value: int) -> str:
    return f"{value:,}"


def _value(value: Any) -> str:
    if value is ABSENT:
        return "absent"
    if value is None:
        return "null"
    if isinstance(value, int) and not isinstance(value, bool):
        return _number(value)
    return flow(tree(value))


def brief(node: Any) -> str:
    """A node in one line: its kind and what is not its default, and so below."""
    if node is ABSENT or node is None or node == {}:
        return "absent"
    if not _is_node(node):
        return _value(node)
    inner = []
    for key, value in _items(node).items():
        if isinstance(node, Config) and _is_default(node, key, value):
            continue
        inner.append(f"{key} {brief(value)}")
    text = f"({', '.join(inner)})" if inner else ""
    kind = node.kind if isinstance(node, Config) else ""
    return f"{kind}{text}" or "present"


def sides(a: Resolved, b: Resolved, *, batch: int = 1, length: int | None = None) -> tuple[Side, Side]:
    """Both with their costs at one length: the given one, or the shorter of their usual ones."""
    models = [skeleton(found) for found in (a, b)]
    length = length or min(usual_length(found, model) for found, model in zip((a, b), models, strict=True))
    names = (a.name, b.name) if a.name != b.name else (f"{a.name} (1)", f"{b.name} (2)")
    left, right = (
        Side(name, count(model), components(model), measure_costs(found, batch=batch, length=length))
        for name, found, model in zip(names, (a, b), models, strict=True)
    )
    return left, right


def side_lines(left: Side, right: Side) -> list[str]:
    """Parameters, FLOPs, state and memory of both as a table, and how many times as much the second has."""
    rows: list[tuple[str, ...]] = [("", left.name, right.name, "")]
    rows.append(
        ("parameters", f"{left.parameters:,}", f"{right.parameters:,}", _times(left.parameters, right.parameters))
    )
    for name in dict.fromkeys([*left.components, *right.components]):
        x, y = left.components.get(name, 0), right.components.get(name, 0)
        rows.append((f"  {name}", f"{x:,}", f"{y:,}", _times(x, y)))
    for (label, ours), (_, theirs) in zip(flop_rows(left.costs), flop_rows(right.costs), strict=True):
        rows.append((label, units.flop(ours), units.flop(theirs), _times(ours, theirs)))
    for place, precision in enumerate(left.costs.use):
        a, b = ({label: cells[place] for label, cells in memory_rows(side.costs)} for side in (left, right))
        ratios = _ratios(left.costs, right.costs, precision)
        for label in dict.fromkeys([*a, *b]):
            cells = (a.get(label, "none"), b.get(label, "none"))
            rows.append((f"{label}, {precision}", *cells, ratios.get(label, "")))
    lines = units.table(rows, right=(1, 2, 3))
    return [*lines, f"costs of {occasion(left.costs)}"]


def _ratios(a: Costs, b: Costs, precision: str) -> dict[str, str]:
    x, y = a.use[precision], b.use[precision]
    found = {
        "weights": _times(x.weights, y.weights),
        "memory for inference": _times(x.inference, y.inference),
        "memory for training": _times(x.training.peak, y.training.peak),
    }
    if x.state is not None and y.state is not None:
        found["state per token"] = _times(x.state.token, y.state.token)
    return found


def _times(x: float, y: float) -> str:
    return f"x {units.figure(y / x)}" if x and y and x != y else "=" if x == y else ""


def facts(changes: list[Difference], both: tuple[Side, Side]) -> dict[str, Any]:
    """The comparison as plain data."""
    return {
        "differences": [
            {"path": change.path, "words": list(change.changes), "before": change.before, "after": change.after}
            for change in changes
        ],
        "sides": [
            {
                "name": side.name,
                "parameters": side.parameters,
                "components": dict(side.components),
                "costs": side.costs.facts(),
            }
            for side in both
        ],
    }
