"""Fine-tuning as a user does it: train on labelled rows, read the scores, ask the checkpoint."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from labelled import rows, train, write

import xtcli
import xtcli.errors
from xtcli.cli import app
from xtcli.config.preset import load_preset
from xtcli.data.tokenizers import Tokenizer
from xtcli.generate.label import Found, Labels, Words, label
from xtcli.model import find_checkpoint
from xtcli.train import loop
from xtcli.train.start import new, resume

TASKS: dict[str, tuple[str, list[str], str]] = {
    "sequence": ("small", [], "val_accuracy"),
    "pair": ("small", ["objective.text=one", "objective.pair=two"], "val_accuracy"),
    "token": ("small", ["model.heads={token: {}}"], "val_f1"),
    "choice": ("small", ["model.heads={choice: {}}"], "val_accuracy"),
    "several": ("small", ["model.heads={sequence: {pick: mean}}", "objective.problem=many"], "val_micro_f1"),
    "numbers": ("small", ["model.heads={sequence: {pick: mean, problem: number}}"], "val_pearson"),
    "extract": ("small", ["model.heads={span: {}}", "objective={kind: extract, stride: 12}"], "val_exact_match"),
    "decoder": ("decoder", [], "val_accuracy"),
    "decoder token": ("decoder", ["model.heads={token: {}}"], "val_f1"),
    "encoder-decoder": ("pair", [], "val_accuracy"),
    "encoder-decoder extract": ("pair", ["model.heads={span: {}}", "objective={kind: extract}"], "val_exact_match"),
}
QUICK = ("sequence", "token", "several", "numbers", "decoder", "encoder-decoder")
DATA = {"decoder": "sequence", "decoder token": "token", "encoder-decoder": "sequence"}
DATA |= {"encoder-decoder extract": "extract"}


@pytest.fixture(scope="module", autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    os.environ["XT_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    yield
    del os.environ["XT_CACHE"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, list[dict[str, Any]]]]:
    """Trained runs by task, each made when it is first asked for."""

    class Runs(dict[str, tuple[Path, list[dict[str, Any]]]]):
        def __missing__(self, task: str) -> tuple[Path, list[dict[str, Any]]]:
            folder = tmp_path_factory.mktemp(task.replace(" ", "-"))
            data = write(folder, rows(DATA.get(task, task)))
            preset, overrides, _ = TASKS[task]
            steps = 60 if task in QUICK else 150
            options = [f"data.source={data}", f"train.steps={steps}", *overrides]
            self[task] = folder / "run", train(folder / f"{preset}.yaml", *options, out=folder / "run")
            return self[task]

    return Runs()


def said(run: Path, *prompts: str, second: str | None = None) -> Any:
    folder = find_checkpoint(run)
    return label(xtcli.load(run), Tokenizer.load(folder), load_preset(folder).preset, prompts, second).results


@pytest.mark.parametrize("task", TASKS)
def test_a_small_model_learns(task: str, runs: Any) -> None:
    run, lines = runs[task]
    validations = [line for line in lines if "val_loss" in line]
    assert validations[-1][TASKS[task][2]] > 0.95
    losses = [line["loss"] for line in lines if "loss" in line]
    assert losses[-1] < losses[0] / 4
    assert next((run / "samples").iterdir()).read_text().count("expected:") == 3
    logged = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line for line in logged if "val_loss" in line][-1][TASKS[task][2]] == validations[-1][TASKS[task][2]]


def test_labels_are_kept_in_the_preset(runs: Any) -> None:
    run, _ = runs["sequence"]
    preset: Any = load_preset(find_checkpoint(run)).preset
    assert preset.objective.labels == ("negative", "positive")
    assert (preset.objective.of, preset.model.heads["sequence"].labels) == ("sequence", 2)
    pair: Any = load_preset(runs["pair"][0]).preset
    assert (pair.objective.labels, pair.model.heads["sequence"].labels) == (("0", "1", "2", "3"), 4)
    token: Any = load_preset(runs["token"][0]).preset
    assert token.objective.labels == ("LOC", "O", "PER")


@pytest.mark.parametrize("task", ["sequence", "decoder", "encoder-decoder"])
def test_labels_with_probabilities(task: str, runs: Any) -> None:
    found = said(runs[task][0], "the hotel was really superb", "the hotel was really weak")
    assert [one.labels[0].label for one in found] == ["positive", "negative"]
    for one in found:
        assert isinstance(one, Labels)
        assert sum(each.probability or 0 for each in one.labels) == pytest.approx(1, abs=1e-5)
        assert one.labels[0].probability > 0.8 > one.labels[1].probability
    assert said(runs[task][0], "the hotel was really weak")[0].labels[0].probability == pytest.approx(
        found[1].labels[0].probability, abs=1e-5
    )


def test_several_labels_and_numbers(runs: Any) -> None:
    preset: Any = load_preset(find_checkpoint(runs["several"][0])).preset
    assert (preset.objective.labels, preset.model.heads["sequence"].problem) == (("good", "long"), "many")
    (found,) = said(runs["several"][0], "it was superb brief")
    assert {one.label: one.probability > 0.5 for one in found.labels} == {"good": True, "long": False}
    preset = load_preset(find_checkpoint(runs["numbers"][0])).preset
    assert (preset.model.heads["sequence"].labels, preset.model.heads["sequence"].problem) == (1, "number")
    (found,) = said(runs["numbers"][0], "the book has three stars")
    assert found.labels[0].probability is None and found.labels[0].value == pytest.approx(1.5, abs=0.5)
    lines = [line for line in runs["numbers"][1] if "val_loss" in line]
    assert lines[-1]["val_mse"] == pytest.approx(lines[-1]["val_loss"]) and lines[-1]["unit"] == "squared error"


def test_pair(runs: Any) -> None:
    run, _ = runs["pair"]
    found = said(run, '{"one": "it was great", "two": "she was sad"}', '{"one": "it was awful", "two": "she was glad"}')
    assert [one.labels[0].label for one in found] == ["1", "2"]
    assert said(run, "it was great", second="she was glad")[0].labels[0].label == "3"


def test_words(runs: Any) -> None:
    (found,) = said(runs["token"][0], "clara went to oslo again")
    assert isinstance(found, Words)
    assert [(word, one.label) for word, one in found.words if one] == [
        ("clara", "PER"), ("went", "O"), ("to", "O"), ("oslo", "LOC"), ("again", "O")
    ]  # fmt: skip
    long = said(runs["token"][0], " ".join(["anna went to rome"] * 20))[0].words
    assert (long[0][1].label, long[3][1].label, long[-1][1]) == ("PER", "LOC", None)


def test_choices_of_any_number(runs: Any) -> None:
    prompts = [
        '{"text": "which one ?", "choices": ["a weak book", "a superb book"]}',
        '{"text": "which one ?", "choices": ["a lovely book", "a weak film", "a boring book", "an awful book"]}',
    ]
    found = said(runs["choice"][0], "\n".join(prompts))
    assert [one.labels[0].label for one in found] == ["a superb book", "a lovely book"]
    assert [len(one.labels) for one in found] == [2, 4]


@pytest.mark.parametrize("rain", [0, 3, 40])
def test_answer_is_cut_out_of_a_context_of_any_length(rain: int, runs: Any) -> None:
    context = "it rains . " * rain + "anna lives in rome ." + " it rains ." * rain
    (found,) = said(runs["extract"][0], "where does anna live ?", second=context)
    assert isinstance(found, Found)
    assert (found.answer, found.start) == ("rome", context.index("rome"))
    assert context[found.start : found.end] == found.answer
    assert 0.5 < found.probability <= 1


def test_command_prints_labels_and_answers(runs: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def ask(run: Path, *words: str) -> str:
        with pytest.raises(SystemExit) as ended:
            app(["generate", "--ckpt", str(run), *words])
        assert ended.value.code == 0
        return capsys.readouterr().out

    lines = ask(runs["sequence"][0], "--prompt", "the meal was really lovely").splitlines()
    assert [line.split()[1] for line in lines] == ["positive", "negative"]
    assert float(lines[0].split("%")[0]) > 80
    both = ask(runs["sequence"][0], *(f"--prompt=the show was really {w}" for w in ("boring", "great"))).splitlines()
    assert [line.split()[0] for line in both] == ["negative", "positive"]
    context = tmp_path / "context.txt"
    context.write_text("boris lives in lima .\n")
    question = ("--prompt", "where does boris live ?", "--context", str(context))
    assert ask(runs["extract"][0], *question) == "lima\n"
    found = json.loads(ask(runs["extract"][0], *question, "--json"))
    assert found["task"] == "label"
    assert [found["results"][0][key] for key in ("answer", "start", "end")] == ["lima", 15, 19]
    words = ask(runs["token"][0], "--prompt", "david went to paris").splitlines()
    assert [line.split()[:2] for line in words] == [["david", "PER"], ["went", "O"], ["to", "O"], ["paris", "LOC"]]


def test_what_a_prompt_lacks_is_said(runs: Any, capsys: pytest.CaptureFixture[str]) -> None:
    cases = {
        ("extract", ("--prompt", "where ?")): "the prompt: has no 'context'; add --context TEXT, or write it as "
        '{"question": "...", "context": "..."}',
        ("extract", ("--prompt", '{"question": "where ?"}')): "the prompt: has no key 'context', only 'question'; "
        "name the keys as the columns that the model was trained on",
        ("sequence", ("--prompt", "a", "--context", "b")): "the prompt: --context is for models that read a second "
        "text; leave it out",
        ("sequence", ("--prompt", " ")): "the prompt: 'text' is empty; give some text",
        ("choice", ("--prompt", '{"text": "which ?", "choices": ["one"]}')): "the prompt: has no two texts to "
        "choose from; list them in 'choices'",
        (
            "sequence",
            ("--prompt", '{"text": 3}'),
        ): "the prompt: column 'text' holds int, not text; name a column of text",
        ("choice", ("--prompt", "which ?")): "the prompt: has no 'choices'; add --context TEXT, or write it as "
        '{"text": "...", "choices": "..."}',
    }
    for (task, words), message in cases.items():
        with pytest.raises(xtcli.errors.UserError) as caught:
            app(["generate", "--ckpt", str(runs[task][0]), *words], standalone_mode=False)
        assert str(caught.value) == message
    capsys.readouterr()


def stop_at(step: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGTERM to this process right after that step."""
    original = loop.Trainer.__dict__.get("_plain_step", loop.Trainer.step)

    def stepped(self: loop.Trainer, batch: Any) -> int:
        code = original(self, batch)
        if self.progress.step == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return code

    monkeypatch.setattr(loop.Trainer, "_plain_step", original, raising=False)
    monkeypatch.setattr(loop.Trainer, "step", stepped)


