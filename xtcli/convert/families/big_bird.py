"""BigBird: a BERT of blocks, or of full attention where `attention_type` says so, and where it is a decoder.

The reference reads a text in full where its blocks would reach nearly all of it. A decoder of blocks is one only on
such texts: on longer ones its blocks would see the future, so that these are refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from xtcli.convert.families import bert
from xtcli.convert.families.bert import ATTENTION_DROPOUT, CLASSIFIER_DROPOUT, CROSS, DROPOUT, POOLER, TIED
from xtcli.convert.families.common import LABELS, activation, counts_up, is_zero, pad
from xtcli.convert.families.roberta import sequence
from xtcli.convert.family import Drop, Family, Form, Shapes
from xtcli.convert.options import Custom, Key, Options, Unexpressed, table
from xtcli.convert.rules import Rule, layer
from xtcli.registry import Config

ACT = Key("hidden_act", str, "gelu_new", code=activation("gelu_new"))
CONTEXT = Key("max_position_embeddings", int, 4096)
HEADS = Key("num_attention_heads", int, 12)
BIAS = Key("use_bias", bool, True)
BLOCK = Key("block_size", int, 64)
RANDOM = Key("num_random_blocks", int, 3)
TYPE = "attention_type"
SEPARATOR = Key("sep_token_id", int, 66)
TRANSFORM = {"kind": "dense", "act": ACT, "norm": {"kind": "inherit"}}


def _attention(options: Options) -> dict[str, Any]:
    stated = options.get(TYPE, str, "block_sparse")
    block, random = BLOCK.load(options), RANDOM.load(options)
    decoder = options.get("is_decoder", bool, False)
    if CROSS.load(options):
        options.refuse(
            CROSS.name,
            "is true: the reference then reads the other text in the place of its own, in both attentions of a layer",
            "convert without it",
        )
    if stated not in ("block_sparse", "original_full"):
        options.refuse(TYPE, f"is {stated!r}", "it is block_sparse or original_full")
    common = {"heads": HEADS.load(options), "bias": BIAS.load(options), "out_bias": True}
    common["dropout"] = ATTENTION_DROPOUT.load(options)
    if stated == "block_sparse" and decoder:
        return {"kind": "attention", **common, "mask": {"kind": "causal", "most": (5 + 2 * random) * block}}
    if stated != "block_sparse":
        return {"kind": "attention", **common}
    return {"kind": "block-sparse", **common, "block": block, "random": random}


def _write_attention(value: Any, found: dict[str, Any]) -> None:
    blocks = value["kind"] == "block-sparse"
    found |= {TYPE: "block_sparse" if blocks else "original_full", "use_bias": value["bias"]}
    found |= {"num_attention_heads": value["heads"], "attention_probs_dropout_prob": value["dropout"]}
    most = value.get("mask", {}).get("most")
    if blocks:
        found |= {"block_size": value["block"], "num_random_blocks": value["random"]}
    elif most is not None:
        random = next((count for count in (3, 2, 1, 0) if most % (5 + 2 * count) == 0), None)
        if random is None:
            raise Unexpressed(f"no blocks make texts of {most} tokens the longest that are read in full")
        found |= {TYPE: "block_sparse", "block_size": most // (5 + 2 * random), "num_random_blocks": random}


FFN = {"kind": "mlp", "hidden": Key("intermediate_size", int, 3072), "act": ACT}


def template(form: Form) -> dict[str, Any]:
    """The tree of a BigBird."""
    tree = bert.template(form)
    tree |= {
        "vocab": Key("vocab_size", int, 50358),
        "context": CONTEXT,
        "pad": pad(0),
        "memory": None,
    }
    tree["embed"] = tree["embed"] | {
        "positions": {"kind": "learned"},
        "scale": Key("rescale_embeddings", bool, False, code=table({False: 1.0, True: "sqrt-dim"})),
        "separator": SEPARATOR if "span" in form.heads else None,
    }
    sublayers = {"attn": Custom(_attention, _write_attention), "ffn": FFN}
    tree["stack"] = tree["stack"] | {"block": tree["stack"]["block"] | {"sublayers": sublayers}}
    return tree


BLOCK_BEFORE = {"kind": "feed-forward", "hidden": Key("intermediate_size", int, 3072), "act": ACT, "dropout": DROPOUT}
SPAN = {"transform": BLOCK_BEFORE, "separator": SEPARATOR}


def _mlm(output: str) -> dict[str, Any]:
    return {"act": ACT, "tied": TIED, "output": output}


FORMS = (
    Form(
        "BigBirdForPreTraining",
        "bert.",
        {"mlm": _mlm("prediction_logits"), "nsp": {"output": "seq_relationship_logits"}},
        POOLER,
    ),
    Form("BigBirdForMaskedLM", "bert.", {"mlm": _mlm("logits")}),
    Form("BigBirdForCausalLM", "bert.", {"lm": {"tied": TIED, "bias": True, "transform": TRANSFORM, "shift": True}}),
    Form("BigBirdModel", "", {}, POOLER),
    Form("BigBirdModel", "", {}),
    Form("BigBirdForSequenceClassification", "bert.", {"sequence": sequence(ACT, CLASSIFIER_DROPOUT)}),
    Form("BigBirdForMultipleChoice", "bert.", {"choice": {"dropout": DROPOUT}}, POOLER),
    Form("BigBirdForTokenClassification", "bert.", {"token": {"labels": LABELS, "dropout": CLASSIFIER_DROPOUT}}),
    Form("BigBirdForQuestionAnswering", "bert.", {"span": SPAN}),
    Form("BigBirdForQuestionAnswering", "bert.", {"span": SPAN}, POOLER),
)


def trunk(config: Config) -> Sequence[Rule]:
    """BERT's names, but for the pooler, which is the dense layer itself."""
    return (*(rule for rule in bert.trunk(config) if "pooler" not in rule.theirs[0]), *layer("pooler", "pooler.dense"))


