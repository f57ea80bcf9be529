"""LLaMA and Code Llama: plain names, grouped heads, rotary positions with every scaling."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from xtcli.convert.families.common import LABEL_DROPOUT, LABELS, PAD, PROBLEM, activation
from xtcli.convert.families.scaling import SCALING
from xtcli.convert.family import Drop, Family, Form
from xtcli.convert.options import Custom, Key, Options
from xtcli.convert.rules import Rule, layer, one
from xtcli.registry import Config, part_of

BIAS = Key("attention_bias", bool, False)


def _head_dim(options: Options) -> int | None:
    return options.get("head_dim", int, None)  # type: ignore[no-any-return]


def _write_head_dim(value: Any, found: dict[str, Any]) -> None:
    derived = found["hidden_size"] // found["num_attention_heads"]
    found["head_dim"] = derived if value is None else value


HEAD_DIM = Custom(_head_dim, _write_head_dim)
"""The width of a head, of families whose config.json may leave it to be derived."""


def _template(form: Form) -> dict[str, Any]:
    return {
        "kind": "decoder",
        "vocab": Key("vocab_size", int, 32000),
        "dim": Key("hidden_size", int, 4096),
        "context": Key("max_position_embeddings", int, 2048),
        "dropout": 0.0,
        "pad": PAD,
        "norm": {"kind": "rms", "eps": Key("rms_norm_eps", float, 1e-6)},
        "init": {"kind": "normal", "std": Key("initializer_range", float, 0.02)},
        "embed": {"kind": "tokens"},
        "stack": {
            "layers": Key("num_hidden_layers", int, 32),
            "position": {
                "kind": "rotary",
                "theta": Key("rope_theta", float, 10000.0),
                "scaling": SCALING,
            },
            "block": {
                "wiring": {"kind": "pre", "dropout": 0.0},
                "sublayers": {
                    "attn": {
                        "kind": "attention",
                        "heads": Key("num_attention_heads", int, 32),
                        "kv_heads": Key("num_key_value_heads", int, None),
                        "head_dim": HEAD_DIM,
                        "bias": BIAS,
                        "dropout": Key("attention_dropout", float, 0.0),
                    },
                    "ffn": {
                        "kind": "glu",
                        "hidden": Key("intermediate_size", int, 11008),
                        "act": Key("hidden_act", str, "silu", code=activation("silu")),
                        "bias": Key("mlp_bias", bool, False),
                    },
                },
            },
        },
        "heads": form.heads,
    }


FORMS = (
    Form("LlamaForCausalLM", "model.", {"lm": {"tied": Key("tie_word_embeddings", bool, False)}}),
    Form("LlamaModel", "", {}),
    Form(
        "LlamaForSequenceClassification",
        "model.",
        {"sequence": {"labels": LABELS, "pick": "last", "bias": False, "dropout": 0.0, "problem": PROBLEM}},
    ),
    Form("LlamaForTokenClassification", "model.", {"token": {"labels": LABELS, "dropout": LABEL_DROPOUT}}),
    Form("LlamaForQuestionAnswering", "transformer.", {"span": {}}),
)


def _trunk(config: Config) -> Sequence[Rule]:
    block = "stack.blocks.{layer}"
    return (
        one("embed_tokens.weight", "embed.tokens.weight"),
        *layer("layers.{layer}.input_layernorm", f"{block}.wiring.norm.attn"),
        *(rule for n in "qkvo" for rule in layer(f"layers.{{layer}}.self_attn.{n}_proj", f"{block}.attn.{n}")),
        *layer("layers.{layer}.post_attention_layernorm", f"{block}.wiring.norm.ffn"),
        *(rule for n in ("gate", "up", "down") for rule in layer(f"layers.{{layer}}.mlp.{n}_proj", f"{block}.ffn.{n}")),
        *layer("norm", "stack.norm"),
    )


def ties(config: Any, prefix: str) -> Mapping[str, str]:
    """A tied head stands for the token table."""
    lm = config.heads.get("lm")
    return {"lm_head.weight": f"{prefix}embed_tokens.weight"} if lm is not None and lm.tied else {}


def is_inverse_frequencies(tensor: Tensor, config: Any) -> bool:
    """The frequencies that the config states, at the precision of the file."""
    position = config.stack.position
    if position.kind != "rotary":
        return False
    attention = config.stack.block.sublayers["attn"]
    width = attention.head_dim or config.dim // attention.heads
    length = torch.ones(1, 1, dtype=torch.long)
    scaling = part_of(position.scaling)
    expected = scaling.frequencies(position.scaling, position.theta, width, config.context, length)
    plain = 1.0 / position.theta ** (torch.arange(0, width, 2).float() / width)
    found = tensor.float()
    coarse = 2 * torch.finfo(tensor.dtype).eps if tensor.is_floating_point() else 0.0
    return any(
        found.shape == known.shape and torch.allclose(found, known, rtol=max(coarse, 1e-5), atol=0.0)
        for known in (expected.flatten(), plain)
    )


LLAMA = Family(
    name="llama",
    types=("llama", "code_llama"),
    title="LLaMA",
    template=_template,
    forms=FORMS,
    trunk=_trunk,
    heads=(
        one("lm_head.weight", "heads.lm.decoder.weight"),
        one("score.weight", "heads.sequence.classifier.weight"),
        *layer("score", "heads.token.classifier"),
        *layer("qa_outputs", "heads.span.classifier"),
    ),
    ties=ties,
    drops=(
        Drop("layers.{layer}.self_attn.rotary_emb.inv_freq", "the rotary frequencies", is_inverse_frequencies),
        Drop("rotary_emb.inv_freq", "the rotary frequencies", is_inverse_frequencies),
    ),
    prefixes=("model.", "transformer.", ""),
    fixed={"is_encoder_decoder": (False,), "partial_rotary_factor": (1.0, None)},
    neutral=frozenset(
        {
            "is_decoder",
            "add_cross_attention",
            "pretraining_tp",
            "classifier_dropout",
            "hidden_dropout",
            "tie_word_embeddings",
            "original_max_position_embeddings",
            "max_sequence_length",
            "unsloth_version",
            "unsloth_fixed",
        }
    ),
)
