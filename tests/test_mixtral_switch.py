"""Mixtral and Switch Transformers against the reference: every class and option, scores and losses of routers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from checkpoints import opens_cleanly, save
from references import END, PAD, VOCAB, Case, ids, labels, mask, noise, randomise
from test_parity import TOLERANCE, converted, difference
from torch import Tensor

from xtcli.config.preset import load_preset
from xtcli.convert import convert
from xtcli.convert.exports import find_form
from xtcli.convert.families import by_name
from xtcli.convert.reading import read, read_config
from xtcli.convert.same import difference as difference_of
from xtcli.errors import UserError
from xtcli.inspect.memory import tensors

SIZES: dict[str, dict[str, Any]] = {
    "mixtral": {
        "vocab_size": VOCAB,
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_local_experts": 5,
        "max_position_embeddings": 64,
        "pad_token_id": PAD,
    },
    "switch_transformers": {
        "vocab_size": VOCAB,
        "d_model": 24,
        "d_kv": 8,
        "d_ff": 40,
        "num_layers": 4,
        "num_decoder_layers": 4,
        "num_sparse_encoder_layers": 2,
        "num_sparse_decoder_layers": 2,
        "num_heads": 4,
        "num_experts": 3,
        "expert_capacity": 3,
        "pad_token_id": PAD,
        "eos_token_id": END,
        "decoder_start_token_id": 3,
    },
}
CAUSAL, GENERATION = "MixtralForCausalLM", "SwitchTransformersForConditionalGeneration"
SWITCH, ENCODER = "SwitchTransformersModel", "SwitchTransformersEncoderModel"
CASES: list[tuple[str, dict[str, Any]]] = [
    ("MixtralModel", {}),
    ("MixtralModel", {"output_router_logits": True}),
    (CAUSAL, {}),
    (CAUSAL, {"output_router_logits": True}),
    (CAUSAL, {"output_router_logits": True, "router_aux_loss_coef": 0.3, "num_experts_per_tok": 1}),
    (CAUSAL, {"num_experts_per_tok": 5, "router_jitter_noise": 0.2, "tie_word_embeddings": True}),
    (CAUSAL, {"sliding_window": 5}),
    (CAUSAL, {"sliding_window": 1, "num_key_value_heads": 4, "attention_dropout": 0.1}),
    (CAUSAL, {"head_dim": 10, "num_key_value_heads": 1, "hidden_act": "gelu", "rms_norm_eps": 0.01}),
    (CAUSAL, {"rope_theta": 500.0, "rope_scaling": {"rope_type": "linear", "factor": 2.0}}),
    ("MixtralForSequenceClassification", {"num_labels": 3, "output_router_logits": True}),
    ("MixtralForSequenceClassification", {"num_labels": 1, "sliding_window": 5}),
    ("MixtralForTokenClassification", {"num_labels": 3}),
    ("MixtralForQuestionAnswering", {}),
    (SWITCH, {}),
    (SWITCH, {"expert_capacity": 64, "dense_act_fn": "gelu_new", "is_decoder": True, "add_cross_attention": True}),
    (GENERATION, {}),
    (GENERATION, {"expert_capacity": 1, "router_bias": True, "router_z_loss_coef": 0.3, "router_aux_loss_coef": 0.2}),
    (GENERATION, {"num_sparse_encoder_layers": 4, "num_sparse_decoder_layers": 1}),
    (GENERATION, {"num_sparse_encoder_layers": 0, "num_decoder_layers": 3, "num_sparse_decoder_layers": 3}),
    (GENERATION, {"num_sparse_encoder_layers": 5, "num_layers": 3, "num_decoder_layers": 5}),
    (GENERATION, {"num_layers": 1, "num_sparse_encoder_layers": 0, "num_decoder_layers": 2}),
    (GENERATION, {"d_kv": 5, "layer_norm_epsilon": 0.01, "relative_attention_num_buckets": 8, "num_experts": 1}),
    (GENERATION, {"relative_attention_max_distance": 20, "dropout_rate": 0.2, "router_jitter_noise": 0.1}),
    (ENCODER, {}),
    (ENCODER, {"num_sparse_encoder_layers": 1, "num_layers": 3}),
    # Fewer layers than are to be sparse: none is.
    (ENCODER, {"num_layers": 1}),
    (GENERATION, {"num_layers": 1, "num_decoder_layers": 1, "router_aux_loss_coef": 0.2}),
]


def family(name: str) -> str:
    return "mixtral" if name.startswith("Mixtral") else "switch_transformers"


def reference(name: str, options: dict[str, Any], seed: int = 0) -> Any:
    cls = getattr(transformers, name)
    config = cls.config_class(**SIZES[family(name)] | json.loads(json.dumps(options)))
    config._attn_implementation = "eager"
    return randomise(cls(config), seed)


def feeds(name: str, model: Any) -> dict[str, dict[str, Tensor]]:
    found: dict[str, dict[str, Tensor]] = {f"length {n}": {"input_ids": ids(2, n)} for n in (1, 17, 40)}
    for side in ("right", "left"):
        kept = mask(3, 12, side)
        found[f"padded {side}"] = {"input_ids": ids(3, 12).masked_fill(kept == 0, PAD), "attention_mask": kept}
    found["embeds"] = {"inputs_embeds": noise(2, 9, 24)}
    if name == CAUSAL:
        found["places"] = {"input_ids": ids(2, 9), "position_ids": torch.stack((torch.arange(9), torch.arange(9) + 5))}
        words = ids(3, 12, 7).masked_fill(found["padded right"]["attention_mask"] == 0, -100)
        found["padded loss"] = found["padded right"] | {"labels": words}
    found["loss"] = {"input_ids": ids(4, 9)} | labels(Case(name), model)
    if name not in (SWITCH, GENERATION):
        return found
    for feed, given in found.items():
        rows = next(iter(given.values())).shape[0]
        if feed != "loss" or name == SWITCH:
            given["decoder_input_ids"] = ids(rows, 8, 5)
        if feed.startswith("padded"):
            # What a decoder makes of padding on the left means nothing, and takes room from what follows.
            kept = mask(rows, 8, "right")
            given |= {"decoder_input_ids": ids(rows, 8, 5).masked_fill(kept == 0, PAD), "decoder_attention_mask": kept}
    return found | {"decoder embeds": {"input_ids": ids(2, 9), "decoder_inputs_embeds": noise(2, 6, 24)}}


@pytest.mark.parametrize(("name", "options"), CASES, ids=str)
def test_equals_the_reference(name: str, options: dict[str, Any]) -> None:
    theirs = reference(name, options)
    ours = converted(theirs, family(name))
    for feed, given in feeds(name, theirs).items():
        found = difference(theirs, ours, given)
        # Scores of routers are not in rows, so that what stands at padding on the left, which means nothing, stays in.
        padded = feed == "padded left"
        off = {n: v for n, v in found.items() if not v <= TOLERANCE and not (padded and n.startswith("router_logits"))}
        assert not off, (feed, off)


@pytest.mark.parametrize(("name", "options"), [c for c in CASES if c[0] in (CAUSAL, GENERATION, ENCODER)], ids=str)
def test_routers_report_as_there(name: str, options: dict[str, Any]) -> None:
    theirs = reference(name, options)
    ours = converted(theirs, family(name))
    for given in (feeds(name, theirs)["length 17"], feeds(name, theirs)["loss"]):
        for wanted in (True, False):
            with torch.no_grad():
                expected = theirs(**given, output_router_logits=wanted)
                found = ours(**given, output_router_logits=wanted)
            names = [key for key in expected if "router" in key or key.endswith("loss")]
            assert wanted == any("router" in key for key in names)
            for key in names:
                compare(expected[key], found.get(key), key)


def compare(expected: Any, found: Any, path: str) -> None:
    """Nested tuples of tensors; a loss that the reference does not measure is 0 there and absent here."""
    if isinstance(expected, tuple) and found is None:
        # Where no layer has experts, there are nothing but the places of layers without.
        assert all(torch.equal(scores, torch.zeros(1, dtype=torch.long)) for (scores,) in expected), path
    elif isinstance(expected, tuple):
        assert len(expected) == len(found), path
        for number, (one, other) in enumerate(zip(expected, found, strict=True)):
            compare(one, other, f"{path}.{number}")
    elif isinstance(expected, Tensor):
        torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-5, msg=lambda text: f"{path}: {text}")
    else:
        assert expected in (0, None) and found is None, path


FILES = [case for case in CASES if not case[1].get("num_experts_per_tok")]


@pytest.mark.parametrize(("name", "options"), FILES[::2], ids=str)
def test_there_and_back(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    model = reference(name, options)
    source = save(model, tmp_path / "source")
    there = convert(source, tmp_path / "there", verify=name in (CAUSAL, GENERATION))
    assert (there.family, there.architecture, there.bit_exact) == (family(name), name, True)
    assert convert(tmp_path / "there", tmp_path / "back", to="hf").bit_exact
    for file in ("config.json", "model.safetensors"):
        assert (tmp_path / "back" / file).read_bytes() == (source / file).read_bytes()
    opens_cleanly(tmp_path / "back", type(model))


@pytest.mark.parametrize(("name", "options"), CASES, ids=str)
def test_a_config_written_anew_means_the_same(name: str, options: dict[str, Any]) -> None:
    config = converted(reference(name, options), family(name)).config
    (found, form), values = find_form(config, "auto", {}, "memory")
    assert (found.name, form.name) == (family(name), name)
    assert not difference_of(config, read_config(found, form, values, "memory"))


@pytest.mark.parametrize("window", [1, 4, 30, 80])
@pytest.mark.parametrize("chunks", [(40,), (9, 1, 5, 1, 24), (1,) * 40])
def test_a_window_keeps_what_it_looks_back_to(window: int, chunks: tuple[int, ...]) -> None:
    ours = converted(reference(CAUSAL, {"sliding_window": window}), "mixtral")
    text, kept = ids(3, 40), mask(3, 40, "left")
    with torch.no_grad():
        whole = ours(input_ids=text, attention_mask=kept).logits
        state = ours.new_state(3, 40)  # type: ignore[operator]
        stepped = []
        for part in text.split(list(chunks), 1):
            end = state.length + part.shape[1]
            stepped.append(ours(input_ids=part, attention_mask=kept[:, :end], state=state).logits)
    found = torch.cat(stepped, 1)
    torch.testing.assert_close(found[kept.bool()], whole[kept.bool()], atol=2e-5, rtol=1e-5)
    sizes = {tensor.shape[2] for tensor in tensors(state.blocks) if tensor.dim() == 4}
    assert sizes == {min(window - 1, 40)}


@pytest.mark.parametrize(
    ("name", "options", "key"),
    [
        (CAUSAL, {"sliding_window": 0}, "sliding_window"),
        (CAUSAL, {"hidden_act": "nonsense"}, "hidden_act"),
        (CAUSAL, {"attention_bias": True}, "attention_bias"),
        (CAUSAL, {"num_experts_per_tok": 9}, "num_experts_per_tok"),
        (GENERATION, {"router_dtype": "float64"}, "model.encoder.stack.blocks.sparse.sublayers.ffn.router.dtype"),
        (GENERATION, {"tie_encoder_decoder": True}, "tie_encoder_decoder"),
        (ENCODER, {"is_decoder": True}, "is_decoder"),
    ],
)
def test_what_is_not_expressed_is_refused_by_name(name: str, options: dict[str, Any], key: str) -> None:
    values = SIZES[family(name)] | {"architectures": [name], "model_type": family(name)} | options
    with pytest.raises(UserError) as caught:
        read(by_name()[family(name)], values, [], "memory")
    assert key in [problem.path for problem in caught.value.problems]


@pytest.mark.parametrize(
    ("preset", "values"),
    [
        ("mixtral-8x7b", {"max_position_embeddings": 32768, "router_aux_loss_coef": 0.02}),
        (
            "switch-base-8",
            {"d_ff": 3072, "num_sparse_encoder_layers": 6, "num_sparse_decoder_layers": 6, "decoder_start_token_id": 0},
        ),
    ],
)
def test_a_preset_is_the_released_model(preset: str, values: dict[str, Any]) -> None:
    config = load_preset(preset).preset.model
    (found, form), _ = find_form(config, "auto", {}, "memory")
    assert not difference_of(config, read_config(found, form, values, "memory"))
