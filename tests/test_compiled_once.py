"""Training compiles each kind of block once, and nothing after the second step, by the compiler's own counts."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch._dynamo.utils import counters

from xtcli.bench import stepping
from xtcli.config.preset import load_preset
from xtcli.data.batch import Batch
from xtcli.train import transforms
from xtcli.train.device import Place

CPU = Place(torch.device("cpu"), "CPU, 1 threads", "fp32")

WHOLE = ["gpt2-small", "tinyllama-1.1b"]
BRIEF = ["bert-base", "t5-small", "mamba-130m", "mega-base-wikitext"]


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    if shutil.which("c++") is None and shutil.which("g++") is None:
        in_brief(monkeypatch)
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()
    counters.clear()


def in_brief(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make no code of what is compiled, which takes most of the time; what is counted is the same."""
    monkeypatch.setattr(transforms, "compile_blocks", partial(transforms.compile_blocks, backend="aot_eager"))


def graphs() -> int:
    """Programs that have been compiled so far."""
    return int(counters["stats"]["unique_graphs"])


def started(name: str, layers: int, *overrides: str) -> stepping.Bench:
    changes = ["train.device=cpu", "train.compile=true", f"model.stack.layers={layers}", *overrides]
    if name == "t5-small":
        changes = [change.replace("model.stack", "model.encoder.stack") for change in changes]
        changes.append(f"model.decoder.stack.layers={layers}")
    resolved = load_preset(name, changes, tiny=True)
    skeleton, plan, batch = stepping.prepare(resolved, CPU, rows=2, length=16, seed=0)
    return stepping.start(name, resolved, CPU, plan, batch, skeleton, 0)


@pytest.mark.skipif(shutil.which("c++") is None and shutil.which("g++") is None, reason="the compiler needs a C++ one")
def test_blocks_that_are_computed_again_are_compiled_too() -> None:
    captured, losses = [], []
    for again in ("false", "true"):
        torch._dynamo.reset()
        counters.clear()
        bench = started("gpt2-small", 2, f"train.checkpointing={again}", "model.dropout=0")
        for _ in range(3):
            bench.step()
        captured.append(counters["stats"]["calls_captured"])
        losses.append(bench.losses)
    assert captured[0] == captured[1] > 0
    torch.testing.assert_close(losses[0], losses[1])


@pytest.mark.parametrize("name", WHOLE + BRIEF)
def test_nothing_is_compiled_after_the_second_step(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if name in BRIEF:
        in_brief(monkeypatch)
    bench = started(name, 2)
    for _ in range(2):
        bench.step()
    before = graphs()
    assert before > 0
    for shift in (1, 5, 0):
        assert bench.trainer.step(other_words(bench.batch, shift)) == 0
    assert graphs() == before
    assert not counters["graph_break"], dict(counters["graph_break"])
    assert bench.losses[-1] < bench.losses[0]


def other_words(batch: Batch, shift: int) -> Batch:
    """A batch of other tokens with as many targets."""
    inputs = {name: value.roll(shift, 0) for name, value in batch.inputs.items()}
    return replace(batch, inputs=inputs, targets={name: value.roll(shift, 0) for name, value in batch.targets.items()})


def test_another_number_of_masked_words_is_compiled_once_for_all() -> None:
    bench = started("bert-base", 2)
    bench.step()
    before = graphs()
    counts = set()
    for seed in range(1, 8):
        batch = stepping.random_batch(bench.trainer.job.skeleton, 2, 16, seed)
        counts |= set(batch.slots.values())
        assert bench.trainer.step(batch) == 0
    assert len(counts) > 2
    assert graphs() == before + 1


def test_equal_blocks_share_what_is_compiled() -> None:
    found = []
    for layers in (2, 5):
        torch._dynamo.reset()
        counters.clear()
        started("gpt2-small", layers).step()
        found.append(graphs())
    assert found[0] == found[1] < 5
