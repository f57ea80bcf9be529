"""Biases of a distance, slid over the rows: values and gradients against the plain twin."""

from __future__ import annotations

import pytest
import torch

from xtcli.parts import slides
from xtcli.parts.slides import slide, slide_plainly


@pytest.mark.parametrize("most", [1, 2**28])
@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (1, 6), (5, 5), (7, 3), (2, 9)])
def test_values_and_gradients(queries: int, keys: int, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slides, "MOST", most)
    generator = torch.Generator().manual_seed(0)
    row = torch.randn(3, queries + keys - 1, dtype=torch.double, generator=generator, requires_grad=True)
    ours, theirs = slide(row, keys), slide_plainly(row, keys)
    assert torch.equal(ours, theirs)
    for t in range(queries):
        for s in range(keys):
            assert torch.equal(ours[:, t, s], row[:, queries - 1 - t + s])
    slope = torch.randn(ours.shape, dtype=torch.double, generator=generator)
    (found,) = torch.autograd.grad(ours, row, slope)
    (wanted,) = torch.autograd.grad(theirs, row, slope)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


def test_sums_of_sixteen_bits_are_kept_in_float32() -> None:
    row = torch.zeros(1, 2 * 600 - 1, dtype=torch.bfloat16, requires_grad=True)
    slide(row, 600).sum().backward()
    assert row.grad is not None
    assert row.grad[0, 599] == torch.tensor(600.0).bfloat16()
