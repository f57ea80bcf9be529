"""Passes over the compiler's graphs, which join what stands in different modules to kernels of our own.

    add_onto      x W^T (+ b) and a stream that it is added to, alone or in front of a norm: one product onto the stream
    join          attention's slopes of queries, keys and values, and the joint slope of their product (windowjoint.py)
    sum_beside    the sum over the rows of a slope that the kernel of a norm's way back reads or writes: by that kernel

They see values, not modules: wherever a sum is of such a kind it is joined, and what stands between (dropout, a scale,
another type) leaves it as it was. A sum is rounded once then, not twice.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch._inductor.pattern_matcher import stable_topological_sort
from torch.fx import Graph, Node

# Their operators are what is looked for.
from xtcli.fast import linear as _linear
from xtcli.fast import norms as _norms
from xtcli.fast import windowjoint

aten, prims, xt = torch.ops.aten, torch.ops.prims, torch.ops.xt

VIEWS = (aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.clone.default)
"""Operators that give the same values in the same order."""


class Passes(CustomGraphPass):
    """All passes; the compiler's caches know what it compiled by `uuid`."""

    def __call__(self, graph: Graph) -> None:
        add_onto(graph)
        windowjoint.join(graph)
        sum_beside(graph)

    def uuid(self) -> Any:
        return get_hash_for_files((__file__, _linear.__file__, _norms.__file__, windowjoint.__file__))


PASSES = Passes()
"""One for all blocks: the compiler compares options to know what it has compiled."""


def options() -> dict[str, Any]:
    """Options of the compiler under which the passes run over what it compiles, forward and backward."""
    return {"post_grad_custom_pre_pass": PASSES}


def add_onto(graph: Graph) -> int:
    """Let products start from what they are added to; returns how many do."""
    count = 0
    for node in graph.find_nodes(op="call_function", target=aten.add.Tensor):
        if not node.kwargs and all(_alike(term, node) for term in node.args):
            made = _onto(graph, node, *node.args)
            if made is not None:
                node.replace_all_uses_with(made)
                _forget(graph, node)
                count += 1
    for node in graph.find_nodes(op="call_function", target=xt.sum_norm.default):
        x, y, *norm = node.args
        made = _onto(graph, node, x, y)
        if made is not None:
            with graph.inserting_before(node):
                normed = _call(graph, xt.norm.default, (made, *norm), node.meta["val"][1:])
            for part in list(node.users):
                number = part.args[1]
                if number == 0:
                    part.replace_all_uses_with(made)
                    graph.erase_node(part)
                else:
                    part.args = (normed, number - 1)
            _forget(graph, node)
            count += 1
    return count


def _onto(graph: Graph, node: Node, x: Any, y: Any) -> Node | None:
    """The sum of x and y that stands at `node`, by the product that one of them is; None where none is."""
    for term, onto in ((y, x), (x, y)):
        product = _source(term, alone=True)
        if term is onto or product.target is not xt.product.default or len(product.users) > 1:
            continue
        rows, sums = product.meta["val"], term.meta["val"]
        with graph.inserting_before(node):
            flat = _shown(graph, onto, rows)
            made = _call(graph, xt.product_onto.default, (*product.args, flat), rows)
            return _shown(graph, made, sums)
    return None


def sum_beside(graph: Graph) -> int:
    """Let norms sum the columns of slopes on their way back; returns how many do."""
    backs = graph.find_nodes(op="call_function", target=xt.norm_back.default)
    count = 0
    for node in graph.find_nodes(op="call_function", target=aten.sum.dim_IntList):
        _, axes, *kept = node.args
        # Autocast of a GPU asks for sums in float32.
        plain = node.kwargs in ({}, {"dtype": torch.float32}, {"dtype": torch.float64})
        if not plain or axes != [0] or any(kept):
            continue
        found = next(iter(_kernels(backs, node)), None)
        if found is not None:
            back, given = found
            backs.remove(back)
            _give(graph, node, _summed(graph, back, given))
            count += 1
    if count:
        stable_topological_sort(graph)
    return count


