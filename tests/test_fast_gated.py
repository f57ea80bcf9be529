"""Gated feed-forwards: the kernels in Triton's interpreter against their plain twins, and models with and without."""

from __future__ import annotations

import pytest
import torch
from joined_models import assert_alike, built, drawn, replaced
from torch import Tensor

from xtcli.fast import gated
from xtcli.parts.activations import ACTIVATIONS
from xtcli.parts.ffn import GLU

pytest.importorskip("triton")

SHAPES = [(8, 256), (5, 64), (3, 40), (9, 24), (0, 8)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("act", gated.SLOPES)
def test_kernels(act: str, shape: tuple[int, int], dtype: torch.dtype) -> None:
    from xtcli.fast import gatekernels

    rows, width = shape
    p, dh = drawn(rows, 2 * width, seed=1, size=3).to(dtype), drawn(rows, width, seed=2).to(dtype)
    # The interpreter cuts bits off where a GPU rounds.
    close = {"rtol": 2e-5, "atol": 2e-5} if dtype == torch.float32 else {"rtol": 2**-7, "atol": 1e-4}
    wanted, slope_wanted = torch.ops.xt.gated(p, act), torch.ops.xt.gated_slope(p, dh, act)
    assert torch.equal(gated._gated(p, act), gatekernels.forward(p, act))
    assert all(map(torch.equal, gated._gated_slope(p, dh, act), gatekernels.backward(p, dh, act)))
    for cut in (None, gatekernels.Cut(256, 64, 4)):
        torch.testing.assert_close(gatekernels.forward(p, act, cut), wanted, **close)
        for mine, theirs in zip(gatekernels.backward(p, dh, act, cut), slope_wanted, strict=True):
            torch.testing.assert_close(mine, theirs, **close)


@pytest.mark.parametrize("act", gated.SLOPES)
def test_slopes_are_derivatives(act: str) -> None:
    p = drawn(6, 10, seed=1, size=2).double().requires_grad_()
    gate, up = p.chunk(2, 1)
    h = ACTIVATIONS[act](gate) * up
    dh = drawn(6, 5, seed=2).double()
    (wanted,) = torch.autograd.grad(h, p, dh)
    slope, again = torch.ops.xt.gated_slope(p.detach(), dh, act)
    torch.testing.assert_close(slope, wanted)
    torch.testing.assert_close(again, h.detach())
    torch.testing.assert_close(torch.ops.xt.gated(p.detach(), act), h.detach())


@pytest.mark.parametrize("biased", [False, True])
def test_gradients(biased: bool) -> None:
    x = drawn(2, 3, 6, seed=1).double().requires_grad_()
    weights = [drawn(8, 6, seed=seed).double().requires_grad_() for seed in (2, 3)]
    down = drawn(6, 8, seed=4).double().requires_grad_()
    biases = [drawn(size, seed=5).double().requires_grad_() for size in (8, 8, 6)] if biased else []

    def made(x: Tensor, gate: Tensor, up: Tensor, down: Tensor, *biases: Tensor) -> Tensor:
        last = biases[2] if biases else None
        return gated.feed_forward(x, (gate, up), biases[:2], down, last, "gelu_tanh")

    assert torch.autograd.gradcheck(made, (x, *weights, down, *biases))


FFN = "model.stack.block.sublayers.ffn"

MODELS = [
    ("llama-7b", []),
    ("llama-7b", [f"{FFN}.bias=true", f"{FFN}.act=relu2"]),
    ("llama-7b", [f"{FFN}.out_bias=true", f"{FFN}.chunk=5"]),
    ("t5-v1.1-base", []),
]


@pytest.mark.parametrize(("name", "changes"), MODELS)
def test_models(name: str, changes: list[str]) -> None:
    model = built(name, changes)
    assert all(replaced(model, GLU, "inner"))
    assert_alike(built(name, changes, own=False), model)


@pytest.mark.parametrize("change", ["dropout=0.1", "act=mish"])
def test_what_stays_plain(change: str) -> None:
    assert not any(replaced(built("llama-7b", [f"{FFN}.{change}"]), GLU, "inner"))
