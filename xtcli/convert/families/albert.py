"""ALBERT: an encoder whose layers share weights in groups, over a token table narrower than the states.

Its relative scores are added after the others have been divided by sqrt(head width), and are not divided themselves.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from xtcli.convert.families.common import (
    LABELS,
    PROBLEM,
    TWO_OUTPUTS,
    activation,
    counts_up,
    given,
    is_zero,
    pad,
    undropped,
)
from xtcli.convert.family import Drop, Family, Form, Shapes
from xtcli.convert.options import Code, Custom, Key, Options, Switch
from xtcli.convert.rules import Rule, layer, one
from xtcli.registry import Config

CONTEXT = Key("max_position_embeddings", int, 512)
DROPOUT = Key("hidden_dropout_prob", float, 0.0)
WIDTH = Key("embedding_size", int, 128)
ACT = Key("hidden_act", str, "gelu_new", code=activation("gelu_new"))
POSITIONS = Key("position_embedding_type", str, "absolute")
DISTANCE = Key("max_position_embeddings", int, 512, code=Code(lambda value: value - 1, lambda value: value + 1))
PAD = pad(0)
LABEL_DROPOUT = Key("classifier_dropout_prob", float, 0.1)


def _relative(key_term: bool) -> dict[str, Any]:
    return {"kind": "shaw", "distance": DISTANCE, "key_term": key_term, "scaled": False}


def _write_width(value: Any, found: dict[str, Any]) -> None:
    found["embedding_size"] = value or found["hidden_size"]


def _template(form: Form) -> dict[str, Any]:
    return {
        "kind": "encoder",
        "vocab": Key("vocab_size", int, 30000),
        "dim": Key("hidden_size", int, 4096),
        "context": CONTEXT,
        "dropout": DROPOUT,
        "pad": PAD,
        "norm": {"kind": "layer", "eps": Key("layer_norm_eps", float, 1e-12)},
        "init": {"kind": "normal", "std": Key("initializer_range", float, 0.02)},
        "embed": {
            "kind": "factorised",
            "width": Custom(WIDTH.load, _write_width),
            "positions": Switch(
                POSITIONS,
                {
                    "absolute": {"kind": "learned"},
                    "relative_key": {"kind": "none"},
                    "relative_key_query": {"kind": "none"},
                },
                silent=True,
            ),
            "segments": Key("type_vocab_size", int, 2),
            "norm": {"kind": "inherit"},
            "dropout": DROPOUT,
        },
        "stack": {
            "kind": "grouped",
            "layers": Key("num_hidden_layers", int, 12),
            "groups": Key("num_hidden_groups", int, 1),
            "inner": Key("inner_group_num", int, 1),
            "norm": {"kind": "none"},
            "block": {
                "wiring": {"kind": "post", "dropout": undropped("ffn")},
                "sublayers": {
                    "attn": {
                        "kind": "attention",
                        "heads": Key("num_attention_heads", int, 64),
                        "dropout": Key("attention_probs_dropout_prob", float, 0.0),
                        "position": Switch(
                            POSITIONS,
                            {
                                "relative_key": _relative(False),
                                "relative_key_query": _relative(True),
                                "absolute": {"kind": "none"},
                            },
                        ),
                    },
                    "ffn": {"kind": "mlp", "hidden": Key("intermediate_size", int, 16384), "act": ACT},
                },
            },
        },
        "heads": form.heads,
        **form.more,
    }


def _token_dropout(options: Options) -> float:
    rate = given(options, "classifier_dropout_prob", float, 0.1)
    return float(DROPOUT.load(options) if rate is None else rate)


TOKEN_DROPOUT = Custom(_token_dropout, lambda value, found: found.update(classifier_dropout_prob=value))
"""Dropout before the labels of tokens, that of the states where the key is null; elsewhere it must be a number."""
POOLER = {"pooler": {"act": "tanh"}}


def _mlm(output: str) -> dict[str, Any]:
    return {"act": ACT, "tied": Key("tie_word_embeddings", bool, True), "output": output}


def _pooler(config: Any) -> Shapes:
    return {"albert.pooler.weight": (config.dim, config.dim), "albert.pooler.bias": (config.dim,)}


def _order(config: Any) -> Shapes:
    return {"sop_classifier.classifier.weight": (2, config.dim), "sop_classifier.classifier.bias": (2,)}


def _both(config: Config) -> tuple[Shapes, ...]:
    return _pooler(config), _order(config)


def _pooler_alone(config: Config) -> tuple[Shapes, ...]:
    return (_pooler(config),)


FORMS = (
    Form(
        "AlbertForPreTraining",
        "albert.",
        {"mlm": _mlm("prediction_logits"), "sop": {"labels": LABELS, "dropout": LABEL_DROPOUT}},
        POOLER,
    ),
    Form("AlbertForMaskedLM", "albert.", {"mlm": _mlm("logits")}, {}, _both),
    Form("AlbertModel", "", {}, POOLER),
    Form("AlbertModel", "", {}),
    Form(
        "AlbertForSequenceClassification",
        "albert.",
        {"sequence": {"labels": LABELS, "pick": "pooled", "dropout": LABEL_DROPOUT, "problem": PROBLEM}},
        POOLER,
    ),
    Form("AlbertForMultipleChoice", "albert.", {"choice": {"dropout": LABEL_DROPOUT}}, POOLER),
    Form(
        "AlbertForTokenClassification",
        "albert.",
        {"token": {"labels": LABELS, "dropout": TOKEN_DROPOUT}},
        {},
        _pooler_alone,
    ),
    Form("AlbertForQuestionAnswering", "albert.", {"span": TWO_OUTPUTS}, {}, _pooler_alone),
)


def _block(theirs: str, ours: str) -> tuple[Rule, ...]:
    return (
        *layer(f"{theirs}.attention.query", f"{ours}.attn.q"),
        *layer(f"{theirs}.attention.key", f"{ours}.attn.k"),
        *layer(f"{theirs}.attention.value", f"{ours}.attn.v"),
        one(f"{theirs}.attention.distance_embedding.weight", f"{ours}.attn.relative.table.weight"),
        *layer(f"{theirs}.attention.dense", f"{ours}.attn.o"),
        *layer(f"{theirs}.attention.LayerNorm", f"{ours}.wiring.norm.attn"),
        *layer(f"{theirs}.ffn", f"{ours}.ffn.up"),
        *layer(f"{theirs}.ffn_output", f"{ours}.ffn.down"),
        *layer(f"{theirs}.full_layer_layer_norm", f"{ours}.wiring.norm.ffn"),
    )


def _trunk(config: Any) -> Sequence[Rule]:
    groups, inner = config.stack.groups, config.stack.inner
    blocks = [
        rule
        for group in range(groups)
        for number in range(inner)
        for rule in _block(
            f"encoder.albert_layer_groups.{group}.albert_layers.{number}", f"stack.blocks.{group * inner + number}"
        )
    ]
    return (
        one("embeddings.word_embeddings.weight", "embed.tokens.weight"),
        one("embeddings.position_embeddings.weight", "embed.positions.table.weight"),
        one("embeddings.token_type_embeddings.weight", "embed.segments.weight"),
        *layer("embeddings.LayerNorm", "embed.norm"),
        *layer("encoder.embedding_hidden_mapping_in", "embed.project"),
        *blocks,
        *layer("pooler", "pooler.dense"),
    )


def _ties(config: Any, prefix: str) -> Mapping[str, str]:
    head = config.heads.get("mlm")
    if head is None:
        return {}
    bias = {"predictions.decoder.bias": "predictions.bias"}
    table = {"predictions.decoder.weight": f"{prefix}embeddings.word_embeddings.weight"}
    return bias | table if head.tied else bias


def _dead(config: Any) -> Shapes:
    absolute = config.embed.positions.kind == "learned"
    return (
        {}
        if absolute
        else {"embeddings.position_embeddings.weight": (config.context, config.embed.width or config.dim)}
    )


ALBERT = Family(
    name="albert",
    types=("albert",),
    title="ALBERT",
    template=_template,
    forms=FORMS,
    trunk=_trunk,
    heads=(
        *layer("predictions.dense", "heads.mlm.dense"),
        *layer("predictions.LayerNorm", "heads.mlm.norm"),
        one("predictions.decoder.weight", "heads.mlm.decoder.weight"),
        one("predictions.bias", "heads.mlm.bias"),
        *layer("sop_classifier.classifier", "heads.sop.classifier"),
        *layer("classifier", "heads.sequence.classifier"),
        *layer("classifier", "heads.choice.classifier"),
        *layer("classifier", "heads.token.classifier"),
        *layer("qa_outputs", "heads.span.classifier"),
    ),
    ties=_ties,
    dead=_dead,
    drops=(
        Drop("embeddings.position_ids", "0, 1, 2 ...", counts_up),
        Drop("embeddings.token_type_ids", "zeros", is_zero),
    ),
    aliases=(("LayerNorm.gamma", "LayerNorm.weight"), ("LayerNorm.beta", "LayerNorm.bias")),
    prefixes=("albert.", ""),
    neutral=frozenset(
        """
        add_cross_attention classifier_dropout_prob down_scale_factor gap_size is_decoder is_encoder_decoder
        layers_to_keep net_structure_type num_memory_blocks tie_word_embeddings
        """.split()
    ),
)
