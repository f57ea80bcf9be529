"""Queries, keys and values of one product: the kernels in Triton's interpreter against their plain twins, and models
with and without them."""

from __future__ import annotations

import pytest
import torch
from joined_models import assert_alike, built, drawn, replaced
from torch import Tensor
from torch._dynamo.utils import counters

from xtcli.config.train import LoraConfig
from xtcli.fast import heads, stacked
from xtcli.parts.attention import Attention
from xtcli.parts.rotary import turn_half, turn_interleaved
from xtcli.train.fused import fuse_products
from xtcli.train.joined import join_products
from xtcli.train.lora import adapt
from xtcli.train.transforms import compile_blocks
from xtcli.train.working import Working

pytest.importorskip("triton")

SHAPES = [  # texts, length, heads, groups, width, width that turns, a table of angles for each text
    (2, 8, 4, 2, 16, 16, False),
    (2, 5, 4, 4, 8, 8, True),
    (2, 7, 4, 1, 12, 6, True),
    (1, 9, 3, 3, 20, 12, False),
    (2, 4, 6, 2, 16, 4, False),
]


def angles(length: int, half: int, texts: int) -> tuple[Tensor, Tensor]:
    angle = 7 * drawn(texts, 1, length, half, seed=9)
    return angle.cos(), angle.sin()


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_turning(shape: tuple[int, int, int, int, int, int, bool], interleaved: bool) -> None:
    from xtcli.fast import headkernels

    texts, length, queries, groups, width, turned, each = shape
    cos, sin = angles(length, turned // 2, texts if each else 1)
    x, weight = drawn(texts * length, 6, seed=1), drawn((queries + 2 * groups) * width, 6, seed=2)
    for bias in (None, drawn(len(weight), seed=3)):
        wanted = torch.ops.xt.turned_product(x, (weight,), bias, cos, sin, queries, groups, interleaved)
        on_gpu = heads._turned_product(x, (weight,), bias, cos, sin, queries, groups, interleaved)
        torch.testing.assert_close(on_gpu, wanted, rtol=1e-6, atol=1e-6)
        own = torch.ops.xt.product(x, weight, bias)
        for tile in (32, 4096):
            found = own.clone()
            cut = headkernels.Cut(tile, 4)
            headkernels.turn(found, cos, sin, queries, groups, interleaved, cut)
            torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)
    q, _, v = heads.apart(own, length, queries, groups)
    turn = turn_interleaved if interleaved else turn_half
    first, _, last = heads.apart(wanted, length, queries, groups)
    torch.testing.assert_close(first, turn(q, cos, sin))
    assert torch.equal(last, v)