def _dead(config: Any) -> Shapes:
    """The pooler that most classes have and do not read."""
    if config.pooler is not None or not {"mlm", "lm", "sequence", "token"} & set(config.heads):
        return {}
    return {"pooler.weight": (config.dim, config.dim), "pooler.bias": (config.dim,)}


BIG_BIRD = Family(
    name="big_bird",
    types=("big_bird",),
    title="BigBird",
    template=template,
    forms=FORMS,
    trunk=trunk,
    heads=(
        *bert.prediction("heads.mlm", "heads.mlm"),
        *bert.prediction("heads.lm", "heads.lm.transform"),
        *layer("cls.seq_relationship", "heads.nsp.classifier"),
        *layer("classifier.dense", "heads.sequence.dense"),
        *layer("classifier.out_proj", "heads.sequence.classifier"),
        *layer("classifier", "heads.choice.classifier"),
        *layer("classifier", "heads.token.classifier"),
        *layer("qa_classifier.intermediate.dense", "heads.span.transform.up"),
        *layer("qa_classifier.output.dense", "heads.span.transform.down"),
        *layer("qa_classifier.output.LayerNorm", "heads.span.transform.norm"),
        *layer("qa_classifier.qa_outputs", "heads.span.classifier"),
    ),
    ties=bert.ties,
    dead=_dead,
    drops=(
        Drop("embeddings.position_ids", "0, 1, 2 ...", counts_up),
        Drop("embeddings.token_type_ids", "zeros", is_zero),
    ),
    prefixes=("bert.", ""),
    fixed={"is_encoder_decoder": (False,)},
    # What the blocks are made of has no effect where attention is full; no position_embedding_type is read.
    neutral=frozenset(
        """
        classifier_dropout tie_word_embeddings position_embedding_type block_size num_random_blocks attention_type
        """.split()
    ),
)
