"""Falcon and BLOOM against the reference: every class, layout and option; released names; files there and back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from checkpoints import opens_cleanly, rewrite, same, save, tensors
from references import PAD, VOCAB, Case, ids, labels, mask, noise, randomise
from test_parity import TOLERANCE, converted, difference
from torch import Tensor

from xtcli.config.preset import load_preset
from xtcli.convert import convert
from xtcli.convert.exports import find_form
from xtcli.convert.families import by_name
from xtcli.convert.reading import read, read_config
from xtcli.convert.same import difference as difference_of
from xtcli.errors import UserError

SIZES: dict[str, dict[str, Any]] = {
    "Falcon": {
        "vocab_size": VOCAB,
        "hidden_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
        "pad_token_id": PAD,
    },
    "Bloom": {"vocab_size": VOCAB, "hidden_size": 24, "n_layer": 2, "n_head": 4, "pad_token_id": PAD},
}
LABELLED = ("ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering")
NEW = {"new_decoder_architecture": True, "num_kv_heads": 2}
ONE_NORM = NEW | {"num_ln_in_parallel_attn": 1}
MHA = {"multi_query": False}
SEQUENTIAL = {"parallel_attn": False}
ALIBI = {"alibi": True, "bias": True}
UNEVEN = {"num_attention_heads": 3, "alibi": True}

FALCON: list[tuple[str, dict[str, Any]]] = [
    *((layout, options) for layout in ("ForCausalLM",) for options in (NEW, ONE_NORM, MHA, SEQUENTIAL)),
    ("ForCausalLM", {}),
    ("Model", NEW),
    *((name, {"num_labels": 2 if name.endswith("Answering") else 3}) for name in LABELLED),
    *((name, options | {"bias": True}) for name, options in (("ForCausalLM", o) for o in (NEW, ONE_NORM, MHA))),
    ("ForCausalLM", SEQUENTIAL | MHA | {"bias": True}),
    ("ForCausalLM", NEW | {"num_kv_heads": 1, "tie_word_embeddings": False}),
    ("ForCausalLM", NEW | {"num_kv_heads": None}),
    ("ForCausalLM", {"num_ln_in_parallel_attn": 1, "activation": "relu", "ffn_hidden_size": 40}),
    ("ForCausalLM", SEQUENTIAL | {"num_ln_in_parallel_attn": 2, "layer_norm_epsilon": 0.01}),
    ("ForCausalLM", {"rope_theta": 500.0, "rope_scaling": {"rope_type": "linear", "factor": 2.0}}),
    ("ForCausalLM", NEW | {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}, "max_position_embeddings": 20}),
    ("ForCausalLM", ALIBI),
    ("ForCausalLM", ALIBI | MHA | SEQUENTIAL),
    ("ForCausalLM", ALIBI | NEW),
    ("ForCausalLM", UNEVEN),
    ("ForCausalLM", UNEVEN | MHA | {"num_attention_heads": 6}),
    ("ForSequenceClassification", UNEVEN | {"num_labels": 1}),
    ("ForSequenceClassification", ALIBI | {"num_labels": 3, "problem_type": "multi_label_classification"}),
]
POST = {"apply_residual_connection_post_layernorm": True}
BLOOM: list[tuple[str, dict[str, Any]]] = [
    ("ForCausalLM", {}),
    ("Model", {}),
    *((name, {"num_labels": 2 if name.endswith("Answering") else 3}) for name in LABELLED),
    ("ForCausalLM", POST),
    ("Model", POST | {"n_head": 3, "layer_norm_epsilon": 0.01}),
    ("ForCausalLM", {"n_head": 6, "tie_word_embeddings": False, "hidden_dropout": 0.2, "attention_dropout": 0.1}),
    ("ForCausalLM", {"n_head": 1, "n_layer": 3, "pretraining_tp": 2}),
    ("ForSequenceClassification", {"num_labels": 1}),
    ("ForCausalLM", {"slow_but_exact": True, "pretraining_tp": 3}),
]
CASES = [("Falcon" + name, options) for name, options in FALCON] + [("Bloom" + name, o) for name, o in BLOOM]


def family(name: str) -> str:
    return "falcon" if name.startswith("Falcon") else "bloom"


def reference(name: str, options: dict[str, Any], seed: int = 0) -> Any:
    cls = getattr(transformers, name)
    config = cls.config_class(**SIZES[family(name).title()] | json.loads(json.dumps(options)))
    # Falcon's eager attention adds the biases of ALiBi twice.
    config._attn_implementation = "sdpa" if config.model_type == "falcon" and config.alibi else "eager"
    return randomise(cls(config), seed)


def feeds(name: str, model: Any) -> dict[str, dict[str, Tensor]]:
    found: dict[str, dict[str, Tensor]] = {f"length {n}": {"input_ids": ids(2, n)} for n in (1, 17, 60)}
    for side in ("right", "left"):
        kept = mask(3, 12, side)
        found[f"padded {side}"] = {"input_ids": ids(3, 12).masked_fill(kept == 0, PAD), "attention_mask": kept}
    if not name.endswith("SequenceClassification"):
        kept = torch.ones(2, 12, dtype=torch.long)
        kept[0, 3:5] = kept[1, 7] = 0
        found["holes"] = {"input_ids": ids(2, 12), "attention_mask": kept}
    found["embeds"] = {"inputs_embeds": noise(2, 9, 24)}
    if name in ("FalconModel", "FalconForCausalLM"):
        found["places"] = {"input_ids": ids(2, 9), "position_ids": torch.stack((torch.arange(9), torch.arange(9) + 5))}
    if name == "FalconForCausalLM":
        found |= {f"kept {n}": {"input_ids": ids(2, 9), "logits_to_keep": n} for n in (1, torch.tensor([0, 3, 8]))}
    found["loss"] = {"input_ids": ids(4, 9)} | labels(Case(name), model)
    return found


def test_logits_are_left_out_only_where_nothing_needs_them() -> None:
    ours = converted(reference("FalconForTokenClassification", {}), "falcon")
    with pytest.raises(ValueError, match="logits_to_keep: only a language model"):
        ours(input_ids=ids(2, 9), logits_to_keep=1)
    assert ours(input_ids=ids(2, 9), logits_to_keep=0).logits.shape == (2, 9, 2)


@pytest.mark.parametrize(("name", "options"), CASES, ids=str)
def test_equals_the_reference(name: str, options: dict[str, Any]) -> None:
    theirs = reference(name, options)
    ours = converted(theirs, family(name))
    for feed, given in feeds(name, theirs).items():
        off = {key: value for key, value in difference(theirs, ours, given).items() if not value <= TOLERANCE}
        assert not off, (feed, off)


def test_alibi_far_from_the_start_is_rounded_as_there() -> None:
    theirs = reference("FalconForCausalLM", UNEVEN | {"num_attention_heads": 12, "max_position_embeddings": 700})
    ours = converted(theirs, "falcon")
    off = difference(theirs, ours, {"input_ids": ids(1, 600)})
    assert max(off.values()) < 1e-4
    for module in ours.modules():
        if hasattr(module, "rounded"):
            module.rounded = False
    assert max(difference(theirs, ours, {"input_ids": ids(1, 600)}).values()) > 1e-3


FILES = [
    *(("Falcon" + name, options) for name, options in FALCON[:12]),
    ("FalconForCausalLM", ALIBI | MHA | SEQUENTIAL),
    ("FalconForCausalLM", ALIBI | NEW | {"tie_word_embeddings": False}),
    *(("Bloom" + name, options) for name, options in (*BLOOM[:7], BLOOM[-1])),
]


@pytest.mark.parametrize(("name", "options"), FILES, ids=str)
def test_there_and_back(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    model = reference(name, options)
    source = save(model, tmp_path / "source")
    there = convert(source, tmp_path / "there", verify=name.endswith("CausalLM"))
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


def test_released_bloom_has_no_prefix_and_older_keys(tmp_path: Path) -> None:
    source = save(reference("BloomForCausalLM", {}), tmp_path / "source")
    whole = tensors(source)
    rewrite(source, lambda found: {name.removeprefix("transformer."): tensor for name, tensor in found.items()})
    values = json.loads((source / "config.json").read_text())
    values |= {"n_embed": values.pop("hidden_size"), "num_attention_heads": values.pop("n_head"), "offset_alibi": 100}
    values |= {"seq_length": 2048, "n_inner": None, "masked_softmax_fusion": True, "skip_bias_add": True}
    (source / "config.json").write_text(json.dumps(values))
    convert(source, tmp_path / "there", verify=True)
    convert(tmp_path / "there", tmp_path / "back", to="hf")
    assert same(tensors(tmp_path / "back"), whole)


def test_old_falcon_files_hold_rotary_frequencies(tmp_path: Path) -> None:
    source = save(reference("FalconForCausalLM", NEW), tmp_path / "source")
    held = {
        f"transformer.h.{layer}.self_attention.rotary_emb.inv_freq": 1.0 / 10000 ** (torch.arange(0, 6, 2) / 6)
        for layer in range(2)
    }
    rewrite(source, lambda found: found | held)
    assert len(convert(source, tmp_path / "there").drops) == 2


@pytest.mark.parametrize(
    ("name", "options", "key"),
    [
        ("FalconForCausalLM", NEW | SEQUENTIAL, "parallel_attn"),
        ("FalconForCausalLM", NEW | {"num_ln_in_parallel_attn": 3}, "num_ln_in_parallel_attn"),
        ("FalconForCausalLM", {"num_ln_in_parallel_attn": 2}, "num_ln_in_parallel_attn"),
        ("FalconForCausalLM", MHA | {"num_kv_heads": 2}, "num_kv_heads"),
        ("FalconForCausalLM", {"activation": "nonsense"}, "activation"),
        ("BloomForCausalLM", {"ffn_hidden_size": 40}, "ffn_hidden_size"),
    ],
)
def test_what_is_not_expressed_is_refused_by_name(name: str, options: dict[str, Any], key: str) -> None:
    values = SIZES[family(name).title()] | {"architectures": [name], "model_type": family(name)} | options
    with pytest.raises(UserError) as caught:
        read(by_name()[family(name)], values, [], "memory")
    assert key in [problem.path for problem in caught.value.problems]


@pytest.mark.parametrize(
    ("preset", "values"),
    [
        ("falcon-7b", {"num_attention_heads": 71, "multi_query": True, "parallel_attn": True, "alibi": False}),
        (
            "bloom-560m",
            {"n_embed": 1024, "n_layer": 24, "num_attention_heads": 16, "pad_token_id": 3, "seq_length": 2048},
        ),
    ],
)
def test_a_preset_is_the_released_model(preset: str, values: dict[str, Any]) -> None:
    config = load_preset(preset).preset.model
    (found, form), _ = find_form(config, "auto", {}, "memory")
    assert not difference_of(config, read_config(found, form, values, "memory"))
