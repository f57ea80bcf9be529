"""The loss by slabs against its plain twin: values and gradients, whatever the slab, type, cap and smoothing."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from xtcli.parts import losses
from xtcli.parts.losses import linear_cross_entropy
from xtcli.parts.outputs import IGNORE, cross_entropy

ROWS, DIM, VOCAB = 23, 6, 37


def drawn(dtype: torch.dtype, bias: bool) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    generator = torch.Generator().manual_seed(4)
    states, weight, offset = (
        torch.randn(shape, generator=generator).to(dtype).requires_grad_()
        for shape in ((1, ROWS, DIM), (VOCAB, DIM), (VOCAB,))
    )
    targets = torch.randint(VOCAB, (1, ROWS), generator=generator)
    targets[0, ::5] = IGNORE
    return states, weight, offset if bias else None, targets


def plain(
    states: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, cap: float | None, smoothing: float
) -> Tensor:
    logits = F.linear(states, weight, bias)
    return cross_entropy(logits if cap is None else cap * torch.tanh(logits / cap), targets, smoothing).sum


@pytest.mark.parametrize("slab", [1, 37 * 8 * 5, 2**30])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("cap", [None, 1.5])
@pytest.mark.parametrize("bias", [False, True])
def test_equals_the_plain_twin(
    monkeypatch: pytest.MonkeyPatch, slab: int, smoothing: float, cap: float | None, bias: bool
) -> None:
    monkeypatch.setitem(losses.SLAB_BYTES, "cpu", slab)
    inputs = drawn(torch.float64, bias)
    leaves = [tensor for tensor in inputs[:3] if tensor is not None]
    term = linear_cross_entropy(*inputs, cap, smoothing)
    wanted = plain(*inputs, cap, smoothing)
    assert int(term.count) == int((inputs[3] != IGNORE).sum())
    torch.testing.assert_close(term.sum, wanted, rtol=1e-12, atol=1e-12)
    ours = torch.autograd.grad(term.sum * 0.3, leaves)
    theirs = torch.autograd.grad(wanted * 0.3, leaves)
    torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("target", [IGNORE, 3])
def test_rows_without_targets_and_no_rows_at_all(target: int) -> None:
    states, weight, bias, _ = drawn(torch.float32, True)
    for count in (0, 4):
        term = linear_cross_entropy(states[0, :count], weight, bias, torch.full((count,), target))
        assert bool(torch.isfinite(term.sum)) and int(term.count) == (0 if target == IGNORE else count)
        slopes = torch.autograd.grad(term.sum, (states, weight))
        assert all(bool(slope.eq(0).all()) == (count == 0 or target == IGNORE) for slope in slopes)


def test_far_logits_stay_finite() -> None:
    states, weight, _, targets = drawn(torch.float32, False)
    term = linear_cross_entropy(states * 1e4, weight, None, targets)
    slope = torch.autograd.grad(term.sum, states)[0]
    torch.testing.assert_close(term.sum, plain(states * 1e4, weight, None, targets, None, 0.0), rtol=1e-6, atol=0)
    assert bool(torch.isfinite(slope).all())


@pytest.mark.parametrize("slab", [VOCAB * 2 * 4, 2**30])
def test_sixteen_bits_under_autocast(monkeypatch: pytest.MonkeyPatch, slab: int) -> None:
    monkeypatch.setitem(losses.SLAB_BYTES, "cpu", slab)
    inputs = drawn(torch.float32, True)
    leaves = [tensor for tensor in inputs[:3] if tensor is not None]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = linear_cross_entropy(*inputs).sum
    theirs = plain(*inputs, None, 0.0)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, theirs, rtol=1e-2, atol=0)
    for mine, exact in zip(torch.autograd.grad(ours, leaves), torch.autograd.grad(theirs, leaves), strict=True):
        assert mine.dtype == torch.float32
        assert float((mine - exact).norm() / exact.norm()) < 1e-2


@pytest.mark.parametrize("cap", [None, 2.0])
def test_columns_that_fill_up_the_width_change_nothing(cap: float | None) -> None:
    generator = torch.Generator().manual_seed(1)
    logits, targets = torch.randn(5, 8, generator=generator), torch.tensor([0, 4, IGNORE, 2, 1])
    loss, slope = losses.slab_terms(logits, targets, cap, 0.1, 5)
    exact, narrow = losses.slab_terms(logits[:, :5], targets, cap, 0.1, 5)
    torch.testing.assert_close(loss, exact)
    assert bool(slope[:, 5:].eq(0).all())
    torch.testing.assert_close(slope[:, :5], narrow)


def test_without_gradients_none_are_made() -> None:
    states, weight, bias, targets = drawn(torch.float32, True)
    with torch.no_grad():
        assert linear_cross_entropy(states, weight, bias, targets).sum.grad_fn is None


def test_compiled_terms_agree() -> None:
    compiled = torch.compile(losses.slab_terms, backend="aot_eager", fullgraph=True)
    inputs = drawn(torch.float32, True)
    leaves = [tensor for tensor in inputs[:3] if tensor is not None]
    ours, theirs = (linear_cross_entropy(*inputs, terms=terms).sum for terms in (compiled, losses.slab_terms))
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(torch.autograd.grad(ours, leaves), torch.autograd.grad(theirs, leaves))


@pytest.mark.parametrize("slab", [72 * 2 * 3, 2**30])
@pytest.mark.parametrize(("vocab", "bias"), [(72, True), (72, False), (77, True)])
def test_products_of_a_slab_by_the_kernels_for_linear_layers(
    monkeypatch: pytest.MonkeyPatch, vocab: int, bias: bool, slab: int
) -> None:
    """Those that they take and those that they leave, in several slabs and in one."""
    from xtcli.fast.linear import PRODUCTS

    monkeypatch.setitem(losses.SLAB_BYTES, "cpu", slab)
    generator = torch.Generator().manual_seed(3)
    x, w, b = (torch.randn(size, generator=generator).bfloat16() for size in ((10, 16), (vocab, 16), (vocab,)))
    targets = torch.randint(vocab, (10,), generator=generator)
    made = []
    for products in (losses.PRODUCTS, PRODUCTS):
        given = [value.clone().requires_grad_() for value in ((x, w, b) if bias else (x, w))]
        states, weight, *rest = given
        term = losses.linear_cross_entropy(states, weight, rest[0] if rest else None, targets, products=products)
        made.append((term.sum, *torch.autograd.grad(term.sum, given)))
    for mine, theirs in zip(*made, strict=True):
        assert torch.equal(mine, theirs)
