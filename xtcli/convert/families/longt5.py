"""LongT5: a T5 whose encoder sees what is near, and side tokens that sum up the rest where it is transient-global."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from xtcli.convert.families import t5
from xtcli.convert.families.common import START
from xtcli.convert.family import Family, Form
from xtcli.convert.options import Custom, Key, Options, dump, load
from xtcli.convert.rules import Rule, layer, one

TYPE = Key("encoder_attention_type", str, "local")
RADIUS = {"radius": Key("local_radius", int, 127)}
BLOCK = {"block": Key("global_block_size", int, 16)}
COMMON = {name: mark for name, mark in t5.plain("").items() if name != "kind"}
KINDS = {"local": ("local", COMMON | RADIUS), "transient-global": ("transient-global", COMMON | RADIUS | BLOCK)}
NAMES = {"local": "LocalSelfAttention", "transient-global": "TransientGlobalSelfAttention"}


def _attention(options: Options) -> dict[str, Any]:
    stated = TYPE.load(options)
    if stated not in KINDS:
        options.refuse(TYPE.name, f"is {stated!r}", f"it is {' or '.join(KINDS)}")
        stated = "local"
    kind, body = KINDS[stated]
    return {"kind": kind, **load(body, options)}


def _write_attention(value: Any, found: dict[str, Any]) -> None:
    stated = next((stated for stated, (kind, _) in KINDS.items() if kind == value["kind"]), None)
    # Any other kind is found out when the networks are compared.
    found[TYPE.name] = stated or "local"
    dump(KINDS[found[TYPE.name]][1], value, found, "model.encoder.stack.block.sublayers.attn")


ENCODER_SIDE = t5.side(t5.LAYERS, cross=False, attention=Custom(_attention, _write_attention))
BOTH = {
    "kind": "encoder-decoder",
    "start": START,
    "encoder": ENCODER_SIDE,
    "decoder": t5.side(t5.DECODER_LAYERS, cross=True),
}


def trunk(config: Any) -> Sequence[Rule]:
    """T5's names, but for the encoder's attention."""
    stack = config.encoder.stack if config.kind == "encoder-decoder" else config.stack
    ours = "encoder." if config.kind == "encoder-decoder" else ""
    name = NAMES[stack.block.sublayers["attn"].kind]
    return (
        *t5.trunk(config, name),
        one(
            f"encoder.block.0.layer.0.{name}.global_relative_attention_bias.weight",
            f"{ours}stack.shared.biases.1.table.weight",
        ),
        *layer(
            f"encoder.block.{{layer}}.layer.0.{name}.global_input_layer_norm",
            f"{ours}stack.blocks.{{layer}}.attn.side_norm",
        ),
    )


LONGT5 = Family(
    name="longt5",
    types=("longt5",),
    title="LongT5",
    template=t5.template,
    forms=(
        Form("LongT5ForConditionalGeneration", "", {"lm": t5.LM}, BOTH, t5.legacy("")),
        Form("LongT5Model", "", {}, BOTH, t5.legacy("")),
        Form("LongT5EncoderModel", "", {}, {"kind": "encoder", "alone": t5.ENCODER["alone"], **ENCODER_SIDE}),
    ),
    trunk=trunk,
    heads=(one("lm_head.weight", "heads.lm.decoder.weight"),),
    ties=t5.ties,
    neutral=frozenset(
        """
        is_encoder_decoder num_decoder_layers tie_word_embeddings relative_attention_max_distance dense_act_fn
        is_gated_act n_positions global_block_size is_decoder add_cross_attention
        """.split()
    ),
    mixed=("wo.weight",),
)
