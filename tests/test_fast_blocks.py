"""Attention between listed blocks, in Triton's interpreter, against a stored mask."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from xtcli.parts.blocklists import Listed, lists
from xtcli.parts.blockmasks import labels

pytest.importorskip("triton")

CPU = torch.device("cpu")


def made(
    length: int, width: int, groups: int, layer: int | None, keep: Tensor | None, documents: Tensor | None, often: float
) -> tuple[list[Tensor], Tensor, Listed]:
    """Heads laid out as projections leave them, the slope of the output, and lists of blocks of 16."""
    from xtcli.fast.blocks import attend

    generator = torch.Generator().manual_seed(length + width)
    q, k, v, dy = (
        torch.randn(2, length, heads, width, generator=generator).transpose(1, 2) for heads in (2, groups, groups, 2)
    )
    found = lists(layer, 2, groups, -(-length // 16), 1, CPU)
    listed = Listed(found, 16, labels(keep, documents), often, attend)
    return [x.requires_grad_() for x in (q, k, v)], dy, listed


@pytest.mark.parametrize(
    ("length", "width", "groups", "layer", "often", "pad", "packed"),
    [
        (112, 16, 2, None, 0.0, "none", False),
        (100, 24, 1, 1, 0.0, "right", False),
        (112, 16, 2, 3, 0.0, "left", True),
        (97, 16, 1, None, 1.2, "nothing", False),
        (100, 16, 2, None, 1.2, "none", True),
    ],
)
def test_values_and_gradients(
    length: int, width: int, groups: int, layer: int | None, often: float, pad: str, packed: bool
) -> None:
    keep = None
    if pad != "none":
        keep = torch.ones(2, length, dtype=torch.bool)
        keep[0, : length // 2] = pad == "right"
        keep[0, length // 2 :] = pad == "left"
    documents = (torch.arange(length) // 40).expand(2, -1) if packed else None
    given, dy, listed = made(length, width, groups, layer, keep, documents, often)
    found = listed.attend(*given, 0.3)
    mask = listed.dense(length, torch.float32).mask
    assert mask is not None
    additive = mask if mask.dtype != torch.bool else torch.zeros(mask.shape).masked_fill(~mask, float("-inf"))
    # Queries that see nothing get nothing.
    empty = (additive == float("-inf")).all(-1, keepdim=True)
    assert bool(empty.any()) == (pad == "nothing" or (packed and keep is not None))
    wanted = F.scaled_dot_product_attention(*given, additive.masked_fill(empty, 0.0), scale=0.3, enable_gqa=True)
    wanted = wanted.masked_fill(empty, 0.0)
    torch.testing.assert_close(found, wanted, atol=2e-6, rtol=2e-5)
    slopes = torch.autograd.grad(wanted, given, dy)
    for mine, theirs in zip(torch.autograd.grad(found, given, dy), slopes, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-4)


def test_the_output_lies_as_the_queries_do() -> None:
    given, _, listed = made(97, 16, 2, 1, None, None, 0.0)
    assert listed.attend(*given, 0.3).stride() == given[0].stride()


def test_compiles_whole() -> None:
    given, dy, listed = made(97, 16, 1, 1, None, None, 0.0)
    wanted = listed.attend(*given, 0.3)
    compiled: Any = torch.compile(lambda q, k, v: listed.attend(q, k, v, 0.3), backend="aot_eager", fullgraph=True)
    found = compiled(*given)
    torch.testing.assert_close(found, wanted)
    mine, theirs = (torch.autograd.grad(y, given, dy, retain_graph=True) for y in (found, wanted))
    torch.testing.assert_close(mine, theirs)


def test_random_blocks_are_listed_from_both_sides() -> None:
    count, index, q_count, q_index = lists(1, 4, 2, 12, 2, CPU)
    seen = {(h, n, int(m)) for h in range(4) for n in range(12) for m in index[h, n, : count[h, n]]}
    back = {(h, int(n), m) for h in range(4) for m in range(12) for n in q_index[h, m, : q_count[h, m]]}
    assert seen == back
    assert int(count.max()) == 12 and int(count[:, 1:-1].max()) <= 7
