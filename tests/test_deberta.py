"""DeBERTa, both versions, against the reference: every class, every option; files there and back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from checkpoints import opens_cleanly, same, save, tensors
from references import PAD, VOCAB, ids, mask, noise, randomise
from test_parity import TOLERANCE, converted, difference
from torch import Tensor

from xtcli.convert import convert
from xtcli.errors import UserError
from xtcli.parts.disentangled import log_buckets

SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 48,
    "pad_token_id": PAD,
}
BOTH = {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]}
NEWER = {**BOTH, "position_buckets": 12, "norm_rel_ebd": "layer_norm", "share_att_key": True}
NEWER |= {"position_biased_input": False}
CONV = {"conv_kernel_size": 3, "conv_act": "gelu", "conv_groups": 2}


def family(name: str) -> str:
    return "deberta_v2" if name.startswith("DebertaV2") else "deberta"


def reference(name: str, options: dict[str, Any]) -> Any:
    cls = getattr(transformers, name)
    return randomise(cls(cls.config_class(**SIZES | json.loads(json.dumps(options)))))


def labels(name: str, config: Any) -> dict[str, Tensor]:
    words = torch.randint(0, VOCAB, (4, 9), generator=torch.Generator().manual_seed(3))
    words = words.masked_fill(torch.arange(9) % 4 == 1, -100)
    if name.endswith("MaskedLM"):
        return {"labels": words}
    if name.endswith("TokenClassification"):
        return {"labels": words.clamp(max=config.num_labels - 1)}
    if name.endswith("MultipleChoice"):
        return {"labels": torch.tensor([1, 0])}
    if name.endswith("QuestionAnswering"):
        return {"start_positions": torch.tensor([0, 3, 8, 9]), "end_positions": torch.tensor([2, 3, 30, 1])}
    if name.endswith("SequenceClassification"):
        if config.problem_type == "multi_label_classification":
            return {"labels": torch.rand(4, config.num_labels).round()}
        return {"labels": torch.rand(4, 1) if config.num_labels == 1 else torch.arange(4) % config.num_labels}
    return {}


def feeds(name: str, config: Any) -> dict[str, dict[str, Tensor]]:
    found: dict[str, dict[str, Tensor]] = {f"length {n}": {"input_ids": ids(2, n)} for n in (1, 17, 48)}
    found["types"] = {"input_ids": ids(2, 9), "token_type_ids": torch.tensor([[0] * 4 + [1] * 5, [0] * 9])}
    found["embeds"] = {"inputs_embeds": noise(2, 9, getattr(config, "embedding_size", 24))}
    found["loss"] = {"input_ids": ids(4, 9)} | labels(name, config)
    for side in ("right", "left"):
        kept = mask(4, 12, side)
        found[f"padded {side}"] = {"input_ids": ids(4, 12).masked_fill(kept == 0, PAD), "attention_mask": kept}
        # An answer is looked for at padding too, and a classifier may read a first state of padding.
        kept = mask(4, 9, side)
        padded = {"input_ids": ids(4, 9).masked_fill(kept == 0, PAD), "attention_mask": kept}
        found[f"loss padded {side}"] = padded | labels(name, config)
    if name.endswith("SequenceClassification") and config.num_labels == 3:
        shares = torch.rand(4, 3, generator=torch.Generator().manual_seed(4))
        found["shares"] = {"input_ids": ids(4, 9), "labels": shares}
        found["no label"] = {"input_ids": ids(4, 9), "labels": torch.tensor([1.0, -1.0, 2.0, -100.0])}
    if name.endswith("MultipleChoice"):
        for given in found.values():
            given |= {key: value.unflatten(0, (-1, 2)) for key, value in given.items() if key != "labels"}
    return found


FIRST: list[dict[str, Any]] = [
    {},
    BOTH,
    {"relative_attention": True, "pos_att_type": "c2p", "max_relative_positions": 7},
    {"relative_attention": True, "pos_att_type": "P2C|c2p", "max_relative_positions": 20},
    {"relative_attention": True, "pos_att_type": ["p2c"], "position_biased_input": False},
    {"pos_att_type": ["c2p"]},
    {"relative_attention": True},
    {**BOTH, "talking_head": True},
    {"type_vocab_size": 2, "hidden_act": "gelu_new", "layer_norm_eps": 0.01, "num_hidden_layers": 3},
    {"embedding_size": 10, "type_vocab_size": 2, **BOTH},
    {**BOTH, "max_relative_positions": 1, "pad_token_id": None},
    {"is_decoder": True, "add_cross_attention": True, "padding_idx": 0, "pad_token_id": -1},
    {"pos_att_type": "none"},
    {"relative_attention": True, "pos_att_type": "c2p|none"},
]
SECOND: list[dict[str, Any]] = [
    *FIRST[:7],
    *FIRST[8:],
    NEWER,
    {**NEWER, **CONV},
    {**BOTH, **CONV, "conv_act": "sigmoid", "conv_kernel_size": 5, "num_hidden_layers": 1, "type_vocab_size": 2},
    {**BOTH, "conv_kernel_size": 3, "num_hidden_layers": 4, "share_att_key": True},
    {**BOTH, "position_buckets": 8, "max_relative_positions": 30, "norm_rel_ebd": "none"},
    {"norm_rel_ebd": "layer_norm", "position_buckets": 12},
    {"norm_rel_ebd": "layer_norm", "position_buckets": 2},
    *({**BOTH, "position_buckets": count} for count in (2, 3, 100)),
    {**NEWER, "attention_head_size": 6, "share_att_key": False, "pos_att_type": ["c2p"]},
]
HEADS: list[tuple[str, dict[str, Any]]] = [
    ("Model", {}),
    ("ForMaskedLM", {"tie_word_embeddings": False}),
    ("ForMaskedLM", {"legacy": False, "tie_word_embeddings": False}),
    ("ForSequenceClassification", {"num_labels": 3, "pooler_hidden_act": "tanh", "pooler_dropout": 0.2}),
    ("ForSequenceClassification", {"num_labels": 1, "cls_dropout": 0.3}),
    ("ForSequenceClassification", {"num_labels": 5, "problem_type": "multi_label_classification"}),
    ("ForTokenClassification", {"num_labels": 4}),
    ("ForQuestionAnswering", {}),
]
CASES = (
    [("DebertaForMaskedLM", options) for options in FIRST]
    + [("DebertaV2ForMaskedLM", options) for options in SECOND]
    + [("Deberta" + name, BOTH | options) for name, options in HEADS]
    + [("DebertaV2" + name, NEWER | CONV | options) for name, options in HEADS]
    + [("DebertaV2ForMultipleChoice", NEWER)]
)


@pytest.mark.parametrize(("name", "options"), CASES, ids=str)
def test_equals_the_reference(name: str, options: dict[str, Any]) -> None:
    theirs = reference(name, options)
    ours = converted(theirs, family(name))
    for feed, given in feeds(name, theirs.config).items():
        if feed.startswith("loss") and theirs.config.num_labels == 1:
            # The reference gives back flattened logits there.
            assert abs(float(theirs(**given).loss) - float(ours(**given).loss)) <= TOLERANCE
            continue
        off = {key: value for key, value in difference(theirs, ours, given).items() if not value <= TOLERANCE}
        assert not off, (feed, off)


@pytest.mark.parametrize(("name", "options"), CASES, ids=str)
def test_files_come_back_byte_for_byte(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    theirs = reference(name, options)
    source = save(theirs, tmp_path / "source")
    convert(source, tmp_path / "ours", family="auto")
    convert(tmp_path / "ours", tmp_path / "back", to="hf")
    assert same(tensors(source), tensors(tmp_path / "back"))
    opens_cleanly(tmp_path / "back", type(theirs))


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("DebertaModel", {"pos_att_type": ["c2p", "p2p"]}, "pos_att_type"),
        ("DebertaV2Model", {"conv_kernel_size": 4}, "conv_kernel_size: is 4"),
        ("DebertaV2Model", {"relative_attentoin": True}, "relative_attention"),
        ("DebertaForSequenceClassification", {"pooler_hidden_size": 12}, "pooler_hidden_size"),
    ],
)
def test_what_is_not_expressed_is_refused(name: str, options: dict[str, Any], words: str, tmp_path: Path) -> None:
    source = save(reference(name, {}), tmp_path / "source")
    config = source / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | options))
    with pytest.raises(UserError, match=words):
        convert(source, tmp_path / "ours", family="auto")


def test_buckets_are_exact_near_and_logarithmic_far() -> None:
    distance = torch.arange(-511, 512)
    found = log_buckets(distance, 256, 512)
    near = distance.abs() <= 128
    assert torch.equal(found[near], distance[near])
    assert torch.equal(found, -found.flip(0))
    assert found.max() == 255
    assert (found.diff() >= 0).all()
