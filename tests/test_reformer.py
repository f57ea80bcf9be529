"""Reformer against the reference: every class, options that are not the defaults, lengths around the chunk borders.

The reference fixes the number of buckets at its first long text and keeps it, so each text gets a fresh copy.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from checkpoints import opens_cleanly, save
from references import compared, describe, ids, mask, noise, randomise
from torch import Tensor

from xtcli.config.preset import load_preset
from xtcli.convert import convert
from xtcli.convert.engine import state_of
from xtcli.convert.families import by_name
from xtcli.convert.reading import read
from xtcli.errors import UserError
from xtcli.model import Model, construct, load, save_model

TOLERANCE = 2e-5
PAD, VOCAB = 60, 61
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 24,
    "feed_forward_size": 40,
    "num_attention_heads": 3,
    "attention_head_size": 10,
    "attn_layers": ["local", "lsh"],
    "local_attn_chunk_length": 4,
    "lsh_attn_chunk_length": 4,
    "axial_pos_shape": [8, 12],
    "axial_pos_embds_dim": [10, 14],
    "max_position_embeddings": 96,
    "pad_token_id": PAD,
    "hash_seed": 3,
}
DECODER = "ReformerModelWithLMHead"
LSH = {"attn_layers": ["lsh", "lsh"]}
LOCAL = {"attn_layers": ["local", "local"]}

CASES: list[tuple[str, dict[str, Any]]] = [
    (DECODER, {}),
    (DECODER, LSH),
    (DECODER, LOCAL),
    (DECODER, LSH | {"num_hashes": 3}),
    (DECODER, LSH | {"num_buckets": 6, "num_hashes": 2}),
    (DECODER, LSH | {"num_buckets": [4, 6]}),
    (DECODER, LSH | {"num_buckets": [2, 4, 2], "num_hashes": 2}),
    (DECODER, LSH | {"num_buckets": [8]}),
    (DECODER, LSH | {"max_position_embeddings": 36, "lsh_attn_chunk_length": 2}),
    (DECODER, LSH | {"lsh_num_chunks_before": 0}),
    (DECODER, LSH | {"lsh_num_chunks_before": 3, "num_hashes": 2}),
    (DECODER, LOCAL | {"local_num_chunks_before": 0}),
    (DECODER, LOCAL | {"local_num_chunks_before": 4}),
    (DECODER, {"lsh_attn_chunk_length": 6}),
    (DECODER, {"local_attn_chunk_length": 6, "attn_layers": ["lsh", "local", "lsh", "lsh"]}),
    (DECODER, {"axial_pos_embds": False, "hash_seed": 0}),
    (DECODER, {"axial_pos_shape": [3, 4, 8], "axial_pos_embds_dim": [8, 10, 6]}),
    (DECODER, {"hash_seed": None, "num_hashes": 2}),
    (DECODER, {"chunk_size_lm_head": 1, "chunk_size_feed_forward": 1}),
    (DECODER, {"hidden_act": "gelu_new", "layer_norm_eps": 0.1}),
    ("ReformerForMaskedLM", {}),
    ("ReformerForMaskedLM", LSH | {"num_hashes": 2, "lsh_num_chunks_after": 1}),
    ("ReformerForMaskedLM", LSH | {"lsh_num_chunks_before": 0, "lsh_num_chunks_after": 2}),
    ("ReformerForMaskedLM", LOCAL | {"local_num_chunks_after": 1}),
    ("ReformerForMaskedLM", LOCAL | {"local_num_chunks_before": 2, "local_num_chunks_after": 3}),
    ("ReformerModel", {"tie_word_embeddings": True}),
    ("ReformerModel", {"is_decoder": True, "local_num_chunks_after": 1, "lsh_num_chunks_after": 1}),
    ("ReformerForSequenceClassification", {"num_labels": 3, "classifier_dropout": 0.3}),
    ("ReformerForSequenceClassification", {"num_labels": 1, "is_decoder": True}),
    ("ReformerForSequenceClassification", {"num_labels": 4, "problem_type": "multi_label_classification"}),
    ("ReformerForQuestionAnswering", {}),
]


def name_of(case: tuple[str, dict[str, Any]]) -> str:
    return f"{case[0]}{json.dumps(case[1])}"


def reference(case: tuple[str, dict[str, Any]]) -> Any:
    name, options = case
    cls = getattr(transformers, name)
    whole = SIZES | ({"is_decoder": True} if name == DECODER else {}) | copy.deepcopy(options)
    return randomise(cls(cls.config_class(**whole)))


def converted(theirs: Any) -> Model:
    state = theirs.state_dict()
    plan, claims = read(by_name()["reformer"], describe(theirs), list(state), "memory")
    model = construct(plan.config)
    model.load_state_dict(state_of(plan, lambda name: state[claims.source[name]], model.state_dict()), assign=True)
    return model.eval()


def labels(name: str, model: Any) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    if name.endswith("QuestionAnswering"):
        return {"start_positions": torch.tensor([0, 3, 8, 40]), "end_positions": torch.tensor([2, 3, 30, 1])}
    if name.endswith("SequenceClassification"):
        count = model.config.num_labels
        if count == 1 or model.config.problem_type:
            return {"labels": torch.rand(4, count, generator=generator).round()}
        return {"labels": torch.randint(0, count, (4,), generator=generator)}
    words = torch.randint(0, VOCAB, (4, 13), generator=generator).masked_fill(torch.arange(13) % 4 == 1, -100)
    return {"labels": words} if name != "ReformerModel" else {}


def feeds(name: str, model: Any) -> dict[str, dict[str, Tensor]]:
    found: dict[str, dict[str, Tensor]] = {f"length {n}": {"input_ids": ids(2, n)} for n in (1, 3, 4, 5, 17, 36)}
    for side in ("right", "left"):
        for length in (4, 13, 24):
            kept = mask(3, length, side)
            words = ids(3, length).masked_fill(kept == 0, PAD)
            found[f"padded {side} {length}"] = {"input_ids": words, "attention_mask": kept}
    found["embeds"] = {"inputs_embeds": noise(2, 9, 24)}
    found["places"] = {"input_ids": ids(2, 12), "position_ids": torch.stack((torch.arange(12), torch.arange(12) + 5))}
    found["loss"] = {"input_ids": ids(4, 13)} | labels(name, model)
    if name.endswith("SequenceClassification") and model.config.is_decoder:
        # The classifier reads the first state, which would be padding that sees nothing.
        found = {feed: given for feed, given in found.items() if "left" not in feed}
    return found


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_equals_the_reference(case: tuple[str, dict[str, Any]]) -> None:
    theirs = reference(case)
    ours = converted(theirs)
    for feed, given in feeds(case[0], theirs).items():
        fresh = copy.deepcopy(theirs)
        with torch.no_grad():
            torch.manual_seed(11)
            expected = compared(given, fresh(**given, use_cache=False) if case[0] == DECODER else fresh(**given))
            torch.manual_seed(11)
            found = compared(given, ours(**given))
        for output, value in expected.items():
            if output in ("past_buckets_states", "hidden_states"):
                continue
            assert found[output].shape == value.shape, (feed, output)
            size = max(1.0, float(value.abs().max()) / 10)
            assert float((found[output] - value).abs().max()) / size <= TOLERANCE, (feed, output)


FORMS = [
    (DECODER, {}),
    (DECODER, {"num_buckets": [4, 6], "num_hashes": 2, "attn_layers": ["lsh", "local", "lsh"], "hash_seed": None}),
    (DECODER, {"axial_pos_embds": False, "attn_layers": ["lsh"], "num_buckets": 8}),
    ("ReformerForMaskedLM", {"axial_pos_shape": [3, 4, 8], "axial_pos_embds_dim": [8, 10, 6]}),
    ("ReformerModel", {"is_decoder": True}),
    ("ReformerModel", {}),
    ("ReformerForSequenceClassification", {"num_labels": 3, "chunk_size_feed_forward": 2}),
    ("ReformerForQuestionAnswering", {}),
]


@pytest.mark.parametrize("case", FORMS, ids=name_of)
def test_there_and_back(case: tuple[str, dict[str, Any]], tmp_path: Path) -> None:
    theirs = reference(case)
    source = save(theirs, tmp_path / "source")
    there = convert(source, tmp_path / "there")
    assert there.bit_exact and there.family == "reformer" and there.architecture == case[0]
    back = convert(tmp_path / "there", tmp_path / "back", to="hf")
    assert back.bit_exact and back.architecture == case[0]
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "back" / name).read_bytes() == (source / name).read_bytes()
    opens_cleanly(tmp_path / "back", type(theirs))
    assert sum(p.numel() for p in load(tmp_path / "there").parameters()) == sum(p.numel() for p in theirs.parameters())
    load_preset(tmp_path / "there")


@pytest.mark.parametrize("case", FORMS, ids=name_of)
def test_a_config_is_written_from_the_preset_alone(case: tuple[str, dict[str, Any]], tmp_path: Path) -> None:
    theirs = reference(case)
    convert(save(theirs, tmp_path / "source"), tmp_path / "there")
    save_model(load(tmp_path / "there"), tmp_path / "fresh", load_preset(tmp_path / "there").to_yaml())
    convert(tmp_path / "fresh", tmp_path / "back", to="hf")
    opens_cleanly(tmp_path / "back", type(theirs))
    written = transformers.ReformerConfig.from_pretrained(tmp_path / "back").to_dict()
    silent = {"dtype", "torch_dtype", "_name_or_path", "transformers_version"}
    unread = {"axial_pos_shape", "axial_pos_embds_dim", "axial_norm_std"} if "axial_pos_embds" in case[1] else set()
    kinds = set(theirs.config.attn_layers)
    unread |= {key for key in written for kind in {"local", "lsh"} - kinds if key.startswith(f"{kind}_")}
    stated = theirs.config.to_dict()
    assert {key for key in stated if written.get(key) != stated[key]} <= silent | unread | {"classifier_dropout"}


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        ({"attn_layers": ["lsh", "full"]}, "attn_layers"),
        ({"attn_layers": []}, "attn_layers"),
        ({"num_hidden_layers": 5}, "num_hidden_layers"),
        ({"num_buckets": 7}, "num_buckets"),
        ({"num_buckets": [4, 3]}, "num_buckets"),
        ({"axial_pos_embds_dim": [10, 10]}, "widths"),
        ({"is_decoder": False}, "is_decoder"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings"),
        ({"hidden_act": "nothing"}, "hidden_act"),
        ({"lsh_chunks": 3}, "lsh_chunks"),
    ],
    ids=str,
)
def test_what_cannot_be_said_is_refused(change: dict[str, Any], cause: str, tmp_path: Path) -> None:
    source = save(reference((DECODER, {})), tmp_path / "source")
    config = json.loads((source / "config.json").read_text()) | change
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=cause):
        convert(source, tmp_path / "there")
