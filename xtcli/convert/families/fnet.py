"""FNet: a BERT whose attention is a Fourier transform, with a dense layer behind the embedding's norm.

The reference has no mask: padding is mixed into the text there as here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from xtcli.convert.families import bert
from xtcli.convert.families.bert import DIM, DROPOUT, POOLER, TIED
from xtcli.convert.families.common import LABELS, PROBLEM, TWO_OUTPUTS, activation, counts_up, is_zero, pad, undropped
from xtcli.convert.family import Drop, Family, Form, Shapes
from xtcli.convert.options import Custom, Key, Options, Unexpressed
from xtcli.convert.rules import Rule, layer, one
from xtcli.registry import Config

ACT = Key("hidden_act", str, "gelu_new", code=activation("gelu_new"))
CONTEXT = Key("max_position_embeddings", int, 512)


LONGEST = 4096
"""Places up to which the reference transforms by matrices where it is told to, and then texts of one length alone."""


def _length(options: Options) -> int | None:
    length = int(options.get("tpu_short_seq_length", int, 512))
    by_matrices = options.get("use_tpu_fourier_optimizations", bool, False)
    return length if by_matrices and CONTEXT.load(options) <= LONGEST else None


def _write_length(value: Any, found: dict[str, Any]) -> None:
    if value is not None:
        found |= {"use_tpu_fourier_optimizations": True, "tpu_short_seq_length": value}


def _write_width(value: Any, found: dict[str, Any]) -> None:
    if value not in (None, found["hidden_size"]):
        raise Unexpressed(f"is {value}, and the token table is as wide as the model, {found['hidden_size']}")


def _template(form: Form) -> dict[str, Any]:
    return {
        "kind": "encoder",
        "vocab": Key("vocab_size", int, 32000),
        "dim": DIM,
        "context": CONTEXT,
        "dropout": DROPOUT,
        "pad": pad(3),
        "norm": {"kind": "layer", "eps": Key("layer_norm_eps", float, 1e-12)},
        "init": {"kind": "normal", "std": Key("initializer_range", float, 0.02)},
        "embed": {
            "kind": "factorised",
            "width": Custom(lambda options: None, _write_width),
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
                "wiring": {"kind": "post", "dropout": undropped("mixer")},
                "sublayers": {
                    "mixer": {"kind": "fourier", "length": Custom(_length, _write_length)},
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


def _matrices(config: Any) -> dict[str, int]:
    """The matrices of the transform, a pair for each layer: their rows."""
    length = config.stack.block.sublayers["mixer"].length
    sizes = {} if length is None else {"dft_mat_hidden": config.dim, "dft_mat_seq": length}
    layers = range(config.stack.layers)
    return {f"encoder.layer.{layer}.fourier.self.{name}": rows for layer in layers for name, rows in sizes.items()}


def _known(config: Any) -> Mapping[str, Tensor]:
    found = _matrices(config)
    waves = {rows: _waves(rows) for rows in set(found.values())}
    return {name: waves[rows] for name, rows in found.items()}


def _waves(size: int) -> Tensor:
    """e^(-2 pi i jk / n), (n, n)."""
    steps = torch.arange(size, dtype=torch.float64)
    turns = steps[:, None] * steps % size * (-2 * math.pi / size)
    return torch.polar(torch.ones_like(turns), turns).to(torch.complex64)


def _dead(config: Any) -> Shapes:
    return {**unread_pooler(config), **{name: (rows, rows) for name, rows in _matrices(config).items()}}


FNET = Family(
    name="fnet",
    types=("fnet",),
    title="FNet",
    template=_template,
    forms=FORMS,
    trunk=_trunk,
    heads=bert.BERT.heads,
    ties=bert.ties,
    dead=_dead,
    known=_known,
    drops=(
        Drop("embeddings.position_ids", "0, 1, 2 ...", counts_up),
        Drop("embeddings.token_type_ids", "zeros", is_zero),
    ),
    prefixes=("fnet.", ""),
    neutral=frozenset({"add_cross_attention", "is_decoder", "is_encoder_decoder", "tie_word_embeddings"}),
)
