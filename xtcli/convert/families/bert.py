"""BERT: an encoder with post-norms, or a decoder; a pooler; the table of absolute positions may lie idle."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from xtcli.convert.families.common import LABELS, PAD, PROBLEM, TWO_OUTPUTS, activation, counts_up, is_zero
from xtcli.convert.family import Drop, Family, Form, Shapes
from xtcli.convert.options import Code, Custom, Key, Options, Part, Switch, table
from xtcli.convert.rules import Rule, layer, one
from xtcli.registry import Config

DIM = Key("hidden_size", int, 768)
HEADS = Key("num_attention_heads", int, 12)
DROPOUT = Key("hidden_dropout_prob", float, 0.1)
ATTENTION_DROPOUT = Key("attention_probs_dropout_prob", float, 0.1)
ACT = Key("hidden_act", str, "gelu", code=activation("gelu"))
TIED = Key("tie_word_embeddings", bool, True)
POSITIONS = Key("position_embedding_type", str, "absolute")
CROSS = Key("add_cross_attention", bool, False)
DISTANCE = Key("max_position_embeddings", int, 512, code=Code(lambda value: value - 1, lambda value: value + 1))


def _relative(key_term: bool) -> dict[str, Any]:
    return {"kind": "shaw", "distance": DISTANCE, "key_term": key_term}


def template(form: Form) -> dict[str, Any]:
    """The tree of a BERT; its relatives change some of its entries."""
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
        "embed": {
            "kind": "tokens",
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
                    "ffn": {"kind": "mlp", "hidden": Key("intermediate_size", int, 3072), "act": ACT},
                },
            },
        },
        "heads": form.heads,
        **form.more,
    }


def _classifier_dropout(options: Options) -> float:
    rate = options.get("classifier_dropout", float, None)
    return float(DROPOUT.load(options) if rate is None else rate)


CLASSIFIER_DROPOUT = Custom(_classifier_dropout, lambda value, found: found.update(classifier_dropout=value))
POOLER = {"pooler": {"act": "tanh"}}
SEQUENCE = {"labels": LABELS, "pick": "pooled", "dropout": CLASSIFIER_DROPOUT, "problem": PROBLEM}
TRANSFORM = {"kind": "dense", "act": ACT, "norm": {"kind": "inherit"}}


def mlm(output: str) -> dict[str, Any]:
    """A masked-language-model head."""
    return {"act": ACT, "tied": TIED, "output": output}


def _pooler(config: Any) -> Shapes:
    return {
        "bert.pooler.dense.weight": (config.dim, config.dim),
        "bert.pooler.dense.bias": (config.dim,),
    }


def _next_sentence(config: Any) -> Shapes:
    return {"cls.seq_relationship.weight": (2, config.dim), "cls.seq_relationship.bias": (2,)}


def _both(config: Config) -> tuple[Shapes, ...]:
    return _pooler(config), _next_sentence(config)


def _pooler_alone(config: Config) -> tuple[Shapes, ...]:
    return (_pooler(config),)


FORMS = (
    Form(
        "BertForPreTraining",
        "bert.",
        {"mlm": mlm("prediction_logits"), "nsp": {"output": "seq_relationship_logits"}},
        POOLER,
    ),
    Form("BertForMaskedLM", "bert.", {"mlm": mlm("logits")}, {}, _both),
    Form(
        "BertLMHeadModel",
        "bert.",
        {"lm": {"tied": TIED, "bias": True, "transform": TRANSFORM, "shift": True}},
        {},
        _both,
    ),
    Form("BertModel", "", {}, POOLER),
    Form("BertModel", "", {}),
    Form("BertForSequenceClassification", "bert.", {"sequence": SEQUENCE}, POOLER),
    Form("BertForMultipleChoice", "bert.", {"choice": {"dropout": CLASSIFIER_DROPOUT}}, POOLER),
    Form(
        "BertForTokenClassification",
        "bert.",
        {"token": {"labels": LABELS, "dropout": CLASSIFIER_DROPOUT}},
        {},
        _pooler_alone,
    ),
    Form("BertForQuestionAnswering", "bert.", {"span": TWO_OUTPUTS}, {}, _pooler_alone),
    Form("BertForNextSentencePrediction", "bert.", {"nsp": {"output": "logits"}}, POOLER),
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


def trunk(config: Config) -> Sequence[Rule]:
    """The names of the layers."""
    theirs, block = "encoder.layer.{layer}", "stack.blocks.{layer}"
    return (
        one("embeddings.word_embeddings.weight", "embed.tokens.weight"),
        one("embeddings.position_embeddings.weight", "embed.positions.table.weight"),
        one("embeddings.token_type_embeddings.weight", "embed.segments.weight"),
        *layer("embeddings.LayerNorm", "embed.norm"),
        *_attention(f"{theirs}.attention", f"{block}.attn", f"{block}.wiring.norm.attn"),
        *_attention(f"{theirs}.crossattention", f"{block}.cross", f"{block}.wiring.norm.cross"),
        *layer(f"{theirs}.intermediate.dense", f"{block}.ffn.up"),
        *layer(f"{theirs}.output.dense", f"{block}.ffn.down"),
        *layer(f"{theirs}.output.LayerNorm", f"{block}.wiring.norm.ffn"),
        *layer("pooler.dense", "pooler.dense"),
    )


def prediction(ours: str, transform: str) -> tuple[Rule, ...]:
    """The names of a language-model head."""
    return (
        *layer("cls.predictions.transform.dense", f"{transform}.dense"),
        *layer("cls.predictions.transform.LayerNorm", f"{transform}.norm"),
        one("cls.predictions.decoder.weight", f"{ours}.decoder.weight"),
        one("cls.predictions.bias", f"{ours}.bias"),
    )


def ties(config: Any, prefix: str) -> Mapping[str, str]:
    """What a language-model head shares."""
    head = config.heads.get("mlm") or config.heads.get("lm")
    if head is None:
        return {}
    bias = {"cls.predictions.decoder.bias": "cls.predictions.bias"}
    table = {"cls.predictions.decoder.weight": f"{prefix}embeddings.word_embeddings.weight"}
    return bias | table if head.tied else bias


def _dead(config: Any) -> Shapes:
    absolute = config.embed.positions.kind == "learned"
    return {} if absolute else {"embeddings.position_embeddings.weight": (config.context, config.dim)}


BERT = Family(
    name="bert",
    types=("bert",),
    title="BERT",
    template=template,
    forms=FORMS,
    trunk=trunk,
    heads=(
        *prediction("heads.mlm", "heads.mlm"),
        *prediction("heads.lm", "heads.lm.transform"),
        *layer("cls.seq_relationship", "heads.nsp.classifier"),
        *layer("classifier", "heads.sequence.classifier"),
        *layer("classifier", "heads.choice.classifier"),
        *layer("classifier", "heads.token.classifier"),
        *layer("qa_outputs", "heads.span.classifier"),
    ),
    ties=ties,
    dead=_dead,
    drops=(
        Drop("embeddings.position_ids", "0, 1, 2 ...", counts_up),
        Drop("embeddings.token_type_ids", "zeros", is_zero),
    ),
    aliases=(("LayerNorm.gamma", "LayerNorm.weight"), ("LayerNorm.beta", "LayerNorm.bias")),
    prefixes=("bert.", ""),
    fixed={"is_encoder_decoder": (False,)},
    neutral=frozenset(
        """
        classifier_dropout directionality pooler_fc_size pooler_num_attention_heads pooler_num_fc_layers
        pooler_size_per_head pooler_type tie_word_embeddings
        """.split()
    ),
)
