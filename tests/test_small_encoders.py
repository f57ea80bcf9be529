"""FNet, SqueezeBERT and MobileBERT against the reference: every class, every option; files there and back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from checkpoints import opens_cleanly, same, save, tensors
from references import PAD, VOCAB, ids, mask, noise, randomise
from test_parity import converted, difference
from torch import Tensor

from xtcli.convert import convert
from xtcli.errors import UserError
from xtcli.model import load, save_model
from xtcli.parts.split import GroupedLinear

SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 24,
    "embedding_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 48,
    "pad_token_id": PAD,
}
TOLERANCE = 5e-5
FAMILY = {"FNet": "fnet", "SqueezeBert": "squeezebert", "MobileBert": "mobilebert"}
SMALL = {"embedding_size": 10, "intra_bottleneck_size": 12, "num_feedforward_networks": 2}
GROUPS = {
    "q_groups": 2,
    "k_groups": 1,
    "v_groups": 8,
    "post_attention_groups": 4,
    "intermediate_groups": 2,
    "output_groups": 8,
}


def head(name: str) -> str:
    return name.removeprefix("FNet").removeprefix("SqueezeBert").removeprefix("MobileBert")


def family(name: str) -> str:
    return FAMILY[name.removesuffix(head(name))]


def reference(name: str, options: dict[str, Any]) -> Any:
    said = SIZES | json.loads(json.dumps(options))
    if family(name) == "fnet":
        said.pop("embedding_size")
        said.pop("num_attention_heads")
    if family(name) == "mobilebert":
        said = SIZES | SMALL | json.loads(json.dumps(options))
    more = {key: said.pop(key) for key in ("add_pooling_layer",) if key in said}
    cls = getattr(transformers, name)
    return randomise(cls(cls.config_class(**said), **more))


def labels(name: str, config: Any) -> dict[str, Tensor]:
    words = torch.randint(0, VOCAB, (4, 9), generator=torch.Generator().manual_seed(3)).masked_fill(
        torch.arange(9) % 4 == 1, -100
    )
    match head(name):
        case "ForPreTraining":
            return {"labels": words, "next_sentence_label": torch.tensor([0, 1, 1, 0])}
        case "ForMaskedLM":
            return {"labels": words}
        case "ForNextSentencePrediction":
            return {"labels": torch.tensor([0, 1, 1, 0])}
        case "ForTokenClassification":
            return {"labels": words.clamp(max=config.num_labels - 1)}
        case "ForMultipleChoice":
            return {"labels": torch.tensor([1, 0])}
        case "ForQuestionAnswering":
            return {"start_positions": torch.tensor([0, 3, 8, 9]), "end_positions": torch.tensor([2, -1, 30, 1])}
        case "ForSequenceClassification":
            if config.problem_type == "multi_label_classification":
                return {"labels": torch.rand(4, config.num_labels).round()}
            number = config.num_labels == 1
            return {"labels": torch.rand(4, 1) if number else torch.arange(4) % config.num_labels}
    return {}


def feeds(name: str, config: Any) -> dict[str, dict[str, Tensor]]:
    found: dict[str, dict[str, Tensor]] = {f"length {n}": {"input_ids": ids(2, n)} for n in (1, 17, 48)}
    found["types"] = {"input_ids": ids(2, 9), "token_type_ids": torch.tensor([[0] * 4 + [1] * 5, [1] * 9])}
    found["places"] = {"input_ids": ids(2, 9), "position_ids": torch.arange(9)[None] + 5}
    width = config.embedding_size if family(name) == "mobilebert" else 24
    found["embeds"] = {"inputs_embeds": noise(2, 9, width)}
    found["loss"] = {"input_ids": ids(4, 9)} | labels(name, config)
    if family(name) != "fnet":
        for side in ("right", "left"):
            kept = mask(4, 12, side)
            found[f"padded {side}"] = {"input_ids": ids(4, 12).masked_fill(kept == 0, PAD), "attention_mask": kept}
    if head(name) == "ForMultipleChoice":
        for given in found.values():
            given |= {
                key: value.unflatten(0, (-1, 2))
                for key, value in given.items()
                if value.shape[0] > 1 and key != "labels"
            }
        found["places"].pop("position_ids")
    return found


ACTIVATIONS = ("gelu", "gelu_new", "relu", "silu")
COMMON: list[tuple[str, dict[str, Any]]] = [
    ("Model", {}),
    ("ForMaskedLM", {"layer_norm_eps": 0.01, "type_vocab_size": 3, "num_hidden_layers": 3}),
    *(("ForMaskedLM", {"hidden_act": name}) for name in ACTIVATIONS),
    ("ForMaskedLM", {"tie_word_embeddings": False}),
    ("ForSequenceClassification", {"num_labels": 3}),
    ("ForSequenceClassification", {"num_labels": 1}),
    ("ForSequenceClassification", {"num_labels": 5, "problem_type": "multi_label_classification"}),
    ("ForMultipleChoice", {}),
    ("ForTokenClassification", {"num_labels": 4}),
    ("ForQuestionAnswering", {}),
]
CASES = [(prefix + name, options) for prefix in FAMILY for name, options in COMMON] + [
    ("FNetModel", {"add_pooling_layer": False}),
    ("FNetModel", {"pad_token_id": None, "is_decoder": True, "add_cross_attention": True}),
    ("FNetForPreTraining", {}),
    ("FNetForPreTraining", {"tie_word_embeddings": False, "chunk_size_feed_forward": 1}),
    ("FNetForNextSentencePrediction", {}),
    *(
        (f"{name}ForPreTraining", {"layer_norm_eps": 0.1, "normalization_type": "layer_norm"})
        for name in ("MobileBert",)
    ),
    ("MobileBertForPreTraining", {"tie_word_embeddings": False}),
    ("MobileBertForPreTraining", {"classifier_activation": False, "num_feedforward_networks": 1}),
    ("MobileBertForNextSentencePrediction", {"num_feedforward_networks": 4}),
    ("MobileBertModel", {"add_pooling_layer": False, "trigram_input": False}),
    ("MobileBertModel", {"trigram_input": False, "embedding_size": 24}),
    ("MobileBertModel", {"embedding_size": 24, "hidden_dropout_prob": 0.2}),
    ("MobileBertModel", {"use_bottleneck": False, "normalization_type": "layer_norm", "layer_norm_eps": 0.1}),
    ("MobileBertModel", {"use_bottleneck_attention": True}),
    ("MobileBertForMaskedLM", {"use_bottleneck_attention": True, "key_query_shared_bottleneck": False}),
    ("MobileBertForMaskedLM", {"key_query_shared_bottleneck": False, "intra_bottleneck_size": 24}),
    ("MobileBertForMaskedLM", {"is_decoder": True}),
    ("MobileBertModel", {"num_feedforward_networks": 1, "is_encoder_decoder": True}),
    ("SqueezeBertModel", GROUPS),
    ("SqueezeBertForMaskedLM", {"is_decoder": True, "add_cross_attention": True}),
    ("MobileBertModel", {"pad_token_id": None, "add_cross_attention": True}),
    ("SqueezeBertForMaskedLM", GROUPS | {"num_attention_heads": 3}),
]


@pytest.mark.parametrize(("name", "options"), CASES, ids=str)
def test_equals_the_reference(name: str, options: dict[str, Any]) -> None:
    theirs = reference(name, options)
    ours = converted(theirs, family(name))
    if family(name) == "mobilebert":
        # Without norms states grow until float32's rounding alone is beyond the tolerance.
        theirs, ours = theirs.double(), ours.double()
    for feed, given in feeds(name, theirs.config).items():
        given = {key: value.to(theirs.dtype) if value.is_floating_point() else value for key, value in given.items()}
        off = {key: value for key, value in difference(theirs, ours, given).items() if not value <= TOLERANCE}
        assert not off, (feed, off)


@pytest.mark.parametrize(("name", "options"), CASES, ids=str)
def test_files_come_back_byte_for_byte(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    theirs = reference(name, options)
    source = save(theirs, tmp_path / "source")
    convert(source, tmp_path / "ours", family="auto")
    convert(tmp_path / "ours", tmp_path / "back", to="hf")
    assert same(tensors(source), tensors(tmp_path / "back"))
    more = {key: value for key, value in options.items() if key == "add_pooling_layer"}
    opens_cleanly(tmp_path / "back", type(theirs), **more)


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("SqueezeBertModel", {"embedding_size": 12}, "embedding_size"),
        ("SqueezeBertModel", {"q_groups": 5}, "q_groups"),
    ],
)
def test_what_is_not_expressed_is_refused(name: str, options: dict[str, Any], words: str, tmp_path: Path) -> None:
    source = save(reference(name, {}), tmp_path / "source")
    config = source / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | options))
    with pytest.raises(UserError, match=words):
        convert(source, tmp_path / "ours", family="auto")


@pytest.mark.parametrize(
    ("name", "options", "whole"),
    [("FNetModel", {}, ["mixer"]), ("MobileBertModel", {"use_bottleneck": False, "num_feedforward_networks": 3}, None)],
)
def test_dropout_leaves_out_what_the_reference_adds_whole(name: str, options: dict[str, Any], whole: Any) -> None:
    ours: Any = converted(reference(name, options | {"hidden_dropout_prob": 0.2}), family(name))
    wiring = ours.stack.blocks[0].wiring
    assert wiring.dropout.p == 0.2
    assert {key: drop.p for key, drop in wiring.dropouts.items()} == dict.fromkeys(whole or ["ffn", "ffn_2"], 0.0)


def test_a_transform_by_matrices_travels_with_them(tmp_path: Path) -> None:
    options = {"use_tpu_fourier_optimizations": True, "tpu_short_seq_length": 17}
    theirs = reference("FNetForMaskedLM", options)
    ours = converted(theirs, "fnet")
    assert max(difference(theirs, ours, {"input_ids": ids(2, 17)}).values()) <= TOLERANCE
    with pytest.raises(UserError, match=r"9 places.*made for 17"):
        ours(input_ids=ids(2, 9))
    convert(save(theirs, tmp_path / "source"), tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "back", to="hf")
    whole = tensors(tmp_path / "source")
    assert same(whole, tensors(tmp_path / "back"))
    # Without the file that they came with they are made anew.
    save_model(load(tmp_path / "ours"), tmp_path / "alone", (tmp_path / "ours/preset.yaml").read_text())
    convert(tmp_path / "alone", tmp_path / "anew", "fnet", to="hf")
    for key, made in ((key, made) for key, made in tensors(tmp_path / "anew").items() if "dft" in key):
        torch.testing.assert_close(made, whole[key], atol=1e-6, rtol=0)


def test_grouped_linear_is_a_grouped_convolution() -> None:
    ours = GroupedLinear(12, 24, True, 4)
    x = torch.randn(2, 5, 12, requires_grad=True)
    theirs = torch.nn.functional.conv1d(x.transpose(1, 2), ours.weight[..., None], ours.bias, groups=4).transpose(1, 2)
    made = ours(x)
    assert torch.allclose(made, theirs, atol=1e-6)
    dy = torch.randn_like(made)
    wanted = torch.autograd.grad(theirs, (x, ours.weight, ours.bias), dy)
    found = torch.autograd.grad(made, (x, ours.weight, ours.bias), dy)
    for a, b in zip(found, wanted, strict=True):
        assert torch.allclose(a, b, atol=1e-5)
