"""GPT-2: weights as (in, out), query, key and value fused; released files have no prefix and hold the masks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from xtcli.convert.families.common import (
    LABEL_DROPOUT,
    LABELS,
    PAD,
    PROBLEM,
    activation,
    is_large_negative,
    is_lower_triangle,
)
from xtcli.convert.family import Drop, Family, Form
from xtcli.convert.options import Custom, Key, Options, Part, Switch, table
from xtcli.convert.rules import TRANSPOSE, Chain, Rule, Split, layer, one
from xtcli.registry import Config

DIM = Key("n_embd", int, 768, ("hidden_size",))
HEADS = Key("n_head", int, 12, ("num_attention_heads",))
RESIDUAL = Key("resid_pdrop", float, 0.1)
EPS = Key("layer_norm_epsilon", float, 1e-5)
TIED = Key("tie_word_embeddings", bool, True)
FUSED = Chain((TRANSPOSE, Split()))


def _hidden(options: Options) -> int:
    inner = options.get("n_inner", int, None)
    return int(4 * DIM.load(options) if inner is None else inner)


def _write_hidden(value: Any, found: dict[str, Any]) -> None:
    found["n_inner"] = None if value == 4 * found["n_embd"] else value


SCORES = {
    "scale": Key("scale_attn_weights", bool, True, code=table({True: None, False: 1.0})),
    "scale_by_depth": Key("scale_attn_by_inverse_layer_idx", bool, False),
    "dropout": Key("attn_pdrop", float, 0.1),
    "score": Switch(
        Key("reorder_and_upcast_attn", bool, False), {False: {"kind": "softmax"}, True: {"kind": "softmax-wide"}}
    ),
}


def _template(form: Form) -> dict[str, Any]:
    return {
        "kind": "decoder",
        "vocab": Key("vocab_size", int, 50257),
        "dim": DIM,
        "context": Key("n_positions", int, 1024, ("max_position_embeddings",)),
        "dropout": RESIDUAL,
        "pad": PAD,
        "norm": {"kind": "layer", "eps": EPS},
        "init": {"kind": "normal", "std": Key("initializer_range", float, 0.02), "residual": True},
        "memory": Switch(Key("add_cross_attention", bool, False), {False: None, True: DIM}, silent=True),
        "embed": {
            "kind": "tokens",
            "positions": {"kind": "learned"},
            "segments": "tokens",
            "dropout": Key("embd_pdrop", float, 0.1),
        },
        "stack": {
            "layers": Key("n_layer", int, 12, ("num_hidden_layers",)),
            "block": {
                "wiring": {"kind": "pre", "dropout": RESIDUAL},
                "sublayers": {
                    "attn": {"kind": "attention", "heads": HEADS, **SCORES},
                    "cross": Part(
                        Key("add_cross_attention", bool, False), {"kind": "cross-attention", "heads": HEADS, **SCORES}
                    ),
                    "ffn": {
                        "kind": "mlp",
                        "hidden": Custom(_hidden, _write_hidden),
                        "act": Key("activation_function", str, "gelu_new", code=activation("gelu_new")),
                    },
                },
            },
        },
        "heads": form.heads,
    }


def _projection(options: Options) -> str:
    to_labels = options.get("summary_proj_to_labels", bool, True)
    return ("score" if to_labels else "states") if options.get("summary_use_proj", bool, True) else "none"


def _write_projection(value: Any, found: dict[str, Any]) -> None:
    found |= {"summary_use_proj": value != "none", "summary_proj_to_labels": value != "states"}


LM = {"tied": TIED}
SUMMARY = {
    "pick": Key(
        "summary_type",
        str,
        "cls_index",
        code=table({"cls_index": "given", "last": "last", "first": "first", "mean": "mean"}),
    ),
    "project": Custom(_projection, _write_projection),
    # An empty name means what null does.
    "act": Key("summary_activation", str, None, code=activation(None, "")),
    "dropout": Key("summary_first_dropout", float, 0.1),
    "last_dropout": Key("summary_last_dropout", float, 0.0),
}
SEQUENCE = {"labels": LABELS, "pick": "last", "bias": False, "dropout": 0.0, "problem": PROBLEM}
TOKEN = {"labels": LABELS, "dropout": LABEL_DROPOUT}

FORMS = (
    Form("GPT2LMHeadModel", "transformer.", {"lm": LM}),
    Form("GPT2Model", "", {}),
    Form("GPT2DoubleHeadsModel", "transformer.", {"lm": LM, "summary": SUMMARY}),
    Form("GPT2ForSequenceClassification", "transformer.", {"sequence": SEQUENCE}),
    Form("GPT2ForTokenClassification", "transformer.", {"token": TOKEN}),
    Form("GPT2ForQuestionAnswering", "transformer.", {"span": {}}),
)


def _fused(theirs: str, ours: str, names: str) -> tuple[Rule, Rule]:
    return (
        Rule((f"{theirs}.weight",), tuple(f"{ours}.{name}.weight" for name in names), FUSED),
        Rule((f"{theirs}.bias",), tuple(f"{ours}.{name}.bias" for name in names), Split()),
    )


def _trunk(config: Config) -> Sequence[Rule]:
    block = "stack.blocks.{layer}"
    return (
        one("wte.weight", "embed.tokens.weight"),
        one("wpe.weight", "embed.positions.table.weight"),
        *layer("h.{layer}.ln_1", f"{block}.wiring.norm.attn"),
        *_fused("h.{layer}.attn.c_attn", f"{block}.attn", "qkv"),
        *layer("h.{layer}.attn.c_proj", f"{block}.attn.o", TRANSPOSE),
        *layer("h.{layer}.ln_cross_attn", f"{block}.wiring.norm.cross"),
        *_fused("h.{layer}.crossattention.c_attn", f"{block}.cross", "kv"),
        *layer("h.{layer}.crossattention.q_attn", f"{block}.cross.q", TRANSPOSE),
        *layer("h.{layer}.crossattention.c_proj", f"{block}.cross.o", TRANSPOSE),
        *layer("h.{layer}.ln_2", f"{block}.wiring.norm.ffn"),
        *layer("h.{layer}.mlp.c_fc", f"{block}.ffn.up", TRANSPOSE),
        *layer("h.{layer}.mlp.c_proj", f"{block}.ffn.down", TRANSPOSE),
        *layer("ln_f", "stack.norm"),
    )


def _ties(config: Any, prefix: str) -> Mapping[str, str]:
    lm = config.heads.get("lm")
    return {"lm_head.weight": f"{prefix}wte.weight"} if lm is not None and lm.tied else {}


SUMMARY_KEYS = (
    "summary_type summary_use_proj summary_proj_to_labels summary_activation summary_first_dropout summary_last_dropout"
).split()


GPT2 = Family(
    name="gpt2",
    types=("gpt2",),
    title="GPT-2",
    template=_template,
    forms=FORMS,
    trunk=_trunk,
    heads=(
        one("lm_head.weight", "heads.lm.decoder.weight"),
        *layer("multiple_choice_head.summary", "heads.summary.dense"),
        *layer("score", "heads.sequence.classifier"),
        *layer("classifier", "heads.token.classifier"),
        *layer("qa_outputs", "heads.span.classifier"),
    ),
    ties=_ties,
    drops=(
        Drop("h.{layer}.attn.bias", "the causal mask", is_lower_triangle),
        Drop("h.{layer}.crossattention.bias", "the causal mask", is_lower_triangle),
        Drop("h.{layer}.attn.masked_bias", "the number that hides a score", is_large_negative),
        Drop("h.{layer}.crossattention.masked_bias", "the number that hides a score", is_large_negative),
    ),
    prefixes=("transformer.", ""),
    fixed={"is_encoder_decoder": (False,)},
    neutral=frozenset(
        {
            "is_decoder",
            "n_ctx",
            "predict_special_tokens",
            "classifier_dropout",
            "hidden_dropout",
            "tie_word_embeddings",
            *SUMMARY_KEYS,
        }
    ),
)
