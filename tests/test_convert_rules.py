"""The name-map engine by itself: templates, operations and their inverses, tables that claim twice or not at all."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from xtcli.convert.rules import SAME, TRANSPOSE, Chain, Interleave, Rule, Split, Stack, fill, match, moves


@pytest.mark.parametrize(
    ("template", "name", "binding"),
    [
        ("h.{layer}.w", "h.3.w", {"layer": 3}),
        ("h.{layer}.w", "h.12.w", {"layer": 12}),
        ("{a}.{b}", "1.2", {"a": 1, "b": 2}),
        ("{a}.{a}", "1.1", {"a": 1}),
        ("{a}.{a}", "1.2", None),
        ("h.{layer}.w", "h.03.w", None),
        ("h.{layer}.w", "h.x.w", None),
        ("h.{layer}.w", "h.-1.w", None),
        ("h.{layer}.w", "h.3.w.x", None),
        ("h.{layer}.w", "g.3.w", None),
        ("w", "w", {}),
    ],
)
def test_template(template: str, name: str, binding: dict[str, int] | None) -> None:
    assert match(template, name) == binding
    if binding is not None:
        assert fill(template, binding) == name


OPERATIONS = [
    (SAME, [(3, 4)], [(3, 4)]),
    (TRANSPOSE, [(3, 4)], [(4, 3)]),
    (Split(), [(9, 4)], [(4, 4), (2, 4), (3, 4)]),
    (Split(1), [(4, 9)], [(4, 4), (4, 2), (4, 3)]),
    (Split(), [(9,)], [(4,), (2,), (3,)]),
    (Interleave(2), [(16, 3)], [(4, 3), (4, 3), (8, 3)]),
    (Interleave(3), [(9,)], [(3,), (6,)]),
    (Stack(), [(3, 4)] * 5, [(5, 3, 4)]),
    (Chain((TRANSPOSE, Split())), [(4, 9)], [(4, 4), (2, 4), (3, 4)]),
    (Chain((Split(1), TRANSPOSE)), [(4, 9)], [(4, 4), (2, 4), (3, 4)]),
    (Chain((TRANSPOSE, Interleave(2))), [(3, 16)], [(4, 3), (4, 3), (8, 3)]),
]


@pytest.mark.parametrize(("operation", "theirs", "ours"), OPERATIONS, ids=lambda value: str(value)[:40])
def test_operation_loses_nothing(operation: Any, theirs: list[Any], ours: list[Any]) -> None:
    count = 0
    sources = []
    for shape in theirs:
        sources.append(torch.arange(count, count + torch.Size(shape).numel()).reshape(shape))
        count += sources[-1].numel()
    like = [torch.empty(shape, device="meta") for shape in ours]
    made = operation.forward(sources, like)
    assert [tuple(tensor.shape) for tensor in made] == ours
    assert sorted(torch.cat([tensor.flatten() for tensor in made]).tolist()) == list(range(count))
    back = operation.backward(made)
    assert all(torch.equal(a, b) for a, b in zip(back, sources, strict=True))
    # Shapes alone go the same way.
    assert [tuple(tensor.shape) for tensor in operation.backward(like)] == theirs


def test_interleave_takes_a_piece_for_each_head() -> None:
    fused = torch.arange(12)  # two heads of q, q, k, v, v, v
    q, k, v = Interleave(2).forward([fused], [torch.empty(n, device="meta") for n in (4, 2, 6)])
    assert (q.tolist(), k.tolist(), v.tolist()) == ([0, 1, 6, 7], [2, 8], [3, 4, 5, 9, 10, 11])


def test_stack_names_each_of_the_series() -> None:
    rule = Rule(("experts.{e}.{layer}.w",), ("blocks.{layer}.experts",), Stack(), each="e")
    (move,) = moves([rule], {"blocks.1.experts": torch.empty(3, 2, 2, device="meta")})
    assert move.theirs == ("experts.0.1.w", "experts.1.1.w", "experts.2.1.w")


@pytest.mark.parametrize(
    "rules",
    [
        [Rule(("a",), ("x",)), Rule(("b",), ("x",))],
        [Rule(("a",), ("y",))],
        [Rule(("a",), ("x", "z"), Split())],
    ],
)
def test_a_table_that_does_not_make_each_tensor_once_is_our_mistake(rules: list[Rule]) -> None:
    with pytest.raises(AssertionError):
        moves(rules, {"x": torch.empty(1)})