@pytest.mark.parametrize("lora", [[], ["train.lora={rank: 2, dropout: 0.2, on: ['**.attn.*']}"]], ids=["whole", "lora"])
def test_resumed_run_equals_one_never_stopped(
    lora: list[str], runs: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tmp_path / "base"
    shutil.copytree(runs["pair"][0], base)
    data = write(tmp_path, rows("sequence"))
    options = [f"data.source={data}", f"train.init={base}", "model.dropout=0.1", *lora]
    options += [
        "train.steps=9",
        "train.save_every=3",
        "train.log_every=1",
        "train.validate_every=4",
        "train.micro_batch=5",
    ]
    resolved = load_preset(tmp_path / "small.yaml", options)
    ends: dict[str, list[tuple[Any, ...]]] = {}
    for name, stop in (("whole", None), ("cut", 5)):  # the second one goes on without what it started from
        stop_at(stop, monkeypatch)
        code, run = new(resolved, out=tmp_path / name, command=["xt"], record=lambda line: None, talk=lambda text: None)
        if stop is not None:
            assert code == 143
            stop_at(None, monkeypatch)
            base.rename(tmp_path / "gone")
            code, _ = resume(run, [], command=["xt"], record=lambda line: None, talk=lambda text: None)
        assert code == 0
        log = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
        keys = ("loss", "val_loss", "val_accuracy", "grad_norm", "best")
        ends[name] = [(line["step"], key, line[key]) for line in log for key in keys if key in line]
    assert ends["cut"] == ends["whole"]
    for merge in (True, False):
        one, two = (xtcli.load(tmp_path / name, merge=merge).state_dict() for name in ("whole", "cut"))
        assert one.keys() == two.keys()
        assert all(torch.equal(one[name], two[name]) for name in one)
        assert any(".lora." in name for name in one) == bool(lora and not merge)
