"""Reformer: two reversible streams, hashed and chunked attention by layer, axial positions; heads are 2 h wide."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from xtcli.convert.families.common import LABELS, PAD, PROBLEM, TWO_OUTPUTS, activation, only
from xtcli.convert.family import Family, Form
from xtcli.convert.options import Code, Custom, Key, Options, Switch, Unexpressed, dump, load
from xtcli.convert.rules import Rule, Unit, layer, one
from xtcli.errors import did_you_mean

DIM = Key("hidden_size", int, 256)
DROPOUT = Key("hidden_dropout_prob", float, 0.05)
SHAPE = (64, 64)
WIDTHS = (64, 192)
LAYERS = ["local", "lsh", "local", "lsh", "local", "lsh"]
LISTED = Code(tuple, list)

PROJECTIONS = {
    "heads": Key("num_attention_heads", int, 12),
    "head_dim": Key("attention_head_size", int, 64),
    "bias": False,
}


def _buckets(options: Options) -> Any:
    given = options.values.get("num_buckets")
    value = options.get("num_buckets", list if isinstance(given, list) else int, None)
    sizes = value if isinstance(value, list) else [] if value is None else [value]
    if any(not isinstance(size, int) or size <= 0 or size % 2 for size in sizes) or value == []:
        options.refuse("num_buckets", f"is {value!r}", "buckets are even numbers above 0")
        return None
    return tuple(value) if isinstance(value, list) else value


def _write_buckets(value: Any, found: dict[str, Any]) -> None:
    found["num_buckets"] = list(value) if isinstance(value, list | tuple) else value


MIXERS: Mapping[str, Mapping[str, Any]] = {
    "local": {
        "kind": "chunked",
        **PROJECTIONS,
        "chunk": Key("local_attn_chunk_length", int, 64),
        "before": Key("local_num_chunks_before", int, 1),
        "after": Key("local_num_chunks_after", int, 0),
        "dropout": Key("local_attention_probs_dropout_prob", float, 0.05),
    },
    "lsh": {
        "kind": "lsh",
        **PROJECTIONS,
        "chunk": Key("lsh_attn_chunk_length", int, 64),
        "before": Key("lsh_num_chunks_before", int, 1),
        "after": Key("lsh_num_chunks_after", int, 0),
        "rounds": Key("num_hashes", int, 1),
        "buckets": Custom(_buckets, _write_buckets),
        "seed": Key("hash_seed", int, None),
        "dropout": Key("lsh_attention_probs_dropout_prob", float, 0.0),
    },
}
"""What the reference calls a layer, and the mixer that it is."""

FEED_FORWARD = {
    "kind": "mlp",
    "hidden": Key("feed_forward_size", int, 512),
    "act": Key("hidden_act", str, "relu", code=activation("relu")),
    "dropout": DROPOUT,
    "chunk": Key("chunk_size_feed_forward", int, 0, code=Code(lambda size: size or None, lambda size: size or 0)),
}


def _block(name: str) -> dict[str, Any]:
    wiring = {"kind": "pre", "dropout": DROPOUT}
    return {"wiring": wiring, "sublayers": {"attn": MIXERS[name], "ffn": FEED_FORWARD}}


def _stack(options: Options) -> dict[str, Any]:
    names = options.get("attn_layers", list, LAYERS)
    unknown = [name for name in names if name not in MIXERS]
    if unknown or not names:
        options.refuse(
            "attn_layers", f"is {names!r}", did_you_mean(str(unknown[0]), MIXERS) if unknown else "name some"
        )
        names = LAYERS
    count = options.get("num_hidden_layers", int, len(names))
    if count != len(names):
        options.refuse("num_hidden_layers", f"is {count}, but attn_layers names {len(names)} layers", "leave it out")
    stack = {
        "kind": "reversible",
        "layers": len(names),
        "join": "concat",
        "blocks": {name: _block(name) for name in sorted(set(names))},
        "dropout": DROPOUT,
    }
    return {**load(stack, options), "pattern": names}


def _write_stack(value: Any, found: dict[str, Any]) -> None:
    if value["kind"] != "reversible":
        raise Unexpressed(f"kind is '{value['kind']}', not 'reversible'")
    blocks = value.get("blocks") or {"": value["block"]}
    pattern = value.get("pattern") or [""]
    kinds = {mixer["kind"]: name for name, mixer in MIXERS.items()}
    names: dict[str, str] = {}
    for key, block in blocks.items():
        kind = block["sublayers"].get("attn", {}).get("kind")
        if set(block["sublayers"]) != {"attn", "ffn"} or kind not in kinds:
            raise Unexpressed(f"its layers are not an attention 'attn' ({' or '.join(kinds)}) and a feed-forward 'ffn'")
        names[key] = kinds[kind]
        dump(_block(names[key]), block, found)
    DROPOUT.dump(value["dropout"], found, "dropout")
    found["attn_layers"] = [names[pattern[number % len(pattern)]] for number in range(value["layers"])]
    found["num_hidden_layers"] = value["layers"]


def _numbers(name: str, usual: tuple[int, ...]) -> Custom:
    """A list of whole numbers."""

    def read(options: Options) -> list[int]:
        numbers = options.get(name, list, list(usual))
        if any(not isinstance(number, int) or number <= 0 for number in numbers):
            options.refuse(name, f"is {numbers!r}, not a list of numbers above 0")
            return list(usual)
        return list(numbers)

    return Custom(read, lambda value, found: found.update({name: list(value)}))


POSITIONS = Switch(
    Key("axial_pos_embds", bool, True),
    {
        True: {
            "kind": "axial",
            "shape": _numbers("axial_pos_shape", SHAPE),
            "widths": _numbers("axial_pos_embds_dim", WIDTHS),
            "std": Key("axial_norm_std", float, 1.0),
            "dropout": DROPOUT,
        },
        False: {"kind": "learned", "dropout": DROPOUT},
    },
)


def _kind(wanted: bool | None) -> Custom:
    """The graph; `wanted` is what `is_decoder` must be for a class, None where it may be either."""

    def read(options: Options) -> str:
        decodes = options.get("is_decoder", bool, False)
        if wanted is not None and decodes != wanted:
            options.refuse("is_decoder", f"is {decodes}, which this class does not take", f"it must be {wanted}")
        return "decoder" if decodes else "encoder"

    def write(value: Any, found: dict[str, Any]) -> None:
        if wanted is not None and (value == "decoder") != wanted:
            raise Unexpressed(f"is '{value}'")
        found["is_decoder"] = value == "decoder"

    return Custom(read, write)


def _template(form: Form) -> dict[str, Any]:
    return {
        "kind": _kind(None),
        "vocab": Key("vocab_size", int, 320),
        "dim": DIM,
        "context": Key("max_position_embeddings", int, 4096),
        "dropout": DROPOUT,
        "pad": PAD_ZERO,
        "norm": {"kind": "layer", "eps": Key("layer_norm_eps", float, 1e-12)},
        "init": {"kind": "normal", "std": Key("initializer_range", float, 0.02)},
        "embed": {"kind": "tokens", "positions": POSITIONS, "token_dropout": DROPOUT, "dropout": 0.0},
        "stack": Custom(_stack, _write_stack),
        "heads": form.heads,
        **form.more,
    }


def _classifier_dropout(options: Options) -> float:
    rate = options.get("classifier_dropout", float, None)
    return float(DROPOUT.load(options) if rate is None else rate)


PAD_ZERO = Key(PAD.name, int, 0, code=PAD.code)
UNTIED = only("tie_word_embeddings", False, "its tokens are narrower than what its head reads, and it does not run")
LM = {"tied": False, "bias": True, "untied": UNTIED}
SEQUENCE = {
    "labels": LABELS,
    "pick": "first",
    "hidden": DIM,
    "act": "tanh",
    "dropout": Custom(_classifier_dropout, lambda value, found: found.update(classifier_dropout=value)),
    "problem": PROBLEM,
}

FORMS = (
    Form("ReformerModelWithLMHead", "reformer.", {"lm": LM}, {"kind": _kind(True)}),
    Form("ReformerForMaskedLM", "reformer.", {"lm": LM}, {"kind": _kind(False)}),
    Form("ReformerModel", "", {}),
    Form("ReformerForSequenceClassification", "reformer.", {"sequence": SEQUENCE}),
    Form("ReformerForQuestionAnswering", "reformer.", {"span": TWO_OUTPUTS}),
)


def _positions(config: Any) -> tuple[Rule, ...]:
    theirs = "embeddings.position_embeddings"
    if config.embed.positions.kind != "axial":
        return (one(f"{theirs}.embedding.weight", "embed.positions.table.weight"),)
    count = len(config.embed.positions.shape)
    return tuple(
        one(
            f"{theirs}.weights.{number}",
            f"embed.positions.axis_{number}",
            Unit(tuple(axis for axis in range(count) if axis != number)),
        )
        for number in range(count)
    )


def _trunk(config: Any) -> Sequence[Rule]:
    theirs, ours = "encoder.layers.{layer}", "stack.blocks.{layer}"
    attention = f"{theirs}.attention.self_attention"
    return (
        one("embeddings.word_embeddings.weight", "embed.tokens.weight"),
        *_positions(config),
        *layer(f"{theirs}.attention.layer_norm", f"{ours}.wiring.norm.attn"),
        *layer(f"{attention}.query_key", f"{ours}.attn.qk"),
        *layer(f"{attention}.query", f"{ours}.attn.q"),
        *layer(f"{attention}.key", f"{ours}.attn.k"),
        *layer(f"{attention}.value", f"{ours}.attn.v"),
        *layer(f"{theirs}.attention.output.dense", f"{ours}.attn.o"),
        *layer(f"{theirs}.feed_forward.layer_norm", f"{ours}.wiring.norm.ffn"),
        *layer(f"{theirs}.feed_forward.dense.dense", f"{ours}.ffn.up"),
        *layer(f"{theirs}.feed_forward.output.dense", f"{ours}.ffn.down"),
        *layer("encoder.layer_norm", "stack.norm"),
    )


def _ties(config: Any, prefix: str) -> Mapping[str, str]:
    return {"lm_head.decoder.bias": "lm_head.bias"} if "lm" in config.heads else {}


REFORMER = Family(
    name="reformer",
    types=("reformer",),
    title="Reformer",
    template=_template,
    forms=FORMS,
    trunk=_trunk,
    heads=(
        one("lm_head.decoder.weight", "heads.lm.decoder.weight"),
        one("lm_head.bias", "heads.lm.bias"),
        *layer("classifier.dense", "heads.sequence.dense"),
        *layer("classifier.out_proj", "heads.sequence.classifier"),
        *layer("qa_outputs", "heads.span.classifier"),
    ),
    ties=_ties,
    prefixes=("reformer.", ""),
    fixed={"is_encoder_decoder": (False,), "add_cross_attention": (False,)},
    neutral=frozenset(
        """
        axial_norm_std axial_pos_embds_dim axial_pos_shape chunk_size_lm_head classifier_dropout hash_seed
        local_attention_probs_dropout_prob local_attn_chunk_length local_num_chunks_after local_num_chunks_before
        lsh_attention_probs_dropout_prob lsh_attn_chunk_length lsh_num_chunks_after lsh_num_chunks_before
        num_buckets num_hashes tie_word_embeddings
        """.split()
    ),
)
