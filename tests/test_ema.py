"""The damped moving average against slow twins: a loop over time, and its definition."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from xtcli.parts.ema import DampedEma, Spread, convolved, cut_short, ema_steps, packed, taps_of


def averages() -> tuple[Tensor, ...]:
    """Inputs of an average, in double precision, with gradients."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 75, generator=generator, dtype=torch.double)
    weight = torch.randn(3, 5, generator=generator, dtype=torch.double)
    log_keep = -torch.rand(3, 5, generator=generator, dtype=torch.double)
    return x.requires_grad_(), weight.requires_grad_(), log_keep.requires_grad_()


def direct(x: Tensor, kernel: Tensor, documents: Tensor | None, step: int = 1) -> Tensor:
    """The convolution as it is defined; `step` -1 looks ahead."""
    made = []
    for t in range(x.shape[-1]):
        total = torch.zeros_like(x[..., 0])
        for lag in range(kernel.shape[-1]):
            place = t - step * lag
            if 0 <= place < x.shape[-1]:
                own = 1.0 if documents is None else (documents[:, place] == documents[:, t])[:, None]
                total = total + kernel[:, lag] * x[..., place] * own
        made.append(total)
    return torch.stack(made, -1)


def alike(one: Tensor, other: Tensor, inputs: tuple[Tensor, ...]) -> None:
    """Equal values and equal gradients."""
    torch.testing.assert_close(one, other)
    pull = torch.randn(one.shape, generator=torch.Generator().manual_seed(1), dtype=one.dtype)
    grads = (torch.autograd.grad(made, inputs, pull, retain_graph=True) for made in (one, other))
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


def test_fourier_equals_the_loop_over_time() -> None:
    inputs = x, weight, log_keep = averages()
    slow, _ = ema_steps(x, weight, log_keep, x.new_zeros(2, 3, 5))
    alike(convolved(x, taps_of(weight, log_keep, 75)), slow, inputs)


def test_fourier_both_ways_equals_its_definition() -> None:
    inputs = x, weight, log_keep = averages()
    ahead, back = (
        taps_of(weight, log_keep, 9),
        taps_of(weight.cos(), log_keep, 9),
    )
    alike(convolved(x, ahead, back), direct(x, ahead, None) + direct(x, back, None, -1), inputs)


def test_pieces_equal_the_loop_over_time() -> None:
    x, weight, log_keep = averages()
    documents = torch.tensor([[0] * 30 + [1] * 34 + [2] * 11, [4] * 2 + [5] * 73])
    state = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(2), dtype=torch.double, requires_grad=True)
    fast, slow = (made(x, weight, log_keep, state, documents) for made in (packed, ema_steps))
    alike(fast[0], slow[0], (x, weight, log_keep))
    # The state is gone where the last document began.
    alike(fast[1], slow[1], (x, log_keep))


@pytest.mark.parametrize("taps", [1, 4, 40, None])
def test_a_kernel_cut_short_ends_with_its_document(taps: int | None) -> None:
    inputs = x, weight, log_keep = averages()
    documents = torch.tensor([[0] * 30 + [1] * 34 + [2] * 11, [4] * 2 + [5] * 73])
    kernel = taps_of(weight, log_keep, taps or 75)
    alike(cut_short(x, weight, log_keep, taps, documents), direct(x, kernel, documents), inputs)


def test_averages_begin_as_published() -> None:
    model = DampedEma(8, 4, True, None, Spread(0.2, 0.02, 1.0))
    generator = torch.Generator().manual_seed(0)

    def normal(weight: Tensor, std: float) -> None:
        weight.normal_(0.0, std, generator=generator)

    with torch.no_grad():
        model.draw(normal)
    assert model.expand.shape == (16, 4)
    assert (model.expand - torch.tensor([1.0, -1.0, 1.0, -1.0])).abs().max() < 0.1
