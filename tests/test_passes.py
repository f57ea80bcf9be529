"""Passes over the compiler's graphs: what they join, what they leave, and that nothing else changes."""

from __future__ import annotations

import operator
import shutil
from collections import Counter
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._inductor.decomposition import select_decomp_table
from torch.fx import Graph, GraphModule, Node

from tests.test_fast_norms import answers, shaken
from xtcli.fast import passes
from xtcli.model import Model
from xtcli.train.fused import fuse_norms, fuse_products
from xtcli.train.joined import join_products
from xtcli.train.transforms import compile_blocks
from xtcli.train.working import Working

xt = torch.ops.xt


class Compiler:
    """A backend that runs the graphs of both directions as they are after the passes; `found` counts operators."""

    def __init__(self) -> None:
        self.found: Counter[str] = Counter()

    def __call__(self, module: GraphModule, inputs: Any) -> Any:
        return aot_autograd(
            fw_compiler=self.compiled,
            bw_compiler=self.compiled,
            decompositions=select_decomp_table(),
            partition_fn=min_cut_rematerialization_partition,
        )(module, inputs)

    def compiled(self, module: GraphModule, _: Any) -> Any:
        passes.PASSES(module.graph)
        module.graph.lint()
        module.recompile()
        self.found.update(str(node.target).split(".")[1] for node in module.graph.nodes if "xt." in str(node.target))
        return make_boxed_func(module.forward)


def compiled(model: Model, backend: Compiler | None = None) -> Counter[str]:
    """Let a model run with kernels of our own and the passes; the operators of ours in what will be compiled."""
    fuse_products(model)
    join_products(model)
    fuse_norms(model)
    torch._dynamo.reset()
    backend = backend or Compiler()
    compile_blocks(model, backend=backend)
    return backend.found


CASES = {
    # Equal blocks are compiled once: of attention and of the feed-forward, and sums for two biases.
    "gpt2-nano": (["model.dropout=0"], {"product_onto": 2, "norm_back_summed": 2, "product": 0, "sum_norm": 0}),
    "llama-7b": ([], {"product_onto": 2, "norm_back": 2, "product": 0, "sum_norm": 0}),
    "bert-base": (["model.dropout=0"], {"product_onto": 2, "norm_back_summed": 2, "sum_norm": 0}),
    "t5-small": (["model.dropout=0"], {"product_onto": 5, "sum_norm": 0}),
    "falcon-7b": (["model.dropout=0"], {"product_onto": 2, "product": 1}),
}


@pytest.mark.parametrize("name", CASES)
def test_models(name: str) -> None:
    changes, counts = CASES[name]
    model = shaken(name, *changes).eval()
    states, slopes = answers(model)
    found = compiled(model)
    same(answers(model), (states, slopes))
    assert {key: found[key] for key in counts} == counts


def test_sums_that_name_their_type() -> None:
    """As autocast of a GPU writes them."""

    class Naming(Compiler):
        def compiled(self, module: GraphModule, inputs: Any) -> Any:
            for node in module.graph.find_nodes(op="call_function", target=torch.ops.aten.sum.dim_IntList):
                node.kwargs = {"dtype": node.meta["val"].dtype}
            return super().compiled(module, inputs)

    model = shaken("gpt2-nano", "model.dropout=0").eval()
    states, slopes = answers(model)
    backend = Naming()
    found = compiled(model, backend)
    same(answers(model), (states, slopes))
    assert found["norm_back_summed"] == 2


def test_scaled_branches_are_left() -> None:
    model = shaken("gpt2-nano", "model.stack.block.wiring.scale=0.5").eval()
    states, slopes = answers(model)
    found = compiled(model)
    same(answers(model), (states, slopes))
    assert found["product_onto"] == found["norm_back_summed"] == 0


@pytest.mark.parametrize("name", ["gpt2-nano", "bert-base"])
def test_dropout_stands_between(name: str) -> None:
    model = shaken(name, "model.dropout=0.2").train()
    found = compiled(model)
    answers(model)
    assert found["product"] >= 2 and found["product_onto"] == found["norm_back_summed"] == 0


def same(found: Any, wanted: Any) -> None:
    torch.testing.assert_close(found[0], wanted[0], rtol=1e-9, atol=1e-9)
    for one, other in zip(found[1], wanted[1], strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-8)


needs_compiler = pytest.mark.skipif(
    shutil.which("c++") is None and shutil.which("g++") is None, reason="Inductor needs a C++ compiler"
)


@needs_compiler
@pytest.mark.parametrize("name", ["gpt2-nano", "tinyllama-1.1b"])
def test_working_copies_by_inductor(name: str) -> None:
    """As in training in 16 bits: with the passes and without, equal up to the roundings that are saved."""
    found = []
    for options in ({}, passes.options()):
        model = shaken(name, "model.dropout=0").float().train()
        fuse_products(model)
        join_products(model)
        fuse_norms(model)
        working = Working(model, torch.bfloat16)
        torch._dynamo.reset()
        compile_blocks(model, options=options)
        with working.lent(), torch.autocast("cpu", torch.bfloat16):
            model.hidden(**model.blank(2, 16)).states.float().square().mean().backward()
        found.append({name: weight.grad for name, weight in model.named_parameters()})
    for name, slope in found[0].items():
        assert (slope is None) == (found[1][name] is None)
        if slope is not None:
            gap = (slope - found[1][name]).norm() / slope.norm().clamp(min=1e-6)
            assert gap < 2**-6, name
    torch._dynamo.reset()


