"""Transformer-XL against the reference: every class, every option, memories in and out; files there and back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from checkpoints import opens_cleanly, save
from memories import flat, off, runnable
from references import PAD, ids, noise, randomise
from test_parity import TOLERANCE, converted
from torch import Tensor

from xtcli.config.preset import load_preset
from xtcli.convert import convert
from xtcli.errors import UserError
from xtcli.model import build, load, save_model

SIZES: dict[str, Any] = {
    "vocab_size": 61,
    "cutoffs": [20, 30, 50],
    "d_model": 32,
    "d_embed": 32,
    "n_head": 4,
    "d_head": 6,
    "d_inner": 40,
    "div_val": 2,
    "n_layer": 2,
    "mem_len": 8,
    "clamp_len": 5,
}
LM, MODEL, SEQUENCE = "TransfoXLLMHeadModel", "TransfoXLModel", "TransfoXLForSequenceClassification"
NARROW = {"d_embed": 16}

CASES: list[tuple[str, dict[str, Any]]] = [
    (MODEL, {}),
    (MODEL, {"pre_lnorm": True, "sample_softmax": 3}),
    (LM, {}),
    (LM, {"same_length": False}),
    (LM, {"same_length": False, "mem_len": 0}),
    (LM, {"mem_len": 3, "clamp_len": 2}),
    (LM, {"mem_len": 30, "clamp_len": -1}),
    (LM, {"clamp_len": 0, "pre_lnorm": True, "same_length": False}),
    (LM, {"pre_lnorm": True}),
    (LM, {"untie_r": False}),
    (LM, {"untie_r": False, "pre_lnorm": True}),
    (LM, {"div_val": 1}),
    (LM, {"div_val": 1, **NARROW}),
    (LM, {"div_val": 1, **NARROW, "proj_share_all_but_first": False}),
    (LM, {"div_val": 2, **NARROW, "proj_share_all_but_first": False}),
    (LM, {"div_val": 2, **NARROW, "tie_projs": [True, False, True, False]}),
    (LM, {"tie_word_embeddings": False}),
    (LM, {"tie_word_embeddings": False, "div_val": 1, **NARROW}),
    (LM, {"cutoffs": []}),
    (LM, {"cutoffs": [], "div_val": 1, **NARROW}),
    (LM, {"cutoffs": [7], "div_val": 4}),
    (LM, {"layer_norm_epsilon": 0.01, "n_layer": 3, "n_head": 2, "d_head": 9, "d_inner": 24}),
    (LM, {"dropout": 0.2, "dropatt": 0.3, "init": "uniform", "init_std": 0.1, "eos_token_id": 5}),
    (SEQUENCE, {"pad_token_id": PAD, "num_labels": 3}),
    (SEQUENCE, {"pad_token_id": PAD, "num_labels": 1}),
    (SEQUENCE, {"pad_token_id": PAD, "num_labels": 4, "problem_type": "multi_label_classification"}),
]


def reference(name: str, options: dict[str, Any], seed: int = 0) -> Any:
    cls = getattr(transformers, name)
    model = randomise(cls(cls.config_class(**SIZES | json.loads(json.dumps(options)))), seed)
    # Narrow bands would drown the rest of the sum.
    for parameter in model.parameters():
        parameter.data *= 0.6
    return model


def mems(model: Any, length: int, seed: int = 7) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    layers, width = model.config.n_layer, model.config.d_model
    return [torch.randn(length, 2, width, generator=generator) for _ in range(layers)]


def feeds(model: Any) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {f"length {n}": {"input_ids": ids(2, n)} for n in (1, 5, 17, 40)}
    for length in (1, 4, 8, 13):
        found[f"mems {length}"] = {"input_ids": ids(2, 6), "mems": mems(model, length)}
    found["stacked"] = {"input_ids": ids(2, 6), "mems": torch.stack(mems(model, 8))}
    found["embeds"] = {"inputs_embeds": noise(2, 9, model.config.d_model)}
    if type(model).__name__ == LM:
        words = ids(2, 9, 4).masked_fill(torch.arange(9) % 4 == 1, -100)
        found["loss"] = {"input_ids": ids(2, 9), "labels": words}
    if type(model).__name__ == SEQUENCE:
        padded = ids(2, 9)
        padded[1, 6:] = PAD
        found["padded"] = {"input_ids": padded}
        count = model.config.num_labels
        many = count == 1 or model.config.problem_type
        labels = torch.ones(2, count) if many else torch.tensor([2, 0])
        found["loss"] = {"input_ids": padded, "labels": labels}
    return found


@pytest.mark.parametrize(("name", "options"), CASES, ids=str)
def test_equals_the_reference(name: str, options: dict[str, Any]) -> None:
    theirs = reference(name, options)
    ours = converted(theirs, "transfo-xl")
    for feed, given in feeds(theirs).items():
        wrong = off(theirs, ours, given, TOLERANCE)
        assert not wrong, (feed, wrong)


def test_segments_hand_on_what_the_reference_s_do() -> None:
    theirs = reference(LM, {})
    ours = converted(theirs, "transfo-xl")
    there: Any = None
    here: Any = None
    text = ids(2, 60)
    for at, width in ((0, 20), (20, 1), (21, 1), (22, 5), (27, 33)):
        part = text[:, at : at + width]
        with torch.no_grad(), runnable():
            expected, found = theirs(part, mems=there), ours(input_ids=part, mems=here)
        for name, value in flat(expected).items():
            torch.testing.assert_close(flat(found)[name], value, atol=TOLERANCE, rtol=1e-5)
        there, here = expected.mems, found.mems


@pytest.mark.parametrize("options", [{}, {"pre_lnorm": True}, {"same_length": False, "mem_len": 30}])
def test_steps_with_a_state_equal_one_pass_and_the_reference_s_memories(options: dict[str, Any]) -> None:
    theirs = reference(LM, options)
    ours = converted(theirs, "transfo-xl")
    text = ids(2, 24)
    with torch.no_grad(), runnable():
        whole = ours(input_ids=text).logits
        state, parts, there, steps = ours.new_state(2, 24), [], None, []
        for at, stop in ((0, 7), (7, 8), (8, 13), (13, 24)):
            parts.append(ours(input_ids=text[:, at:stop], state=state).logits)
            made = theirs(text[:, at:stop], mems=there)
            there = made.mems
            steps.append(made.prediction_scores)
    torch.testing.assert_close(torch.cat(parts, 1), whole, atol=2e-5, rtol=1e-5)
    # Where each token sees as many keys in segments as in one pass, segments are one pass.
    if options.get("same_length", True):
        torch.testing.assert_close(torch.cat(steps, 1), whole, atol=2e-5, rtol=1e-5)


FILES = [
    (MODEL, {}),
    (LM, {}),
    (LM, {"div_val": 1, **NARROW}),
    (LM, {"tie_word_embeddings": False, "proj_share_all_but_first": False}),
    (SEQUENCE, {"num_labels": 3}),
]


@pytest.mark.parametrize(("name", "options"), FILES, ids=str)
def test_there_and_back(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    model = reference(name, options)
    source = save(model, tmp_path / "source")
    there = convert(source, tmp_path / "there", verify=True)
    assert (there.family, there.architecture, there.bit_exact) == ("transfo-xl", name, True)
    assert convert(tmp_path / "there", tmp_path / "back", to="hf").bit_exact
    for file in ("config.json", "model.safetensors"):
        assert (tmp_path / "back" / file).read_bytes() == (source / file).read_bytes()
    opened = opens_cleanly(tmp_path / "back", type(model))
    rows = 2 if name != SEQUENCE else 1  # the reference labels one text at a time where no id is padding
    assert not off(opened, load(tmp_path / "there").eval(), {"input_ids": ids(rows, 9)}, TOLERANCE)


@pytest.mark.parametrize("change", [[], ["model.stack.position.shared=true"]])
def test_a_preset_becomes_a_checkpoint_of_theirs(change: list[str], tmp_path: Path) -> None:
    resolved = load_preset("transfo-xl-wt103", change, tiny=True)
    ours = build(resolved).eval()
    save_model(ours, tmp_path / "ours", resolved.to_yaml())
    assert convert(tmp_path / "ours", tmp_path / "theirs", to="hf").architecture == LM
    opened = opens_cleanly(tmp_path / "theirs", transformers.TransfoXLLMHeadModel)
    assert not off(opened, ours, {"input_ids": ids(2, 9)}, TOLERANCE)


@pytest.mark.parametrize(
    ("option", "value"),
    [("attn_type", 1), ("sample_softmax", 10), ("mem_len", 0), ("relative_window", 3)],
)
def test_options_that_we_do_not_express_are_refused_by_name(option: str, value: Any, tmp_path: Path) -> None:
    source = save(reference(LM, {}), tmp_path / "source")
    stated = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(stated | {option: value}))
    with pytest.raises(UserError, match=option):
        convert(source, tmp_path / "there")
