"""Mega: gated attention of one head over a moving average, as an encoder or a decoder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from xtcli.convert.families.bert import CLASSIFIER_DROPOUT, CROSS, POOLER, TIED
from xtcli.convert.families.bert import DROPOUT as VALUE_DROPOUT
from xtcli.convert.families.common import LABELS, TWO_OUTPUTS, activation, pad
from xtcli.convert.families.roberta import sequence
from xtcli.convert.family import Family, Form, Shapes
from xtcli.convert.options import Code, Custom, Key, Options, Part, Switch, Unexpressed, table
from xtcli.convert.rules import Rule, Unit, layer, one

ACTIVATIONS = activation("silu")
DIM = Key("hidden_size", int, 128)
DECODES = Key("is_decoder", bool, False)
SPAN = Key("max_positions", int, 2048)
CHUNKS = Key("use_chunking", bool, False)
CHUNK = Key("chunk_size", int, -1)
DISTANCE = Key("relative_positional_bias", str, "rotary")
BOTH = Key("bidirectional", bool, True)
DROPOUT = Key("dropout_prob", float, 0.1)
CHANNELS = Key("use_feature_dropout", bool, False)
ACT = Key("activation", str, "silu", code=ACTIVATIONS)
NORM = Key("normalization_type", str, "scalenorm")
AFFINE = Key("norm_affine", bool, True)
FEEDS = Key("use_normalized_ffn", bool, True)
BEFORE = Key("normalize_before_mega", bool, True)
FFN_BEFORE = Key("normalize_before_ffn", bool, True)
TYPED = Key("add_token_type_embeddings", bool, False)
TYPES = Key("type_vocab_size", int, 2)
DENSE = Key("add_lm_hidden_dense_layer", bool, True)
EPS = 1e-5

NORMS: Mapping[tuple[str, bool], dict[str, Any]] = {
    ("scalenorm", True): {"kind": "rms-scale", "eps": EPS},
    ("scalenorm", False): {"kind": "simple-rms", "eps": EPS},
    ("layernorm", True): {"kind": "layer", "eps": EPS, "bias": True},
    ("batchnorm", True): {"kind": "batch", "eps": EPS, "affine": True},
    ("batchnorm", False): {"kind": "batch", "eps": EPS, "affine": False},
    # The reference computes the mean square and leaves it out.
    ("rmsnorm", True): {"kind": "gain"},
    ("rmsnorm", False): {"kind": "none"},
}


def _norm(options: Options) -> dict[str, Any]:
    key = NORM.load(options), AFFINE.load(options)
    if key == ("layernorm", False):
        options.refuse(AFFINE.name, f"is false, and {NORM.name} 'layernorm': the reference makes no such network")
        return {"kind": "none"}
    if key not in NORMS:
        options.refuse(NORM.name, f"is {key[0]!r}", "scalenorm, layernorm, rmsnorm and batchnorm are expressed")
        return NORMS["scalenorm", True]
    return NORMS[key]


def _write_norm(value: Any, found: dict[str, Any]) -> None:
    for (name, affine), body in NORMS.items():
        if body == value:
            found[NORM.name], found[AFFINE.name] = name, affine
            return
    raise Unexpressed(f"no option stands for {value!r}")


def _wiring(options: Options) -> dict[str, Any]:
    feeds, before, ffn_before = FEEDS.load(options), BEFORE.load(options), FFN_BEFORE.load(options)
    mixers = ["attn", "cross"] if CROSS.load(options) else ["attn"]
    rates = dict.fromkeys(mixers, 0.0) | ({"ffn": DROPOUT.load(options)} if feeds else {})
    drops = {"dropout": rates, "channels": CHANNELS.load(options)}
    if not feeds or before == ffn_before:
        return {"kind": "pre" if before else "post", **drops}
    return {"kind": "pre-post", "after": ["ffn"] if before else mixers, **drops}


def _write_wiring(value: Any, found: dict[str, Any]) -> None:
    after = {"pre": (), "post": ("attn", "ffn")}.get(value["kind"], value.get("after"))
    if after is None:
        raise Unexpressed(f"no option stands for '{value['kind']}'")
    found[BEFORE.name], found[FFN_BEFORE.name] = "attn" not in after, "ffn" not in after


WIRING = Custom(_wiring, _write_wiring)


def _chunk(options: Options) -> int | None:
    chunk = CHUNK.load(options)
    if not CHUNKS.load(options):
        return None
    if chunk < 1:
        options.refuse(CHUNK.name, f"is {chunk}, and {CHUNKS.name} is true", "say how many tokens a chunk has")
        return 1
    return int(chunk)


def _write_chunk(value: Any, found: dict[str, Any]) -> None:
    found[CHUNKS.name] = value is not None
    if value is not None:
        found[CHUNK.name] = value


def _distance(options: Options) -> dict[str, Any]:
    kind, span, chunk = DISTANCE.load(options), SPAN.load(options), CHUNK.load(options)
    if kind == "rotary":
        return {"kind": "rotary"}
    if kind != "simple":
        options.refuse(DISTANCE.name, f"is {kind!r}", "it is simple or rotary")
    if chunk == 0 or chunk > span:
        options.refuse(CHUNK.name, f"is {chunk}, and the table of biases is for {span} places: the reference fails")
        chunk = -1
    return {"kind": "table", "span": span, "centre": (span if chunk < 0 else chunk) - 1}


def _write_distance(value: Any, found: dict[str, Any]) -> None:
    found[DISTANCE.name] = "rotary" if value["kind"] == "rotary" else "simple"
    if value["kind"] == "rotary":
        return
    span = found[SPAN.name] if value["span"] is None else value["span"]
    centre = span - 1 if value["centre"] is None else value["centre"]
    if span != found[SPAN.name] or centre + 1 != found.get(CHUNK.name, centre + 1):
        raise Unexpressed("the table of distances is not of the context, with its centre at the chunk's end")
    if centre != span - 1:
        found[CHUNK.name] = centre + 1


def _both(options: Options) -> bool:
    both = BOTH.load(options)
    if both and DECODES.load(options):
        options.refuse(BOTH.name, "is true in a decoder: its average would see the future", "set it to false")
        return False
    return bool(both)


def _weights(name: str, back: bool = False) -> Any:
    return name if name == "softmax" else (ACTIVATIONS.dump if back else ACTIVATIONS.load)(name)


def _types(options: Options) -> int | str:
    return int(TYPES.load(options)) if TYPED.load(options) else "unread"


def _write_types(value: Any, found: dict[str, Any]) -> None:
    if value not in (None, "unread") and isinstance(value, str):
        raise Unexpressed(f"no option stands for {value!r}")
    found[TYPED.name] = isinstance(value, int)
    if isinstance(value, int):
        found[TYPES.name] = value


def _template(form: Form) -> dict[str, Any]:
    mixer = {
        "kind": "ema-gated",
        "hidden": Key("intermediate_size", int, 256),
        "shared": Key("shared_representation_size", int, 64),
        "states": Key("ema_projection_size", int, 16),
        "both": Custom(_both, lambda value, found: found.update({BOTH.name: value})),
        "taps": Key("truncation", int, None),
        "chunk": Custom(_chunk, _write_chunk),
        "act": ACT,
        "weights": Key("attention_activation", str, "softmax", code=Code(_weights, lambda name: _weights(name, True))),
        "distance": Custom(_distance, _write_distance),
        "dropout": DROPOUT,
        "value_dropout": VALUE_DROPOUT,
        "channels": CHANNELS,
        "weight_dropout": Key("attention_probs_dropout_prob", float, 0.1),
        "decay_std": Key("ema_delta_alpha_range", float, 0.2),
        "expand_std": Key("ema_beta_range", float, 0.02),
        "contract_std": Key("ema_gamma_omega_range", float, 1.0),
    }
    # Keys and biases are of one kind in both attentions.
    shared = ("shared", "act", "weights", "distance", "dropout", "channels", "value_dropout", "weight_dropout")
    cross = {"kind": "gated-cross", **{name: mixer[name] for name in shared}, "required": True}
    ffn = {
        "kind": "mlp",
        "hidden": Key("nffn_hidden_size", int, 256),
        "act": ACT,
        "dropout": Key("nffn_activation_dropout_prob", float, 0.1),
        "channels": CHANNELS,
    }
    return {
        "kind": Key(DECODES.name, bool, False, code=table({False: "encoder", True: "decoder"})),
        "vocab": Key("vocab_size", int, 30522),
        "dim": DIM,
        "context": SPAN,
        "dropout": DROPOUT,
        "pad": pad(1),
        "memory": Switch(CROSS, {False: None, True: DIM}, silent=True),
        "norm": Custom(_norm, _write_norm),
        "init": {"kind": "normal", "std": Key("initializer_range", float, 0.02)},
        "embed": {
            "kind": "tokens",
            "positions": {"kind": "none"},
            "segments": Custom(_types, _write_types),
            "norm": {"kind": "none"},
            "dropout": 0.0,
        },
        "stack": {
            "layers": Key("num_hidden_layers", int, 4),
            "norm": {"kind": "none"},
            "block": {
                "wiring": WIRING,
                "sublayers": {"attn": mixer, "cross": Part(CROSS, cross), "ffn": Part(FEEDS, ffn)},
            },
        },
        "heads": form.heads,
        **form.more,
    }


PLAIN = {"norm": {"kind": "none"}, "tied": TIED, "output": "logits"}
MLM = Switch(DENSE, {True: {"dense": True, "act": "tanh"} | PLAIN, False: {"dense": False, "act": "identity"} | PLAIN})
TRANSFORM = {True: {"kind": "dense", "act": "tanh", "norm": {"kind": "none"}}, False: {"kind": "none"}}
LM = {"tied": TIED, "bias": True, "transform": Switch(DENSE, TRANSFORM), "shift": True}

FORMS = (
    Form("MegaForMaskedLM", "mega.", {"mlm": MLM}),
    Form("MegaForCausalLM", "mega.", {"lm": LM}),
    Form("MegaModel", "", {}, POOLER),
    Form("MegaModel", "", {}),
    Form("MegaForSequenceClassification", "mega.", {"sequence": sequence("tanh", CLASSIFIER_DROPOUT)}),
    Form("MegaForMultipleChoice", "mega.", {"choice": {"dropout": CLASSIFIER_DROPOUT}}, POOLER),
    Form("MegaForTokenClassification", "mega.", {"token": {"labels": LABELS, "dropout": CLASSIFIER_DROPOUT}}),
    Form("MegaForQuestionAnswering", "mega.", {"span": TWO_OUTPUTS}),
)


STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
"""What batch normalisation has seen."""


def _distances(theirs: str, ours: str) -> tuple[Rule, ...]:
    return (
        one(f"{theirs}.rel_pos_bias.rel_pos_bias", f"{ours}.distance.weight"),
        one(f"{theirs}.rel_pos_bias.alpha", f"{ours}.distance.a", Unit()),
        one(f"{theirs}.rel_pos_bias.b_param", f"{ours}.distance.b", Unit()),
    )


def _trunk(config: Any) -> Sequence[Rule]:
    """The names of the layers."""
    theirs, ours = "layers.{layer}.mega_layer", "stack.blocks.{layer}.attn"
    their_cross, cross = "layers.{layer}.cross_attn", "stack.blocks.{layer}.cross"
    ffn, norms = "layers.{layer}.nffn", "stack.blocks.{layer}.wiring.norm"
    gain = "scalar" if config.norm.kind == "rms-scale" else "weight"
    states = {
        "damping_factor": "damping",
        "decay_factor": "decay",
        "ema_expansion_matrix": "expand",
    }
    return (
        one("embedding_layer.word_embeddings.weight", "embed.tokens.weight"),
        one("embedding_layer.token_type_embeddings.weight", "embed.segments.weight"),
        *(one(f"{theirs}.ema_gate.{name}", f"{ours}.ema.{mine}", Unit((2,))) for name, mine in states.items()),
        one(f"{theirs}.ema_gate.kernel_projection_matrix", f"{ours}.ema.contract"),
        one(f"{theirs}.ema_gate.residual_weight", f"{ours}.ema.skip"),
        *layer(f"{theirs}.v_proj", f"{ours}.value"),
        *layer(f"{theirs}.mx_proj", f"{ours}.mix"),
        *layer(f"{theirs}.h_proj", f"{ours}.out"),
        one(f"{theirs}.qk_weight", f"{ours}.qk_weight"),
        one(f"{theirs}.qk_bias", f"{ours}.qk_bias"),
        *layer(f"{their_cross}.q_proj", f"{cross}.query"),
        *layer(f"{their_cross}.k_proj", f"{cross}.key"),
        *layer(f"{their_cross}.v_proj", f"{cross}.value"),
        *layer(f"{their_cross}.h_proj", f"{cross}.out"),
        *_distances(theirs, ours),
        *_distances(their_cross, cross),
        *layer(f"{ffn}.fc1", "stack.blocks.{layer}.ffn.up"),
        *layer(f"{ffn}.fc2", "stack.blocks.{layer}.ffn.down"),
        *(
            rule
            for name, module in (("attn", theirs), ("cross", their_cross), ("ffn", ffn))
            for rule in (
                one(f"{module}.norm.norm.{gain}", f"{norms}.{name}.weight"),
                *(one(f"{module}.norm.norm.{tensor}", f"{norms}.{name}.{tensor}") for tensor in ("bias", *STATISTICS)),
            )
        ),
        *layer("pooler.dense", "pooler.dense"),
    )


def _ties(config: Any, prefix: str) -> Mapping[str, str]:
    table = f"{prefix}embedding_layer.word_embeddings.weight"
    return {f"{name}_head.weight": table for name in ("mlm", "lm") if name in config.heads and config.heads[name].tied}


def _known(config: Any) -> Mapping[str, Tensor]:
    """A zero that the reference keeps to know where its waves belong."""
    if config.stack.block.sublayers["attn"].distance.kind != "rotary":
        return {}
    names = [name for name in ("mega_layer", "cross_attn") if name == "mega_layer" or config.memory is not None]
    layers = range(config.stack.layers)
    return {f"layers.{n}.{name}.rel_pos_bias._float_tensor": torch.zeros(1) for n in layers for name in names}


def _dead(config: Any) -> Shapes:
    return {name: tuple(value.shape) for name, value in _known(config).items()}


MEGA = Family(
    name="mega",
    types=("mega",),
    title="Mega",
    template=_template,
    forms=FORMS,
    trunk=_trunk,
    heads=(
        *layer("dense", "heads.mlm.dense"),
        *layer("dense", "heads.lm.transform.dense"),
        *(one(f"{name}_head.weight", f"heads.{name}.decoder.weight") for name in ("mlm", "lm")),
        *(one(f"{name}_head.bias", f"heads.{name}.bias") for name in ("mlm", "lm")),
        *layer("classifier.dense", "heads.sequence.dense"),
        *layer("classifier.out_proj", "heads.sequence.classifier"),
        *layer("classifier", "heads.choice.classifier"),
        *layer("classifier", "heads.token.classifier"),
        *layer("qa_outputs", "heads.span.classifier"),
    ),
    ties=_ties,
    dead=_dead,
    known=_known,
    whole=("num_batches_tracked",),
    time_first=True,
    rescaled=("embed.tokens", "embed.segments"),
    prefixes=("mega.", ""),
    fixed={"is_encoder_decoder": (False,)},
    neutral=frozenset(
        """
        add_lm_hidden_dense_layer classifier_dropout tie_word_embeddings num_attention_heads chunk_size type_vocab_size
        nffn_hidden_size nffn_activation_dropout_prob normalize_before_ffn
        """.split()
    ),
)
