"""Slopes of attention in a window, written where the joint product's way back reads them, in Triton's interpreter."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.test_fast_norms import answers, shaken
from xtcli.parts import kernels, windows

pytest.importorskip("triton")


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels on the CPU, with float32 and small tiles."""
    from xtcli.fast import window as own

    monkeypatch.setattr(windows, "runs_on", lambda device: True)
    monkeypatch.setattr(windows, "KINDS", (torch.float32,))
    for table, size in {"QUERIES": (16, 32, 4, 1), "KEYS": (32, 16, 4, 1), "KEYS_OF_GROUPS": (32, 16, 4, 1)}.items():
        monkeypatch.setattr(own, table, dict.fromkeys(windows.WIDTHS, size))


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(
    ("heads", "groups", "length", "left", "right", "turn", "rows", "biased", "labelled"),
    [
        (2, 2, 32, 32, 0, None, 1, True, False),
        (2, 2, 40, 40, 40, None, 1, False, True),
        (4, 2, 32, 32, 0, "half", 1, False, False),
        (2, 2, 45, 10, 3, "half", 2, True, False),
        (2, 1, 32, 32, 0, "interleaved", 2, True, True),
    ],
)
def test_values(
    heads: int, groups: int, length: int, left: int, right: int, turn: str | None, rows: int, biased: bool,
    labelled: bool,
) -> None:  # fmt: skip
    from xtcli.fast import window
    from xtcli.fast.heads import apart
    from xtcli.fast.windowjoint import backward

    generator = torch.Generator().manual_seed(0)
    joint, dy = (
        torch.randn(2 * length, count * 16, generator=generator) for count in (heads + 2 * groups, heads)
    )  # fmt: skip
    dy = dy.view(2, length, heads, 16).transpose(1, 2)
    q, k, v = apart(joint, length, heads, groups)
    label = (torch.arange(length) // 20).int().expand(2, -1).contiguous() if labelled else None
    y, ends = window.forward(q, k, v, label, label, left, right, 0.3)
    angles = torch.rand(rows, 1, length, 8, generator=generator)
    cos, sin = (None, None) if turn is None else (angles.cos(), angles.sin())
    given = (dy, q, k, v, label, label, y, ends, left, right, 0.3)
    wanted = torch.ops.xt.joint_slope(*window.backward(*given), cos, sin, turn == "interleaved", biased)
    found = backward(*given, cos, sin, turn == "interleaved", biased)
    for mine, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine, theirs, atol=2e-5, rtol=1e-4)


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(
    ("name", "change", "joined"),
    [
        ("gpt2-nano", "model.dropout=0", 1),
        ("llama-7b", "model.dropout=0", 1),
        ("llama-7b", "model.stack.position.fraction=0.5", 0),
    ],
)
def test_models(name: str, change: str, joined: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.test_passes import compiled

    model: Any = shaken(name, change).float().train()
    states, slopes = answers(model)
    attention = next(module for module in model.modules() if hasattr(module, "head_dim"))
    monkeypatch.setitem(kernels.OURS, "cpu", windows)
    monkeypatch.setattr(windows, "SHORT_WIDTH", attention.head_dim)
    monkeypatch.setattr(windows, "SHORT_STEP", 1)
    found = compiled(model)
    others = answers(model)
    torch.testing.assert_close(others[0], states, rtol=1e-4, atol=1e-5)
    for one, other in zip(others[1], slopes, strict=True):
        if one is not None:
            torch.testing.assert_close(one, other, rtol=1e-3, atol=2e-5)
    assert found["attend_window"] >= 1
    assert found["attend_window_joint_back"] == joined and found["joint_slope"] == 1 - joined
