"""`xt generate` as a user meets it: streams, JSON, prompts, mistakes."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from xtcli import cli
from xtcli.config.preset import load_preset
from xtcli.data.tokenizers import Bytes, Unigram, WordPiece
from xtcli.data.train_tokenizer import train
from xtcli.model import build, save_model

WORDS = ["the cat sat on the mat", "a dog ate the cat", "cats and dogs and mats"] * 20
TOKENIZERS: dict[str, Any] = {
    "gpt2-nano": Bytes.Config(),
    "tinyllama-1.1b": Bytes.Config(),
    "bert-base": WordPiece.Config(vocab=90),
    "t5-small": Unigram.Config(vocab=90, sentinels=4),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small checkpoints, named after their presets, and one without a tokenizer."""
    folder = tmp_path_factory.mktemp("models")
    for name, config in TOKENIZERS.items():
        preset = load_preset(name, tiny=True)
        save_model(build(preset, seed=1), folder / name, preset.to_yaml(), train(config, WORDS))
    save_model(build(preset), folder / "bare", preset.to_yaml())
    return folder


class Run:
    """What a command printed, and its exit code."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err
        self.talk = err.splitlines()


@pytest.fixture
def xt(models: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    def run(*words: object, stdin: str | bytes = "") -> Run:
        content = stdin.encode() if isinstance(stdin, str) else stdin
        monkeypatch.setattr(sys, "argv", ["xt", "generate", *map(str, words)])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
        monkeypatch.chdir(models)
        with pytest.raises(SystemExit) as left:
            cli.main()
        printed = capsys.readouterr()
        return Run(int(left.value.code or 0), printed.out, printed.err)

    return run


def test_text_alone_on_stdout(xt: Any) -> None:
    run = xt("--ckpt", "gpt2-nano", "--prompt", "def ", "--max-tokens", 12, "--seed", 5)
    assert run.code == 0
    assert run.talk[0].startswith("gpt2-nano: 124,800 parameters, fp32, on cpu (")
    assert run.talk[0].endswith("; continues the prompt")
    assert run.talk[1] == "seed: 5"
    assert run.talk[2].startswith("prefill: 4 tokens in ") and "; decode: 11 tokens in " in run.talk[2]
    assert run.talk[3] == "next: xt generate --ckpt gpt2-nano --prompt 'def ' --max-tokens 12 --seed 5 --lens"
    assert len(run.talk) == 4
    answer = json.loads(xt("--ckpt", "gpt2-nano", "--prompt", "def ", "--max-tokens", 12, "--seed", 5, "--json").out)
    assert run.out == answer["results"][0]["text"] + "\n"


def test_drawn_seed_repeats_the_text(xt: Any) -> None:
    first = xt("--ckpt", "gpt2-nano", "--prompt", "a", "--max-tokens", 9)
    seed = first.talk[1].removeprefix("seed: ")
    assert first.talk[-1] == f"next: xt generate --ckpt gpt2-nano --prompt a --max-tokens 9 --seed {seed}"
    assert xt("--ckpt", "gpt2-nano", "--prompt", "a", "--max-tokens", 9, "--seed", seed).out == first.out


def test_json(xt: Any) -> None:
    run = xt(
        "--ckpt",
        "gpt2-nano",
        "--prompt",
        "a",
        "--prompt",
        "b",
        "-n",
        2,
        "--max-tokens",
        6,
        "--seed",
        1,
        "--json",
        "--lens",
    )
    answer = json.loads(run.out)
    assert set(answer) == {"task", "checkpoint", "device", "dtype", "seed", "results", "timings", "notes"}
    assert (answer["task"], answer["device"], answer["dtype"]) == ("continue", "cpu", "fp32")
    assert [(row["prompt"], row["sample"]) for row in answer["results"]] == [("a", 0), ("a", 1), ("b", 0), ("b", 1)]
    for row in answer["results"]:
        assert row["finish"] == "length" and len(row["tokens"]) == 6 and row["prompt_tokens"] == 1
        assert [step["token"] for step in row["lens"]] == row["tokens"]
        assert len(row["lens"][0]["likeliest"]) == 4
    assert answer["timings"]["decode_tokens"] == 20 and answer["timings"]["prefill_seconds"] > 0


@pytest.mark.parametrize(
    "more", [(), ("--temperature", "0"), ("-n", "3"), ("--stop", "e"), ("--beams", "2", "-n", "2")]
)
def test_stream_prints_the_same(xt: Any, more: tuple[str, ...]) -> None:
    words = ["--ckpt", "gpt2-nano", "--prompt", "x" * 60, "--prompt", "yz", "--max-tokens", 40]
    words += [*more, *([] if "--temperature" in more or "--beams" in more else ["--seed", 2])]
    streamed, whole = xt(*words, "--stream"), xt(*words, "--no-stream")
    assert streamed.out == whole.out and streamed.out.count("\n") >= 2
    heads = [line for line in streamed.talk if line.startswith("--- ")]
    assert heads == [line for line in whole.talk if line.startswith("--- ")] and heads[0].startswith("--- prompt 1")


def test_prompts_from_files_and_stdin(xt: Any, tmp_path: Path) -> None:
    words = ["--ckpt", "tinyllama-1.1b", "--temperature", 0, "--max-tokens", 8]
    plain = xt(*words, "--prompt", "one\ntwo")
    assert xt(*words, stdin="one\ntwo\n").out == plain.out
    assert xt(*words, stdin="one\r\ntwo\r\n").out != plain.out
    file = tmp_path / "prompt.txt"
    file.write_bytes(b"\xef\xbb\xbfone\ntwo\n")
    assert xt(*words, "--prompt-file", file).out == plain.out
    both = json.loads(xt(*words, "--prompt-file", file, "--prompt", "zz", "--json").out)
    assert [row["prompt"] for row in both["results"]] == ["zz", "one\ntwo"]
    assert f"--prompt-file {file}" in xt(*words, "--prompt-file", file).talk[-1]
    assert (
        xt(*words, "--prompt", "one\ntwo").talk[-1].startswith("next: xt generate --ckpt tinyllama-1.1b --prompt ...")
    )


def test_masks(xt: Any) -> None:
    run = xt("--ckpt", "bert-base", "--prompt", "the [MASK] sat on [MASK]", "--fill-top", 2, "--top-k", 3)
    lines = run.out.splitlines()
    assert lines[0].startswith("the") and len(lines) == 5
    assert [line[:8].strip() for line in lines[1:]] == ["mask 1", "", "mask 2", ""]
    assert all("%" in line for line in lines[1:])
    assert "filling masks makes no use of --top-k" in run.talk
    answer = json.loads(xt("--ckpt", "bert-base", "--prompt", "the [MASK] sat", "--json").out)
    assert answer["task"] == "fill" and len(answer["results"][0]["masks"][0]) == 5
    assert set(answer["results"][0]["masks"][0][0]) == {"token", "text", "probability"}


def test_seq2seq_is_greedy_unless_asked(xt: Any) -> None:
    words = ["--ckpt", "t5-small", "--prompt", "the <extra_id_0> sat", "--max-tokens", 5, "--json"]
    assert json.loads(xt(*words).out)["seed"] is None
    assert json.loads(xt(*words, "--top-p", 0.9).out)["seed"] is not None
    scored = json.loads(xt(*words, "--beams", 2, "-n", 2).out)["results"]
    assert scored[0]["score"] >= scored[1]["score"]


def test_context_is_the_end(xt: Any) -> None:
    run = xt("--ckpt", "gpt2-nano", "--prompt", "a", "--temperature", 0, "--max-tokens", 999)
    assert "the text ends where the model's context ends" in run.talk
    run = xt("--ckpt", "tinyllama-1.1b", "--prompt", "a", "--temperature", 0, "--max-tokens", 140, "--past-context")
    assert run.code == 0 and "decode: 139 tokens" in run.err


def test_lens(xt: Any) -> None:
    run = xt("--ckpt", "gpt2-nano", "--prompt", "a", "--temperature", 0, "--max-tokens", 3, "--lens")
    head = next(line for line in run.talk if "likeliest" in line)
    assert head.split() == ["token", "probability", "likeliest"]
    assert run.err.count("%") >= 15


OK = ("--ckpt", "gpt2-nano", "--prompt", "x")
MISTAKES: list[tuple[tuple[str, ...], list[str]]] = [
    (("--ckpt", "gpt2-nan", "--prompt", "x"), ["gpt2-nan: no such run or checkpoint; did you mean 'gpt2-nano'?"]),
    (
        ("--ckpt", "quite-other", "--prompt", "x"),
        ["quite-other: no such run or checkpoint; name a folder that xt train or xt build made"],
    ),
    (
        ("--ckpt", "gpt2-nano/preset.yaml", "--prompt", "x"),
        ["gpt2-nano/preset.yaml: is neither a run nor a checkpoint; did you mean gpt2-nano?"],
    ),
    (
        ("--ckpt", "bare", "--prompt", "x"),
        ["bare: has weights but no tokenizer; name one with --tokenizer, or train the model"],
    ),
    (OK[:2], ["xt: no prompt was given; add --prompt TEXT or --prompt-file FILE, or pipe a text in"]),
    ((*OK, "--prompt-file", "missing.txt"), ["missing.txt: no such file; give a text file"]),
    ((*OK, "--prompt-file", "bare"), ["bare: is a folder; give a text file"]),
    ((*OK, "--dtype", "fp23"), ["--dtype: 'fp23' is no type of weights; did you mean 'fp32'?"]),
    ((*OK, "--device", "abacus"), ["--device: 'abacus' is no device; this machine has: "]),
    ((*OK, "--device", "cuda:99"), ["--device: there is no device 'cuda:99' on this machine; this PyTorch ("]),
    (
        (*OK, "--temperature", "-1", "--min-p", "3"),
        [
            "--temperature: -1 is not possible; give a number 0 (greedy) or more",
            "--min-p: 3 is not possible; give a number between 0 and 1; 0 keeps all tokens",
        ],
    ),
    ((*OK, "--max-tokens", "0"), ["--max-tokens: 0 is not possible; give 1 or more"]),
    ((*OK, "--stop", ""), ["--stop: an empty stop string would end every text at once; give some text"]),
    (
        (*OK, "--beams", "2", "--top-k", "4"),
        ["--beams: beams do not draw; leave out the options of sampling, or --beams"],
    ),
    (
        (*OK[:3], "x" * 128),
        ["the prompt: has 128 tokens, which leaves no room for a new one: the model takes 128; shorten it"],
    ),
    (
        ("--ckpt", "tinyllama-1.1b", "--prompt", "x" * 500, "--prompt", "y", "--prompt", "z" * 200),
        [
            f"prompt {number}: has {size} tokens, which leaves no room for a new one: the model takes 128; "
            "shorten it, or allow more with --past-context"
            for number, size in ((1, 500), (3, 200))
        ],
    ),
    (("--ckpt", "bert-base", "--prompt", "x"), ["the prompt: has no mask; write [MASK] for what is to be filled"]),
    (("--ckpt", "t5-small", "--prompt", ""), ["the prompt: is empty; give some text"]),
]


@pytest.mark.parametrize(("words", "messages"), MISTAKES, ids=lambda value: " ".join(value)[:60])
def test_mistakes(xt: Any, words: tuple[str, ...], messages: list[str]) -> None:
    run = xt(*words)
    assert run.code == 2 and run.out == ""
    said = [line for line in run.talk if " parameters, " not in line and not line.startswith("seed: ")]
    assert len(said) == len(messages)
    for line, message in zip(said, messages, strict=True):
        assert line.startswith(message)


def test_file_that_is_no_text(xt: Any, tmp_path: Path) -> None:
    file = tmp_path / "picture.png"
    file.write_bytes(b"ab\xff\xd8")
    assert xt(*OK, "--prompt-file", file).err == f"{file}: byte 3 is no UTF-8; save the file as UTF-8\n"
    file.write_bytes(b"\n")
    assert xt(*OK, "--prompt-file", file).err.startswith(f"{file}: is empty; ")


def test_damaged_checkpoint(xt: Any, models: Path) -> None:
    weights = models / "gpt2-nano" / "model.safetensors"
    whole = weights.read_bytes()
    try:
        weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        run = xt(*OK)
        assert run.code == 2 and run.out == "" and len(run.talk) == 1 and "model.safetensors" in run.err
    finally:
        weights.write_bytes(whole)


def test_weights_in_eight_bits(xt: Any) -> None:
    given = ("--ckpt", "tinyllama-1.1b", "--prompt", "the cat", "--max-tokens", "6", "--temperature", "0")
    made = xt(*given, "--int8", "--json")
    assert made.code == 0
    assert "parameters, fp32 with 15 layers in 8 bits, on cpu" in made.talk[0]
    assert json.loads(made.out)["dtype"] == "fp32 with 15 layers in 8 bits"
    plain = xt(*given, "--json")
    assert "8 bits" not in plain.err
    assert made.talk[0].split(" parameters")[0] == plain.talk[0].split(" parameters")[0]
