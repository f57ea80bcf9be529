"""WKV by kernels in Triton's interpreter, and its plain form, against the plain form in float64."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from joined_models import drawn
from torch import Tensor

from xtcli.parts import wkv as plain

pytest.importorskip("triton")

from xtcli.fast import wkvkernels


def flags(shape: tuple[int, int], share: float, seed: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < share


@pytest.mark.parametrize(("tokens", "width"), [(1, 8), (8, 3), (19, 9)])
@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("padding", [False, True])
@pytest.mark.parametrize("size", [1.0, 60.0])
def test_kernels(
    tokens: int, width: int, documents: bool, padding: bool, size: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Values and slopes, with tiles of 8 tokens and 8 channels; memory with steps of its own is read as well."""
    monkeypatch.setattr(wkvkernels, "TOKENS", 8)
    monkeypatch.setattr(wkvkernels, "CHANNELS", 8)
    k, v = drawn(2, width, tokens, seed=1, size=size).transpose(1, 2), drawn(2, tokens, width, seed=2)
    decay, bonus = -drawn(width, seed=3).exp(), drawn(width, seed=4)
    state = drawn(2, width, seed=5), drawn(2, width, seed=6).exp(), drawn(2, width, seed=7, size=size)
    real = flags((2, tokens), 0.7, 8) if padding else None
    opens = flags((2, tokens), 0.8, 9) if documents else None
    slopes = drawn(2, width, tokens, seed=10).transpose(1, 2), drawn(2, width, seed=11), drawn(2, width, seed=12)
    given = [k, v, decay, bonus, *state, real, opens]
    exact: list[Any] = [*(x.double() for x in (*slopes, k, v, decay, bonus, *state)), real, opens]
    # Exponents are as large as keys, and so are their last digits.
    close = {"rtol": 1e-5 * (10 + size), "atol": 1e-5 * (10 + size)}

    def assert_close(mine: Sequence[Tensor], theirs: Sequence[Tensor], names: str) -> None:
        for name, one, other in zip(names.split(), mine, theirs, strict=True):
            torch.testing.assert_close(one.double(), other, msg=lambda text, name=name: f"{name}: {text}", **close)

    for made in (plain, wkvkernels):
        assert_close(made.forward(*given), plain.forward(*exact[3:]), "y n d m")
        assert_close(made.backward(*slopes, *given), plain.backward(*exact), "k v decay bonus n d")
