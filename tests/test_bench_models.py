"""Training, generation and races measured on tiny models; the command line."""

from __future__ import annotations

import json
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from commands import xt

from xtcli.bench import again, generation, overhead, peers, performance, race, report, results, stepping, training
from xtcli.bench.peers.hf import arguments
from xtcli.commands import amounts
from xtcli.commands import bench as command
from xtcli.config.preset import load_preset
from xtcli.errors import UserError
from xtcli.inspect.targets import Target, targets
from xtcli.model import skeleton
from xtcli.train.device import Place
from xtcli.train.optim import set_rate

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
    config = training.Config.of(given, tiny=True, steps=2, batch=3, length=16, against=("transformers",))
    ours, theirs = training.run(config, quiet)["rows"]
    assert theirs["same_loss"]
    assert theirs["losses_without_dropout"] == pytest.approx([theirs["losses_without_dropout"][0]] * 2, abs=1e-4)
    if name != "t5-small":
        # Without dropout the same optimizer, clipping and schedule lead to the same weights, step after step.
        assert ours["losses"][:5] == pytest.approx(theirs["losses"][:5], abs=2e-3)
    assert theirs["ratio"] == pytest.approx(theirs["step"]["median_ms"] / theirs["xt_step"]["median_ms"])


def test_what_the_reference_cannot_express_is_said() -> None:
    pytest.importorskip("transformers")
    given = words("gpt2-nano", "model.norm=rms")
    config = training.Config.of(given, tiny=True, steps=2, batch=2, length=8, against=("transformers",))
    (row,) = training.run(config, quiet)["rows"]
    assert "cannot express this model" in row["no_peer"]["transformers"]
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


@pytest.mark.parametrize(
    "name", ["gpt2-nano", "bert-base", "t5-small", "vit-base", "vit-gpt2-captioner", "x-captioner", "x-continuous"]
)
def test_random_batches_repeat_and_fit_the_heads(name: str) -> None:
    model = skeleton(load_preset(name, tiny=True))
    batch, same, other = (stepping.random_batch(model, 2, 12, seed) for seed in (1, 1, 2))
    for key, value in batch.inputs.items():
        assert torch.equal(value, same.inputs[key]) and not torch.equal(value, other.inputs[key])
    assert set(batch.targets) <= set(model.heads)
    assert all(count > 0 for count in batch.supervised().values())


@pytest.mark.parametrize(("name", "asked"), [("t5-small", 24), ("vit-gpt2-captioner", 24), ("gpt2-nano", 22)])
def test_every_word_of_an_answer_is_asked_about(name: str, asked: int) -> None:
    batch = stepping.random_batch(skeleton(load_preset(name, tiny=True)), 2, 12, 1)
    assert batch.supervised() == {"lm": asked}
    if "decoder_input_ids" in batch.inputs:
        assert torch.equal(batch.targets["lm"][:, :-1], batch.inputs["decoder_input_ids"][:, 1:])


def test_images_count_by_their_places() -> None:
    model = skeleton(load_preset("vit-gpt2-captioner", tiny=True))
    places = model.encoder.embed.places
    assert places != 12 and stepping.random_batch(model, 2, 12, 1).tokens == 2 * (places + 12)


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
        words(name),
        device="cpu",
        dtype="fp32",
        tiny=True,
        prompt=6,
        new=6,
        batch=2,
        repeats=2,
        against=("transformers",),
    )
    ours, theirs = generation.run(config, CPU, quiet)["rows"]
    assert theirs["same_tokens"] == 1.0
    assert len(ours["tokens"]) == 2 and all(len(row) == 6 for row in ours["tokens"])
    assert ours["per_token"]["median_ms"] > 0


def test_eight_bits_have_a_line_of_their_own() -> None:
    config = generation.Config.of(
        words("llama-7b"), device="cpu", dtype="fp32", tiny=True, prompt=6, new=6, repeats=2, int8=True
    )
    ours, small = generation.run(config, CPU, quiet)["rows"]
    assert (ours["side"], small["side"]) == ("xt", generation.EIGHT)
    assert len(small["tokens"][0]) == 6 and small["per_token"]["median_ms"] > 0 and small["ratio"] > 0


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
    assert [row[0] for row in results.beside(before, now)] == [
        "gpt2-nano xt step",
        "gpt2-nano xt processor",
    ]
    before["conditions"]["device"] = "another machine"
    with pytest.raises(UserError, match="only results of the same device"):
        again.repeat(before, "r.json", quiet)


