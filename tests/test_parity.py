"""Converted models against the reference: every head, every option, outputs, hidden states and losses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from references import Case, compared, describe, feeds, ids, mask, reference
from torch import Tensor

from xtcli.convert.engine import state_of
from xtcli.convert.families import by_name
from xtcli.convert.reading import read
from xtcli.model import Model, construct

TOLERANCE = 2e-5

ACTIVATIONS = (
    "gelu gelu_python gelu_pytorch_tanh gelu_new gelu_python_tanh gelu_accurate gelu_fast gelu_10 quick_gelu relu relu2 "
    "relu6 silu swish tanh sigmoid mish leaky_relu laplace linear"
).split()


def scaled(note: str, **scaling: Any) -> Case:
    """A LLaMA with a rotary scaling, on texts within and beyond the context."""
    outside = {key[1:]: scaling.pop(key) for key in list(scaling) if key.startswith("_")}
    return Case("LlamaForCausalLM", outside | {"rope_scaling": scaling}, note, (1, 17, 47))


YARN = {"rope_type": "yarn", "factor": 4.0}
LONG = {"rope_type": "longrope", "short_factor": [1.1, 1.5, 2.0], "long_factor": [1.3, 2.5, 7.0]}
CROSS = {"add_cross_attention": True}
RELATIVE = ({"position_embedding_type": kind} for kind in ("relative_key", "relative_key_query"))
DECODES = {"is_decoder": True, "use_cache": False}

CASES = [
    Case("GPT2Model"),
    Case("GPT2Model", {"tie_word_embeddings": False, "classifier_dropout": 0.2, "hidden_dropout": 0.3}, lengths=(17,)),
    Case("GPT2LMHeadModel", lengths=(1, 17, 48)),
    *(Case("GPT2LMHeadModel", {"activation_function": name}, lengths=(17,)) for name in ACTIVATIONS),
    Case("GPT2LMHeadModel", {"n_inner": 40, "layer_norm_epsilon": 0.01, "n_head": 1, "n_layer": 3}),
    Case("GPT2LMHeadModel", {"scale_attn_weights": False}),
    Case("GPT2LMHeadModel", {"scale_attn_by_inverse_layer_idx": True, "n_layer": 3}),
    Case("GPT2LMHeadModel", {"reorder_and_upcast_attn": True}),
    Case("GPT2LMHeadModel", {"reorder_and_upcast_attn": True, "scale_attn_by_inverse_layer_idx": True} | CROSS),
    Case("GPT2LMHeadModel", {"tie_word_embeddings": False}),
    Case("GPT2LMHeadModel", CROSS),
    Case("GPT2Model", CROSS | {"scale_attn_weights": False, "scale_attn_by_inverse_layer_idx": True}),
    Case("GPT2DoubleHeadsModel"),
    *(Case("GPT2DoubleHeadsModel", {"summary_type": kind}) for kind in ("last", "first", "mean")),
    *(Case("GPT2DoubleHeadsModel", {"summary_activation": name}) for name in ("tanh", "")),
    Case("GPT2DoubleHeadsModel", {"summary_proj_to_labels": False, "summary_activation": "gelu_new"}),
    Case("GPT2DoubleHeadsModel", {"summary_use_proj": False, "tie_word_embeddings": False}),
    Case("GPT2ForSequenceClassification"),
    Case("GPT2ForSequenceClassification", {"num_labels": 1}),
    Case("GPT2ForSequenceClassification", {"num_labels": 5, "problem_type": "multi_label_classification"}),
    Case("GPT2ForTokenClassification", {"num_labels": 5}),
    Case("GPT2ForQuestionAnswering"),
    Case("LlamaModel"),
    Case("LlamaForCausalLM", lengths=(1, 17, 47)),
    Case("LlamaForCausalLM", {"num_key_value_heads": 2}),
    Case("LlamaForCausalLM", {"num_key_value_heads": 1, "attention_bias": True, "mlp_bias": True}),
    Case("LlamaForCausalLM", {"head_dim": 10, "num_key_value_heads": 2, "rope_theta": 500.0}),
    Case("LlamaForCausalLM", {"tie_word_embeddings": True, "rms_norm_eps": 0.01}),
    *(Case("LlamaForCausalLM", {"hidden_act": name}, lengths=(17,)) for name in ("gelu", "relu", "gelu_new")),
    Case("LlamaForSequenceClassification", {"num_labels": 3}),
    Case("LlamaForSequenceClassification", {"num_labels": 3, "problem_type": "regression"}),
    Case("LlamaForTokenClassification"),
    Case("LlamaForQuestionAnswering"),
    scaled("default", rope_type="default"),
    scaled("linear", rope_type="linear", factor=3.0),
    scaled("linear, older key", type="linear", factor=2),
    scaled("dynamic", rope_type="dynamic", factor=2.5),
    scaled(
        "llama3",
        rope_type="llama3",
        factor=8.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=16,
    ),
    scaled("yarn", **YARN),
    scaled("yarn, original", **YARN, original_max_position_embeddings=8, beta_fast=4.0, beta_slow=0.5),
    scaled("yarn, gain", **YARN, attention_factor=1.7, truncate=False, _head_dim=16),
    scaled("yarn, mscale", **YARN, mscale=0.7, mscale_all_dim=1.1, _rope_theta=100.0),
    scaled("longrope", **LONG, factor=4.0),
    scaled("longrope, gain", **LONG, attention_factor=1.3),
    scaled("longrope, original", **LONG, _original_max_position_embeddings=16),
    Case("BertModel"),
    Case("BertModel", {"add_pooling_layer": False}),
    Case("BertModel", CROSS | DECODES),
    Case("BertForPreTraining", lengths=(1, 17, 48)),
    Case("BertForPreTraining", {"tie_word_embeddings": False}),
    Case("BertForMaskedLM"),
    *(Case("BertForMaskedLM", {"hidden_act": name}, lengths=(17,)) for name in ("gelu_new", "relu", "silu")),
    Case("BertForMaskedLM", {"layer_norm_eps": 0.01, "type_vocab_size": 3, "chunk_size_feed_forward": 1}),
    *(Case("BertForMaskedLM", kind) for kind in RELATIVE),
    Case("BertForMaskedLM", DECODES),
    Case("BertLMHeadModel", DECODES),
    Case("BertLMHeadModel"),
    Case("BertLMHeadModel", DECODES | CROSS | {"position_embedding_type": "relative_key_query"}),
    Case("BertLMHeadModel", DECODES | CROSS | {"tie_word_embeddings": False}),
    Case("BertForNextSentencePrediction"),
    Case("BertForSequenceClassification", {"num_labels": 3}),
    Case("BertForSequenceClassification", {"num_labels": 1}),
    Case("BertForMultipleChoice"),
    Case("BertForTokenClassification", {"num_labels": 4}),
    Case("BertForQuestionAnswering"),
    Case("T5Model", {"is_decoder": True}),
    Case("T5ForConditionalGeneration", lengths=(1, 17, 150)),
    Case("T5ForConditionalGeneration", {"tie_word_embeddings": False, "feed_forward_proj": "gated-gelu"}),
    *(
        Case("T5ForConditionalGeneration", {"feed_forward_proj": name}, lengths=(17,))
        for name in ("gated-silu", "gated-relu", "gelu", "gelu_new", "silu")
    ),
    Case(
        "T5ForConditionalGeneration", {"num_decoder_layers": 3, "num_layers": 1, "d_kv": 5, "layer_norm_epsilon": 0.01}
    ),
    Case(
        "T5ForConditionalGeneration",
        {"relative_attention_num_buckets": 8, "relative_attention_max_distance": 20},
        lengths=(17, 40),
    ),
    Case("T5EncoderModel"),
    Case("T5EncoderModel", {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}),
    Case("T5ForSequenceClassification", {"num_labels": 3}),
    Case("T5ForTokenClassification", {"num_labels": 3}),
    Case("T5ForQuestionAnswering"),
]


def converted(theirs: Any, family: str) -> Model:
    """The reference's weights in our model, without a file between."""
    state = theirs.state_dict()
    plan, claims = read(by_name()[family], describe(theirs), list(state), "memory")
    model = construct(plan.config)
    ours = state_of(plan, lambda name: state[claims.source[name]], model.state_dict())
    model.load_state_dict(ours, assign=True)
    return model.eval()


