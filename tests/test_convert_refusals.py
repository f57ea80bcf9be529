"""What conversion refuses of tensors and options: every mutation of every tensor, ties and buffers that disagree."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from checkpoints import SMALL, write_sources
from references import Case, reference
from torch import Tensor

from xtcli.convert import convert
from xtcli.errors import UserError


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A checkpoint of each family."""
    return write_sources(tmp_path_factory.mktemp("sources"))


def renamed(found: dict[str, Tensor], name: str) -> None:
    found[name + "x"] = found.pop(name)


def transposed(found: dict[str, Tensor], name: str) -> None:
    found[name] = found[name].t().contiguous()


def reshaped(found: dict[str, Tensor], name: str) -> None:
    found[name] = found[name].reshape(1, *found[name].shape)


def retyped(found: dict[str, Tensor], name: str) -> None:
    found[name] = found[name].half()


def cut(found: dict[str, Tensor], name: str) -> None:
    found[name] = found[name][:-1].clone()


def shifted(found: dict[str, Tensor], name: str) -> None:
    digits = [part for part in name.split(".") if part.isdigit()]
    where = name.replace(f".{digits[0]}.", ".7.", 1) if digits else f"other.{name}"
    found[where] = found.pop(name)


MUTATIONS: dict[str, Callable[[dict[str, Tensor], str], Any]] = {
    "removed": lambda found, name: found.pop(name),
    "added": lambda found, name: found.update({f"{name}.1": found[name].clone()}),
    "renamed": renamed,
    "moved": shifted,
    "transposed": transposed,
    "reshaped": reshaped,
    "cut": cut,
    "retyped": retyped,
    "counted": lambda found, name: found.update({name: found[name].long()}),
}


@pytest.mark.parametrize("mutation", MUTATIONS)
@pytest.mark.parametrize("family", SMALL)
def test_every_mutation_of_every_tensor(family: str, mutation: str, sources: dict[str, Path], tmp_path: Path) -> None:
    whole = safetensors.torch.load_file(sources[family] / "model.safetensors")
    (tmp_path / "config.json").write_bytes((sources[family] / "config.json").read_bytes())
    tried = 0
    for name, tensor in whole.items():
        square = tensor.dim() < 2 or tensor.shape[0] == tensor.shape[1]
        if mutation == "transposed" and square:
            # The transpose of a square matrix is a matrix like any other: nothing in a file tells them apart.
            continue
        found = dict(whole)
        MUTATIONS[mutation](found, name)
        safetensors.torch.save_file(found, tmp_path / "model.safetensors")
        with pytest.raises(UserError) as refused:
            convert(tmp_path, tmp_path / "there", dry_run=True)
        assert name.removeprefix("transformer.") in str(refused.value)
        tried += 1
    assert tried > 3


