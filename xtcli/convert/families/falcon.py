"""Falcon: three ways to fuse query, key and value; blocks in parallel or in turn; rotary positions or ALiBi.

    new_decoder_architecture          key/value heads by num_kv_heads, blocks in parallel, one or two norms
    multi_query (else)                one key/value head; in parallel behind one norm, or in turn
    neither                           as many key/value heads as heads; the same

Fused rows are those of each key/value head with its queries in front, in all three. Surprises: `parallel_attn` and
`multi_query` say nothing in the new architecture, `num_kv_heads` nothing outside it; biases of ALiBi are divided by
sqrt(head width) and rounded to bfloat16. In training the reference drops no attention weights out where positions
are rotary, and drops what attention adds out by `attention_dropout` in blocks that run in turn; here the weights are
dropped out everywhere, and what is added by `hidden_dropout`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from xtcli.convert.families.bloom import HEADS, SEQUENCE, fused, ties
from xtcli.convert.families.common import LABEL_DROPOUT, LABELS, PAD, activation
from xtcli.convert.families.llama import is_inverse_frequencies
from xtcli.convert.families.scaling import SCALING
from xtcli.convert.family import Drop, Family, Form
from xtcli.convert.options import Custom, Key, Options, Switch, Unexpressed
from xtcli.convert.rules import Rule, layer, one

DIM = Key("hidden_size", int, 4544, ("n_embed",))
HEAD_COUNT = Key("num_attention_heads", int, 71)
BIAS = Key("bias", bool, False)
HIDDEN_DROPOUT = Key("hidden_dropout", float, 0.0)
NEW = Key("new_decoder_architecture", bool, False)
PARALLEL = Key("parallel_attn", bool, True)
MULTI_QUERY = Key("multi_query", bool, True)


def _hidden(options: Options) -> int:
    stated = options.get("ffn_hidden_size", int, None)
    # The reference multiplies its default where only the older name of the width is given.
    width = DIM.load(options) if "hidden_size" in options.values else DIM.default
    return int(4 * width if stated is None else stated)


def _write_hidden(value: Any, found: dict[str, Any]) -> None:
    found["ffn_hidden_size"] = value


def _kv_heads(options: Options) -> int:
    heads, stated = HEAD_COUNT.load(options), options.get("num_kv_heads", int, None)
    if NEW.load(options):
        return int(heads if stated is None else stated)
    if MULTI_QUERY.load(options):
        return 1
    if stated not in (None, heads):
        options.refuse(
            "num_kv_heads",
            f"is {stated}, but without multi_query there are as many as heads, {heads}",
            "the reference cannot run this; set new_decoder_architecture, or leave it out",
        )
    return int(heads)


def _write_kv_heads(value: Any, found: dict[str, Any]) -> None:
    # Whether the architecture is new has been found by the wiring, which stands before the sublayers.
    if found["new_decoder_architecture"]:
        found |= {"num_kv_heads": value}
    elif value in (1, found["num_attention_heads"]):
        found |= {"multi_query": value == 1, "num_kv_heads": found["num_attention_heads"]}
    elif found["parallel_attn"]:
        # Blocks in parallel behind one norm are in the new architecture too, with any grouping.
        found |= {"new_decoder_architecture": True, "num_ln_in_parallel_attn": 1, "num_kv_heads": value}
    else:
        raise Unexpressed(f"{value} key/value heads are grouped, which blocks that run in turn cannot have")


def _wiring(options: Options) -> dict[str, Any]:
    new, parallel = NEW.load(options), PARALLEL.load(options)
    norms = options.get("num_ln_in_parallel_attn", int, None)
    if new and not parallel:
        options.refuse("parallel_attn", "is false in the new architecture", "the reference cannot run this")
    if new and norms not in (None, 1, 2):
        options.refuse("num_ln_in_parallel_attn", f"is {norms}", "there are 1 or 2")
    if not new and parallel and norms == 2:
        options.refuse("num_ln_in_parallel_attn", "is 2 in the old architecture", "the reference cannot run this")
    kind = "pre" if not parallel else "parallel" if new and norms != 1 else "parallel-shared"
    return {"kind": kind, "norm": {"kind": "inherit"}, "dropout": HIDDEN_DROPOUT.load(options)}


def _write_wiring(value: Any, found: dict[str, Any]) -> None:
    kind = value["kind"]
    if kind not in NORMS:
        raise Unexpressed(f"no option stands for '{kind}'")
    found |= {"new_decoder_architecture": kind == "parallel", "parallel_attn": kind != "pre"}
    found |= {"num_ln_in_parallel_attn": 2 if kind == "parallel" else None, "hidden_dropout": value["dropout"]}


POSITION = Switch(
    Key("alibi", bool, False),
    {
        False: {"kind": "rotary", "theta": Key("rope_theta", float, 10000.0), "scaling": SCALING},
        True: {"kind": "alibi", "places": "counted", "scaled": True, "rounded": True},
    },
)


def _template(form: Form) -> dict[str, Any]:
    return {
        "kind": "decoder",
        "vocab": Key("vocab_size", int, 65024),
        "dim": DIM,
        "context": Key("max_position_embeddings", int, 2048),
        "dropout": HIDDEN_DROPOUT,
        "pad": PAD,
        "norm": {"kind": "layer", "eps": Key("layer_norm_epsilon", float, 1e-5)},
        "init": {"kind": "normal", "std": Key("initializer_range", float, 0.02)},
        "embed": {"kind": "tokens", "dropout": 0.0},
        "stack": {
            "layers": Key("num_hidden_layers", int, 32),
            "position": POSITION,
            "block": {
                "wiring": Custom(_wiring, _write_wiring),
                "sublayers": {
                    "attn": {
                        "kind": "attention",
                        "heads": HEAD_COUNT,
                        "kv_heads": Custom(_kv_heads, _write_kv_heads),
                        "bias": BIAS,
                        "dropout": Key("attention_dropout", float, 0.0),
                    },
                    "ffn": {
                        "kind": "mlp",
                        "hidden": Custom(_hidden, _write_hidden),
                        "act": Key("activation", str, "gelu", code=activation("gelu")),
                        "bias": BIAS,
                    },
                },
            },
        },
        "heads": form.heads,
    }


FORMS = (
    Form("FalconForCausalLM", "transformer.", {"lm": {"tied": Key("tie_word_embeddings", bool, True)}}),
    Form("FalconModel", "", {}),
    Form("FalconForSequenceClassification", "transformer.", {"sequence": SEQUENCE}),
    Form("FalconForTokenClassification", "transformer.", {"token": {"labels": LABELS, "dropout": LABEL_DROPOUT}}),
    Form("FalconForQuestionAnswering", "transformer.", {"span": {}}),
)

NORMS = {
    "pre": {"input_layernorm": "norm.attn", "post_attention_layernorm": "norm.ffn"},
    "parallel": {"ln_attn": "norm.attn", "ln_mlp": "norm.ffn"},
    "parallel-shared": {"input_layernorm": "norm"},
}


def _trunk(config: Any) -> Sequence[Rule]:
    block = "stack.blocks.{layer}"
    attention = config.stack.block.sublayers["attn"]
    names = NORMS[config.stack.block.wiring.kind]
    return (
        one("word_embeddings.weight", "embed.tokens.weight"),
        *(rule for theirs, ours in names.items() for rule in layer(f"h.{{layer}}.{theirs}", f"{block}.wiring.{ours}")),
        *fused("h.{layer}.self_attention.query_key_value", f"{block}.attn", attention.kv_heads or attention.heads),
        *layer("h.{layer}.self_attention.dense", f"{block}.attn.o"),
        *layer("h.{layer}.mlp.dense_h_to_4h", f"{block}.ffn.up"),
        *layer("h.{layer}.mlp.dense_4h_to_h", f"{block}.ffn.down"),
        *layer("ln_f", "stack.norm"),
    )


FALCON = Family(
    name="falcon",
    types=("falcon",),
    title="Falcon",
    template=_template,
    forms=FORMS,
    trunk=_trunk,
    heads=HEADS,
    ties=ties,
    drops=tuple(
        Drop(name, "the rotary frequencies", is_inverse_frequencies)
        for name in ("h.{layer}.self_attention.rotary_emb.inv_freq", "rotary_emb.inv_freq")
    ),
    prefixes=("transformer.", ""),
    fixed={"is_encoder_decoder": (False,), "partial_rotary_factor": (1.0, None)},
    kernel="sdpa",
    neutral=frozenset(
        """
        is_decoder add_cross_attention classifier_dropout tie_word_embeddings num_ln_in_parallel_attn num_kv_heads
        multi_query parallel_attn apply_residual_connection_post_layernorm rope_theta rope_scaling
        original_max_position_embeddings auto_map
        """.split()
    ),
)
