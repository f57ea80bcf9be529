"""Kernels that give the same bits each time are chosen before a run writes down where it runs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from xtcli.config.preset import load_preset
from xtcli.runs import environment
from xtcli.runs.run import ENVIRONMENT
from xtcli.train.start import new, resume


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled()
    yield
    torch.use_deterministic_algorithms(before)


def test_the_environment_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XT_CACHE", str(tmp_path / "cache"))
    text = tmp_path / "text.txt"
    text.write_text("one and one is two\n" * 500, encoding="utf-8")
    options = [
        f"data={text}",
        "train.steps=1",
        "train.validate_every=0",
        "train.sample_every=0",
        "train.sample_tokens=2",
    ]
    options += ["train.deterministic=true", "train.device=cpu"]
    said: list[str] = []
    code, run = new(
        load_preset("gpt2-nano", options, tiny=True),
        out=tmp_path / "run",
        command=["xt"],
        record=lambda line: None,
        talk=said.append,
    )
    assert code == 0
    assert environment.recorded(run / ENVIRONMENT)["deterministic"] is True
    torch.use_deterministic_algorithms(False)
    resume(run, ["train.steps=2"], command=["xt"], record=lambda line: None, talk=said.append)
    assert not [line for line in said if "not the same" in line]
    assert torch.are_deterministic_algorithms_enabled()