@needs_compiler
def test_equal_blocks_share_what_is_compiled() -> None:
    from torch._dynamo.utils import counters

    found = []
    for layers in (2, 4):
        torch._dynamo.reset()
        counters.clear()
        model = shaken("gpt2-nano", "model.dropout=0", f"model.stack.layers={layers}").train()
        fuse_products(model)
        join_products(model)
        fuse_norms(model)
        compile_blocks(model, options=passes.options())
        for _ in range(2):
            answers(model)
        found.append(int(counters["stats"]["unique_graphs"]))
        assert not counters["graph_break"]
    assert found[0] == found[1]
    torch._dynamo.reset()


class Drawing:
    """A graph that is put together by hand; values stand beside its nodes."""

    def __init__(self, *inputs: Tensor) -> None:
        self.graph, self.given = Graph(), inputs
        self.inputs = [self.graph.placeholder(f"x{number}") for number in range(len(inputs))]
        for node, value in zip(self.inputs, inputs, strict=True):
            node.meta["val"] = value

    def call(self, target: Any, *arguments: Any) -> Node:
        node = self.graph.call_function(target, arguments)
        values = torch.fx.map_arg(arguments, lambda one: one.meta["val"])
        node.meta["val"] = target(*values)
        return node

    def checked(self, joins: Any, *outputs: Node, level: float = 1e-6) -> int:
        """How many `joins` finds, after comparing what the graph gives before and after."""
        self.graph.output(outputs)
        module = GraphModule({}, self.graph)
        wanted = module(*self.given)
        count: int = joins(self.graph)
        self.graph.lint()
        module.recompile()
        for one, other in zip(module(*self.given), wanted, strict=True):
            torch.testing.assert_close(one, other, rtol=level, atol=level)
        return count


def drawn(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)), dtype=torch.float64).to(dtype)


aten = torch.ops.aten
ADDED = {
    "alone": 1,
    "first": 1,
    "read twice": 0,
    "twice itself": 0,
    "of another shape": 0,
    "of another type": 0,
    "both": 1,
}


@pytest.mark.parametrize("case", ADDED)
def test_what_products_are_added_to(case: str) -> None:
    other = drawn(2, 3, 8, dtype=torch.float32 if case == "of another type" else torch.float64)
    drawing = Drawing(drawn(6, 4), drawn(8, 4), other[:1] if case == "of another shape" else other)
    x, weight, stream = drawing.inputs
    product = drawing.call(xt.product.default, x, weight, None)
    shown = drawing.call(aten.view.default, product, [2, 3, 8])
    outputs = [shown] if case == "read twice" else []
    if case == "twice itself":
        stream = shown
    if case == "both":
        second = drawing.call(xt.product.default, x, weight, None)
        stream = drawing.call(aten.view.default, second, [2, 3, 8])
    terms = (shown, stream) if case == "first" else (stream, shown)
    outputs.append(drawing.call(aten.add.Tensor, *terms))
    assert drawing.checked(passes.add_onto, *outputs) == ADDED[case]


SUMMED = {
    "read": 1, "written": 1, "both": 1, "elsewhere": 0, "needed before": 0, "over all": 0, "kept": 0, "rows as one": 0,
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
@pytest.mark.parametrize("case", SUMMED)
def test_which_slopes_are_summed(case: str, dtype: torch.dtype) -> None:
    stats = torch.rand(
        1, 6, generator=torch.Generator().manual_seed(1), dtype=torch.promote_types(dtype, torch.float32)
    )
    given = [one.to(dtype) for one in (drawn(6, 8), drawn(2, 3, 8), drawn(6, 8) + 1.0, drawn(8), drawn(6, 8) - 1.0)]
    drawing = Drawing(*given, stats)
    dn, ds, x, gain, apart, kept = drawing.inputs
    flat = drawing.call(aten.view.default, ds, [6, 8])
    rows = drawing.call(aten.view.default, ds, [6, 8])

    def back(dn: Node) -> tuple[Node, Node]:
        made = drawing.call(xt.norm_back.default, dn, None, flat, x, gain, kept, 0.0, False)
        return drawing.call(operator.getitem, made, 0), drawing.call(operator.getitem, made, 1)

    if case == "needed before":
        sums = drawing.call(aten.sum.dim_IntList, rows, [0])
        dx, of_gain = back(drawing.call(aten.mul.Tensor, dn, sums))
        outputs = [sums]
    else:
        dx, of_gain = back(dn)
        axes = [0, 1] if case == "over all" else [0]
        of = {"written": dx, "elsewhere": apart}.get(case, rows)
        outputs = [drawing.call(aten.sum.dim_IntList, of, axes, *([True] if case == "kept" else []))]
        if case == "both":
            outputs.append(drawing.call(aten.sum.dim_IntList, rows, [0]))
        if dtype.itemsize < 4:
            outputs.append(drawing.call(torch.ops.prims.convert_element_type.default, outputs[0], torch.float32))
    row = of_gain if case == "rows as one" else drawing.call(aten.select.int, of_gain, 0, 0)
    level = 2**-10 if dtype.itemsize < 4 else 1e-9
    assert drawing.checked(passes.sum_beside, dx, row, *outputs, level=level) == SUMMED[case]
