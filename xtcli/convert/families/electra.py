"""ELECTRA: a BERT over a token table that may be narrower than its states, without a pooler.

Generators and discriminators differ in their heads alone. Where the table is as wide as the states, nothing is
projected.
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
)
from xtcli.convert.family import Drop, Family, Form, Shapes
from xtcli.convert.options import Code, Custom, Key, Options, Part, Switch, Unexpressed, dump, load, table
from xtcli.convert.rules import Rule, layer, one

DIM = Key("hidden_size", int, 256)
WIDTH = Key("embedding_size", int, 128)
HEADS = Key("num_attention_heads", int, 4)
DROPOUT = Key("hidden_dropout_prob", float, 0.1)
ATTENTION_DROPOUT = Key("attention_probs_dropout_prob", float, 0.1)
ACTIVATION = activation("gelu")
ACT = Key("hidden_act", str, "gelu", code=ACTIVATION)
TIED = Key("tie_word_embeddings", bool, True)
POSITIONS = Key("position_embedding_type", str, "absolute")
CROSS = Key("add_cross_attention", bool, False)
DISTANCE = Key("max_position_embeddings", int, 512, code=Code(lambda value: value - 1, lambda value: value + 1))
PAD = pad(0)

EMBEDDING = {
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
}


def _embedding(options: Options) -> dict[str, Any]:
    width: int = WIDTH.load(options)
    whole: dict[str, Any] = load(EMBEDDING, options)
    return {"kind": "tokens"} | whole if width == DIM.load(options) else {"kind": "factorised", "width": width} | whole


def _dump_embedding(value: Any, found: dict[str, Any]) -> None:
    if value["kind"] not in ("tokens", "factorised"):
        raise Unexpressed(f"is '{value['kind']}', not 'tokens' or 'factorised'")
    found["embedding_size"] = value.get("width") or found["hidden_size"]
    dump(EMBEDDING, value, found, "model.embed")


def _relative(key_term: bool) -> dict[str, Any]:
    return {"kind": "shaw", "distance": DISTANCE, "key_term": key_term}


def _template(form: Form) -> dict[str, Any]:
    return {
        "kind": Key("is_decoder", bool, False, code=table({False: "encoder", True: "decoder"})),
        "vocab": Key("vocab_size", int, 30522),
        "dim": DIM,
        "context": Key("max_position_embeddings", int, 512),
        "dropout": DROPOUT,
        "pad": PAD,
        "norm": {"kind": "layer", "eps": Key("layer_norm_eps", float, 1e-12)},
        "init": {"kind": "normal", "std": Key("initializer_range", float, 0.02)},
        "memory": Switch(CROSS, {False: None, True: DIM}, silent=True),
        "embed": Custom(_embedding, _dump_embedding),
        "stack": {
            "layers": Key("num_hidden_layers", int, 12),
            "norm": {"kind": "none"},
            "block": {
                "wiring": {"kind": "post", "dropout": DROPOUT},
                "sublayers": {
                    "attn": {
                        "kind": "attention",
                        "heads": HEADS,
                        "dropout": ATTENTION_DROPOUT,
                        "position": Switch(
                            POSITIONS,
                            {
                                "relative_key": _relative(False),
                                "relative_key_query": _relative(True),
                                "absolute": {"kind": "none"},
                            },
                        ),
                    },
                    "cross": Part(CROSS, {"kind": "cross-attention", "heads": HEADS, "dropout": ATTENTION_DROPOUT}),
                    "ffn": {"kind": "mlp", "hidden": Key("intermediate_size", int, 1024), "act": ACT},
                },
            },
        },
        "heads": form.heads,
    }


def _label_dropout(options: Options) -> float:
    rate = options.get("classifier_dropout", float, None)
    return float(DROPOUT.load(options) if rate is None else rate)


LABEL_DROPOUT = Custom(_label_dropout, lambda value, found: found.update(classifier_dropout=value))


def _summary(options: Options) -> dict[str, Any]:
    name = given(options, "summary_activation", str, "gelu") or None
    try:
        act = "identity" if name is None else ACTIVATION.load(name)
    except Unexpressed as problem:
        options.refuse("summary_activation", str(problem))
        act = "identity"
    if options.get("summary_use_proj", bool, True):
        _refuse_few_labels(options)
        return {"kind": "dense", "act": act, "norm": {"kind": "none"}}
    return {"kind": "none"} if act == "identity" else {"kind": "activation", "act": act}


def _refuse_few_labels(options: Options) -> None:
    """A summary as wide as there are labels is read by a classifier of the states' width."""
    count, dim = LABELS.load(options), DIM.load(options)
    if options.get("summary_proj_to_labels", bool, None) and count not in (0, dim):
        options.refuse(
            "summary_proj_to_labels",
            f"makes {count} values, and the classifier reads {dim}: the reference runs no such network",
            "set it to false",
        )


def _dump_summary(value: Any, found: dict[str, Any]) -> None:
    act = value.get("act", "identity")
    found["summary_use_proj"] = value["kind"] == "dense"
    found["summary_activation"] = None if act == "identity" else ACTIVATION.dump(act)