def difference(theirs: Any, ours: Model, given: dict[str, Tensor]) -> dict[str, float]:
    """The largest difference of each output of the reference, by name; inf where ours lacks it.

    Outputs beyond 10 are measured against their size, since float32 has no finer steps there.
    """
    with torch.no_grad():
        expected = compared(given, theirs(**given, output_hidden_states=True))
        found = compared(given, ours(**given, output_hidden_states=True))
    return {
        name: float((found[name] - value).abs().max() / max(1.0, float(value.abs().max()) / 10))
        if name in found and found[name].shape == value.shape
        else float("inf")
        for name, value in expected.items()
        if not name.startswith(("past_key_values",))
    }


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_equals_the_reference(case: Case) -> None:
    theirs = reference(case)
    ours = converted(theirs, case.family)
    for feed, given in feeds(case, theirs).items():
        off = {name: value for name, value in difference(theirs, ours, given).items() if not value <= TOLERANCE}
        assert not off, (feed, off)


LONG_ENOUGH = {
    "gpt2": {"n_positions": 260},
    "llama": {"num_key_value_heads": 2},
    "bert": {"max_position_embeddings": 260},
    "t5": {},
}
MAIN = {
    "gpt2": "GPT2LMHeadModel",
    "llama": "LlamaForCausalLM",
    "bert": "BertForMaskedLM",
    "t5": "T5ForConditionalGeneration",
}


