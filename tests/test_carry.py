"""Memories carried from batch to batch: the order of lanes, what is remembered, and runs that stop and go on."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_train import QUICK, RESUME, comparable, quiet, stop_after, train

import xtcli
from xtcli.data.loader import batches, validation_batches
from xtcli.data.order import Lanes
from xtcli.errors import UserError
from xtcli.train.carry import Carried
from xtcli.train.loop import Trainer
from xtcli.train.start import resume


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of text that takes a few epochs in a short run."""
    folder = tmp_path_factory.mktemp("text")
    for number in range(4):
        lines = [f"def add_{i}(a, b):\n    return a + b + {i % 7}\n\n" for i in range(number, number + 30)]
        (folder / f"{number}.py").write_text("".join(lines), encoding="utf-8")
    return folder


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XT_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@settings(max_examples=60, deadline=None)
@given(batch=st.integers(1, 7), extra=st.integers(0, 40), seed=st.integers(0, 99))
def test_each_row_goes_on_and_an_epoch_reads_nothing_twice(batch: int, extra: int, seed: int) -> None:
    order = Lanes(batch + extra, batch, seed)
    for epoch in range(3):
        begin = epoch * order.steps * batch
        rows = []
        for step in range(order.steps):
            number = begin + step * batch
            epochs, indices = order.at(number + np.arange(batch, dtype=np.int64))
            assert order.begins(number) == (step == 0)
            assert set(epochs.tolist()) == {epoch}
            rows.append(indices)
        read = np.stack(rows)
        assert (np.diff(read, axis=0) == 1).all()
        assert np.unique(read).size == read.size
        assert read.min() >= 0
        assert read.max() < batch + extra


def test_the_split_of_an_epoch_changes_so_that_no_sample_is_always_left_out() -> None:
    order = Lanes(11, 4, 0)
    seen = {int(i) for number in range(0, 8 * 40, 4) for i in order.at(number + np.arange(4, dtype=np.int64))[1]}
    assert seen == set(range(11))


STILL = ("model.dropout=0", "model.stack.dropout=0", "model.stack.block.sublayers.ffn.dropout=0")


def job_of(text: Path, tmp_path: Path, *options: str) -> Any:
    from xtcli.config.preset import load_preset
    from xtcli.train.job import make_job

    resolved = load_preset("transfo-xl-wt103", [f"data={text}", *QUICK, *options], tiny=True)
    return make_job(resolved, quiet)


def test_a_row_of_a_batch_continues_the_row_of_the_batch_before(text: Path, tmp_path: Path) -> None:
    job = job_of(text, tmp_path, "train.context=16", "train.batch=3")
    before = None
    for batch in itertools.islice(batches(job.objective, batch=3, seed=0), 5):
        ids, answers = batch.inputs["input_ids"], batch.targets["adaptive"]
        if before is not None:
            assert torch.equal(before[:, -1], ids[:, 0])
        before = answers
    held = list(validation_batches(job.validation, batch=2))
    for one, two in itertools.pairwise(held):
        assert torch.equal(one.targets["adaptive"][:, -1], two.inputs["input_ids"][:, 0])


def trainer(job: Any, micro: int) -> Trainer:
    job.plan = SimpleNamespace(micro_batch=micro)
    from xtcli.train.job import with_weights

    torch.manual_seed(0)
    nowhere: Any = SimpleNamespace(event=lambda *args, **kwargs: None)
    return Trainer(job, with_weights(job, None), nowhere, nowhere, lambda line: None)


def losses(job: Any, micro: int, steps: int) -> tuple[list[float], torch.Tensor]:
    made = trainer(job, micro)
    found = []
    for batch in itertools.islice(batches(job.objective, batch=4, seed=0), steps):
        loss = made.backward(*made.shared(batch))
        made.carried.end()
        made.progress.cursor += 4
        found += [float(value) for value in loss.values()]
    assert made.carried.mems is not None
    return found, made.carried.mems


def test_micro_batches_remember_what_whole_batches_do(text: Path, tmp_path: Path) -> None:
    job = job_of(text, tmp_path, "train.context=16", "train.batch=4", *STILL)
    wanted, mems = losses(job, 4, 4)
    for micro in (1, 3):
        found, made = losses(job, micro, 4)
        assert found == pytest.approx(wanted, abs=1e-5)
        torch.testing.assert_close(made, mems, atol=1e-5, rtol=1e-5)


