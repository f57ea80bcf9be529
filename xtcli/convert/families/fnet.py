"""FNet: a BERT whose attention is a Fourier transform, with a dense layer behind the embedding's norm.

The reference has no mask: padding is mixed into the text there as here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from xtcli.convert.families import bert
from xtcli.convert.families.bert import DIM, DROPOUT, POOLER, TIED
from xtcli.convert.families.common import LABELS, PROBLEM, TWO_OUTPUTS, activation, counts_up, is_zero, pad
from xtcli.convert.family import Drop, Family, Form, Shapes
from xtcli.convert.options import Key
from xtcli.convert.rules import Rule, layer, one
from xtcli.registry import Config

ACT = Key("hidden_act", str, "gelu_new", code=activation("gelu_new"))


def _template(form: Form) -> dict[str, Any]:
    return {
        "kind": "encoder",
        "vocab": Key("vocab_size", int, 32000),
        "dim": DIM,
        "context": Key("max_position_embeddings", int, 512),
        "dropout": DROPOUT,
        "pad": pad(3),
        "norm": {"kind": "layer", "eps": Key("layer_norm_eps", float, 1e-12)},
        "init": {"kind": "normal", "std": Key("initializer_range", float, 0.02)},
        "embed": {
            "kind": "factorised",
            "width": DIM,
            "project_after": "norm",
            "project_bias": True,
            "positions": {"kind": "learned"},
            "segments": Key("type_vocab_size", int, 4),
            "norm": {"kind": "inherit"},
            "dropout": DROPOUT,
        },
        "stack": {
            "layers": Key("num_hidden_layers", int, 12),
            "norm": {"kind": "none"},
            "block": {
                # In training dropout falls on the transform as well, which the reference adds whole.
                "wiring": {"kind": "post", "dropout": DROPOUT},
                "sublayers": {
                    "mixer": {"kind": "fourier"},
                    "ffn": {"kind": "mlp", "hidden": Key("intermediate_size", int, 3072), "act": ACT},
                },
            },
        },
        "heads": form.heads,
        **form.more,
    }


def _mlm(output: str) -> dict[str, Any]:
    return {"act": ACT, "tied": TIED, "output": output}


SEQUENCE = {"labels": LABELS, "pick": "pooled", "dropout": DROPOUT, "problem": PROBLEM}
FORMS = (
    Form(
        "FNetForPreTraining",
        "fnet.",
        {"mlm": _mlm("prediction_logits"), "nsp": {"output": "seq_relationship_logits"}},
        POOLER,
    ),
    Form("FNetForMaskedLM", "fnet.", {"mlm": _mlm("logits")}),
    Form("FNetForNextSentencePrediction", "fnet.", {"nsp": {"output": "logits"}}, POOLER),
    Form("FNetModel", "", {}, POOLER),
    Form("FNetModel", "", {}),
    Form("FNetForSequenceClassification", "fnet.", {"sequence": SEQUENCE}, POOLER),
    Form("FNetForMultipleChoice", "fnet.", {"choice": {"dropout": DROPOUT}}, POOLER),
    Form("FNetForTokenClassification", "fnet.", {"token": {"labels": LABELS, "dropout": DROPOUT}}),
    Form("FNetForQuestionAnswering", "fnet.", {"span": TWO_OUTPUTS}),
)


def _trunk(config: Config) -> Sequence[Rule]:
    theirs, block = "encoder.layer.{layer}", "stack.blocks.{layer}"
    return (
        one("embeddings.word_embeddings.weight", "embed.tokens.weight"),
        one("embeddings.position_embeddings.weight", "embed.positions.table.weight"),
        one("embeddings.token_type_embeddings.weight", "embed.segments.weight"),
        *layer("embeddings.LayerNorm", "embed.norm"),
        *layer("embeddings.projection", "embed.project"),
        *layer(f"{theirs}.fourier.output.LayerNorm", f"{block}.wiring.norm.mixer"),
        *layer(f"{theirs}.intermediate.dense", f"{block}.ffn.up"),
        *layer(f"{theirs}.output.dense", f"{block}.ffn.down"),
        *layer(f"{theirs}.output.LayerNorm", f"{block}.wiring.norm.ffn"),
        *layer("pooler.dense", "pooler.dense"),
    )


def unread_pooler(config: Any) -> Shapes:
    """The pooler of the classes that have one and do not read it."""
    if config.pooler is not None or not config.heads:
        return {}
    return {"pooler.dense.weight": (config.dim, config.dim), "pooler.dense.bias": (config.dim,)}


FNET = Family(
    name="fnet",
    types=("fnet",),
    title="FNet",
    template=_template,
    forms=FORMS,
    trunk=_trunk,
    heads=bert.BERT.heads,
    ties=bert.ties,
    dead=unread_pooler,
    drops=(
        Drop("embeddings.position_ids", "0, 1, 2 ...", counts_up),
        Drop("embeddings.token_type_ids", "zeros", is_zero),
    ),
    prefixes=("fnet.", ""),
    fixed={"is_encoder_decoder": (False,), "use_tpu_fourier_optimizations": (False,)},
    neutral=frozenset({"add_cross_attention", "is_decoder", "tpu_short_seq_length", "tie_word_embeddings"}),
)
