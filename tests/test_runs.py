"""Run folders: never written over, trained by one process, with a log that reads back exactly."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small import Tokens, small
from torch import nn

from xtcli.errors import UserError
from xtcli.runs import environment
from xtcli.runs.metrics import Metrics, read_metrics
from xtcli.runs.run import Run, check_disk, gib
from xtcli.runs.state import TrainerState


def new(name: str = "toy", **options: Any) -> Run:
    return Run.create(
        name, preset_yaml="version: 1\n", command=["xt", "train", "a b"], environment={"seed": 1}, **options
    )


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_a_new_run() -> None:
    with new() as made:
        assert made.path == Path("runs/toy") and made.notes == []
        assert sorted(os.listdir(made.path)) == [
            ".lock", "checkpoints", "command", "environment.json", "metrics.jsonl", "preset.yaml", "samples",
        ]  # fmt: skip
        assert (made.path / "command").read_text() == "xt train 'a b'\n"
        assert made.sample(7, "def \ud800").read_bytes() == b"def ?"


def test_a_run_is_never_written_over() -> None:
    runs = [new() for _ in range(3)]
    assert [str(made.path) for made in runs] == ["runs/toy", "runs/toy-2", "runs/toy-3"]
    assert runs[2].notes == ["runs/toy exists: this run is runs/toy-3"]
    for made in runs:
        made.close()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda out: out.write_text(""), "out: is a file, not a folder for a run; choose another --out"),
        (
            lambda out: (out / "x").mkdir(parents=True),
            "out: is not empty, and a new run never writes into an old folder; choose another --out",
        ),
        (
            lambda out: new(out=out).close(),
            "out: is not empty, and a new run never writes into an old folder; resume it with xt train out, "
            "or choose another --out",
        ),
    ],
)
def test_out_must_be_empty(make: Any, message: str) -> None:
    make(Path("out"))
    with pytest.raises(UserError) as caught:
        new(out=Path("out"))
    assert str(caught.value) == message


def test_out_may_be_an_empty_folder() -> None:
    Path("deep/out").mkdir(parents=True)
    with new(out=Path("deep/out")) as made:
        assert made.path == Path("deep/out") and made.notes == []


def test_what_is_no_run() -> None:
    with pytest.raises(UserError, match="gone: no such run; a run is a folder that xt train made"):
        Run.open(Path("gone"))
    Path("empty").mkdir()
    with pytest.raises(UserError, match="empty: is not a run"):
        Run.open(Path("empty"))
    with new() as made:
        path = small(made.path, 3, 1.0)
    with pytest.raises(UserError, match=r"step-3: is not a run; resume with xt train runs/toy$"):
        Run.open(path)
    with Run.open(made.path) as again:
        assert again.newest() == path
    shutil.rmtree(path)
    with Run.open(made.path) as again, pytest.raises(UserError, match="the run has no checkpoint yet"):
        again.newest()


@pytest.mark.skipif(sys.platform == "win32", reason="needs fork and signals")
def test_one_process_trains_a_run_and_its_death_frees_it() -> None:
    made = new()
    with pytest.raises(UserError, match=rf"another process trains this run \(process {os.getpid()} on .+\); wait"):
        Run.open(made.path)
    made.close()
    ready, go = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            Run.open(made.path)
            os.write(go, b"!")
            time.sleep(30)
        finally:
            os._exit(0)
    os.read(ready, 1)
    with pytest.raises(UserError, match=rf"another process trains this run \(process {child} on "):
        Run.open(made.path)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    (made.path / f"preset.yaml.tmp-{'0' * 32}").write_text("half")
    (made.path / f"checkpoints/step-9.tmp-{'a' * 32}").mkdir()
    with Run.open(made.path) as again:
        assert len(again.notes) == 1 and again.notes[0].startswith("deleted what a killed process left half-written: ")
        assert not list(made.path.rglob("*.tmp-*"))


def test_fallback_is_logged_and_resume_sets_later_things_aside() -> None:
    with new() as made:
        paths = [small(made.path, step, 1.0) for step in (10, 20, 30)]
        for step in (0, 10, 15, 20, 30):
            made.metrics.append({"step": step, "loss": 1 / (step + 3)})
    (paths[2] / "preset.yaml").unlink()
    with Run.open(made.path) as again:
        assert again.newest() == paths[1]
        again.rewind(20)
        again.metrics.append({"step": 30, "loss": 0.5})
        assert again.resumed(20, ["xt", "train", "runs/toy"], {"seed": 1}) == []
        cause = f"{paths[2]}: preset.yaml: missing; use another checkpoint, or copy it anew"
        assert again.notes[0] == f"falling back to an older checkpoint: {cause}"
        assert again.notes[1].startswith("checkpoints after step 20 are now step-30.aside-")
        assert again.notes[2] == "lines of metrics after step 20 (1) are now in metrics.abandoned.jsonl"
        assert again.newest() == paths[1]
    lines = read_metrics(made.path)
    assert [line["step"] for line in lines if "loss" in line] == [0, 10, 15, 20, 30]
    assert [line["event"] for line in lines if "event" in line] == ["damaged_checkpoint", "resume"]
    assert lines[-3]["cause"] == cause
    assert json.loads((made.path / "metrics.abandoned.jsonl").read_text()) == {"step": 30, "loss": 1 / 33}
    assert (made.path / "command").read_text() == "xt train 'a b'\nxt train runs/toy\n"


def test_changed_settings_hold_for_the_next_resume_too() -> None:
    with new() as made:
        made.change_preset(20, "version: 1\ntrain: {steps: 9}\n")
        state = TrainerState({}, {})
        path = made.save(30, model=nn.Linear(1, 1), tokenizer=None, trainer=state, keep=1)
    assert (made.path / "preset.until-step-20.yaml").read_text() == "version: 1\n"
    assert (path / "preset.yaml").read_text() == (made.path / "preset.yaml").read_text() == made.preset_yaml
    with Run.open(made.path) as again:
        assert again.preset_yaml == "version: 1\ntrain: {steps: 9}\n"


# Metrics -----------------------------------------------------------------------------------------------------------


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=200)
@given(st.lists(st.floats(), min_size=1, max_size=5))
def test_floats_read_back_exactly(tmp_path: Path, values: list[float]) -> None:
    (tmp_path / "metrics.jsonl").unlink(missing_ok=True)
    metrics = Metrics(tmp_path)
    for value in values:
        metrics.append({"step": 1, "loss": value, "losses": {"lm": value}})
    metrics.close()
    assert [repr(line["loss"]) for line in read_metrics(tmp_path)] == [repr(value) for value in values]

    def no_constant(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    for line in (tmp_path / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=no_constant)


def test_rewinding_a_log_cut_by_a_kill(tmp_path: Path) -> None:
    whole = b'{"step": 1, "loss": 0.1}\n{"event": "note"}\n{"step": 2, "loss": 0.2}\n'
    (tmp_path / "metrics.jsonl").write_bytes(whole + b'{"step": 3, "loss": 0.3}\n{"step": 4, "lo')
    assert len(read_metrics(tmp_path)) == 4
    metrics = Metrics(tmp_path)
    assert metrics.rewind(2) == 2
    assert (tmp_path / "metrics.jsonl").read_bytes() == whole
    assert (tmp_path / "metrics.abandoned.jsonl").read_bytes() == b'{"step": 3, "loss": 0.3}\n{"step": 4, "lo\n'
    assert metrics.rewind(2) == 0
    metrics.append({"step": 3})
    metrics.close()
    assert (tmp_path / "metrics.jsonl").read_bytes() == whole + b'{"step": 3}\n'


def test_a_log_that_is_not_one(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has no metrics.jsonl; give the folder of a run"):
        read_metrics(tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n?\n{"step": 2}\n')
    with pytest.raises(UserError, match=r"metrics.jsonl:2: not a line of metrics"):
        read_metrics(tmp_path)


# Saving, disk and environment -----------------------------------------------------------------------------------------


def test_saving_prunes_and_makes_the_log_durable(monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[Metrics] = []
    monkeypatch.setattr(Metrics, "sync", lambda self: synced.append(self))
    with new() as made:
        for step in (1, 2, 3):
            state = TrainerState({}, {"step": step})
            made.save(step, model=nn.Linear(1, 1), tokenizer=Tokens(), trainer=state, keep=1, best=1)
            assert len(synced) == step
        assert sorted(os.listdir(made.path / "checkpoints")) == ["step-1", "step-3"]


def test_the_disk_is_looked_at_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(0, 0, 4 * 2**30))
    path = Path("runs/not/yet")
    assert check_disk(path, 2**30, 2, best=True) == "4 checkpoints of 1.0 GiB at most, 4.0 GiB free"
    with pytest.raises(UserError) as caught:
        check_disk(path, 2**30, 3, best=True)
    assert str(caught.value) == (
        "runs/not/yet: the disk is too small for the checkpoints of this run: 5 checkpoints of 1.0 GiB at most, "
        "4.0 GiB free; free 1.0 GiB, lower train.keep or write elsewhere with --out"
    )
    for step in (1, 2, 3, 4, 5, 6):
        small(path, step, 1.0)
    assert check_disk(path, 4 * 2**30, 3, best=True) == "5 checkpoints of 4.0 GiB at most, 4.0 GiB free"


@pytest.mark.parametrize(
    ("size", "text"), [(0, "0 bytes"), (1536, "1.5 KiB"), (3 * 2**30, "3.0 GiB"), (2**50, "1024.0 TiB")]
)
def test_sizes(size: int, text: str) -> None:
    assert gib(size) == text


def test_environment_says_what_numbers_depend_on() -> None:
    now = environment.describe(seed=3, data="d", tokenizer="t", chosen={"device": "cpu"})
    assert json.loads(json.dumps(now)) == now
    assert (now["seed"], now["data"], now["tokenizer"], now["packages"]["torch"]) == (3, "d", "t", torch.__version__)
    assert environment.changes(now, now) == []
    other = now | {"threads": {"torch": 64, "torch_interop": 1}, "data": "e", "seed": 4}
    threads = now["threads"]
    assert environment.changes(now, other) == [
        f"threads was torch {threads['torch']} torch_interop {threads['torch_interop']} when the run started and is "
        "torch 64 torch_interop 1",
        "data was d when the run started and is e",
    ]
