"""A few rows by the matrices of their experts, in Triton's interpreter, against one product after the other."""

from __future__ import annotations

import pytest
import torch

from xtcli.parts.experts import linear_by_one

pytest.importorskip("triton")

from xtcli.fast.fewrows import MOST, few_rows, suits

ROWS = [[1, 0, 1], [0, 0, 2], [2, 3, 0, 0, 1], [0, 1], [7], [0, 0, 0]]


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize(("inner", "outer"), [(64, 32), (300, 17)])
@pytest.mark.parametrize("behind", [0, 2])
@pytest.mark.parametrize("counts", ROWS, ids=str)
def test_few_rows(counts: list[int], behind: int, inner: int, outer: int, turned: bool) -> None:
    generator = torch.Generator().manual_seed(sum(counts))
    rows, number = sum(counts), torch.tensor(counts)
    x = torch.randn(rows + behind, inner, generator=generator)
    shape = (len(counts), inner, outer) if turned else (len(counts), outer, inner)
    weight = torch.randn(shape, generator=generator) / inner**0.5
    weight = weight.transpose(1, 2) if turned else weight
    made, wanted = few_rows(x, weight, number), linear_by_one(x, weight, number)
    # What stands behind the last counted row may be anything, but a number.
    torch.testing.assert_close(made[:rows], wanted[:rows], rtol=1e-5, atol=1e-5)
    assert made.isfinite().all()


def test_rows_apart() -> None:
    wide = torch.randn(4, 10, generator=torch.Generator().manual_seed(0))
    weight, counts = torch.ones(2, 3, 5), torch.tensor([1, 3])
    for x in (wide[:, 5:], wide.t()[:4, :4].t()[:, :]):
        taken = weight[..., : x.shape[1]]
        torch.testing.assert_close(few_rows(x, taken, counts), linear_by_one(x, taken, counts))


def test_what_is_taken() -> None:
    weight = torch.zeros(2, 3, 4)
    assert suits(torch.zeros(MOST, 4), weight)
    assert not suits(torch.zeros(MOST + 1, 4), weight)
    assert not suits(torch.zeros(1, 4, dtype=torch.float16), weight)
    assert not suits(torch.zeros(1, 4).double(), weight.double())
