"""Kernels of a decoding step against their twins, in Triton's interpreter."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from xtcli.fast import attend as attending
from xtcli.fast import ends, twins
from xtcli.fast import product as products
from xtcli.fast.engine import Planned
from xtcli.fast.plan import KNOWN, Heads, Matrix, Norm, Turn, plan
from xtcli.generate.engine import undisturbed
from xtcli.generate.feed import Feed
from xtcli.model import build
from xtcli.parts.int8 import Int8Linear
from xtcli.parts.linear import Linear

CLOSE: dict[str, Any] = {"atol": 2e-5, "rtol": 1e-5}


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape))).to(dtype)


def matrix(outputs: int, inputs: int, bias: bool, eight: bool = False, seed: int = 0) -> Matrix:
    weight = normal(outputs, inputs, seed=seed) / inputs**0.5
    shift = normal(outputs, seed=seed + 1) if bias else None
    if not eight:
        return Matrix(weight, shift)
    layer = Linear(inputs, outputs, False)
    layer.weight.data = weight
    small = Int8Linear(layer)
    return Matrix(small.whole, shift, small.scale)


def norm(kind: str | None, width: int) -> Norm | None:
    if kind is None:
        return None
    gain, shift = 1 + 0.3 * normal(width, seed=3), normal(width, seed=4)
    return Norm("layer", gain, shift, 1e-5) if kind == "layer" else Norm("rms", gain, None, 1e-6, float(kind == "plus"))


def both(x: Tensor, normed: Norm | None, parts: tuple[Matrix, ...], outs: int, **options: Any) -> tuple[Tensor, Tensor]:
    """One row by `product`; several by `products` and, for what that leaves to it, `settle`."""
    made = []
    for module in (products, twins):
        out = torch.full((x.shape[0], outs), float("nan"))
        if x.shape[0] == 1:
            module.product(x, normed, parts, out, **options)
        else:
            read = torch.full_like(x, float("nan"))
            module.settle(x, None, None, 1.0, x, normed, read)
            module.products(read, parts, out, **options)
        made.append(out)
    return made[0], made[1]


SIZES = [(1, 96, (40, 24, 24)), (1, 33, (7, 3, 5)), (1, 128, (65, 9, 1)), (3, 96, (40, 24, 24)), (17, 50, (33, 7, 16))]


@pytest.mark.parametrize("kind", [None, "rms", "plus", "layer"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("rows", "width", "sizes"), SIZES, ids=str)
def test_matrices_behind_one_another(
    rows: int, width: int, sizes: tuple[int, ...], bias: bool, kind: str | None
) -> None:
    parts = tuple(matrix(size, width, bias, seed=at) for at, size in enumerate(sizes))
    torch.testing.assert_close(*both(2 + normal(rows, width), norm(kind, width), parts, sum(sizes)), **CLOSE)


@pytest.mark.parametrize("eight", [False, True])
@pytest.mark.parametrize("act", KNOWN)
@pytest.mark.parametrize("rows", [1, 5])
def test_pairs_and_activations(rows: int, act: str, eight: bool) -> None:
    parts = tuple(matrix(37, 48, True, eight, seed) for seed in (0, 5))
    x = 3 * normal(rows, 48)
    torch.testing.assert_close(*both(x, norm("rms", 48), parts, 37, paired=True, act=act), **CLOSE)
    torch.testing.assert_close(*both(x, None, parts[:1], 37, act=act), **CLOSE)
    torch.testing.assert_close(*both(x, None, (matrix(21, 48, False, eight),), 21, cap=2.0), **CLOSE)


@pytest.mark.parametrize("eight", [False, True])
@pytest.mark.parametrize("weight", [1.0, 0.5])
def test_one_row_into_the_stream(weight: float, eight: bool) -> None:
    stream, x = normal(1, 21, seed=9), normal(1, 64)
    made = both(x, None, (matrix(21, 64, True, eight),), 21, stream=stream, weight=weight)
    torch.testing.assert_close(*made, **CLOSE)


@pytest.mark.parametrize("eight", [False, True])
@pytest.mark.parametrize("kind", [None, "rms", "layer"])
@pytest.mark.parametrize(("rows", "splits"), [(2, 4), (5, 3), (70, 2)])
def test_several_rows_into_the_stream(rows: int, splits: int, kind: str | None, eight: bool) -> None:
    x, part = normal(rows, 290), matrix(21, 290, True, eight)
    for weight in (1.0, 0.5):
        made = []
        for module in (products, twins):
            stream, sums = normal(rows, 21, seed=9), torch.full((splits, rows, 21), float("nan"))
            read, out = (torch.full((rows, 21), float("nan")) for _ in range(2))
            module.products(x, (part,), sums)  # type: ignore[attr-defined]
            module.settle(stream, sums, part.bias, weight, out, norm(kind, 21), read)  # type: ignore[attr-defined]
            made.append((out, read))
        for one, other in zip(*made, strict=True):
            torch.testing.assert_close(one, other, **CLOSE)


def test_wide_rows_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "WIDEST", 32)
    parts = tuple(matrix(11, 75, True, seed=seed) for seed in (0, 5))
    torch.testing.assert_close(*both(normal(1, 75), None, parts, 11, paired=True, act="silu"), **CLOSE)
    torch.testing.assert_close(*both(normal(1, 75), None, parts[:1], 11), **CLOSE)
    with pytest.raises(ValueError, match="wider than"):
        both(normal(1, 75), norm("rms", 75), parts[:1], 11)


def test_rounding_is_that_of_the_parts() -> None:
    # The interpreter rounds to bfloat16 towards zero, to float16 as devices do.
    low = torch.float16
    parts = tuple(Matrix(normal(64, 128, seed=seed, dtype=low) / 8) for seed in (0, 5))
    gain = Norm("rms", normal(128, seed=7, dtype=low), None, 1e-5)
    x, stream = normal(1, 128, dtype=low), normal(1, 64, seed=2, dtype=low)
    made = [torch.empty(1, 64, dtype=low) for _ in range(2)]
    for one, module in zip(made, (products, twins), strict=True):
        module.product(x, gain, parts, one, paired=True, act="silu", stream=stream)  # type: ignore[attr-defined]
    # The order of a sum may move a product over the edge of two neighbours in 16 bits; nothing may move further.
    torch.testing.assert_close(*made, atol=4e-3, rtol=4e-3)
    assert (made[0] == made[1]).float().mean() > 0.9


TURNS = {"none": None, "half": False, "interleaved": True}


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("single", [True, False])
@pytest.mark.parametrize("turn", TURNS)
@pytest.mark.parametrize(("heads", "groups", "width"), [(4, 2, 16), (6, 1, 24), (3, 3, 10)])
def test_attention(heads: int, groups: int, width: int, turn: str, single: bool, splits: int) -> None:
    rows, capacity, turned = 3, 40, 2 * (width // 3)
    angles = normal(capacity, turned // 2)
    turns = None if turn == "none" else Turn(angles.cos(), angles.sin(), bool(TURNS[turn]))
    qk = Norm("rms", 1 + 0.2 * normal(width), None, 1e-6) if heads == 4 else None
    for left in (None, 7):
        what = Heads(heads, groups, width, 0.3, qk, qk, turns, left)
        qkv = normal(rows, (heads + 2 * groups) * width)
        slots, pads = torch.tensor([23, 39, 12]), torch.tensor([0, 5, 12])
        made = []
        for module in (attending, twins):
            keys, values = (normal(rows, groups, capacity, width, seed=seed) for seed in (1, 2))
            out = torch.full((rows, heads * width), float("nan"))
            cut = {"single": single, "splits": splits} if module is attending else {}
            module.attend(qkv, what, keys, values, slots, pads, out, **cut)  # type: ignore[attr-defined]
            made.append((out, keys, values))
        for one, other in zip(*made, strict=True):
            torch.testing.assert_close(one, other, **CLOSE)


def test_attention_cuts_a_long_past_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attending, "LONG", 256)
    what = Heads(2, 1, 16, 0.25)
    qkv, keys, values = normal(1, 64), normal(1, 1, 700, 16), normal(1, 1, 700, 16, seed=1)
    made = []
    for module in (attending, twins):
        out = torch.empty(1, 32)
        module.attend(qkv, what, keys.clone(), values.clone(), torch.tensor([650]), torch.tensor([0]), out)  # type: ignore[attr-defined]
        made.append(out)
    torch.testing.assert_close(*made, **CLOSE)


KERNELS: Any = SimpleNamespace(
    product=products.product,
    products=products.products,
    settle=products.settle,
    attend=attending.attend,
    embed=ends.embed,
    likeliest=ends.likeliest,
)


@pytest.mark.parametrize("prompts", [[[5, 9, 2]], [[5, 9, 2], [7]]], ids=["one", "several"])
@pytest.mark.parametrize("name", ["gpt2-small", "tinyllama-1.1b", "falcon-7b"])
def test_a_whole_step(name: str, prompts: list[list[int]]) -> None:
    model = build(name, tiny=True, seed=3)
    with undisturbed(model):
        feed = Feed(model, prompts, 4)
        chosen = feed.start().argmax(-1)
        step = Planned(plan(model, 16), len(prompts), 16, KERNELS)
        step.begin(feed.state, chosen, feed.width, feed.pads)
        for _ in range(2):
            logits, wanted = step.logits(), feed.step(chosen)
            torch.testing.assert_close(logits, wanted, **CLOSE)
            step.likeliest(logits, model.vocab)
            chosen = wanted.argmax(-1)
            assert torch.equal(step.tokens, chosen)


@pytest.mark.parametrize("scale", [1.0, 3.0])
@pytest.mark.parametrize("placed", [False, True])
def test_tokens_to_vectors(scale: float, placed: bool) -> None:
    table, places = normal(50, 100), normal(20, 100, seed=1) if placed else None
    tokens, slots, pads = torch.tensor([3, 49, 0]), torch.tensor([7, 19, 4]), torch.tensor([0, 2, 6])
    made = [torch.empty(3, 100) for _ in range(2)]
    for one, module in zip(made, (ends, twins), strict=True):
        module.embed(tokens, slots, pads, table, scale, places, one)  # type: ignore[attr-defined]
    assert torch.equal(*made)


def test_the_likeliest_token() -> None:
    logits = normal(6, 9000)
    logits[0, [70, 8500]] = 9.0
    logits[1, 8999] = 10.0
    logits[2, 5] = float("nan")
    logits[3, 5] = float("inf")
    logits[4] = float("-inf")
    made = []
    for module in (ends, twins):
        tokens, slots, said = (
            torch.zeros(6, dtype=torch.long),
            torch.tensor([0, 3, 1, 1, 1, 4]),
            torch.zeros(6, 6).long(),
        )
        module.likeliest(logits, 8999, tokens, slots, said)  # type: ignore[attr-defined]
        made.append((tokens, slots, said))
    for one, other in zip(*made, strict=True):
        assert torch.equal(one[[0, 1, 5]], other[[0, 1, 5]])
    assert made[0][0][0] == 70
    assert torch.equal(made[0][2], made[1][2])
    assert made[0][2][2, 2:5].tolist() == [-1, -1, -1]