CHOICE = {
    "pick": Key(
        "summary_type",
        str,
        "first",
        code=table({"first": "first", "last": "last", "mean": "mean", "cls_index": "last"}),
    ),
    "first_dropout": Key("summary_first_dropout", float, 0.0),
    "transform": Custom(_summary, _dump_summary),
    "dropout": Key("summary_last_dropout", float, 0.1),
}
SEQUENCE = {
    "labels": LABELS,
    "pick": "first",
    "hidden": True,
    "act": "gelu",
    "dropout": LABEL_DROPOUT,
    "problem": PROBLEM,
}
TRANSFORM = {"kind": "dense", "act": "gelu", "norm": {"kind": "inherit"}}

FORMS = (
    Form("ElectraForPreTraining", "electra.", {"replaced": {"act": ACT}}),
    Form("ElectraForMaskedLM", "electra.", {"mlm": {"act": "gelu", "tied": TIED, "output": "logits"}}),
    Form(
        "ElectraForCausalLM",
        "electra.",
        {"lm": {"tied": TIED, "bias": True, "transform": TRANSFORM, "shift": True}},
    ),
    Form("ElectraModel", "", {}),
    Form("ElectraForSequenceClassification", "electra.", {"sequence": SEQUENCE}),
    Form("ElectraForMultipleChoice", "electra.", {"choice": CHOICE}),
    Form("ElectraForTokenClassification", "electra.", {"token": {"labels": LABELS, "dropout": LABEL_DROPOUT}}),
    Form("ElectraForQuestionAnswering", "electra.", {"span": TWO_OUTPUTS}),
)


def _attention(theirs: str, ours: str, norm: str) -> tuple[Rule, ...]:
    return (
        *layer(f"{theirs}.self.query", f"{ours}.q"),
        *layer(f"{theirs}.self.key", f"{ours}.k"),
        *layer(f"{theirs}.self.value", f"{ours}.v"),
        one(f"{theirs}.self.distance_embedding.weight", f"{ours}.relative.table.weight"),
        *layer(f"{theirs}.output.dense", f"{ours}.o"),
        *layer(f"{theirs}.output.LayerNorm", norm),
    )


def _trunk(config: Any) -> Sequence[Rule]:
    theirs, block = "encoder.layer.{layer}", "stack.blocks.{layer}"
    return (
        one("embeddings.word_embeddings.weight", "embed.tokens.weight"),
        one("embeddings.position_embeddings.weight", "embed.positions.table.weight"),
        one("embeddings.token_type_embeddings.weight", "embed.segments.weight"),
        *layer("embeddings.LayerNorm", "embed.norm"),
        *layer("embeddings_project", "embed.project"),
        *_attention(f"{theirs}.attention", f"{block}.attn", f"{block}.wiring.norm.attn"),
        *_attention(f"{theirs}.crossattention", f"{block}.cross", f"{block}.wiring.norm.cross"),
        *layer(f"{theirs}.intermediate.dense", f"{block}.ffn.up"),
        *layer(f"{theirs}.output.dense", f"{block}.ffn.down"),
        *layer(f"{theirs}.output.LayerNorm", f"{block}.wiring.norm.ffn"),
    )


def _prediction(ours: str, transform: str) -> tuple[Rule, ...]:
    return (
        *layer("generator_predictions.dense", f"{transform}.dense"),
        *layer("generator_predictions.LayerNorm", f"{transform}.norm"),
        one("generator_lm_head.weight", f"{ours}.decoder.weight"),
        one("generator_lm_head.bias", f"{ours}.bias"),
    )


def _ties(config: Any, prefix: str) -> Mapping[str, str]:
    head = config.heads.get("mlm") or config.heads.get("lm")
    if head is None or not head.tied:
        return {}
    return {"generator_lm_head.weight": f"{prefix}embeddings.word_embeddings.weight"}


def _dead(config: Any) -> Shapes:
    width = getattr(config.embed, "width", None) or config.dim
    absolute = config.embed.positions.kind == "learned"
    return {} if absolute else {"embeddings.position_embeddings.weight": (config.context, width)}


ELECTRA = Family(
    name="electra",
    types=("electra",),
    title="ELECTRA",
    template=_template,
    forms=FORMS,
    trunk=_trunk,
    heads=(
        *_prediction("heads.mlm", "heads.mlm"),
        *_prediction("heads.lm", "heads.lm.transform"),
        *layer("discriminator_predictions.dense", "heads.replaced.dense"),
        *layer("discriminator_predictions.dense_prediction", "heads.replaced.classifier"),
        *layer("classifier.dense", "heads.sequence.dense"),
        *layer("classifier.out_proj", "heads.sequence.classifier"),
        *layer("sequence_summary.summary", "heads.choice.transform.dense"),
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
    prefixes=("electra.", ""),
    neutral=frozenset(
        """
        classifier_dropout is_encoder_decoder summary_activation summary_first_dropout
        summary_last_dropout summary_proj_to_labels summary_type summary_use_proj tie_word_embeddings
        """.split()
    ),
)
