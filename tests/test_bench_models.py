"""Training, generation and races measured on tiny models; the command line."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from xtcli.bench import again, generation, race, results, stepping, training
from xtcli.bench.reference import arguments
from xtcli.commands import bench as command
from xtcli.config.preset import load_preset
from xtcli.errors import UserError
from xtcli.inspect.targets import Target, targets
from xtcli.model import skeleton
from xtcli.train.device import Place

CPU = Place(torch.device("cpu"), "CPU, 1 threads", "fp32")


def quiet(text: str) -> None:
    """Nothing is said."""


def words(*given: str) -> list[Target]:
    return [replace(target, overrides=(*target.overrides, "train.device=cpu")) for target in targets(given)]


@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("gpt2-nano", ()),
        ("llama-7b", ()),
        ("bert-base", ("model.dropout=0.0",)),
        ("t5-small", ()),
    ],
)
def test_ours_and_the_reference_take_the_same_steps(name: str, overrides: tuple[str, ...]) -> None:
    pytest.importorskip("transformers")
    given = words(name, *overrides)
    config = training.Config.of(given, tiny=True, steps=2, batch=3, length=16, against="transformers")
    ours, theirs = training.run(config, quiet)["rows"]
    assert ours["same_loss"]
    assert ours["losses_without_dropout"] == pytest.approx([ours["losses_without_dropout"][0]] * 2, abs=1e-4)
    if name != "t5-small":
        # Without dropout the same optimizer, clipping and schedule lead to the same weights, step after step.
        assert ours["losses"][:5] == pytest.approx(theirs["losses"][:5], abs=2e-3)
    assert ours["ratio"] == pytest.approx(theirs["step"]["median_ms"] / ours["step"]["median_ms"])


def test_what_the_reference_cannot_express_is_said() -> None:
    pytest.importorskip("transformers")
    given = words("gpt2-nano", "model.norm=rms")
    config = training.Config.of(given, tiny=True, steps=2, batch=2, length=8, against="transformers")
    (row,) = training.run(config, quiet)["rows"]
    assert "cannot express this model" in row["no_reference"]
    assert "ratio" not in row


def test_a_training_result_counts_tokens_and_targets_apart() -> None:
    config = training.Config.of(words("gpt2-nano"), tiny=True, steps=3, batch=2, length=8)
    found = training.run(config, quiet)
    (row,) = found["rows"]
    seconds = row["step"]["median_ms"] / 1e3
    assert row["tok_s"] == pytest.approx(16 / seconds)
    assert row["targets_s"] == pytest.approx(14 / seconds)
    assert row["mfu"] is None
    assert row["peak_bytes"] > 3 * 4 * row["parameters"]
    assert row["final_loss"] < row["first_loss"]
    assert len(row["step"]["raw_ms"]) == 3
    assert found["conditions"]["tokens_per_step"] == [16]


def test_an_impossible_mfu_is_refused(monkeypatch) -> None:
    monkeypatch.setattr(Place, "peak", property(lambda place: 1.0))
    (row,) = training.run(training.Config.of(words("gpt2-nano"), tiny=True, steps=2, batch=1, length=8), quiet)["rows"]
    assert row["mfu"] is None
    assert "% of the peak is impossible" in row["mfu_refused"]


@pytest.mark.parametrize("name", ["gpt2-nano", "bert-base", "t5-small"])
def test_random_batches_repeat_and_fit_the_heads(name: str) -> None:
    model = skeleton(load_preset(name, tiny=True))
    batch, same, other = (stepping.random_batch(model, 2, 12, seed) for seed in (1, 1, 2))
    for key, value in batch.inputs.items():
        assert torch.equal(value, same.inputs[key])
    assert not torch.equal(batch.inputs["input_ids"], other.inputs["input_ids"])
    assert set(batch.targets) <= set(model.heads)
    assert all(count > 0 for count in batch.supervised().values())


def test_labels_shift_only_for_a_causal_model() -> None:
    model = skeleton(load_preset("gpt2-nano", tiny=True))
    batch = stepping.random_batch(model, 1, 5, 0)
    given = arguments(batch, causal=True)
    assert given["labels"][0, 0] == -100
    assert torch.equal(given["labels"][:, 1:], batch.inputs["input_ids"][:, 1:])
    assert torch.equal(arguments(batch, causal=False)["labels"], batch.targets["lm"])


@pytest.mark.parametrize("name", ["gpt2-nano", "llama-7b", "t5-small"])
def test_ours_and_the_reference_write_the_same(name: str) -> None:
    pytest.importorskip("transformers")
    config = generation.Config.of(
        words(name), device="cpu", dtype="fp32", tiny=True, prompt=6, new=6, batch=2, repeats=2, against="transformers"
    )
    ours, theirs = generation.run(config, CPU, quiet)["rows"]
    assert theirs["same_tokens"] == 1.0
    assert len(ours["tokens"]) == 2 and all(len(row) == 6 for row in ours["tokens"])
    assert ours["per_token"]["median_ms"] > 0


@pytest.mark.parametrize(
    ("name", "prompt", "message"),
    [
        ("bert-base", 4, "writes no text token by token"),
        ("gpt2-nano", 1000, "has 128 positions, 1,004 tokens are asked for"),
    ],
)
def test_what_cannot_write_is_refused(name: str, prompt: int, message: str) -> None:
    config = generation.Config.of(words(name), device="cpu", dtype="fp32", tiny=True, prompt=prompt, new=4)
    with pytest.raises(UserError, match=message):
        generation.run(config, CPU, quiet)


@pytest.fixture
def text(tmp_path):
    (tmp_path / "text").mkdir()
    for number in range(40):
        (tmp_path / "text" / f"{number}.txt").write_text(f"line {number} of a text that repeats itself. " * 20)
    return ["tokenizer=bytes", f"data={{source: {tmp_path / 'text'}}}"]


def test_a_race_is_run_on_the_same_text_at_equal_tokens(text, tmp_path) -> None:
    given = words("gpt2-nano", *text, "gpt2-nano", "model.norm=rms")
    config = race.Config.of(given, tiny=True, tokens=16 * 32 * 8, batch=8, length=32)
    found = race.run(config, quiet)
    assert [row["tokens"] for row in found["rows"]] == [16 * 32 * 8] * 2
    for row in found["rows"]:
        assert len(row["training"]) == row["steps"] == 16
        assert row["training"][-1][3] < row["training"][0][3]
        assert row["validation"][-1][0] == row["tokens"]
        assert row["validation_loss"] == row["validation"][-1][3]
    assert len({row["name"] for row in found["rows"]}) == 2
    results.write(tmp_path / "race.json", found)
    assert race.Config.read(results.read(tmp_path / "race.json")["config"]) == config


def test_a_race_ends_with_its_seconds(text) -> None:
    config = race.Config.of(words("gpt2-nano", *text), tiny=True, seconds=0.5, batch=4, length=16)
    (row,) = race.run(config, quiet)["rows"]
    last = row["training"][-1][1] - row["training"][-2][1]
    assert row["steps"] == row["planned_steps"] or 0.5 <= row["seconds"] < 0.5 + 5 * last
    assert row["first_step_s"] > 0


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("gpt2-nano", "bert-base"), "bert-base learns another thing"),
        (("gpt2-nano", "gpt2-nano", "train.batch=3"), "tokens a step"),
        (("gpt2-nano", "gpt2-nano", "train.precision=bf16"), "other results are not compared"),
    ],
)
def test_unequal_races_are_refused(text, given, message) -> None:
    first, *others = given
    config = race.Config.of(words(first, *text, *others), tiny=True, tokens=1000)
    with pytest.raises(UserError, match=message):
        race.run(config, quiet)


def test_a_result_is_repeated_under_its_conditions_only() -> None:
    config = training.Config.of(words("gpt2-nano"), tiny=True, steps=2, batch=1, length=8)
    before = json.loads(json.dumps(training.run(config, quiet)))
    now = again.repeat(before, "r.json", quiet)
    assert now["config"]["presets"] == training.Config.read(before["config"]).presets
    assert [row[0] for row in results.beside(before, now)] == ["gpt2-nano xt step"]
    before["conditions"]["device"] = "another machine"
    with pytest.raises(UserError, match="only results of the same device"):
        again.repeat(before, "r.json", quiet)


@pytest.mark.parametrize(
    ("option", "given", "expected"),
    [("_seconds", "5m", 300.0), ("_seconds", "30s", 30.0), ("_seconds", "7", 7.0), ("_count", "1.5M", 1_500_000)],
)
def test_budgets(option: str, given: str, expected: float) -> None:
    assert getattr(command, option)(given) == expected


@pytest.mark.parametrize("given", ["", "m", "-3s", "nan", "inf", "5x"])
def test_wrong_budgets_are_refused(given: str) -> None:
    with pytest.raises(UserError, match="is no budget"):
        command._seconds(given)


def xt(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "xtcli", "bench", *arguments], capture_output=True, text=True)


def test_the_command_writes_table_file_and_picture(tmp_path) -> None:
    out, plot = tmp_path / "a.json", tmp_path / "a.png"
    done = xt("attention", "--seq", "32", "--mask", "causal", "--heads", "2", "--head-dim", "8", "--device", "cpu",
              "--out", str(out), "--plot", str(plot))  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "causal" in done.stdout and "TFLOP/s" in done.stdout and "needs an NVIDIA GPU" in done.stdout
    assert f"next: xt bench --rerun {out}" in done.stderr
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert results.read(out)["kind"] == "attention"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["attention", "--seq", "x"], "--seq: 'x' is not a length; write --seq 8192 or --seq 1024,2048"),
        (["attention", "--out", "a.txt"], "the file 'a.txt' does not end in .json"),
        (["attention", "--kernel", "flsh"], "--kernel: there is no kernel 'flsh'; did you mean 'flash'?"),
        (["train", "gpt2-nano", "--against", "torch"], "there is no reference 'torch'"),
        (["train", "gpt2-nano", "--budget", "5m", "--tokens", "1M"], "are two budgets"),
        (["--rerun", "nothing.json"], "'nothing.json' cannot be read"),
    ],
)
def test_mistakes_read_as_sentences(arguments: list[str], message: str) -> None:
    done = xt(*arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