def test_training_in_segments_is_training_on_the_whole_text(text: Path, tmp_path: Path) -> None:
    """With the same window for every token, what a segment predicts behind memories is what one long text does."""
    job = job_of(text, tmp_path, "train.context=16", "train.batch=2", *STILL)
    made = trainer(job, 2)
    model = made.model
    stream = list(itertools.islice(batches(job.objective, batch=2, seed=0), 4))
    whole = {
        "input_ids": torch.cat([batch.inputs["input_ids"] for batch in stream], 1),
        "labels": torch.cat([batch.targets["adaptive"] for batch in stream], 1),
    }
    model.eval()
    with torch.no_grad():
        expected = model.losses({"input_ids": whole["input_ids"]}, {"adaptive": whole["labels"]})["adaptive"].mean()
        total = 0.0
        for batch in stream:
            made.carried.begin(made.progress.cursor)
            hidden = model.hidden(**made.carried.join(batch.inputs, 2))
            made.carried.take(hidden.mems)
            made.carried.end()
            made.progress.cursor += 2
            total += float(model.terms(hidden, batch.targets)["adaptive"].mean())
    assert total / 4 == pytest.approx(float(expected), abs=1e-5)


def test_nothing_is_remembered_across_an_epoch_s_border() -> None:
    order = Lanes(6, 2, 0)
    carried = Carried(order, torch.device("cpu"))
    remembered = []
    for cursor in range(0, 20, 2):
        carried.begin(cursor)
        remembered.append(carried.mems is not None)
        carried.join({}, 2)
        carried.take([torch.zeros(3, 2, 4)] * 2)
        carried.end(finite=cursor != 2)
    assert remembered == [False, True, False, False, True, True, False, True, True, False]


@pytest.mark.parametrize(
    ("preset", "change"),
    [
        ("transfo-xl-wt103", ("train.context=32", "model.vocab=300")),
        (
            "gpt2-nano",
            (
                "objective={kind: clm, carry: true}",
                "model.embed.positions=none",
                "model.stack.position=rotary",
                "model.stack.recurrence={length: 12}",
                "train.context=16",
            ),
        ),
        (
            "xlnet-base-cased",
            ("model.stack.recurrence.length=12", "objective.carry=true", "train.context=24", "model.vocab=300"),
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_resumed_run_equals_one_never_stopped(
    preset: str, change: tuple[str, ...], text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = [f"data={text}", *QUICK, *RESUME, *change]
    if preset == "xlnet-base-cased":
        roles = "unk: <unk>, bos: <s>, eos: </s>, cls: <cls>, sep: <sep>, pad: <pad>, mask: <mask>"
        options[1] = f"tokenizer={{kind: bytes, special: {{{roles}}}}}"
    train(preset, *options, out=tmp_path / "whole")
    stop_after(7, monkeypatch)
    train(preset, *options, out=tmp_path / "cut")
    for at in (12, None):
        stop_after(at, monkeypatch)
        resume(tmp_path / "cut", [], command=["xt"], record=lambda line: None, talk=quiet)
    assert comparable(tmp_path / "cut") == comparable(tmp_path / "whole")
    ours, theirs = xtcli.load(tmp_path / "cut"), xtcli.load(tmp_path / "whole")
    for (name, a), b in zip(ours.state_dict().items(), theirs.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    kept = next((tmp_path / "cut" / "checkpoints").glob("step-*/trainer/optimizer.safetensors"))
    assert b"memories/mems" in kept.read_bytes()


def refusals() -> Iterator[Any]:
    rotary = ("model.embed.positions=none", "model.stack.position=rotary")
    carry = "objective={kind: clm, carry: true}"
    yield pytest.param((carry,), "the model keeps none", id="no-recurrence")
    yield pytest.param((carry, *rotary, "model.stack.recurrence={}"), "grow without end", id="endless")
    yield pytest.param(
        ("model.stack.recurrence={length: 8}",), "absolute positions begin anew in each segment", id="absolute"
    )
    yield pytest.param(
        ("objective={kind: clm, carry: true, pack: none}", *rotary, "model.stack.recurrence={length: 8}"),
        "carry is for pack=stream",
        id="documents",
    )
    yield pytest.param(
        (carry, *rotary, "model.stack.recurrence={length: 8}", "train.batch=5000"), "a text of its own", id="lanes"
    )


@pytest.mark.parametrize(("change", "said"), list(refusals()))
def test_what_cannot_be_carried_is_refused(change: tuple[str, ...], said: str, text: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=said):
        train("gpt2-nano", f"data={text}", *QUICK, *change, out=tmp_path / "run")
