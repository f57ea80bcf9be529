"""T5: pre-norms without biases, distances in buckets, one token table for both sides; v1.1 is gated and untied."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from xtcli.convert.families.common import LABELS, PAD, PROBLEM, START, TWO_OUTPUTS, activation
from xtcli.convert.family import Family, Form, Shapes
from xtcli.convert.options import OMIT, Custom, Key, Options, Unexpressed, table
from xtcli.convert.rules import Rule, layer, one

DROPOUT = Key("dropout_rate", float, 0.1)
LAYERS = Key("num_layers", int, 6, ("num_hidden_layers",))
ACT = activation("relu")


def _decoder_layers(options: Options) -> int:
    count = options.get("num_decoder_layers", int, None)
    return int(LAYERS.load(options) if count is None else count)


DECODER_LAYERS = Custom(_decoder_layers, lambda value, found: found.update(num_decoder_layers=value))


def _feed_forward(options: Options) -> dict[str, Any]:
    """`feed_forward_proj` is "act" or "gated-act"; files also state what follows from it, and that decides."""
    stated = options.get("feed_forward_proj", str, "relu")
    gate, _, act = stated.rpartition("-")
    if gate not in ("", "gated"):
        options.refuse("feed_forward_proj", f"is {stated!r}", "it reads ACTIVATION or gated-ACTIVATION")
    name = options.get("dense_act_fn", str, "gelu_new" if stated == "gated-gelu" else act)
    gated = options.get("is_gated_act", bool, gate == "gated")
    try:
        act = ACT.load(name)
    except Unexpressed as problem:
        options.refuse("dense_act_fn" if "dense_act_fn" in options.values else "feed_forward_proj", str(problem))
    return {
        "kind": "glu" if gated else "mlp",
        "hidden": options.get("d_ff", int, 2048),
        "act": act,
        "bias": False,
        "dropout": DROPOUT.load(options),
    }


def _write_feed_forward(value: Any, found: dict[str, Any]) -> None:
    if value["kind"] not in ("mlp", "glu"):
        raise Unexpressed(f"no option stands for '{value['kind']}'")
    act, gated = ACT.dump(value["act"]), value["kind"] == "glu"
    if gated and value["act"] == "gelu_tanh":
        found |= {"feed_forward_proj": "gated-gelu", "dense_act_fn": "gelu_new"}
    else:
        found |= {"feed_forward_proj": f"gated-{act}" if gated else act, "dense_act_fn": act}
    found |= {"is_gated_act": gated, "d_ff": value["hidden"]}


FEED_FORWARD = Custom(_feed_forward, _write_feed_forward)


def plain(kind: str) -> dict[str, Any]:
    """An attention of this kind."""
    return {
        "kind": kind,
        "heads": Key("num_heads", int, 8, ("num_attention_heads",)),
        "head_dim": Key("d_kv", int, 64, ("head_dim",)),
        "bias": False,
        "scale": 1.0,
        "dropout": DROPOUT,
    }


def side(layers: Any, cross: bool, attention: Any = None) -> dict[str, Any]:
    """One side of the network; `attention` stands in for the usual kind."""
    return {
        "embed": {"kind": "tokens", "dropout": DROPOUT},
        "stack": {
            "layers": layers,
            "dropout": DROPOUT,
            "position": {
                "kind": "t5",
                "buckets": Key("relative_attention_num_buckets", int, 32),
                "furthest": Key("relative_attention_max_distance", int, 128),
            },
            "block": {
                "wiring": {"kind": "pre", "dropout": DROPOUT},
                "sublayers": {
                    "attn": plain("attention") if attention is None else attention,
                    **({"cross": plain("cross-attention")} if cross else {}),
                    "ffn": FEED_FORWARD,
                },
            },
        },
    }


def template(form: Form) -> dict[str, Any]:
    """What both sides share."""
    return {
        "vocab": Key("vocab_size", int, 32128),
        "dim": Key("d_model", int, 512, ("hidden_size",)),
        "context": Key("n_positions", int, 512),
        "dropout": DROPOUT,
        "pad": PAD,
        "norm": {"kind": "rms", "eps": Key("layer_norm_epsilon", float, 1e-6)},
        "init": {"kind": "fan_in", "factor": Key("initializer_factor", float, 1.0)},
        "heads": form.heads,
        **form.more,
    }


TIED = Key("tie_word_embeddings", bool, True)
LM = {
    "tied": TIED,
    "scale": Key("tie_word_embeddings", bool, True, code=table({True: "inverse-sqrt-dim", False: 1.0})),
}
LABEL_DROPOUT = Key("classifier_dropout", float, 0.0)
SEQUENCE = {
    "labels": LABELS,
    "pick": "end",
    "end": Key("eos_token_id", int, 1),
    "hidden": True,
    "act": "tanh",
    "dropout": LABEL_DROPOUT,
    "problem": PROBLEM,
}
BOTH = {
    "kind": "encoder-decoder",
    "start": START,
    "encoder": side(LAYERS, cross=False),
    "decoder": side(DECODER_LAYERS, cross=True),
}


def _alone(options: Options) -> Any:
    """An encoder alone takes `is_decoder` at its word; with a decoder beside it neither side reads it."""
    if options.get("is_decoder", bool, False):
        options.refuse("is_decoder", "is true, and an encoder alone would be causal", "only false converts")
    return OMIT


ALONE = Custom(_alone, lambda value, found: None)
ENCODER = {"kind": "encoder", "alone": ALONE, **side(LAYERS, cross=False)}


def legacy(prefix: str) -> Any:
    """A bias that old files hold for the cross-attention, where none is used."""

    def groups(config: Any) -> tuple[Shapes, ...]:
        attention = config.decoder.stack.block.sublayers["cross"]
        name = f"{prefix}decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"
        return ({name: (config.decoder.stack.position.buckets, attention.heads)},)

    return groups


FORMS = (
    Form("T5ForConditionalGeneration", "", {"lm": LM}, BOTH, legacy("")),
    Form("T5Model", "", {}, BOTH, legacy("")),
    Form("T5EncoderModel", "", {}, ENCODER),
    Form("T5ForSequenceClassification", "transformer.", {"sequence": SEQUENCE}, BOTH, legacy("transformer.")),
    Form("T5ForTokenClassification", "transformer.", {"token": {"labels": LABELS, "dropout": LABEL_DROPOUT}}, ENCODER),
    Form("T5ForQuestionAnswering", "", {"span": TWO_OUTPUTS}, BOTH, legacy("")),
)


def tower(side: str, ours: str, cross: bool, attention: str) -> tuple[Rule, ...]:
    """The names of one side but for what enters its feed-forwards."""
    block = f"{ours}stack.blocks.{{layer}}"
    theirs = f"{side}.block.{{layer}}.layer"
    last = f"{theirs}.{2 if cross else 1}"
    read = "qkvo"
    return (
        one(
            f"{side}.block.0.layer.0.{attention}.relative_attention_bias.weight",
            f"{ours}stack.shared.biases.0.table.weight",
        ),
        *layer(f"{theirs}.0.layer_norm", f"{block}.wiring.norm.attn"),
        *(rule for n in read for rule in layer(f"{theirs}.0.{attention}.{n}", f"{block}.attn.{n}")),
        *layer(f"{theirs}.1.layer_norm", f"{block}.wiring.norm.cross"),
        *(rule for n in read for rule in layer(f"{theirs}.1.EncDecAttention.{n}", f"{block}.cross.{n}")),
        *layer(f"{last}.layer_norm", f"{block}.wiring.norm.ffn"),
        *layer(f"{last}.DenseReluDense.wo", f"{block}.ffn.down"),
        *layer(f"{side}.final_layer_norm", f"{ours}stack.norm"),
    )


def trunk(config: Any, attention: str = "SelfAttention") -> Sequence[Rule]:
    """The names of the layers; `attention` is that of the encoder's self-attention."""
    both = config.kind == "encoder-decoder"
    towers = (
        (("encoder", "encoder.", False, config.encoder.stack), ("decoder", "decoder.", True, config.decoder.stack))
        if both
        else (("encoder", "", False, config.stack),)
    )
    rules = [one("shared.weight", "tokens.weight" if both else "embed.tokens.weight")]
    for side, ours, cross, stack in towers:
        rules += tower(side, ours, cross, attention if side == "encoder" else "SelfAttention")
        theirs = f"{side}.block.{{layer}}.layer.{2 if cross else 1}.DenseReluDense"
        block = f"{ours}stack.blocks.{{layer}}.ffn"
        if stack.block.sublayers["ffn"].kind == "glu":
            rules += [*layer(f"{theirs}.wi_0", f"{block}.gate"), *layer(f"{theirs}.wi_1", f"{block}.up")]
        else:
            rules += layer(f"{theirs}.wi", f"{block}.up")
    return rules