@pytest.mark.parametrize(
    ("option", "given", "expected"),
    [("seconds", "5m", 300.0), ("seconds", "30s", 30.0), ("seconds", "7", 7.0), ("count", "1.5M", 1_500_000)],
)
def test_budgets(option: str, given: str, expected: float) -> None:
    assert getattr(amounts, option)(given) == expected


@pytest.mark.parametrize("given", ["", "m", "-3s", "nan", "inf", "5x"])
def test_wrong_budgets_are_refused(given: str) -> None:
    with pytest.raises(UserError, match="is no budget"):
        amounts.seconds(given)


def test_the_command_writes_table_file_and_picture(tmp_path) -> None:
    out, plot = tmp_path / "a.json", tmp_path / "a.png"
    done = xt("bench", "attention", "--seq", "32", "--mask", "causal", "--heads", "2", "--head-dim", "8", "--device", "cpu",
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
        (["train", "gpt2-nano", "--against", "torch"], "there is no peer 'torch'"),
        (["train", "gpt2-nano", "--budget", "5m", "--tokens", "1M"], "are two budgets"),
        (["--rerun", "nothing.json"], "'nothing.json' cannot be read"),
    ],
)
def test_mistakes_read_as_sentences(arguments: list[str], message: str) -> None:
    done = xt("bench", *arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_the_loop_is_timed_in_blocks_that_end_where_it_logs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "BLOCK", {"cpu": 4})
    config = training.Config.of(words("gpt2-nano"), tiny=True, steps=12, batch=2, length=8)
    (row,) = training.run(config, quiet)["rows"]
    # Of the first step and of the last in each block: one to warm up, three that are timed.
    assert len(row["losses"]) == 1 + 4
    assert len(row["step"]["raw_ms"]) == 3
    assert row["step"]["warm_up_calls"] == 4


def test_what_the_loop_adds_is_measured_on_the_same_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(overhead, "BLOCK", 2)
    monkeypatch.setattr(overhead, "BLOCKS", 3)
    config = training.Config.of(words("gpt2-nano"), tiny=True, steps=3, batch=2, length=8, loop=True)
    found = training.run(config, quiet)
    loop = found["rows"][0]["loop"]
    assert loop["lines"] == 3
    assert loop["share"] == pytest.approx(loop["loop"]["median_ms"] / loop["bare"]["median_ms"] - 1)
    _, loops = report.tables(found)
    assert loops.rows[0][0] == "gpt2-nano"


@pytest.mark.parametrize("name", ["gpt2-nano", "bert-base", "t5-small"])
def test_a_bare_step_is_the_step_of_the_loop(name: str) -> None:
    def made() -> stepping.Bench:
        resolved = load_preset(name, ["train.device=cpu", "model.dropout=0.0"], tiny=True)
        skeleton, plan, batch = stepping.prepare(resolved, CPU, rows=4, length=8, seed=0)
        return stepping.start(name, resolved, CPU, plan, batch, skeleton, 0)

    looped, bare = made(), made()
    for bench in (looped, bare):
        for module in bench.model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
    looped.step()
    set_rate(bare.trainer.optimizer, bare.trainer.rate(0))
    overhead.bare(bare)
    for one, other in zip(looped.model.parameters(), bare.model.parameters(), strict=True):
        torch.testing.assert_close(one, other)


FOUND = {
    "title": "Training",
    "command": "xt bench train gpt2-nano",
    "goals": {"transformers": 1.2},
    "without": ["nanogpt"],
}


@pytest.fixture(scope="module")
def performed() -> dict[str, object]:
    pytest.importorskip("transformers")
    config = training.Config.of(words("gpt2-nano"), tiny=True, steps=3, batch=2, length=8, against=("transformers",))
    entry = FOUND | {"result": json.loads(json.dumps(training.run(config, quiet)))}
    skipped = FOUND | {"title": "Writing", "skipped": "needs an NVIDIA GPU"}
    return results.result("all", {}, {}, {"cases": {"cpu-train": entry, "train-gpt2": skipped}})


