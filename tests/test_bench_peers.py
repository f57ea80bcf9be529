"""Peers beside ours: their copies stand in as small models of the same interface."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from xtcli.bench import generation, peers, training
from xtcli.bench.peers.exported import export
from xtcli.config.preset import load_preset
from xtcli.errors import UserError
from xtcli.inspect.targets import Target, targets
from xtcli.model import build
from xtcli.train.device import Place

HERE = Path(__file__).parent / "stand_ins"
NANOGPT = f"nanogpt={HERE / 'learned_places.py'}"
GPT_FAST = f"gpt-fast={HERE / 'turned_pairs.py'}"
CPU = Place(torch.device("cpu"), "CPU, 1 threads", "fp32")
GROUPED = "model.stack.block.sublayers.attn.kv_heads=2"


def quiet(text: str) -> None:
    """Nothing is said."""


def words(*given: str) -> list[Target]:
    return [replace(target, overrides=(*target.overrides, "train.device=cpu")) for target in targets(given)]


@pytest.fixture
def litgpt(monkeypatch: pytest.MonkeyPatch) -> str:
    for name in [name for name in sys.modules if name.partition(".")[0] == "litgpt"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(str(HERE))
    yield "litgpt"
    for name in [name for name in sys.modules if name.partition(".")[0] == "litgpt"]:
        del sys.modules[name]


def trained(peer: str, *given: str, **more: Any) -> list[dict[str, Any]]:
    options = {"tiny": True, "steps": 3, "batch": 3, "length": 16} | more
    return training.run(training.Config.of(words(*given), against=(peer,), **options), quiet)["rows"]


def check_same(rows: list[dict[str, Any]], tolerance: float) -> None:
    ours, theirs = rows
    assert theirs["same_loss"]
    assert theirs["losses_without_dropout"] == pytest.approx([theirs["losses_without_dropout"][0]] * 2, abs=1e-4)
    assert ours["losses"] == pytest.approx(theirs["losses"], abs=tolerance)
    assert ours["final_loss"] < ours["first_loss"] - 10 * tolerance
    assert theirs["ratio"] == pytest.approx(theirs["step"]["median_ms"] / theirs["xt_step"]["median_ms"])
    assert ours["peak_bytes"] > 3 * 4 * ours["parameters"]
    assert theirs["peak_bytes"] > 3 * 4 * ours["parameters"]


def test_a_copy_of_nanogpt_takes_the_same_steps(capsys: pytest.CaptureFixture[str]) -> None:
    check_same(trained(NANOGPT, "gpt2-nano"), 2e-3)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("setting", ["model.heads.lm.tied=false", GROUPED])
def test_litgpt_takes_the_same_steps(litgpt: str, setting: str) -> None:
    # It decays gains as well, which ours does not.
    check_same(trained(litgpt, "llama-7b", setting, "train.weight_decay=0"), 2e-3)


def test_several_micro_batches_are_one_step_there_too() -> None:
    once = trained(NANOGPT, "gpt2-nano")[1]["losses"]
    twice = trained(NANOGPT, "gpt2-nano", "train.micro_batch=1")[1]["losses"]
    assert once == pytest.approx(twice, abs=1e-3)


def written(peer: str, *given: str) -> list[dict[str, Any]]:
    options: dict[str, Any] = {"device": "cpu", "dtype": "fp32", "tiny": True, "prompt": 6, "new": 8, "batch": 2}
    config = generation.Config.of(words(*given), repeats=2, against=(peer,), **options)
    return generation.run(config, CPU, quiet)["rows"]


@pytest.mark.parametrize("setting", [GROUPED, "model.stack.position.theta=500.0"])
def test_a_copy_of_gpt_fast_writes_the_same(setting: str) -> None:
    ours, theirs = written(GPT_FAST, "llama-7b", setting)
    assert theirs["same_tokens"] == 1.0
    assert len(theirs["tokens"]) == 2 and all(len(row) == 8 for row in theirs["tokens"])
    assert theirs["ratio"] == theirs["per_token"]["median_ms"] / ours["per_token"]["median_ms"]


@pytest.mark.parametrize(
    ("peer", "preset", "setting", "reason"),
    [
        (
            NANOGPT,
            "llama-7b",
            "model.dropout=0.0",
            "it is a GPT-2 with a language-model head, this is LlamaForCausalLM",
        ),
        (NANOGPT, "gpt2-nano", "model.stack.block.sublayers.ffn.act=relu", "activation_function is 'relu', it knows"),
        (NANOGPT, "gpt2-nano", "model.norm.eps=1e-6", "layer_norm_epsilon is 1e-06, it knows 1e-05"),
        (NANOGPT, "gpt2-nano", "model.embed.dropout=0.3", "it has one rate of dropout, here are"),
        (NANOGPT, "gpt2-nano", "model.norm=rms", "cannot express this model"),
    ],
)
def test_what_a_peer_cannot_express_is_said(peer: str, preset: str, setting: str, reason: str) -> None:
    (row,) = trained(peer, preset, setting)
    (said,) = row["no_peer"].values()
    assert reason in said
    assert "ratio" not in row


@pytest.mark.parametrize(
    ("setting", "reason"),
    [
        ("model.stack.block.sublayers.attn.bias=true", "attention_bias is True, it knows False"),
        ("model.stack.block.sublayers.attn.head_dim=8", "head_dim is 8"),
        ("model.stack.block.sublayers.ffn.act=gelu", "hidden_act is 'gelu', it knows 'silu'"),
    ],
)
def test_a_copy_of_gpt_fast_refuses_what_is_not_its_structure(setting: str, reason: str) -> None:
    (row,) = written(GPT_FAST, "llama-7b", setting)
    assert reason in row["no_peer"]["gpt-fast"]


def test_a_tied_head_is_not_litgpts(litgpt: str) -> None:
    (row,) = trained(litgpt, "llama-7b", "model.heads.lm.tied=true")
    assert "its head has a matrix of its own" in row["no_peer"]["litgpt"]


def test_the_export_is_what_conversion_writes(tmp_path: Path) -> None:
    from xtcli.convert import convert
    from xtcli.convert.files import open_source
    from xtcli.model import save_model

    resolved = load_preset("gpt2-nano", tiny=True)
    model = build(resolved, seed=3)
    save_model(model, tmp_path / "ours", resolved.to_yaml())
    convert(tmp_path / "ours", tmp_path / "theirs", to="hf")
    source = open_source(tmp_path / "theirs")
    assert source is not None
    made = export(model)
    assert made.architecture == "GPT2LMHeadModel"
    assert set(made.tensors) == set(source.entries)
    for name, tensor in made.tensors.items():
        assert torch.equal(tensor, source.read(name))
    before = made.tensors["transformer.wte.weight"].clone()
    with torch.no_grad():
        model.embed.tokens.weight.zero_()
    assert torch.equal(made.tensors["transformer.wte.weight"], before)


@pytest.mark.parametrize(
    ("word", "use", "message"),
    [
        ("nanogp", "train", "there is no peer 'nanogp'; did you mean 'nanogpt'?"),
        ("nanogpt", "train", "nanogpt is no package; write nanogpt=PATH, the folder of a copy"),
        ("nanogpt=/nowhere", "train", "there is no file '/nowhere'"),
        (f"nanogpt={Path(__file__).parents[1] / 'pyproject.toml'}", "train", "is no Python file"),
        (NANOGPT, "write", "nanogpt only is compared in training"),
        (GPT_FAST, "train", "gpt-fast only writes texts"),
        ("transformers=/x", "train", "transformers is a package and takes no path"),
    ],
)
def test_peers_that_are_not_there_are_refused(word: str, use: Any, message: str) -> None:
    with pytest.raises(UserError) as caught:
        peers.chosen([word], use)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("class GPT: ...\n", "defines no GPTConfig"),
        ("from no_such_module import GPT\n", "cannot be imported: No module named 'no_such_module'"),
    ],
)
def test_a_file_that_is_no_such_model_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "model.py").write_text(text)
    with pytest.raises(UserError, match=message):
        trained(f"nanogpt={tmp_path}", "gpt2-nano")


def test_each_peer_has_its_own_turn_with_ours() -> None:
    pytest.importorskip("transformers")
    config = training.Config.of(
        words("gpt2-nano"), tiny=True, steps=3, batch=2, length=8, against=(NANOGPT, "transformers")
    )
    ours, *theirs = training.run(config, quiet)["rows"]
    assert [row["side"] for row in (ours, *theirs)] == ["xt", "nanogpt", "transformers"]
    # All start from the weights that ours had before its first step.
    assert theirs[1]["losses"] == pytest.approx(theirs[0]["losses"], abs=2e-3)


def test_a_peer_that_finds_no_room_beside_ours_follows_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    from xtcli.bench.peers import nanogpt

    usual, benches = nanogpt.train, []
    leave = training.Measured._leave
    monkeypatch.setattr(training.Measured, "_leave", lambda self: (benches.append(self.bench), leave(self)))

    def crowded(*given: Any) -> Any:
        if not benches:
            raise torch.OutOfMemoryError("no room")
        return usual(*given)

    monkeypatch.setattr(nanogpt, "train", crowded)
    ours, theirs = trained(NANOGPT, "gpt2-nano", steps=5)
    assert len(ours["step"]["raw_ms"]) == len(theirs["step"]["raw_ms"]) == 5
    assert theirs["xt_step"] == ours["step"]
    assert "no room for both" in theirs["note"] and theirs["same_loss"]

    def full(*given: Any) -> Any:
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(nanogpt, "train", full)
    (ours,) = trained(NANOGPT, "gpt2-nano")
    assert ours["no_peer"] == {"nanogpt": "out of memory"}
