"""MobileBERT: BERT in blocks narrower than its stream, with several feed-forwards, over trigrams of narrow tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from xtcli.convert.families import bert
from xtcli.convert.families.bert import ATTENTION_DROPOUT, TIED
from xtcli.convert.families.common import LABELS, PAD, PROBLEM, TWO_OUTPUTS, activation, counts_up
from xtcli.convert.family import Drop, Family, Form, Shapes
from xtcli.convert.options import OMIT, Custom, Key, Options, Unexpressed
from xtcli.convert.rules import Rule, layer, one

DIM = Key("hidden_size", int, 512)
WIDTH = Key("embedding_size", int, 128)
INNER = Key("intra_bottleneck_size", int, 128)
DROPOUT = Key("hidden_dropout_prob", float, 0.0)
HEADS = Key("num_attention_heads", int, 4)
HIDDEN = Key("intermediate_size", int, 512)
ACT = Key("hidden_act", str, "relu", code=activation("relu"))
NARROWS = Key("use_bottleneck", bool, True)
NARROW_ATTENTION = Key("use_bottleneck_attention", bool, False)
SHARED = Key("key_query_shared_bottleneck", bool, True)
TRIGRAM = Key("trigram_input", bool, True)
COUNT = Key("num_feedforward_networks", int, 4)
EPS = Key("layer_norm_eps", float, 1e-12)
NORM = Key("normalization_type", str, "no_norm")
DECODES = Key("is_decoder", bool, False)
POOLS = Key("classifier_activation", bool, True)
MOST = 8
USUAL_EPS = 1e-5
"""Of the norms that the reference makes without saying one."""


def _norm(options: Options, eps: float) -> dict[str, Any]:
    kind = NORM.load(options)
    if kind not in ("no_norm", "layer_norm"):
        options.refuse(NORM.name, f"is {kind!r}", "it is no_norm or layer_norm")
    return {"kind": "affine"} if kind != "layer_norm" else {"kind": "layer", "eps": eps}


def _embed(options: Options) -> dict[str, Any]:
    width, dim = WIDTH.load(options), DIM.load(options)
    common = {
        "positions": {"kind": "learned"},
        "segments": options.get("type_vocab_size", int, 2),
        "norm": _norm(options, USUAL_EPS),
        "dropout": DROPOUT.load(options),
    }
    if TRIGRAM.load(options):
        return {"kind": "trigram", "width": width, **common}
    if width != dim:
        return {"kind": "factorised", "width": width, "project_after": "tokens", **common}
    return {"kind": "tokens", **common}


def _write_embed(value: Any, found: dict[str, Any]) -> None:
    found["trigram_input"] = value["kind"] == "trigram"
    found["embedding_size"] = value.get("width") or found[DIM.name]
    found["type_vocab_size"], found["hidden_dropout_prob"] = value["segments"], value["dropout"]
    _write_norm(value["norm"], found)


def _write_norm(value: Any, found: dict[str, Any]) -> None:
    found["normalization_type"] = "layer_norm" if value["kind"] == "layer" else "no_norm"


def _names(count: int) -> list[str]:
    return ["ffn", *(f"ffn_{number}" for number in range(2, count + 1))]


def _block(options: Options) -> dict[str, Any]:
    narrows, count = NARROWS.load(options), COUNT.load(options)
    if not 1 <= count <= MOST:
        options.refuse(COUNT.name, f"is {count}", f"1 to {MOST} feed-forwards are expressed")
        count = 1
    inner, dim = INNER.load(options), DIM.load(options)
    shared, narrow = SHARED.load(options), NARROW_ATTENTION.load(options)
    kind = "attention"
    if narrows and not narrow:
        kind = "outer-values" if shared else "outer-attention"
        if not shared and inner != dim:
            options.refuse(INNER.name, f"is {inner}, hidden_size is {dim}: the reference runs no such network")
    ffn = {"kind": "mlp", "hidden": HIDDEN.load(options), "act": ACT.load(options)}
    names = _names(count)
    attention = {"kind": kind, "heads": HEADS.load(options), "dropout": ATTENTION_DROPOUT.load(options)}
    # Trigrams see both ways whatever attention does.
    attention["mask"] = {"kind": "causal" if DECODES.load(options) else "inherit"}
    if kind == "outer-values":
        attention["norm"] = _norm(options, EPS.load(options))
    wiring: dict[str, Any] = {
        "kind": "bottleneck" if narrows else "post",
        "norm": _norm(options, EPS.load(options)),
        "norms": {names[-1]: _norm(options, USUAL_EPS)},
        # All feed-forwards but the last are added whole; a bottleneck drops what goes back to the stream.
        "dropout": DROPOUT.load(options) if narrows else dict.fromkeys(names[:-1], 0.0),
    }
    if narrows:
        wiring["width"] = inner
    return {"wiring": wiring, "sublayers": {"attn": attention} | {name: dict(ffn) for name in names}}


def _write_block(value: Any, found: dict[str, Any]) -> None:
    if value is None or "attn" not in value["sublayers"]:
        raise Unexpressed("is not one block with an attention, which all layers repeat")
    wiring, sublayers = value["wiring"], value["sublayers"]
    kind = sublayers["attn"]["kind"]
    found["use_bottleneck"] = wiring["kind"] == "bottleneck"
    if "width" in wiring:
        found["intra_bottleneck_size"] = wiring["width"]
    found["use_bottleneck_attention"] = kind == "attention"
    found["key_query_shared_bottleneck"] = kind == "outer-values"
    found["num_attention_heads"] = sublayers["attn"]["heads"]
    found["attention_probs_dropout_prob"] = sublayers["attn"]["dropout"]
    found["is_decoder"] = sublayers["attn"]["mask"]["kind"] == "causal"
    found["num_feedforward_networks"] = len(sublayers) - 1
    HIDDEN.dump(sublayers["ffn"]["hidden"], found, "")
    ACT.dump(sublayers["ffn"]["act"], found, "")
    _write_norm(wiring["norm"], found)
    if wiring["norm"]["kind"] == "layer":
        found["layer_norm_eps"] = wiring["norm"]["eps"]


def _pooler(options: Options) -> Any:
    return {"act": "tanh"} if POOLS.load(options) else {"act": "identity", "dense": False}


def _write_pooler(value: Any, found: dict[str, Any]) -> None:
    if value is None:
        raise Unexpressed("there is no pooler")
    found["classifier_activation"] = bool(value["dense"])


POOLER = {"pooler": Custom(_pooler, _write_pooler)}
UNPOOLED = {"pooler": Custom(lambda options: (POOLS.load(options), OMIT)[1], lambda value, found: None)}


def _classifier_dropout(options: Options) -> float:
    rate = options.get("classifier_dropout", float, None)
    return float(DROPOUT.load(options) if rate is None else rate)


CLASSIFIER_DROPOUT = Custom(_classifier_dropout, lambda value, found: found.update(classifier_dropout=value))


def _mlm(output: str) -> dict[str, Any]:
    return {
        "act": ACT,
        "tied": TIED,
        "extended": True,
        "output": output,
        "norm": {"kind": "layer", "eps": EPS},
    }


def _template(form: Form) -> dict[str, Any]:
    return {
        "kind": "encoder",
        "vocab": Key("vocab_size", int, 30522),
        "dim": DIM,
        "context": Key("max_position_embeddings", int, 512),
        "dropout": DROPOUT,
        "pad": PAD,
        "norm": {"kind": "layer", "eps": EPS},
        "init": {"kind": "normal", "std": Key("initializer_range", float, 0.02)},
        "embed": Custom(_embed, _write_embed),
        "stack": {
            "layers": Key("num_hidden_layers", int, 24),
            "norm": {"kind": "none"},
            "block": Custom(_block, _write_block),
        },
        "heads": form.heads,
        **form.more,
    }


SEQUENCE = {"labels": LABELS, "pick": "pooled", "dropout": CLASSIFIER_DROPOUT, "problem": PROBLEM}
TRUNK = "mobilebert."


def _spare(prefix: str) -> Callable[[Any], tuple[Shapes, ...]]:
    """The bottleneck of queries and keys, which is there and unread where attention reads the block's."""

    def shapes(config: Any) -> tuple[Shapes, ...]:
        wiring, attention = config.stack.block.wiring, config.stack.block.sublayers["attn"]
        if wiring.kind != "bottleneck" or attention.kind != "attention":
            return ()
        found: dict[str, tuple[int, ...]] = {}
        for number in range(config.stack.layers):
            name = f"{prefix}encoder.layer.{number}.bottleneck.attention"
            found |= _linear(f"{name}.dense", wiring.width, config.dim)
            found |= {f"{name}.LayerNorm.weight": (wiring.width,), f"{name}.LayerNorm.bias": (wiring.width,)}
        return (found,)

    return shapes