@pytest.mark.parametrize(
    ("family", "old", "new", "said"),
    [
        ("gpt2", "transformer.h.0.attn.c_attn.weight", "transformer.h.0.attn.c_atn.weight", "c_attn.weight'"),
        (
            "bert",
            "bert.encoder.layer.0.output.dense.bias",
            "bert.encoder.layer.0.outputs.dense.bias",
            "output.dense.bias'",
        ),
        ("gpt2", "transformer.ln_f.weight", "ln_f.weight", "transformer.ln_f.weight'"),
        ("bert", "bert.embeddings.LayerNorm.weight", "bert.embeddings.LayerNorm.gama", "LayerNorm.weight'"),
    ],
)
def test_a_wrong_name_is_told_the_nearest(
    family: str, old: str, new: str, said: str, sources: dict[str, Path], tmp_path: Path
) -> None:
    found = safetensors.torch.load_file(sources[family] / "model.safetensors")
    found[new] = found.pop(old)
    safetensors.torch.save_file(found, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((sources[family] / "config.json").read_bytes())
    with pytest.raises(UserError) as refused:
        convert(tmp_path, tmp_path / "there")
    assert f"tensor '{new}' has no place" in str(refused.value) and said in str(refused.value)
    assert not (tmp_path / "there").exists()


@pytest.mark.parametrize(
    ("family", "name", "change"),
    [
        ("gpt2", "lm_head.weight", lambda found: found["transformer.wte.weight"] + 1),
        ("t5", "encoder.embed_tokens.weight", lambda found: found["shared.weight"] + 1),
        ("bert", "cls.predictions.decoder.bias", lambda found: found["cls.predictions.bias"] + 1),
        ("gpt2", "transformer.h.0.attn.bias", lambda found: torch.ones(1, 1, 48, 48)),
        ("gpt2", "transformer.h.0.attn.masked_bias", lambda found: torch.tensor(0.0)),
        ("bert", "bert.embeddings.position_ids", lambda found: torch.arange(48).flip(0)[None]),
        ("bert", "bert.embeddings.LayerNorm.gamma", lambda found: found["bert.embeddings.LayerNorm.weight"].clone()),
    ],
)
def test_a_tie_a_buffer_an_older_name_must_agree(
    family: str, name: str, change: Any, sources: dict[str, Path], tmp_path: Path
) -> None:
    found = safetensors.torch.load_file(sources[family] / "model.safetensors")
    found[name] = change(found)
    safetensors.torch.save_file(found, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((sources[family] / "config.json").read_bytes())
    with pytest.raises(UserError, match=name.replace(".", r"\.")):
        convert(tmp_path, tmp_path / "there", dry_run=True)


def test_half_of_a_spare_group_is_no_group(tmp_path: Path) -> None:
    model: Any = reference(Case("BertForMaskedLM"))
    model.save_pretrained(tmp_path)
    found = safetensors.torch.load_file(tmp_path / "model.safetensors")
    found["bert.pooler.dense.weight"] = torch.ones(24, 24)
    safetensors.torch.save_file(found, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"bert\.pooler\.dense\.bias' is missing"):
        convert(tmp_path, tmp_path / "there")


OPTIONS = [
    ("gpt2", {"n_layr": 2}, "n_layr: is no option of GPT-2 that xt knows; did you mean 'n_layer'"),
    ("gpt2", {"activation_function": "prelu"}, "activation_function: is 'prelu', which xt does not express"),
    ("gpt2", {"activation_function": "gelu_knew"}, "did you mean 'gelu_new'"),
    ("gpt2", {"n_layer": "2"}, "n_layer: is '2', not a whole number"),
    ("gpt2", {"n_layer": True}, "n_layer: is True, not a whole number"),
    ("gpt2", {"layer_norm_epsilon": "1e-5"}, "layer_norm_epsilon: is '1e-5', not a number"),
    ("gpt2", {"n_embd": 24, "hidden_size": 32}, "hidden_size 32 are one option"),
    ("gpt2", {"pruned_heads": {"0": [1]}}, "pruned_heads"),
    ("gpt2", {"is_encoder_decoder": True}, "is_encoder_decoder: is True, which xt does not express"),
    ("gpt2", {"n_head": 5}, "5 heads do not divide dim 24"),
    ("gpt2", {"resid_pdrop": 1.5}, "resid_pdrop"),
    ("gpt2", {"architectures": ["GPT2LMHeadModle"]}, "did you mean 'GPT2LMHeadModel'"),
    ("gpt2", {"architectures": ["A", "B"]}, "must name one class"),
    ("gpt2", {"model_type": "gpt3"}, "model_type 'gpt3' is no family that xt converts; did you mean 'gpt2'"),
    ("gpt2", {"model_type": ["gpt2"]}, "model_type is ['gpt2'], not text"),
    ("gpt2", {"n_embd": 10**9}, "asks for a tensor beyond all memory"),
    ("gpt2", {"quantization_config": {"bits": 4}}, "quantization_config: is no option"),
    ("llama", {"rope_scaling": {"rope_type": "yarm", "factor": 2.0}}, "did you mean 'yarn'"),
    ("llama", {"rope_scaling": {"rope_type": "linear"}}, "rope_scaling.factor: is missing"),
    ("llama", {"rope_scaling": {"rope_type": "linear", "factor": 2.0, "base": 1}}, "rope_scaling.base: is no option"),
    (
        "llama",
        {"rope_scaling": {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [1.0] * 4}},
        "factor",
    ),
    ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor: is 0.5, which xt does not express"),
    ("llama", {"rope_parameters": {}}, "rope_parameters: is no option"),
    ("bert", {"position_embedding_type": "relative"}, "position_embedding_type: is 'relative'"),
    ("bert", {"type_vocab_size": -1}, "type_vocab_size: is -1, and a table has one row or more"),
    ("bert", {"tie_encoder_decoder": True}, "tie_encoder_decoder"),
    ("t5", {"relative_attention_max_distance": 5}, "relative_attention_max_distance: must exceed"),
    ("t5", {"feed_forward_proj": "gatd-gelu"}, "feed_forward_proj"),
    ("t5", {"is_decoder": True, "architectures": ["T5EncoderModel"]}, "is_decoder: is true, and an encoder alone"),
]


@pytest.mark.parametrize(("family", "changes", "said"), OPTIONS, ids=lambda value: json.dumps(value)[:50])
def test_an_option_that_is_wrong_or_not_expressed(
    family: str, changes: dict[str, Any], said: str, sources: dict[str, Path], tmp_path: Path
) -> None:
    config = json.loads((sources[family] / "config.json").read_text()) | changes
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes((sources[family] / "model.safetensors").read_bytes())
    with pytest.raises(UserError) as refused:
        convert(tmp_path, tmp_path / "there")
    assert said in str(refused.value)
    assert not (tmp_path / "there").exists()


def test_a_type_that_cannot_hold_the_values(sources: dict[str, Path], tmp_path: Path) -> None:
    found = safetensors.torch.load_file(sources["gpt2"] / "model.safetensors")
    found["transformer.ln_f.bias"][0] = 1e6
    safetensors.torch.save_file(found, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((sources["gpt2"] / "config.json").read_bytes())
    with pytest.raises(UserError, match=r"'stack.norm.bias' holds values beyond the range of float16"):
        convert(tmp_path, tmp_path / "there", dtype="float16")
    with pytest.raises(UserError, match="there is no type 'float17'; did you mean 'float16'"):
        convert(tmp_path, tmp_path / "there", dtype="float17")


def test_a_model_that_no_class_of_theirs_is(tmp_path: Path) -> None:
    from xtcli.config.preset import load_preset
    from xtcli.model import build, save_model

    for number, (preset, change, said) in enumerate(
        [
            (
                "gpt2-small",
                "model.stack.block.sublayers.attn.kv_heads=2",
                "attn.kv_heads is 2, their config.json can only say 4",
            ),
            ("gpt2-small", "model.stack.block.sublayers.ffn={kind: glu, hidden: 64}", "ffn: is 'glu', not 'mlp'"),
            ("llama-7b", "model.stack.position.layout=interleaved", "layout"),
            ("bert-base", "model.embed.scale=2.0", "scale"),
            ("t5-small", "model.decoder.stack.block.sublayers.cross.heads=2", "heads"),
        ]
    ):
        resolved = load_preset(preset, [change], tiny=True)
        save_model(build(resolved), tmp_path / f"ours {number}", resolved.to_yaml())
        with pytest.raises(UserError, match="cannot express this model") as refused:
            convert(tmp_path / f"ours {number}", tmp_path / "theirs", to="hf")
        assert said in str(refused.value)
