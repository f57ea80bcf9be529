"""SqueezeBERT: a BERT whose dense layers are 1 x 1 convolutions in groups.

The norms of its layers have an epsilon of their own, 1e-12, whatever `layer_norm_eps` says.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from xtcli.convert.families import bert
from xtcli.convert.families.bert import ATTENTION_DROPOUT, DIM, DROPOUT, HEADS, POOLER, TIED
from xtcli.convert.families.common import LABELS, PAD, TWO_OUTPUTS, activation, counts_up
from xtcli.convert.families.fnet import SEQUENCE, unread_pooler
from xtcli.convert.family import Drop, Family, Form
from xtcli.convert.options import Custom, Key, Options, table
from xtcli.convert.rules import Rule, Unit, layer, one
from xtcli.registry import Config

ACT = Key("hidden_act", str, "gelu", code=activation("gelu"))


def _width(options: Options) -> int:
    dim, width = DIM.load(options), options.get("embedding_size", int, 768)
    if width != dim:
        options.refuse("embedding_size", f"is {width}, hidden_size is {dim}: the reference builds no such network")
    return int(dim)


def _write_width(value: Any, found: dict[str, Any]) -> None:
    found.update(hidden_size=value, embedding_size=value)


def _groups(name: str, usual: int) -> Key:
    return Key(f"{name}_groups", int, usual)


def _template(form: Form) -> dict[str, Any]:
    return {
        "kind": Key("is_decoder", bool, False, code=table({False: "encoder", True: "decoder"})),
        "vocab": Key("vocab_size", int, 30522),
        "dim": Custom(_width, _write_width),
        "context": Key("max_position_embeddings", int, 512),
        "dropout": DROPOUT,
        "pad": PAD,
        "norm": {"kind": "layer", "eps": Key("layer_norm_eps", float, 1e-12)},
        "init": {"kind": "normal", "std": Key("initializer_range", float, 0.02)},
        "embed": {
            "kind": "tokens",
            "positions": {"kind": "learned"},
            "segments": Key("type_vocab_size", int, 2),
            "norm": {"kind": "inherit"},
            "dropout": DROPOUT,
        },
        "stack": {
            "layers": Key("num_hidden_layers", int, 12),
            "norm": {"kind": "none"},
            "block": {
                "wiring": {"kind": "post", "dropout": DROPOUT, "norm": {"kind": "layer", "eps": 1e-12}},
                "sublayers": {
                    "attn": {
                        "kind": "grouped-attention",
                        "heads": HEADS,
                        "dropout": ATTENTION_DROPOUT,
                        "q_groups": _groups("q", 4),
                        "k_groups": _groups("k", 4),
                        "v_groups": _groups("v", 4),
                        "out_groups": _groups("post_attention", 1),
                    },
                    "ffn": {
                        "kind": "grouped-mlp",
                        "hidden": Key("intermediate_size", int, 3072),
                        "act": ACT,
                        "up_groups": _groups("intermediate", 4),
                        "down_groups": _groups("output", 4),
                    },
                },
            },
        },
        "heads": form.heads,
        **form.more,
    }


TRUNK = "transformer."
FORMS = (
    Form("SqueezeBertForMaskedLM", TRUNK, {"mlm": {"act": ACT, "tied": TIED, "output": "logits"}}),
    Form("SqueezeBertModel", "", {}, POOLER),
    Form("SqueezeBertForSequenceClassification", TRUNK, {"sequence": SEQUENCE}, POOLER),
    Form("SqueezeBertForMultipleChoice", TRUNK, {"choice": {"dropout": DROPOUT}}, POOLER),
    Form("SqueezeBertForTokenClassification", TRUNK, {"token": {"labels": LABELS, "dropout": DROPOUT}}),
    Form("SqueezeBertForQuestionAnswering", TRUNK, {"span": TWO_OUTPUTS}),
)


def _trunk(config: Config) -> Sequence[Rule]:
    theirs, block = "encoder.layers.{layer}", "stack.blocks.{layer}"
    width = Unit((2,))
    return (
        one("embeddings.word_embeddings.weight", "embed.tokens.weight"),
        one("embeddings.position_embeddings.weight", "embed.positions.table.weight"),
        one("embeddings.token_type_embeddings.weight", "embed.segments.weight"),
        *layer("embeddings.LayerNorm", "embed.norm"),
        *layer(f"{theirs}.attention.query", f"{block}.attn.q", width),
        *layer(f"{theirs}.attention.key", f"{block}.attn.k", width),
        *layer(f"{theirs}.attention.value", f"{block}.attn.v", width),
        *layer(f"{theirs}.post_attention.conv1d", f"{block}.attn.o", width),
        *layer(f"{theirs}.post_attention.layernorm", f"{block}.wiring.norm.attn"),
        *layer(f"{theirs}.intermediate.conv1d", f"{block}.ffn.up", width),
        *layer(f"{theirs}.output.conv1d", f"{block}.ffn.down", width),
        *layer(f"{theirs}.output.layernorm", f"{block}.wiring.norm.ffn"),
        *layer("pooler.dense", "pooler.dense"),
    )


SQUEEZEBERT = Family(
    name="squeezebert",
    types=("squeezebert",),
    title="SqueezeBERT",
    template=_template,
    forms=FORMS,
    trunk=_trunk,
    heads=bert.BERT.heads,
    ties=bert.ties,
    dead=unread_pooler,
    drops=(Drop("embeddings.position_ids", "0, 1, 2 ...", counts_up),),
    prefixes=("transformer.", ""),
    neutral=frozenset({"add_cross_attention", "is_encoder_decoder", "tie_word_embeddings"}),
)
