"""BLOOM: query, key and value fused head by head, ALiBi, a norm behind the token table.

Three surprises: `slow_but_exact` with `pretraining_tp` above 1 leaves the biases of each block's outputs out; positions
given by hand are ignored, places count the real tokens; and released files have neither a
prefix nor the keys of their config in one place (`n_embed` and `num_attention_heads` beside `n_layer`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from xtcli.convert.families.common import LABEL_DROPOUT, LABELS, PAD, PROBLEM
from xtcli.convert.family import Family, Form, Shapes
from xtcli.convert.options import Custom, Key, Options, Switch, Unexpressed
from xtcli.convert.rules import Interleave, Rule, layer, one

DIM = Key("hidden_size", int, 64, ("n_embed",))
CONTEXT = Custom(
    lambda options: options.get("seq_length", int, None),
    lambda value, found: None if value is None else found.update(seq_length=value),
)
HIDDEN_DROPOUT = Key("hidden_dropout", float, 0.0)


def _out_bias(options: Options) -> bool:
    exact, parallel = options.get("slow_but_exact", bool, False), options.get("pretraining_tp", int, 1)
    return not (exact and parallel > 1)


def _write_out_bias(value: Any, found: dict[str, Any]) -> None:
    if value is False:
        found |= {"slow_but_exact": True, "pretraining_tp": 2}


OUT_BIAS = Custom(_out_bias, _write_out_bias)


def _hidden(options: Options) -> int:
    return int(4 * DIM.load(options))


def _write_hidden(value: Any, found: dict[str, Any]) -> None:
    if value != 4 * found["hidden_size"]:
        raise Unexpressed(f"{value} is not four times the width")


WIRING = Switch(
    Key("apply_residual_connection_post_layernorm", bool, False),
    {
        False: {"kind": "pre", "norm": {"kind": "inherit"}, "dropout": HIDDEN_DROPOUT},
        True: {"kind": "normed", "norm": {"kind": "inherit"}, "dropout": HIDDEN_DROPOUT},
    },
)


def _template(form: Form) -> dict[str, Any]:
    return {
        "kind": "decoder",
        "vocab": Key("vocab_size", int, 250880),
        "dim": DIM,
        "context": CONTEXT,
        "dropout": HIDDEN_DROPOUT,
        "pad": PAD,
        "norm": {"kind": "layer", "eps": Key("layer_norm_epsilon", float, 1e-5)},
        "init": {"kind": "normal", "std": Key("initializer_range", float, 0.02)},
        "embed": {"kind": "tokens", "norm": {"kind": "inherit"}, "dropout": 0.0},
        "stack": {
            "layers": Key("n_layer", int, 2, ("num_hidden_layers",)),
            "position": {"kind": "alibi", "places": "counted"},
            "block": {
                "wiring": WIRING,
                "sublayers": {
                    "attn": {
                        "kind": "attention",
                        "heads": Key("n_head", int, 8, ("num_attention_heads",)),
                        "out_bias": OUT_BIAS,
                        "dropout": Key("attention_dropout", float, 0.0),
                    },
                    "ffn": {
                        "kind": "mlp",
                        "hidden": Custom(_hidden, _write_hidden),
                        "act": "gelu_fast",
                        "out_bias": OUT_BIAS,
                    },
                },
            },
        },
        "heads": form.heads,
    }


LM = {"tied": Key("tie_word_embeddings", bool, True)}
SEQUENCE = {"labels": LABELS, "pick": "last", "bias": False, "dropout": 0.0, "problem": PROBLEM}

FORMS = (
    Form("BloomForCausalLM", "transformer.", {"lm": LM}),
    Form("BloomModel", "", {}),
    Form("BloomForSequenceClassification", "transformer.", {"sequence": SEQUENCE}),
    Form("BloomForTokenClassification", "transformer.", {"token": {"labels": LABELS, "dropout": LABEL_DROPOUT}}),
    Form("BloomForQuestionAnswering", "transformer.", {"span": {}}),
)


def fused(theirs: str, ours: str, groups: int) -> tuple[Rule, ...]:
    """The fused layer: for each group of heads that share a key, its queries, its key, its value."""
    return tuple(
        Rule((f"{theirs}.{name}",), tuple(f"{ours}.{n}.{name}" for n in "qkv"), Interleave(groups))
        for name in ("weight", "bias")
    )


def _trunk(config: Any) -> Sequence[Rule]:
    block = "stack.blocks.{layer}"
    return (
        one("word_embeddings.weight", "embed.tokens.weight"),
        *layer("word_embeddings_layernorm", "embed.norm"),
        *layer("h.{layer}.input_layernorm", f"{block}.wiring.norm.attn"),
        *fused(
            "h.{layer}.self_attention.query_key_value",
            f"{block}.attn",
            config.stack.block.sublayers["attn"].heads,
        ),
        *layer("h.{layer}.self_attention.dense", f"{block}.attn.o"),
        *layer("h.{layer}.post_attention_layernorm", f"{block}.wiring.norm.ffn"),
        *layer("h.{layer}.mlp.dense_h_to_4h", f"{block}.ffn.up"),
        *layer("h.{layer}.mlp.dense_4h_to_h", f"{block}.ffn.down"),
        *layer("ln_f", "stack.norm"),
    )


def ties(config: Any, prefix: str) -> Mapping[str, str]:
    """A tied head stands for the token table."""
    lm = config.heads.get("lm")
    return {"lm_head.weight": f"{prefix}word_embeddings.weight"} if lm is not None and lm.tied else {}


def _dead(config: Any) -> Shapes:
    """The biases of each block's outputs, where the reference passes them over."""
    if config.stack.block.sublayers["ffn"].out_bias is not False:
        return {}
    names = ("self_attention.dense.bias", "mlp.dense_4h_to_h.bias")
    return {f"h.{layer}.{name}": (config.dim,) for layer in range(config.stack.layers) for name in names}


HEADS = (
    one("lm_head.weight", "heads.lm.decoder.weight"),
    one("score.weight", "heads.sequence.classifier.weight"),
    *layer("classifier", "heads.token.classifier"),
    *layer("qa_outputs", "heads.span.classifier"),
)

BLOOM = Family(
    name="bloom",
    types=("bloom",),
    title="BLOOM",
    template=_template,
    forms=FORMS,
    trunk=_trunk,
    heads=HEADS,
    ties=ties,
    dead=_dead,
    prefixes=("transformer.", ""),
    fixed={"is_encoder_decoder": (False,)},
    neutral=frozenset(
        """
        is_decoder add_cross_attention pretraining_tp slow_but_exact classifier_dropout tie_word_embeddings
        attention_softmax_in_fp32 bias_dropout_fusion masked_softmax_fusion n_inner offset_alibi skip_bias_add
        skip_bias_add_qkv unk_token_id
        """.split()
    ),
)
