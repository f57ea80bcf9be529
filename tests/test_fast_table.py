"""Rows of a token table by a kernel of our own, in Triton's interpreter, against PyTorch's lookup."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from xtcli.config.preset import load_preset
from xtcli.model import build
from xtcli.parts.embed import Tokens

pytest.importorskip("triton")

from xtcli.fast.table import PARTS, TILE, look_up, summed

DRAWS = {
    "all apart": lambda n, v: torch.randperm(v)[:n],
    "some alike": lambda n, v: torch.randint(v, (n,)),
    "one": lambda n, v: torch.full((n,), v - 1),
    "two in turn": lambda n, v: torch.arange(n) % 2,
    "three, one of them often": lambda n, v: torch.arange(n).clamp(max=n - 3),
}


def gradient(function: object, ids: Tensor, weight: Tensor, dy: Tensor) -> Tensor:
    leaf = weight.clone().requires_grad_()
    x = function(ids, leaf)  # type: ignore[operator]
    torch.testing.assert_close(x, F.embedding(ids, weight), rtol=0, atol=0)
    x.backward(dy)
    assert leaf.grad is not None
    return leaf.grad


@pytest.mark.parametrize("draw", DRAWS)
@pytest.mark.parametrize(
    ("shape", "rows", "width"),
    [((3, 5), 40, 24), ((TILE,), 90, 128), ((TILE + 1,), 90, 200), ((2, TILE), 150, 8), ((3 * TILE - 1,), 200, 130)],
)
def test_gradients(shape: tuple[int, ...], rows: int, width: int, draw: str) -> None:
    torch.manual_seed(rows)
    count = int(torch.Size(shape).numel())
    ids = DRAWS[draw](count, rows).reshape(shape)
    weight, dy = torch.randn(rows, width), torch.randn(*shape, width)
    wanted = gradient(F.embedding, ids, weight, dy)
    torch.testing.assert_close(gradient(look_up, ids, weight, dy), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bits(dtype: torch.dtype) -> None:
    ids = torch.cat((torch.arange(30), torch.full((100,), 7)))
    dy = torch.randn(len(ids), 24, generator=torch.Generator().manual_seed(1)).to(dtype)
    wanted = torch.zeros(40, 24, dtype=torch.float64).index_add_(0, ids, dy.double())
    torch.testing.assert_close(summed(ids, dy, 40).double(), wanted, rtol=2**-7, atol=0)


@pytest.mark.parametrize("tiles", [PARTS, PARTS + 1, 2 * PARTS + 3])
def test_a_number_that_fills_many_tiles(tiles: int) -> None:
    ids = torch.cat((torch.tensor([0, 1, 2]), torch.full((tiles * TILE,), 3), torch.tensor([4, 4])))
    weight, dy = torch.randn(6, 8), torch.randn(len(ids), 8)
    wanted = gradient(F.embedding, ids, weight, dy)
    torch.testing.assert_close(gradient(look_up, ids, weight, dy), wanted, rtol=1e-5, atol=1e-4)


def test_no_places() -> None:
    weight = torch.randn(4, 3, requires_grad=True)
    look_up(torch.zeros(2, 0, dtype=torch.long), weight).sum().backward()
    assert weight.grad is not None and not weight.grad.any()


def test_a_table_that_is_computed() -> None:
    weight, ids = torch.randn(6, 4, requires_grad=True), torch.tensor([1, 1, 5])
    look_up(ids, weight * 2).sum().backward()
    found, weight.grad = weight.grad, None
    F.embedding(ids, weight * 2).sum().backward()
    torch.testing.assert_close(found, weight.grad)


@pytest.mark.parametrize("name", ["gpt2-nano", "llama-7b", "t5-small", "bert-base"])
def test_models(name: str) -> None:
    """Tied and untied tables, and one that encoder, decoder and head share."""
    model = build(load_preset(name, ["model.dropout=0"], tiny=True), seed=1).eval()
    inputs = model.blank(2, 9)
    generator = torch.Generator().manual_seed(3)
    for key, value in inputs.items():
        if key.endswith("input_ids"):
            inputs[key] = torch.randint(20, value.shape, generator=generator)

    def gradients() -> dict[str, Tensor]:
        model.zero_grad(set_to_none=True)
        targets = {head: inputs.get("decoder_input_ids", inputs["input_ids"]) for head in ("lm", "mlm")}
        terms = model.losses(inputs, {head: ids for head, ids in targets.items() if head in model.heads})
        sum(term.sum for term in terms.values()).backward()
        return {key: weight.grad for key, weight in model.named_parameters() if weight.grad is not None}

    wanted = gradients()
    tables = [module for module in model.modules() if isinstance(module, Tokens)]
    assert tables
    for table in tables:
        table.look_up = look_up
    found = gradients()
    assert found.keys() == wanted.keys()
    for key, gradient in found.items():
        torch.testing.assert_close(
            gradient, wanted[key], rtol=1e-4, atol=1e-5, msg=lambda text, key=key: f"{key}: {text}"
        )
