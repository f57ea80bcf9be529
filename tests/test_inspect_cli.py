"""xt inspect as it is called: which answer, on which stream, and what is refused before a line is printed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from test_inspect_files import log
from typer.testing import CliRunner

from xtcli import cli
from xtcli.config import complete
from xtcli.errors import UserError


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("LINES", "24")


def xt(*words: str) -> tuple[str, str]:
    """stdout and stderr of a command that must not fail."""
    done = CliRunner().invoke(cli.app, ["inspect", *words], catch_exceptions=False)
    assert done.exit_code == 0
    return done.stdout, done.stderr


ANSWERS = [
    (("gpt2-small", "--tiny"), "\nFLOPs per token, forward ", "xt train gpt2-small --tiny --dry-run"),
    (("gpt2-small", "--tiny", "--batch", "3", "--length", "9"), "\n3 texts of 9 tokens ", "xt train gpt2-small --tiny --dry-run"),
    (("gpt2-small", "--tiny", "--tree"), "blocks 0-1  (2 x ", "xt inspect gpt2-small --tiny --masks"),
    (("gpt2-small", "--tiny", "--masks", "--length", "9"), " of 9 x 9 pairs seen", "xt inspect gpt2-small --tiny --png masks.png"),
    (("gpt2-small", "--tiny", "--png", "m.png"), "mask causal", "xt inspect gpt2-small --tiny --tree"),
    (("gpt2-small", "llama-7b", "--tiny"), "model.norm: layer -> rms; eps 1e-5 -> 1e-6\n", "xt inspect llama-7b --tiny --tree"),
    (("gpt2-small", "gpt2-small", "model.stack.layers=1", "--tiny"), "model.stack: 2 -> 1 layers\n", "xt inspect gpt2-small --tiny model.stack.layers=1 --tree"),
    (("gpt2-small", "model.stack.layers=1", "gpt2-small", "--tiny"), "model.stack: 1 -> 2 layers\n", "xt inspect gpt2-small --tiny --tree"),
    (("gpt2-small", "gpt2-small", "--tiny"), "the presets do not differ\n", "xt inspect gpt2-small --tiny --tree"),
    (("--parts",), "\nnorm\n", "xt inspect --parts mixer.attention"),
    (("--parts", "norm"), "\nnorm: rms\n", "xt inspect --parts"),
    (("runs/a", "--curves"), "losses in nats per target\n", "xt inspect runs/a --curves --png curves.png"),
    (("runs/a", "runs/b", "--curves", "--png", "c.png"), "\nruns/b  ", "xt inspect runs/a runs/b"),
]  # fmt: skip


@pytest.mark.parametrize(("words", "part", "after"), ANSWERS, ids=[" ".join(item[0]) for item in ANSWERS])
def test_answers_go_to_stdout_and_the_next_command_to_stderr(words: tuple[str, ...], part: str, after: str) -> None:
    for name in "ab":
        log(Path("runs", name), [3.0, 2.0, 1.5])
    out, err = xt(*words)
    assert part in f"\n{out}"
    assert err.splitlines()[-1] == f"next: {after}"
    for png in ("m.png", "c.png"):
        assert Path(png).exists() == (png in words) == (f"wrote {png}" in err)


@pytest.mark.parametrize("words", [item[0] for item in ANSWERS if "--png" not in item[0]], ids=" ".join)
def test_every_answer_is_there_as_json(words: tuple[str, ...]) -> None:
    for name in "ab":
        log(Path("runs", name), [3.0, 2.0, 1.5])
    assert json.loads(xt(*words, "--json")[0])


def test_a_checkpoint_is_inspected_like_a_preset_and_its_tensors_too() -> None:
    done = CliRunner().invoke(cli.app, ["build", "t5-small", "--tiny", "--out", "made"], catch_exceptions=False)
    assert done.exit_code == 0
    out, err = xt("made")
    assert "\nstored       " in out and err.splitlines()[-1] == "next: xt generate --ckpt made --prompt TEXT"
    out, err = xt("made", "--tensors")
    lines = out.splitlines()
    assert lines[0].split() == ["tensor", "shape", "dtype", "mean", "std", "min", "max", "non-finite"]
    assert any(line.startswith("tokens.weight") and "(512, 64)" in line and "float32" in line for line in lines)
    assert lines[-1].endswith(", all finite") and err == "next: xt inspect made\n"
    assert {row["name"] for row in json.loads(xt("made", "--tensors", "--json")[0])} == {
        line.split()[0] for line in lines[1:-1]
    }
    assert "bias t5 (attn of layers 0-1): trained, added to the scores" in xt("made", "--masks", "--length", "8")[0]
    assert json.loads(xt("made", "--json")[0])["stored"]["dtypes"] == ["f32"]


REFUSED = [
    (("gpt2-small", "--tree", "--masks"), "--tree and --masks are different answers; ask for one at a time"),
    (("gpt2-small", "--tree", "--batch", "2"), "--batch changes nothing in the answer of --tree; it takes --size, --tiny"),
    (("gpt2-small", "--curves", "--tiny"), "--tiny changes nothing in the answer of --curves; it takes --png"),
    (("gpt2-small", "llama-7b", "--tree"), "--tree takes one target, not 2 (gpt2-small, llama-7b); overrides are written KEY=VALUE"),
    (("a", "b", "c"), "a comparison takes 2 targets at most, not 3 (a, b, c); overrides are written KEY=VALUE"),
    (("--masks",), "--masks is about a preset, a run or a checkpoint; write xt inspect PRESET --masks"),
    (("--parts", "norm", "ffn"), "--parts takes one SLOT or SLOT.KIND, not 2; ask for one at a time"),
    (("x", "a=1", "--tensors"), "--tensors reads what was written, and 'a=1' changes nothing there; leave it out"),
    (("gpt2-small", "--length", "2000"), "--length: 2,000 tokens do not fit into 1,024 positions; use 1024 or less, or raise model.context"),
    (("gpt2-small", "--masks", "--length", "2000"), "--length: 2,000 tokens do not fit into 1,024 positions; use 1024 or less, or raise model.context"),
    (("gpt2-small", "--png", "m.jpg"), "the file 'm.jpg' does not end in .png; write --png m.jpg.png"),
    (("gpt2-small", "gpt2-smal"), "there is no preset 'gpt2-smal'; did you mean 'gpt2-small'?"),
    (("gpt2-small", "--curves"), "'gpt2-small' is not a run: it has no metrics.jsonl; give the folder of a run, as xt train printed it"),
    (("gpt2-small", "--tensors"), "gpt2-small: no such run or checkpoint; a run is a folder that xt train made"),
]  # fmt: skip


@pytest.mark.parametrize(("words", "message"), REFUSED, ids=[" ".join(item[0]) for item in REFUSED])
def test_wrong_words_are_refused_before_anything_is_printed(words: tuple[str, ...], message: str) -> None:
    done = CliRunner().invoke(cli.app, ["inspect", *words])
    assert isinstance(done.exception, UserError)
    assert str(done.exception) == message
    assert done.stdout == ""


class Context:
    """What completion sees of a command line."""

    def __init__(self, **params: object) -> None:
        self.params, self.args = params, []


def test_completion_knows_parts_presets_and_keys() -> None:
    assert ("norm.rms", "") in complete.complete_inspected(Context(parts=True), "norm")
    assert ("norm", "") in complete.complete_inspected(Context(parts=True), "no")
    names = [name for name, _ in complete.complete_inspected(Context(), "gpt2-")]
    assert "gpt2-small" in names and "norm" not in names
    both = [name for name, _ in complete.complete_override_or_preset(Context(preset="gpt2-small"), "t")]
    assert "train." in both and "t5-small" in both
    words = complete.complete_override_or_preset(Context(preset="gpt2-small"), "model.stack.block.wiring=re")
    assert [word for word, _ in words] == ["model.stack.block.wiring=rezero"]
