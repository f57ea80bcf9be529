"""ELECTRA against the reference: every class, every option; files there and back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import opens_cleanly, rewrite, same, save, tensors
from encoders import feeds, reference
from test_parity import TOLERANCE, converted, difference
from torch import Tensor

from xtcli.convert import convert
from xtcli.errors import UserError
from xtcli.model import load, save_model

DISCRIMINATOR, GENERATOR, CAUSAL = "ElectraForPreTraining", "ElectraForMaskedLM", "ElectraForCausalLM"
MODEL, SEQUENCE, TOKEN = "ElectraModel", "ElectraForSequenceClassification", "ElectraForTokenClassification"
CHOICE, ANSWERING = "ElectraForMultipleChoice", "ElectraForQuestionAnswering"
RELATIVE = [{"position_embedding_type": kind} for kind in ("relative_key", "relative_key_query")]
DECODES = {"is_decoder": True, "use_cache": False}
CROSS = DECODES | {"add_cross_attention": True}
WIDE = {"embedding_size": 24}
DROPPED = {"hidden_dropout_prob": 0.2, "attention_probs_dropout_prob": 0.3, "classifier_dropout": 0.4}

CASES: list[tuple[str, dict[str, Any]]] = [
    (MODEL, {}),
    (MODEL, WIDE),
    (MODEL, CROSS),
    (DISCRIMINATOR, {}),
    (DISCRIMINATOR, WIDE | {"layer_norm_eps": 0.01, "type_vocab_size": 3}),
    *((DISCRIMINATOR, {"hidden_act": name}) for name in ("gelu_new", "relu", "silu")),
    *((DISCRIMINATOR, kind) for kind in RELATIVE),
    (DISCRIMINATOR, {"embedding_size": 30, "chunk_size_feed_forward": 1}),
    (GENERATOR, {}),
    (GENERATOR, {"hidden_act": "relu"}),
    (GENERATOR, {"tie_word_embeddings": False}),
    (GENERATOR, WIDE | RELATIVE[1]),
    (CAUSAL, {}),
    (CAUSAL, DECODES),
    (CAUSAL, CROSS | WIDE),
    (CAUSAL, CROSS | RELATIVE[0] | {"tie_word_embeddings": False}),
    (SEQUENCE, {"num_labels": 3, "hidden_act": "relu"}),
    (SEQUENCE, {"num_labels": 1}),
    (SEQUENCE, DROPPED | {"num_labels": 5, "problem_type": "multi_label_classification"}),
    (CHOICE, {}),
    *((CHOICE, {"summary_type": kind}) for kind in ("last", "mean", "cls_index")),
    *((CHOICE, {"summary_activation": name}) for name in (None, "tanh", "relu")),
    (CHOICE, {"summary_use_proj": False, "summary_type": "last"}),
    (CHOICE, {"summary_use_proj": False, "summary_activation": None}),
    (CHOICE, WIDE | {"summary_first_dropout": 0.2, "summary_last_dropout": 0.0}),
    (CHOICE, {"summary_proj_to_labels": True, "num_labels": 24}),
    (CHOICE, {"summary_proj_to_labels": True, "summary_use_proj": False, "is_encoder_decoder": True}),
    (TOKEN, {"num_labels": 4, "summary_proj_to_labels": True}),
    (TOKEN, DECODES),
    (ANSWERING, {}),
    (GENERATOR, {"pad_token_id": None}),
]


@pytest.mark.parametrize(("name", "options"), CASES, ids=str)
def test_equals_the_reference(name: str, options: dict[str, Any]) -> None:
    theirs = reference(name, options)
    ours = converted(theirs, "electra")
    for feed, given in feeds(theirs).items():
        off = {key: value for key, value in difference(theirs, ours, given).items() if not value <= TOLERANCE}
        assert not off, (feed, off)


FILES = [
    (MODEL, {}),
    (MODEL, WIDE),
    (DISCRIMINATOR, {}),
    (DISCRIMINATOR, RELATIVE[0]),
    (GENERATOR, {}),
    (GENERATOR, {"tie_word_embeddings": False}),
    (CAUSAL, CROSS),
    (SEQUENCE, {"num_labels": 3}),
    (CHOICE, {"summary_type": "cls_index", "summary_activation": None}),
    (CHOICE, {"summary_use_proj": False}),
    (TOKEN, {}),
    (ANSWERING, {}),
]


@pytest.mark.parametrize(("name", "options"), FILES, ids=str)
def test_there_and_back(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    model = reference(name, options)
    source = save(model, tmp_path / "source")
    there = convert(source, tmp_path / "there", verify=True)
    assert (there.family, there.architecture, there.bit_exact) == ("electra", name, True)
    assert convert(tmp_path / "there", tmp_path / "back", to="hf").bit_exact
    for file in ("config.json", "model.safetensors"):
        assert (tmp_path / "back" / file).read_bytes() == (source / file).read_bytes()
    opens_cleanly(tmp_path / "back", type(model))
    load(tmp_path / "there")


@pytest.mark.parametrize(("name", "options"), FILES, ids=str)
def test_a_config_written_anew_means_the_same(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    """Without the config that came with the weights, one is made from the tree alone."""
    model = reference(name, options)
    source = save(model, tmp_path / "source")
    convert(source, tmp_path / "there")
    preset = (tmp_path / "there/preset.yaml").read_text()
    save_model(load(tmp_path / "there"), tmp_path / "ours", preset)
    report = convert(tmp_path / "ours", tmp_path / "back", "electra", to="hf", verify=True)
    assert report.architecture == name
    again = opens_cleanly(tmp_path / "back", type(model))
    for feed, given in list(feeds(model, (7,)).items())[:3]:
        assert max(difference(model, again, given).values()) <= TOLERANCE, feed


def test_dropouts_are_read() -> None:
    model = converted(reference(SEQUENCE, DROPPED), "electra")
    assert model.embed.dropout.p == model.stack.blocks[0].wiring.dropout.p == 0.2
    assert model.stack.blocks[0].attn.rate == 0.3
    assert model.heads["sequence"].dropout.p == 0.4
    assert converted(reference(TOKEN, {"hidden_dropout_prob": 0.25}), "electra").heads["token"].dropout.p == 0.25
    summary = {"summary_first_dropout": 0.2, "summary_last_dropout": 0.3}
    choice = converted(reference(CHOICE, summary), "electra").heads["choice"]
    assert (choice.first_dropout.p, choice.dropout.p) == (0.2, 0.3)


def test_a_released_file_has_a_buffer_and_both_names_of_the_table(tmp_path: Path) -> None:
    source = save(reference(GENERATOR, {}), tmp_path / "source")
    whole = tensors(source)

    def release(found: dict[str, Tensor]) -> dict[str, Tensor]:
        table = found["electra.embeddings.word_embeddings.weight"].clone()
        positions = torch.arange(48)[None]
        return found | {"generator_lm_head.weight": table, "electra.embeddings.position_ids": positions}

    report = convert(rewrite(source, release), tmp_path / "there")
    assert report.drops == ["electra.embeddings.position_ids"] and len(report.ties) == 1
    convert(tmp_path / "there", tmp_path / "back", to="hf")
    assert same(tensors(tmp_path / "back"), whole)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        (CHOICE, {"summary_type": "attn"}),
        (CHOICE, {"summary_activation": "softsign"}),
        (CHOICE, {"summary_proj_to_labels": True}),
        (DISCRIMINATOR, {"position_embedding_type": "rotary"}),
        (DISCRIMINATOR, {"generator_size": 0.25}),
        (ANSWERING, {"id2label": {"0": "a", "1": "b", "2": "c"}}),
    ],
    ids=str,
)
def test_what_it_does_not_express_is_refused_by_name(name: str, change: dict[str, Any], tmp_path: Path) -> None:
    source = save(reference(name, {}), tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(UserError, match=next(iter(change))):
        convert(source, tmp_path / "there")
    assert not (tmp_path / "there").exists()