@pytest.mark.parametrize(("biased", "dtype"), [(False, torch.float32), (True, torch.float32), (True, torch.bfloat16)])
@pytest.mark.parametrize("kind", ["none", "half", "interleaved"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_joint_slopes(
    shape: tuple[int, int, int, int, int, int, bool], kind: str, biased: bool, dtype: torch.dtype
) -> None:
    from xtcli.fast import headkernels

    texts, length, queries, groups, width, turned, each = shape
    cos, sin = (None, None) if kind == "none" else angles(length, turned // 2, texts if each else 1)
    # In three orders, as kernels of attention leave them.
    dq = drawn(texts, length, queries, width, seed=1).transpose(1, 2).to(dtype)
    dk = drawn(texts, groups, length, width, seed=2).to(dtype)
    dv = drawn(texts, length, groups, width + 4, seed=3).transpose(1, 2)[..., :width].to(dtype)
    given = (dq, dk, dv, cos, sin, kind == "interleaved", biased)
    wanted, sums = torch.ops.xt.joint_slope(*given)
    for found, own_sums in (heads._joint_slope(*given), headkernels.join(*given, headkernels.Cut(32, 4, 2))):
        # The interpreter cuts bits off where a GPU rounds.
        torch.testing.assert_close(found, wanted, rtol=1e-6 if dtype == torch.float32 else 2**-7, atol=1e-6)
        if biased:
            torch.testing.assert_close(own_sums, sums, rtol=1e-5, atol=1e-5 if dtype == torch.float32 else 0.1)


def test_nothing_at_all() -> None:
    from xtcli.fast import headkernels

    empty = torch.zeros(0, 4, 3, 8)
    joint, sums = headkernels.join(empty, empty, empty, None, None, False, True)
    assert joint.shape == (0, 96) and sums is not None and torch.equal(sums, torch.zeros(96))
    headkernels.turn(torch.zeros(0, 96), *angles(3, 4, 1), 4, 4, False)


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("kind", ["none", "half", "interleaved"])
def test_gradients(kind: str, biased: bool) -> None:
    texts, length, queries, groups, width, turned, _ = SHAPES[0]
    x = drawn(texts, length, 6, seed=1).double().requires_grad_()
    weights = [drawn(n * width, 6, seed=n).double().requires_grad_() for n in (queries, groups, groups)]
    biases = [drawn(len(weight), seed=5).double().requires_grad_() for weight in weights] if biased else []
    cos, sin = (table.double() for table in angles(length, turned // 2, 1))
    turn = None if kind == "none" else (cos, sin, kind == "interleaved")

    def made(x: Tensor, *more: Tensor) -> tuple[Tensor, ...]:
        return heads.heads_of(x, more[:3], more[3:], turn, queries, groups)

    assert torch.autograd.gradcheck(made, (x, *weights, *biases), fast_mode=True)


MODELS = [
    ("tinyllama-1.1b", []),
    ("llama-7b", ["model.stack.position.layout=interleaved", "model.stack.position.fraction=0.5"]),
    ("llama-7b", ["model.stack.block.sublayers.attn.bias=true"]),
    ("gpt2-nano", []),
    ("falcon-7b", []),
    ("t5-v1.1-base", []),
    ("bert-base", []),
]


@pytest.mark.parametrize(("name", "changes"), MODELS)
def test_models(name: str, changes: list[str]) -> None:
    model = built(name, changes)
    assert all(replaced(model, Attention, "prepare"))
    assert_alike(built(name, changes, own=False), model)


ATTN = "model.stack.block.sublayers.attn"


@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        (f"{ATTN}.dropout=0.1", True),
        (f"{ATTN}.qk_norm.kind=rms", False),
        ("model.stack.position.scaling={kind: dynamic, factor: 2.0}", False),
    ],
)
def test_what_is_replaced(change: str, wanted: bool) -> None:
    assert replaced(built("llama-7b", [change]), Attention, "prepare") == [wanted] * 2


def test_an_adapter_stays_plain() -> None:
    model = built("llama-7b", own=False)
    adapt(model, LoraConfig())
    fuse_products(model)
    join_products(model)
    assert not any(replaced(model, Attention, "prepare"))


def test_weights_that_follow_one_another_are_read_where_they_are() -> None:
    weights = [drawn(rows, 4, seed=rows) for rows in (3, 2, 5)]
    laid = stacked.laid_out(weights, torch.bfloat16)
    joint = stacked.stacked(laid)
    assert joint.data_ptr() == laid[0].data_ptr()
    assert torch.equal(joint, torch.cat(weights).bfloat16())
    for given in (weights, laid[::-1], [laid[0], laid[2]]):
        apart = stacked.stacked(given)
        assert torch.equal(apart, torch.cat(given)) and apart.data_ptr() != given[0].data_ptr()


@pytest.mark.parametrize("name", ["tinyllama-1.1b", "gpt2-nano"])
def test_working_copies_follow_one_another(name: str) -> None:
    model = built(name)
    working = Working(model, torch.bfloat16)
    with working.lent():
        for module in model.modules():
            weights = [layer.weight for layer in getattr(module, "joined", ())]
            if weights:
                assert stacked.stacked(weights).data_ptr() == weights[0].data_ptr()
    with torch.no_grad():
        for weight in model.parameters():
            weight += 1.0
    working.refresh()
    for master, copy in zip(working.masters, working.copies, strict=True):
        assert torch.equal(copy, master.bfloat16())


@pytest.mark.parametrize("name", ["tinyllama-1.1b", "gpt2-nano"])
def test_equal_blocks_share_what_is_compiled(name: str) -> None:
    found = []
    for layers in (2, 5):
        torch._dynamo.reset()
        counters.clear()
        model = built(name, [f"model.stack.layers={layers}"])
        compile_blocks(model, backend="aot_eager")
        working = Working(model, torch.bfloat16)
        for _ in range(2):
            with working.lent(), torch.autocast("cpu", dtype=torch.bfloat16):
                model.hidden(**model.blank(2, 16)).states.sum().backward()
        found.append(counters["stats"]["unique_graphs"])
    assert found[0] == found[1] < 5
    assert not counters["graph_break"], dict(counters["graph_break"])
