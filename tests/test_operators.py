"""Operators say what they give: its shapes, types and steps in memory, whatever steps their inputs have.

A compiler believes what is said, and fails in a user's first step of training where it is not so.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from joined_models import drawn
from torch import Tensor

from xtcli.parts import ema, experts, lsh, scans, wkv

PARTS = (ema, experts, lsh, scans, wkv)
"""What registers them."""
SPACES = dict.fromkeys(("grouped_linear", "grouped_outer"), torch.ops.xtcli)
DIFFERENTIABLE = ("convolved", "selective_scan", "wkv", "grouped_linear")
B, T, C, N = 2, 37, 6, 4

# What each is given; where it can be left out, once with and once without.
GIVEN: dict[str, list[list[Any]]] = {
    "convolved": [[(B, C, T), (C, 9), (C, 9)], [(B, C, T), (C, T), None]],
    "convolved_backward": [[(B, C, T), (B, C, T), (C, 9), (C, 9)], [(B, C, T), (B, C, T), (C, T), None]],
    "grouped_linear": [[(5, C), (3, N, C), torch.tensor([2, 0, 3])]],
    "grouped_outer": [[(5, N), (5, C), torch.tensor([2, 0, 3])]],
    "seeded": [[7, [B, C], (B, C)]],
    "selective_scan": [
        [(B, T, C), (B, T, C), (B, T, N), (B, T, N), (C, N), (B, C, N), torch.arange(B * T).view(B, T) % 5 > 0],
        [(B, T, C), (B, T, C), (B, T, N), (B, T, N), (C, N), (B, C, N), None],
    ],
    "selective_scan_backward": [
        [(B, T, C), (B, C, N), (B, T, C), (B, T, C), (B, T, N), (B, T, N), (C, N), (B, 2, C, N), None]
    ],
    "wkv": [
        [(B, T, C), (B, T, C), (C,), (C,), (B, C), (B, C), (B, C), None, None],
        [(B, T, C), (B, T, C), (C,), (C,), (B, C), (B, C), (B, C), *2 * [torch.arange(B * T).view(B, T) % 5 > 0]],
    ],
    "wkv_backward": [[(B, T, C), (B, C), (B, C), (B, T, C), (B, T, C), (C,), (C,), (B, C), (B, C), (B, C), None, None]],
}


def turned(x: Tensor) -> Tensor:
    """The same with its last two axes the other way around in memory."""
    return x if x.dim() < 2 else x.transpose(-2, -1).contiguous().transpose(-2, -1)


@pytest.mark.parametrize("steps", [Tensor.contiguous, turned], ids=["rows", "columns"])
@pytest.mark.parametrize(
    ("operator", "given"),
    [
        pytest.param(getattr(SPACES.get(name, torch.ops.xt), name).default, given, id=f"{name}-{number}")
        for name, several in GIVEN.items()
        for number, given in enumerate(several)
    ],
)
def test_operators_say_what_they_give(operator: Any, given: list[Any], steps: Any) -> None:
    made = [steps(drawn(*x, seed=at)) if isinstance(x, tuple) else x for at, x in enumerate(given)]
    differentiable = operator.name().split("::")[1] in DIFFERENTIABLE
    if differentiable:
        made = [x.requires_grad_() if isinstance(x, Tensor) and x.is_floating_point() else x for x in made]
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    found = torch.library.opcheck(operator, tuple(made), test_utils=tests if differentiable else tests[:2])
    assert set(found.values()) == {"SUCCESS"}
