"""Slopes of activations with the sums of their columns, in Triton's interpreter, against the plain form and autograd."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from xtcli.fast import feedforward
from xtcli.fast.gated import SLOPES
from xtcli.parts.activations import ACTIVATIONS

pytest.importorskip("triton")

from xtcli.fast import bends


@pytest.mark.parametrize("act", SLOPES)
def test_slopes_are_derivatives(act: str) -> None:
    p = torch.randn(5, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    dh = torch.randn(5, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    (wanted,) = torch.autograd.grad(ACTIVATIONS[act](p), p, dh)
    slope, total = torch.ops.xt.act_slope(p.detach(), dh, act)
    torch.testing.assert_close(slope, wanted)
    torch.testing.assert_close(total, wanted.sum(0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("shape", [(16, 512), (100, 512), (3, 96), (41, 1100), (0, 8)])
@pytest.mark.parametrize("act", SLOPES)
def test_kernels(act: str, shape: tuple[int, int], dtype: torch.dtype) -> None:
    p = (torch.randn(shape, generator=torch.Generator().manual_seed(1)) * 2).to(dtype)
    dh = torch.randn(shape, generator=torch.Generator().manual_seed(2)).to(dtype)
    slope, total = bends.slope(p, dh, act)
    plain, sums = torch.ops.xt.act_slope(p, dh, act)
    close = {"rtol": 2e-3, "atol": 2e-3} if dtype == torch.float16 else {"rtol": 1e-5, "atol": 4e-6}
    torch.testing.assert_close(slope, plain, **close)
    torch.testing.assert_close(total, sums, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("act", SLOPES)
def test_whole(act: str) -> None:
    generator = torch.Generator().manual_seed(3)
    draw = lambda *shape: torch.randn(*shape, dtype=torch.float64, generator=generator).requires_grad_()  # noqa: E731
    x, up, up_bias, down, down_bias = draw(2, 3, 8), draw(16, 8), draw(16), draw(8, 16), draw(8)
    aim = torch.randn(2, 3, 8, dtype=torch.float64, generator=generator)
    own = feedforward.feed_forward(x, up, up_bias, down, down_bias, act)
    plain = F.linear(ACTIVATIONS[act](F.linear(x, up, up_bias)), down, down_bias)
    torch.testing.assert_close(own, plain)
    leaves = (x, up, up_bias, down, down_bias)
    found, wanted = torch.autograd.grad(own, leaves, aim), torch.autograd.grad(plain, leaves, aim)
    for mine, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine, theirs)
