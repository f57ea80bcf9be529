"""The selective scan by kernels in Triton's interpreter against its plain form."""

from __future__ import annotations

import pytest
import torch
from joined_models import drawn

from xtcli.parts import scans as plain

pytest.importorskip("triton")

from xtcli.fast import scankernels


@pytest.mark.parametrize(("tokens", "width", "states"), [(1, 4, 4), (7, 3, 2), (8, 4, 4), (20, 6, 3), (25, 4, 16)])
@pytest.mark.parametrize("documents", [False, True])
def test_kernels(tokens: int, width: int, states: int, documents: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Values and slopes, by chunks of 8 tokens and programs of 4 channels; memory with steps of its own is read."""
    monkeypatch.setattr(plain, "LENGTH", 8)
    monkeypatch.setattr(scankernels, "CHANNELS", 4)
    monkeypatch.setattr(scankernels, "CHANNELS_BACK", 4)
    monkeypatch.setattr(scankernels, "PIECE", 4)
    x, step = (drawn(2, width, tokens, seed=seed).transpose(1, 2) for seed in (1, 2))
    b, c = (drawn(2, states, tokens, seed=seed).transpose(1, 2) for seed in (3, 4))
    decay, state = -drawn(width, states, seed=5).exp(), drawn(2, width, states, seed=6)
    opens = drawn(2, tokens, seed=7) > -1 if documents else None
    given = x, step.exp(), b, c, decay, state
    wanted = plain.forward(*given, opens)
    made = scankernels.forward(*given, opens, 8)
    for mine, theirs in zip(made, wanted, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)
    slopes = drawn(2, width, tokens, seed=8).transpose(1, 2), drawn(2, width, states, seed=9)
    held = *given[:5], wanted[2], opens
    names = "x step b c decay state".split()
    found = scankernels.backward(*slopes, *held, 8)
    for name, mine, theirs in zip(names, found, plain.backward(*slopes, *held), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}")