def divergence(expected: Tensor, found: Tensor) -> float:
    """The largest Kullback-Leibler divergence of two rows of logits, in float64."""
    p, q = expected.double().log_softmax(-1), found.double().log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).max())


def logits(theirs: Any, ours: Model, length: int) -> tuple[Tensor, Tensor]:
    given = {"input_ids": ids(2, length), "attention_mask": mask(2, length, "right")}
    if theirs.config.is_encoder_decoder:
        given["decoder_input_ids"] = ids(2, length, 5)
    with torch.no_grad():
        return compared(given, theirs(**given))["logits"], compared(given, ours(**given))["logits"]


@pytest.mark.parametrize("length", [1, 17, 257])
@pytest.mark.parametrize("family", MAIN)
def test_distributions_are_the_reference_s(family: str, length: int) -> None:
    theirs = reference(Case(MAIN[family], LONG_ENOUGH[family]))
    expected, found = logits(theirs, converted(theirs, family), length)
    assert float((expected - found).abs().max()) <= 1e-4
    assert divergence(expected, found) <= 1e-9


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_a_wrong_order_of_rotary_rows_is_far_outside(kv_heads: int) -> None:
    theirs = reference(Case("LlamaForCausalLM", {"num_key_value_heads": kv_heads}))
    ours = converted(theirs, "llama")
    for name, parameter in ours.named_parameters():
        if name.endswith(("attn.q.weight", "attn.k.weight")):
            # Pairs (i, i + r/2) become pairs (2i, 2i + 1); the weights themselves are still the reference's memory.
            parameter.data = parameter.detach().unflatten(0, (-1, 2, 3)).transpose(1, 2).flatten(0, 2)
    expected, found = logits(theirs, ours, 17)
    assert float((expected - found).abs().max()) > 1e-2
    assert divergence(expected, found) > 1e-6