def test_all_comparisons_stand_in_one_table(performed) -> None:
    summary, *_ = report.tables(performed)
    ((work, ours, beside, theirs, ratio, goal, _),) = summary.rows
    row = performed["cases"]["cpu-train"]["result"]["rows"][1]
    assert (work, beside, goal) == ("Training", "transformers", "1.20 x")
    assert ratio == f"{row['ratio']:.2f} x"
    assert theirs == f"{row['tok_s']:,.0f}"
    assert float(ours.replace(",", "")) == pytest.approx(16e3 / row["xt_step"]["median_ms"], rel=0.01)


def test_the_page_is_made_from_the_file(performed, tmp_path) -> None:
    results.write(tmp_path / "p.json", performed)
    done = xt("bench", "--show", str(tmp_path / "p.json"), "--markdown")
    assert done.returncode == 0, done.stderr
    page = done.stdout
    assert page == performance.page(performed)
    assert "| Training |" in page and "Not measured: needs an NVIDIA GPU." in page
    assert "Without nanogpt: not given with --peers." in page
    assert torch.__version__ in page
    assert f"; beside transformers {version('transformers')}." in page and "sdpa attention, AdamW fused" in page
    # The order is that of the cases, whatever was measured first.
    assert page.index("## Writing") < page.index("## Training")
    lines = page.splitlines()
    for at, line in enumerate(lines):
        if line.startswith("| :--"):
            assert lines[at - 1].count(" | ") == line.count(" | ") == lines[at + 1].count(" | ")


def test_cases_are_measured_once_and_again_where_they_are_named(monkeypatch, tmp_path) -> None:
    words = "train gpt2-nano --device cpu --tiny --steps 2 --batch 1 --length 8"
    cases = (
        performance.Case("quick", "Quick", words, "cpu", 100, 0, {"nanogpt": 1.0}),
        performance.Case("gpu", "GPU", words, "cuda", 100),
        performance.Case("wrong", "Wrong", "train no-such-preset", "cpu", 100),
        performance.Case("slow", "Slow", words, "cpu", 0),
    )
    monkeypatch.setattr(performance, "CASES", cases)
    heard: list[str] = []
    out = tmp_path / "p.json"
    names = ["quick", "gpu", "wrong", "slow"] if not torch.cuda.is_available() else ["quick", "wrong", "slow"]
    found = performance.run(names, [], out, heard.append)
    assert found["cases"]["quick"]["result"]["kind"] == "train"
    assert found["cases"]["quick"]["without"] == ["nanogpt"]
    assert "there is no preset 'no-such-preset'" in found["cases"]["wrong"]["skipped"]
    assert found["cases"]["slow"]["skipped"] == "took longer than 0 s"
    if "gpu" in names:
        assert found["cases"]["gpu"]["skipped"] == "needs an NVIDIA GPU"
    assert results.read(out) == json.loads(json.dumps(found))
    monkeypatch.setattr(performance, "_wanted", lambda names: [cases[0]])
    heard.clear()
    assert performance.run([], [], out, heard.append) == json.loads(json.dumps(found))
    assert heard == ["quick: measured already; --case quick measures it again"]
    with pytest.raises(UserError, match="a result of kind train"):
        results.write(out, found["cases"]["quick"]["result"])
        performance.run([], [], out, heard.append)


@pytest.mark.parametrize(
    "case", [case for case in performance.CASES if case.words.split()[0] != "attention"], ids=lambda case: case.name
)
def test_the_commands_of_the_cases_are_understood(case: performance.Case) -> None:
    kind, name, *rest = case.words.split()
    assert kind in ("train", "generate")
    overrides = [word for word in rest if "=" in word]
    assert load_preset(name, overrides).name
    options = {param for known in command.command.registered_commands for param in _options(known, kind)}
    assert {word for word in rest if word.startswith("--")} <= options
    assert set(case.peers) <= set(peers.KNOWN)


def _options(known, kind: str) -> list[str]:
    import typer.main

    built = typer.main.get_command_from_info(known, pretty_exceptions_short=False, rich_markup_mode=None)
    return [name for param in built.params for name in param.opts] if built.name == kind else []


def test_the_page_of_figures_is_that_of_its_file() -> None:
    docs = Path(__file__).parents[1] / "docs"
    assert (docs / "performance.md").read_text(encoding="utf-8") == performance.page(
        results.read(docs / "performance.json")
    )
