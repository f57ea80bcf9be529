"""Mixtral: LLaMA's blocks with a mixture of gated experts, and a window on all layers if config.json has one.

Surprises: the balance loss joins the loss only with `output_router_logits`, and only in the language model; its means
are those of the whole batch. Jitter multiplies the experts' inputs too in the reference, here the router's alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from xtcli.convert.families.common import LABEL_DROPOUT, LABELS, PAD, PROBLEM, activation
from xtcli.convert.families.llama import HEAD_DIM, is_inverse_frequencies, ties
from xtcli.convert.families.scaling import SCALING
from xtcli.convert.family import Drop, Family, Form
from xtcli.convert.options import Custom, Key, Options, Unexpressed
from xtcli.convert.rules import Rule, Stack, layer, one
from xtcli.registry import Config


def _window(options: Options) -> dict[str, Any]:
    width = options.get("sliding_window", int, None)
    if width is None:
        return {"kind": "inherit"}
    if width < 1:
        options.refuse("sliding_window", f"is {width}", "a token sees at least itself")
    return {"kind": "all", "of": [{"kind": "causal"}, {"kind": "window", "left": max(width, 1) - 1}]}


def _write_window(value: Any, found: dict[str, Any]) -> None:
    if value["kind"] in ("inherit", "causal"):
        found["sliding_window"] = None
        return
    rules = value.get("of") or []
    if value["kind"] != "all" or [rule["kind"] for rule in rules] != ["causal", "window"]:
        raise Unexpressed("only a causal window stands for sliding_window")
    found["sliding_window"] = rules[1]["left"] + 1


def _template(form: Form) -> dict[str, Any]:
    return {
        "kind": "decoder",
        "vocab": Key("vocab_size", int, 32000),
        "dim": Key("hidden_size", int, 4096),
        "context": Key("max_position_embeddings", int, 131072),
        "dropout": 0.0,
        "pad": PAD,
        "norm": {"kind": "rms", "eps": Key("rms_norm_eps", float, 1e-5)},
        "init": {"kind": "normal", "std": Key("initializer_range", float, 0.02)},
        "embed": {"kind": "tokens"},
        "stack": {
            "layers": Key("num_hidden_layers", int, 32),
            "position": {"kind": "rotary", "theta": Key("rope_theta", float, 1e6), "scaling": SCALING},
            "block": {
                "wiring": {"kind": "pre", "dropout": 0.0},
                "sublayers": {
                    "attn": {
                        "kind": "attention",
                        "heads": Key("num_attention_heads", int, 32),
                        "kv_heads": Custom(_kv_heads, lambda value, found: found.update(num_key_value_heads=value)),
                        "head_dim": HEAD_DIM,
                        "bias": False,
                        "mask": Custom(_window, _write_window),
                        "dropout": Key("attention_dropout", float, 0.0),
                    },
                    "ffn": {
                        "kind": "moe",
                        "experts": Key("num_local_experts", int, 8),
                        "router": {
                            "kind": "top-k",
                            "choose": Key("num_experts_per_tok", int, 2),
                            "jitter": Key("router_jitter_noise", float, 0.0),
                        },
                        "expert": {
                            "kind": "glu",
                            "hidden": Key("intermediate_size", int, 14336),
                            "act": Key("hidden_act", str, "silu", code=activation("silu")),
                        },
                    },
                },
            },
        },
        "heads": form.heads,
        "auxiliary": {
            "balance": {
                "weight": Key("router_aux_loss_coef", float, 0.001),
                "over": "batch",
                "shown": False,
                **form.more,
            }
        },
    }


def _kv_heads(options: Options) -> int | None:
    # Left out there are 8, null means as many as heads.
    return options.get("num_key_value_heads", int, None) if "num_key_value_heads" in options.values else 8


SHOWN = {"shown": Key("output_router_logits", bool, False)}
SEQUENCE = {"labels": LABELS, "pick": "last", "bias": False, "dropout": 0.0, "problem": PROBLEM}

FORMS = (
    Form("MixtralForCausalLM", "model.", {"lm": {"tied": Key("tie_word_embeddings", bool, False)}}, SHOWN),
    Form("MixtralModel", "", {}, SHOWN),
    Form("MixtralForSequenceClassification", "model.", {"sequence": SEQUENCE}),
    Form("MixtralForTokenClassification", "model.", {"token": {"labels": LABELS, "dropout": LABEL_DROPOUT}}),
    Form("MixtralForQuestionAnswering", "model.", {"span": {}}),
)


def _trunk(config: Config) -> Sequence[Rule]:
    block = "stack.blocks.{layer}"
    moe = "layers.{layer}.block_sparse_moe"
    return (
        one("embed_tokens.weight", "embed.tokens.weight"),
        *layer("layers.{layer}.input_layernorm", f"{block}.wiring.norm.attn"),
        *(rule for n in "qkvo" for rule in layer(f"layers.{{layer}}.self_attn.{n}_proj", f"{block}.attn.{n}")),
        *layer("layers.{layer}.post_attention_layernorm", f"{block}.wiring.norm.ffn"),
        *layer(f"{moe}.gate", f"{block}.ffn.router.classifier"),
        *(
            Rule((f"{moe}.experts.{{e}}.{theirs}.weight",), (f"{block}.ffn.experts.{ours}.weight",), Stack(), "e")
            for theirs, ours in (("w1", "gate"), ("w3", "up"), ("w2", "down"))
        ),
        *layer("norm", "stack.norm"),
    )


MIXTRAL = Family(
    name="mixtral",
    types=("mixtral",),
    title="Mixtral",
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
    drops=tuple(
        Drop(name, "the rotary frequencies", is_inverse_frequencies)
        for name in ("layers.{layer}.self_attn.rotary_emb.inv_freq", "rotary_emb.inv_freq")
    ),
    prefixes=("model.", ""),
    fixed={"is_encoder_decoder": (False,), "partial_rotary_factor": (1.0, None)},
    neutral=frozenset(
        """
        is_decoder add_cross_attention classifier_dropout hidden_dropout tie_word_embeddings output_router_logits
        original_max_position_embeddings
        """.split()
    ),
)