def ties(config: Any, prefix: str) -> Mapping[str, str]:
    """What shares the token table."""
    sides = ("encoder", "decoder") if config.kind == "encoder-decoder" else ("encoder",)
    ties = {f"{prefix}{side}.embed_tokens.weight": f"{prefix}shared.weight" for side in sides}
    lm = config.heads.get("lm")
    return ties | ({"lm_head.weight": f"{prefix}shared.weight"} if lm is not None and lm.tied else {})


T5 = Family(
    name="t5",
    types=("t5",),
    title="T5",
    template=template,
    forms=FORMS,
    trunk=trunk,
    heads=(
        one("lm_head.weight", "heads.lm.decoder.weight"),
        *layer("classification_head.dense", "heads.sequence.dense"),
        *layer("classification_head.out_proj", "heads.sequence.classifier"),
        *layer("classifier", "heads.token.classifier"),
        *layer("qa_outputs", "heads.span.classifier"),
    ),
    ties=ties,
    prefixes=("", "transformer."),
    neutral=frozenset(
        """
        is_encoder_decoder num_decoder_layers classifier_dropout tie_word_embeddings
        relative_attention_max_distance dense_act_fn is_gated_act n_positions is_decoder add_cross_attention
        """.split()
    ),
    mixed=("wo.weight",),
)
