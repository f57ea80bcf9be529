"""Training as a user runs it: presets in tiny form, resume, stops, refusals; and the rule of the loss."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import xt
from pictures import listed

import xtcli
from presets import DISTINCT
from xtcli.config.library import names
from xtcli.config.preset import load_preset
from xtcli.data.batch import Batch
from xtcli.errors import UserError
from xtcli.model import build, count
from xtcli.registry import find
from xtcli.train.start import new, resume

QUICK = ("tokenizer={kind: bytes, special: {pad: '<pad>', eos: '</s>'}}", "data.validation=0.1")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small folder of text that can be learnt."""
    folder = tmp_path_factory.mktemp("text")
    for number in range(12):
        lines = [f"def add_{i}(a, b):\n    return a + b + {i % 7}\n\n" for i in range(number, number + 60)]
        (folder / f"{number}.py").write_text("".join(lines), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def data(text: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """What objectives learn from, by what they read."""
    return {"text": text, "images": listed(tmp_path_factory.mktemp("images"))}


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XT_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


def quiet(text: str) -> None:
    """Nobody listens."""


def train(preset: str, *overrides: str, out: Path, size: str | None = None) -> tuple[int, list[dict[str, Any]]]:
    """Train in tiny form in this process; returns the exit code and the lines of metrics."""
    lines: list[dict[str, Any]] = []
    resolved = load_preset(preset, overrides, size=size, tiny=True)
    code, _ = new(resolved, out=out, command=["xt"], record=lines.append, talk=quiet)
    return code, lines


@pytest.mark.parametrize("name", names())
def test_parameter_count_is_the_published_one(name: str) -> None:
    resolved = load_preset(name)
    expected = resolved.preset.expect.parameters
    if expected is None:
        pytest.skip("nothing was published")
    assert count(build(resolved, device="meta")) == expected


@pytest.mark.parametrize(
    ("name", "size"), [(name, size) for name in names() for size in load_preset(name).sizes], ids=str
)
def test_parameter_count_of_each_size(name: str, size: str) -> None:
    resolved = load_preset(name, size=size)
    assert resolved.preset.expect.parameters is not None
    assert count(build(resolved, device="meta")) == resolved.preset.expect.parameters


@pytest.mark.parametrize("name", DISTINCT)
def test_tiny_preset_learns_saves_and_generates(name: str, data: dict[str, Path], tmp_path: Path) -> None:
    source = data[find("objective", load_preset(name).preset.objective.kind).data]
    options = [
        f"data={source}",
        "train.steps=20",
        "train.lr=3e-3",
        "train.validate_every=0",
        "train.log_every=1",
        "train.sample_every=0",
    ]
    options += ["train.save_every=0", "train.sample_tokens=4"]
    code, lines = train(name, *options, out=tmp_path / "run")
    losses = [line["loss"] for line in lines if "loss" in line]
    assert code == 0
    assert len(losses) == 20
    assert sum(losses[-5:]) / 5 < losses[0] * 0.9
    assert (tmp_path / "run" / "samples" / "step-20.txt").read_text(encoding="utf-8")
    loaded = xtcli.load(tmp_path / "run")
    assert count(loaded) == count(build(load_preset(name, tiny=True), device="meta"))


def comparable(path: Path) -> list[tuple[int, str, float]]:
    """What a resumed log must share with that of a run never stopped."""
    lines = map(json.loads, (path / "metrics.jsonl").read_text().splitlines())
    keys = ("loss", "val_loss", "lr", "grad_norm", "tokens", "best")
    return [(line["step"], key, line[key]) for line in lines if "event" not in line for key in keys if key in line]


RESUME = [
    "train.steps=24",
    "train.log_every=1",
    "train.validate_every=6",
    "train.validate_batches=2",
    "train.save_every=5",
    "train.keep=2",
    "train.sample_every=0",
    "train.sample_tokens=2",
    "train.micro_batch=3",
    "model.dropout=0.1",
]


@pytest.fixture(scope="module")
def whole(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was never stopped."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    train("gpt2-nano", f"data={text}", *QUICK, *RESUME, out=out)
    return out


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("stops", [(1,), (7, 12), (6, 10, 11, 18, 23)])
def test_resumed_run_equals_one_never_stopped(
    stops: tuple[int, ...], workers: int, text: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if workers and len(stops) != 2:
        pytest.skip("one pattern of stops is enough for worker processes")
    options = [f"data={text}", *QUICK, *RESUME, f"train.workers={workers}"]
    stop_after(stops[0], monkeypatch)
    code, _ = train("gpt2-nano", *options, out=tmp_path / "cut")
    assert code == 128 + signal.SIGTERM
    for at in (*stops[1:], None):
        stop_after(at, monkeypatch)
        code, _ = resume(tmp_path / "cut", [], command=["xt"], record=lambda line: None, talk=quiet)
        assert code == (0 if at is None else 128 + signal.SIGTERM)
    assert comparable(tmp_path / "cut") == comparable(whole)
    ours, theirs = xtcli.load(tmp_path / "cut"), xtcli.load(whole)
    for (name, a), b in zip(ours.state_dict().items(), theirs.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def stop_after(step: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A SIGTERM to this process right after that optimizer step."""
    from xtcli.train import loop

    original = loop.Trainer.__dict__.get("_plain_step", loop.Trainer.step)

    def stepped(self: loop.Trainer, batch: Batch) -> int:
        code = original(self, batch)
        if step is not None and self.progress.step == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return code

    monkeypatch.setattr(loop.Trainer, "_plain_step", original, raising=False)
    monkeypatch.setattr(loop.Trainer, "step", stepped)


def endless(run: Path, text: Path) -> list[str]:
    """The words of a run that only a signal ends."""
    words = ["train", "gpt2-nano", "--tiny", "--out", str(run), f"data={text}", *QUICK]
    return [*words, "train.steps=100000", "train.log_every=1"]


def stopped(run: Path, code: int, expected: int, said: str) -> None:
    """Check what a run that was stopped leaves behind."""
    assert code == expected
    assert f"xt train {run}" in said.splitlines()[-1]
    assert "Traceback" not in said
    after = xt("train", str(run), "train.steps=8", "--dry-run")
    assert after.returncode == 0, after.stderr
    xtcli.load(run)


def test_ctrl_c_saves_and_prints_the_resume_command(text: Path, tmp_path: Path) -> None:
    """In a process of its own, which is interrupted wherever it is, also where the tests run behind a shell that
    ignores Ctrl-C."""
    run = tmp_path / "run"
    process = subprocess.Popen(
        [sys.executable, "-m", "xtcli", *endless(run, text)],
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and '"step": 3,' not in log_of(run):
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
    finally:
        process.kill()
    stopped(run, process.returncode, 130, said)


def test_sigterm_saves_and_prints_the_resume_command(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop_after(3, monkeypatch)
    done = xt(*endless(tmp_path / "run", text))
    stopped(tmp_path / "run", done.returncode, 143, done.stderr)


def log_of(run: Path) -> str:
    try:
        return (run / "metrics.jsonl").read_text()
    except FileNotFoundError:
        return ""


def test_non_finite_loss_stops_before_the_step(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from xtcli.train import loop

    original = loop.Trainer.backward

    def poisoned(self: loop.Trainer, *given: Any) -> dict[str, float]:
        if self.progress.step == 7:
            with torch.no_grad():
                self.model.stack.blocks[1].ffn.up.weight[0, 0] = float("inf")  # type: ignore[union-attr, index]
        return original(self, *given)

    monkeypatch.setattr(loop.Trainer, "backward", poisoned)
    options = [f"data={text}", *QUICK, "train.steps=20", "train.save_every=5", "train.sample_every=0"]
    code, _ = train("gpt2-nano", *options, out=tmp_path / "run")
    assert code == 3
    events = [json.loads(line) for line in log_of(tmp_path / "run").splitlines() if '"event"' in line]
    assert events[-1]["event"] == "non_finite"
    assert (events[-1]["step"], events[-1]["module"]) == (8, "stack.blocks.1.ffn.up")
    kept = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert kept == ["step-5"]
    assert all(bool(torch.isfinite(p).all()) for p in xtcli.load(tmp_path / "run").parameters())


def ragged(rows: int, seed: int) -> Batch:
    """Rows of different length, one of them without any target."""
    import numpy as np

    generator = np.random.default_rng(seed)
    lengths = generator.integers(1, 17, rows)
    ids = generator.integers(1, 60, (rows, 16))
    mask = np.arange(16) < lengths[:, None]
    targets = np.where(mask & (generator.random((rows, 16)) < 0.7), ids, -100)
    targets[0] = -100
    return Batch.of(
        {"input_ids": ids, "attention_mask": mask}, {"lm": targets}, list(range(rows)), lengths.tolist(), multiple=1
    )


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_any_split_of_a_batch_gives_the_same_gradient(dtype: torch.dtype, limit: float) -> None:
    model = build("gpt2-nano", "model.vocab=64", "model.dropout=0.0", tiny=True, dtype=dtype)
    batch = ragged(32, 0)
    counts = batch.supervised()

    def gradient(micro: int) -> torch.Tensor:
        model.zero_grad()
        for rows in batch.split(micro):
            terms = model.losses(rows.inputs, rows.targets)
            (terms["lm"].sum / counts["lm"]).backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    whole = gradient(32)
    for micro in (1, 2, 3, 5, 7, 8, 11, 16, 31):
        assert (gradient(micro) - whole).norm() <= limit * whole.norm()


def test_dry_run_prints_the_plan_and_writes_nothing(text: Path, tmp_path: Path) -> None:
    done = xt("train", "gpt2-nano", "--dry-run", f"data={text}", *QUICK, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for label in ("parameters", "FLOPs", "memory", "checkpoint", "device", "objective"):
        assert label in done.stdout
    assert list(tmp_path.iterdir()) == []


MARKED = "tokenizer={kind: bytes, special: {pad: <pad>, cls: <cls>, sep: <sep>, mask: <mask>}}"
BAD = {
    "no such preset": (["gpt2-nanno"], "gpt2-nano"),
    "misspelt override": (["gpt2-nano", "train.stepps=3"], "did you mean 'train.steps'?"),
    "impossible heads": (["gpt2-nano", "model.stack.block.sublayers.attn.heads=7"], "7 heads do not divide dim 128"),
    "missing data": (["gpt2-nano", "data=nowhere.txt"], "nowhere.txt"),
    "empty file": (["gpt2-nano", "data=empty.txt"], "empty.txt"),
    "short text": (["gpt2-nano", "data=short.txt", *QUICK], "token"),
    "folder without text": (["gpt2-nano", "data=hollow"], "hollow"),
    "wrong column": (["gpt2-nano", "data.source=rows.jsonl", "data.column=txet", *QUICK], "text"),
    "not a run": (["hollow"], "hollow"),
    "wrong device": (["gpt2-nano", "train.device=cuda"], "cuda"),
    "small vocabulary": (["gpt2-nano", "model.vocab=100", *QUICK, "data=good.txt"], "model.vocab"),
    "head missing": (
        ["gpt2-nano", "objective={kind: mlm}", MARKED, "model.vocab=300", "train.context=32", "data=good.txt"],
        "the head 'mlm'",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_sentence(case: str, tmp_path: Path) -> None:
    words, wanted = BAD[case]
    if case == "wrong device" and torch.cuda.is_available():
        pytest.skip("there is one here")
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "short.txt").write_text("short")
    (tmp_path / "good.txt").write_text("a good text of some words\n" * 400)
    (tmp_path / "hollow").mkdir()
    (tmp_path / "rows.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    before = sorted(path.name for path in tmp_path.iterdir())
    done = xt("train", *words, cwd=tmp_path)
    assert done.returncode == 2, (done.stdout, done.stderr)
    assert "Traceback" not in done.stderr
    assert wanted in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_a_dry_run_is_a_plan_in_numbers(text: Path, tmp_path: Path) -> None:
    words = ("train", "gpt2-nano", "--tiny", f"data={text}", *QUICK, "train.steps=7", "--dry-run", "--json")
    done = xt(*words, cwd=tmp_path)
    plan = json.loads(done.stdout)
    assert plan["steps"] == 7 and plan["tokens"] == 7 * plan["tokens_per_step"] and plan["fits"] is True
    assert plan["memory_bytes"]["weights"] == 4 * plan["parameters"]
    assert done.stderr.splitlines()[-1].startswith("next: xt train gpt2-nano --tiny ")
    assert not list(tmp_path.iterdir())


def test_an_existing_run_is_never_overwritten(text: Path, tmp_path: Path) -> None:
    options = [f"data={text}", *QUICK, "train.steps=2", "train.sample_tokens=2"]
    first = xt("train", "gpt2-nano", "--tiny", *options, cwd=tmp_path)
    second = xt("train", "gpt2-nano", "--tiny", *options, cwd=tmp_path)
    assert (first.stdout.strip(), second.stdout.strip()) == ("runs/gpt2-nano", "runs/gpt2-nano-2"), second.stderr
    refused = xt("train", "gpt2-nano", "--tiny", *options, "--out", "runs/gpt2-nano", cwd=tmp_path)
    assert refused.returncode == 2
    assert "runs/gpt2-nano" in refused.stderr


def test_resume_refuses_what_it_cannot_honour(text: Path, tmp_path: Path) -> None:
    options = [f"data={text}", *QUICK, "train.steps=2", "train.sample_tokens=2"]
    xt("train", "gpt2-nano", "--tiny", *options, "--out", "run", cwd=tmp_path)
    refused = xt("train", "run", "train.seed=5", "model.dim=32", "train.steps=4", cwd=tmp_path)
    assert refused.returncode == 2
    assert "train.seed" in refused.stderr and "model.dim" in refused.stderr
    longer = xt("train", "run", "train.steps=4", cwd=tmp_path)
    assert longer.returncode == 0, longer.stderr
    assert "changed: train.steps 2 -> 4" in longer.stderr
    assert '"step": 4,' in log_of(tmp_path / "run")


def test_tensorboard_gets_every_number(text: Path, tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    options = [f"data={text}", *QUICK, "train.steps=4", "train.log_every=2", "train.sample_every=0"]
    train("gpt2-nano", *options, "train.sample_tokens=2", "train.tensorboard=true", out=tmp_path / "run")
    events = accumulator.EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    lines = [json.loads(line) for line in log_of(tmp_path / "run").splitlines()]
    written = [(event.step, event.value) for event in events.Scalars("loss")]
    assert written == [(line["step"], pytest.approx(line["loss"])) for line in lines if "loss" in line]
    assert events.Scalars("val_loss")


def test_without_tensorboard_the_extra_is_named(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    options = [f"data={text}", *QUICK, "train.steps=1", "train.tensorboard=true"]
    with pytest.raises(UserError, match="TensorBoard is not installed; pip install"):
        train("gpt2-nano", *options, out=tmp_path / "run")


def test_the_micro_batch_that_was_chosen_is_recorded(text: Path, tmp_path: Path) -> None:
    train("gpt2-nano", f"data={text}", *QUICK, "train.steps=1", "train.sample_tokens=2", out=tmp_path / "run")
    recorded = load_preset(tmp_path / "run").preset.train
    assert recorded.micro_batch == recorded.batch == 8
