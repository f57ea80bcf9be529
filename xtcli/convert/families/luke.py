"""LUKE: a RoBERTa that reads the entities of a text behind its words, with queries for each pair of kinds.

Every class but those of tokens and answers has a pooler; those of masked words and of entities do not read theirs.
The matrix of the entity head is always tied to the entity table, whatever ties the matrix of the words.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from xtcli.convert.families import bert, roberta
from xtcli.convert.families.bert import ACT, ATTENTION_DROPOUT, CLASSIFIER_DROPOUT, DIM, DROPOUT, POOLER, TIED
from xtcli.convert.families.common import LABELS, PROBLEM, TWO_OUTPUTS
from xtcli.convert.families.roberta import CONTEXT, PAD, ROWS
from xtcli.convert.family import Family, Form
from xtcli.convert.options import Key, table
from xtcli.convert.rules import Rule, layer, one
from xtcli.registry import Config

TYPES = Key("type_vocab_size", int, 2)
AWARE = Key("use_entity_aware_attention", bool, True, code=table({True: "entity-aware", False: "attention"}))


def _template(form: Form) -> dict[str, Any]:
    return {
        # The padding must be known before the places that are counted without it.
        "pad": PAD,
        "kind": "encoder",
        "vocab": Key("vocab_size", int, 50267),
        "dim": DIM,
        "context": CONTEXT,
        "dropout": DROPOUT,
        "norm": {"kind": "layer", "eps": Key("layer_norm_eps", float, 1e-12)},
        "init": {"kind": "normal", "std": Key("initializer_range", float, 0.02)},
        "embed": {
            "kind": "tokens",
            "positions": {"kind": "counted"},
            "segments": TYPES,
            "norm": {"kind": "inherit"},
            "dropout": DROPOUT,
        },
        "stack": {
            "kind": "entities",
            "layers": Key("num_hidden_layers", int, 12),
            "norm": {"kind": "none"},
            "entities": {
                "vocab": Key("entity_vocab_size", int, 500000),
                "width": Key("entity_emb_size", int, 256),
                "places": ROWS,
                "segments": TYPES,
                "norm": {"kind": "inherit"},
                "dropout": DROPOUT,
            },
            "block": {
                "wiring": {"kind": "post", "dropout": DROPOUT},
                "sublayers": {
                    "attn": {
                        "kind": AWARE,
                        "heads": Key("num_attention_heads", int, 12),
                        "dropout": ATTENTION_DROPOUT,
                    },
                    "ffn": {"kind": "mlp", "hidden": Key("intermediate_size", int, 3072), "act": ACT},
                },
            },
        },
        "heads": form.heads,
        **form.more,
    }


def _of_entities(count: int) -> dict[str, Any]:
    return {"labels": LABELS, "entities": count, "bias": count == 1, "dropout": DROPOUT}


SEQUENCE = {"labels": LABELS, "pick": "pooled", "dropout": CLASSIFIER_DROPOUT, "problem": PROBLEM}
FORMS = (
    Form(
        "LukeForMaskedLM",
        "luke.",
        {"mlm": {"act": "gelu", "tied": TIED, "output": "logits"}, "mep": {"act": ACT}},
        POOLER,
    ),
    Form("LukeModel", "", {}, POOLER),
    Form("LukeModel", "", {}),
    Form("LukeForEntityClassification", "luke.", {"entity": _of_entities(1)}, POOLER),
    Form("LukeForEntityPairClassification", "luke.", {"entity": _of_entities(2)}, POOLER),
    Form("LukeForEntitySpanClassification", "luke.", {"entity-span": {"labels": LABELS, "dropout": DROPOUT}}, POOLER),
    Form("LukeForSequenceClassification", "luke.", {"sequence": SEQUENCE}, POOLER),
    Form("LukeForMultipleChoice", "luke.", {"choice": {"dropout": CLASSIFIER_DROPOUT}}, POOLER),
    Form("LukeForTokenClassification", "luke.", {"token": {"labels": LABELS, "dropout": CLASSIFIER_DROPOUT}}),
    Form("LukeForQuestionAnswering", "luke.", {"span": TWO_OUTPUTS}),
)


def _trunk(config: Config) -> Sequence[Rule]:
    theirs, ours = "encoder.layer.{layer}.attention.self", "stack.blocks.{layer}.attn"
    entities = "stack.entities"
    return (
        *bert.trunk(config),
        *layer(f"{theirs}.w2e_query", f"{ours}.q_entity"),
        *layer(f"{theirs}.e2w_query", f"{ours}.entity_q_word"),
        *layer(f"{theirs}.e2e_query", f"{ours}.entity_q"),
        one("entity_embeddings.entity_embeddings.weight", f"{entities}.table.weight"),
        one("entity_embeddings.entity_embedding_dense.weight", f"{entities}.project.weight"),
        one("entity_embeddings.position_embeddings.weight", f"{entities}.places.weight"),
        one("entity_embeddings.token_type_embeddings.weight", f"{entities}.segments.weight"),
        *layer("entity_embeddings.LayerNorm", f"{entities}.norm"),
    )


HEADS: Sequence[Rule] = (
    *roberta.prediction("heads.mlm", "heads.mlm"),
    *layer("entity_predictions.transform.dense", "heads.mep.dense"),
    *layer("entity_predictions.transform.LayerNorm", "heads.mep.norm"),
    one("entity_predictions.bias", "heads.mep.bias"),
    *layer("classifier", "heads.entity.classifier"),
    *layer("classifier", "heads.entity-span.classifier"),
    *layer("classifier", "heads.sequence.classifier"),
    *layer("classifier", "heads.choice.classifier"),
    *layer("classifier", "heads.token.classifier"),
    *layer("qa_outputs", "heads.span.classifier"),
)


def _ties(config: Any, prefix: str) -> Mapping[str, str]:
    tied = dict(roberta.ties(config, prefix))
    if "mep" in config.heads:
        tied["entity_predictions.decoder.weight"] = f"{prefix}entity_embeddings.entity_embeddings.weight"
    return tied


LUKE = Family(
    name="luke",
    types=("luke",),
    title="LUKE",
    template=_template,
    forms=FORMS,
    trunk=_trunk,
    heads=HEADS,
    ties=_ties,
    drops=roberta.DROPS,
    prefixes=("luke.", ""),
    fixed={"is_encoder_decoder": (False,)},
    neutral=frozenset(
        # The reference never reads the ones that other encoders do.
        """
        bert_model_name classifier_dropout cls_entity_prediction tie_word_embeddings is_decoder add_cross_attention
        position_embedding_type
        """.split()
    ),
    objectives={"mlm": "masked-entities"},
)
