"""RoBERTa: BERT whose places are counted from the ids, with heads of its own and no pooler under most of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from xtcli.convert.families import bert
from xtcli.convert.families.bert import CLASSIFIER_DROPOUT, POOLER, POSITIONS, TIED
from xtcli.convert.families.common import LABELS, PROBLEM, TWO_OUTPUTS, counts_up, is_zero
from xtcli.convert.family import Drop, Family, Form, Shapes
from xtcli.convert.options import Custom, Key, Options, Switch, Unexpressed
from xtcli.convert.rules import Rule, layer, one

PAD = Key("pad_token_id", int, 1)
ROWS = Key("max_position_embeddings", int, 512)


def _context(options: Options) -> int:
    """The table's rows but those of the padding and of what stands before it."""
    rows, pad = ROWS.load(options), PAD.load(options)
    if rows - pad < 2:
        options.refuse(ROWS.name, f"is {rows}, and text begins at row {pad + 1}", "give it more rows")
        return 1
    return int(rows - pad - 1)


def _write_context(value: Any, found: dict[str, Any]) -> None:
    if value is None or found.get(PAD.name) is None:
        raise Unexpressed("places are counted behind the padding's, so that both pad and context must be stated")
    found[ROWS.name] = value + found[PAD.name] + 1


CONTEXT = Custom(_context, _write_context)


def template(form: Form) -> dict[str, Any]:
    """The tree of a RoBERTa; its relatives change some of its entries."""
    tree = bert.template(form)
    tree |= {"vocab": Key("vocab_size", int, 50265), "pad": PAD, "context": CONTEXT}
    relative = {"relative_key": {"kind": "none"}, "relative_key_query": {"kind": "none"}}
    tree["embed"] = tree["embed"] | {
        "positions": Switch(POSITIONS, {"absolute": {"kind": "counted"}, **relative}, silent=True)
    }
    # The padding must be known before the places that are counted without it.
    return {"pad": PAD} | tree


def sequence(act: Any, dropout: Any) -> dict[str, Any]:
    """A classifier of the first state, through a dense layer."""
    return {"labels": LABELS, "pick": "first", "hidden": True, "act": act, "dropout": dropout, "problem": PROBLEM}


def forms(name: str, prefix: str, dropout: Any) -> tuple[Form, ...]:
    """The classes that all relatives have; `dropout` is that of the labels."""

    def pooler(config: Any) -> tuple[Shapes, ...]:
        weight, bias = f"{prefix}pooler.dense.weight", f"{prefix}pooler.dense.bias"
        return ({weight: (config.dim, config.dim), bias: (config.dim,)},)

    return (
        Form(f"{name}ForMaskedLM", prefix, {"mlm": {"act": "gelu", "tied": TIED, "output": "logits"}}, {}, pooler),
        Form(f"{name}Model", "", {}, POOLER),
        Form(f"{name}Model", "", {}),
        Form(f"{name}ForSequenceClassification", prefix, {"sequence": sequence("tanh", dropout)}, {}, pooler),
        Form(f"{name}ForMultipleChoice", prefix, {"choice": {"dropout": bert.DROPOUT}}, POOLER),
        Form(f"{name}ForTokenClassification", prefix, {"token": {"labels": LABELS, "dropout": dropout}}, {}, pooler),
        Form(f"{name}ForQuestionAnswering", prefix, {"span": TWO_OUTPUTS}, {}, pooler),
    )


def prediction(ours: str, transform: str) -> tuple[Rule, ...]:
    """The names of a language-model head."""
    return (
        *layer("lm_head.dense", f"{transform}.dense"),
        *layer("lm_head.layer_norm", f"{transform}.norm"),
        one("lm_head.decoder.weight", f"{ours}.decoder.weight"),
        one("lm_head.bias", f"{ours}.bias"),
    )


HEADS: Sequence[Rule] = (
    *prediction("heads.mlm", "heads.mlm"),
    *prediction("heads.lm", "heads.lm.transform"),
    *layer("classifier.dense", "heads.sequence.dense"),
    *layer("classifier.out_proj", "heads.sequence.classifier"),
    *layer("classifier", "heads.choice.classifier"),
    *layer("classifier", "heads.token.classifier"),
    *layer("qa_outputs", "heads.span.classifier"),
)


def ties(config: Any, prefix: str) -> Mapping[str, str]:
    """What a language-model head shares."""
    head = config.heads.get("mlm") or config.heads.get("lm")
    if head is None:
        return {}
    bias = {"lm_head.decoder.bias": "lm_head.bias"}
    table = {"lm_head.decoder.weight": f"{prefix}embeddings.word_embeddings.weight"}
    return bias | table if head.tied else bias


def _dead(config: Any) -> Shapes:
    counted = config.embed.positions.kind == "counted"
    rows = config.context + (config.pad or 0) + 1
    return {} if counted else {"embeddings.position_embeddings.weight": (rows, config.dim)}


DROPS = (
    Drop("embeddings.position_ids", "0, 1, 2 ...", counts_up),
    Drop("embeddings.token_type_ids", "zeros", is_zero),
)

CAUSAL = {
    "tied": TIED,
    "bias": True,
    "transform": {"kind": "dense", "act": "gelu", "norm": {"kind": "inherit"}},
    "shift": True,
}


ROBERTA = Family(
    name="roberta",
    types=("roberta",),
    title="RoBERTa",
    template=template,
    forms=(
        *forms("Roberta", "roberta.", CLASSIFIER_DROPOUT),
        Form("RobertaForCausalLM", "roberta.", {"lm": CAUSAL}),
    ),
    trunk=bert.trunk,
    heads=HEADS,
    ties=ties,
    dead=_dead,
    drops=DROPS,
    prefixes=("roberta.", ""),
    fixed={"is_encoder_decoder": (False,)},
    neutral=frozenset("classifier_dropout tie_word_embeddings".split()),
)