def _kernels(backs: list[Node], node: Node) -> list[tuple[Node, bool]]:
    """Those of `backs` that can make the sum at `node`, and whether it is of what they read; what they read first."""
    slope = node.args[0]
    assert isinstance(slope, Node)
    after = _followers(node)
    free = [back for back in backs if back not in after and all(_picked(user) for user in _part(back, 1))]
    reading = [(back, True) for back in free if back.args[2] is not None and _same(back.args[2], slope)]
    return reading + [(back, False) for back in free if any(_same(dx, slope) for dx in _part(back, 0))]


def _summed(graph: Graph, back: Node, given: bool) -> Node:
    """The row of sums that a norm's way back leaves from now on."""
    dx, sums = back.meta["val"]
    more = sums.new_empty(sums.shape[0] + 1, sums.shape[1])
    with graph.inserting_before(back):
        made = _call(graph, xt.norm_back_summed.default, (*back.args, given), (dx, more))
        rows = _call(graph, operator.getitem, (made, 1), more)
        row = _call(graph, aten.select.int, (rows, 0, sums.shape[0]), more[-1])
    for old in _part(back, 1):
        old.replace_all_uses_with(rows)
        graph.erase_node(old)
    back.replace_all_uses_with(made)
    graph.erase_node(back)
    return row


def _give(graph: Graph, node: Node, row: Node) -> None:
    """Put float32 sums in the place of those at `node`, without a rounding where it was undone."""
    kind, wide = node.meta["val"].dtype, row.meta["val"].dtype
    for user in list(node.users):
        if user.target is prims.convert_element_type.default and user.args[1] == wide:
            user.replace_all_uses_with(row)
            graph.erase_node(user)
    if node.users and kind != wide:
        with graph.inserting_after(row):
            row = _call(graph, prims.convert_element_type.default, (row, kind), node.meta["val"])
    node.replace_all_uses_with(row)
    _forget(graph, node)


def _call(graph: Graph, target: Any, arguments: tuple[Any, ...], value: Any) -> Node:
    node = graph.call_function(target, arguments)
    node.meta["val"] = value
    return node


def _shown(graph: Graph, node: Node, like: Tensor) -> Node:
    """A node's values in the shape of `like`."""
    value = node.meta["val"]
    if value.shape == like.shape:
        return node
    return _call(graph, aten.reshape.default, (node, list(like.shape)), value.reshape(like.shape))


def _source(node: Node, alone: bool = False) -> Node:
    """What a node shows in another shape; if `alone`, no further than to what others read as well."""
    while node.target in VIEWS and not (alone and len(node.users) > 1):
        node = node.args[0]  # type: ignore[assignment]
    return node


def _alike(term: Any, node: Node) -> bool:
    """Whether a term is a tensor of the shape and type of a node."""
    if not isinstance(term, Node) or not isinstance(term.meta.get("val"), Tensor):
        return False
    one, other = term.meta["val"], node.meta["val"]
    return bool(one.shape == other.shape and one.dtype == other.dtype)


def _same(one: Any, other: Node) -> bool:
    return _source(one) is _source(other) and _alike(one, other)


def _part(node: Node, number: int) -> list[Node]:
    """Nodes that take this part of an operator's output."""
    return [user for user in node.users if user.target is operator.getitem and user.args[1] == number]


def _picked(sums: Node) -> bool:
    """Whether of these rows single ones are read, which a row more does not change."""
    return all(user.target is aten.select.int and user.args[1:] in ((0, 0), (0, 1)) for user in sums.users)


def _followers(node: Node) -> set[Node]:
    """All nodes that depend on one."""
    found: set[Node] = set()
    front = [node]
    while front:
        fresh = [user for user in front.pop().users if user not in found]
        found.update(fresh)
        front += fresh
    return found


def _forget(graph: Graph, node: Node) -> None:
    """Take out a node that nothing reads, and what it alone has read."""
    read = node.all_input_nodes
    graph.erase_node(node)
    for one in read:
        if not one.users and one.target in (*VIEWS, xt.product.default):
            _forget(graph, one)