def _form(name: str, heads: dict[str, Any], more: dict[str, Any]) -> Form:
    prefix = TRUNK if heads else ""
    return Form(f"MobileBert{name}", prefix, heads, more, _spare(prefix))


FORMS = (
    _form(
        "ForPreTraining",
        {"mlm": _mlm("prediction_logits"), "nsp": {"output": "seq_relationship_logits"}},
        POOLER,
    ),
    _form("ForMaskedLM", {"mlm": _mlm("logits")}, UNPOOLED),
    _form("ForNextSentencePrediction", {"nsp": {"output": "logits"}}, POOLER),
    _form("Model", {}, POOLER),
    _form("Model", {}, UNPOOLED),
    _form("ForSequenceClassification", {"sequence": SEQUENCE}, POOLER),
    _form("ForMultipleChoice", {"choice": {"dropout": CLASSIFIER_DROPOUT}}, POOLER),
    _form("ForTokenClassification", {"token": {"labels": LABELS, "dropout": CLASSIFIER_DROPOUT}}, UNPOOLED),
    _form("ForQuestionAnswering", {"span": TWO_OUTPUTS}, UNPOOLED),
)


def _trunk(config: Any) -> Sequence[Rule]:
    theirs, block = "encoder.layer.{layer}", "stack.blocks.{layer}"
    names = [name for name in config.stack.block.sublayers if name != "attn"]
    rules = [
        one("embeddings.word_embeddings.weight", "embed.tokens.weight"),
        one("embeddings.position_embeddings.weight", "embed.positions.table.weight"),
        one("embeddings.token_type_embeddings.weight", "embed.segments.weight"),
        *layer("embeddings.embedding_transformation", "embed.project"),
        *layer("embeddings.LayerNorm", "embed.norm"),
        *layer(f"{theirs}.attention.self.query", f"{block}.attn.q"),
        *layer(f"{theirs}.attention.self.key", f"{block}.attn.k"),
        *layer(f"{theirs}.attention.self.value", f"{block}.attn.v"),
        *layer(f"{theirs}.attention.output.dense", f"{block}.attn.o"),
        *layer(f"{theirs}.attention.output.LayerNorm", f"{block}.wiring.norm.attn"),
        *layer(f"{theirs}.intermediate.dense", f"{block}.{names[-1]}.up"),
        *layer(f"{theirs}.output.dense", f"{block}.{names[-1]}.down"),
        *layer(f"{theirs}.output.LayerNorm", f"{block}.wiring.norm.{names[-1]}"),
        *layer(f"{theirs}.bottleneck.input.dense", f"{block}.wiring.narrow"),
        *layer(f"{theirs}.bottleneck.input.LayerNorm", f"{block}.wiring.narrow_norm"),
        *layer(f"{theirs}.bottleneck.attention.dense", f"{block}.attn.shared"),
        *layer(f"{theirs}.bottleneck.attention.LayerNorm", f"{block}.attn.shared_norm"),
        *layer(f"{theirs}.output.bottleneck.dense", f"{block}.wiring.widen"),
        *layer(f"{theirs}.output.bottleneck.LayerNorm", f"{block}.wiring.widen_norm"),
        *layer("pooler.dense", "pooler.dense"),
    ]
    for number, name in enumerate(names[:-1]):
        rules += [
            *layer(f"{theirs}.ffn.{number}.intermediate.dense", f"{block}.{name}.up"),
            *layer(f"{theirs}.ffn.{number}.output.dense", f"{block}.{name}.down"),
            *layer(f"{theirs}.ffn.{number}.output.LayerNorm", f"{block}.wiring.norm.{name}"),
        ]
    return rules


def _dead(config: Any) -> Shapes:
    """A projection that the reference makes whether it uses it or not."""
    used = config.embed.kind != "tokens"
    return {} if used else _linear("embeddings.embedding_transformation", config.dim, config.dim)


def _linear(name: str, outer: int, inner: int) -> Shapes:
    return {f"{name}.weight": (outer, inner), f"{name}.bias": (outer,)}


MOBILEBERT = Family(
    name="mobilebert",
    types=("mobilebert",),
    title="MobileBERT",
    template=_template,
    forms=FORMS,
    trunk=_trunk,
    heads=(*bert.BERT.heads, one("cls.predictions.dense.weight", "heads.mlm.extra.weight")),
    ties=bert.ties,
    dead=_dead,
    drops=(Drop("embeddings.position_ids", "0, 1, 2 ...", counts_up),),
    prefixes=("mobilebert.", ""),
    neutral=frozenset(
        "add_cross_attention classifier_dropout is_encoder_decoder tie_word_embeddings true_hidden_size".split()
    ),
)
