"""Transformer-XL: memories of earlier segments, waves of the distance, a vocabulary in bands."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from xtcli.convert.families.common import LABELS, PAD, PROBLEM
from xtcli.convert.family import Family, Form, Shapes
from xtcli.convert.options import OMIT, Code, Custom, Key, Options, table
from xtcli.convert.rules import Copies, Rule, Split, layer, one
from xtcli.registry import Config

DIM = Key("d_model", int, 1024, ("hidden_size",))
DROPOUT = Key("dropout", float, 0.1)
MEMORY = Key("mem_len", int, 1600)
UNTIED = Key("untie_r", bool, True, code=Code(lambda value: not value, lambda value: not value))
CLAMP = Key("clamp_len", int, 1000, code=Code(lambda v: v if v > 0 else None, lambda v: -1 if v is None else v))


def _mask(options: Options) -> Any:
    same, length = options.get("same_length", bool, True), MEMORY.load(options)
    if same and length == 0:
        cause = "true hides every key from every query when mem_len is 0"
        options.refuse("same_length", cause, "set same_length to false, or mem_len")
    return {"kind": "window", "left": max(length - 1, 0), "right": 0} if same else {"kind": "causal"}


def _write_mask(value: Any, found: dict[str, Any]) -> None:
    found["same_length"] = value["kind"] == "window"


def _cutoffs(options: Options) -> Any:
    return list(options.get("cutoffs", list, [20000, 40000, 200000]))


def _own(options: Options) -> Any:
    """The bands of the softmax with projections of their own: those that are not tied."""
    share = options.get("proj_share_all_but_first", bool, True)
    bands = len(_cutoffs(options)) + 1
    tied = options.get("tie_projs", list, [False] + [share] * (bands - 1))
    return [band for band in range(bands) if band >= len(tied) or not tied[band]]


def _write_own(value: Any, found: dict[str, Any]) -> None:
    found["tie_projs"] = [band not in value for band in range(len(found["cutoffs"]) + 1)]


def _unsampled(options: Options) -> Any:
    count = options.get("sample_softmax", int, -1)
    if count > 0:
        options.refuse("sample_softmax", f"is {count}: no such softmax is made any more", "only -1 converts")
    return OMIT


def _template(form: Form) -> dict[str, Any]:
    return {
        "kind": "decoder",
        "vocab": Key("vocab_size", int, 267735, ("n_token",)),
        "dim": DIM,
        "dropout": DROPOUT,
        "pad": PAD,
        "norm": {"kind": "layer", "eps": Key("layer_norm_epsilon", float, 1e-5)},
        "init": {"kind": "normal", "std": Key("init_std", float, 0.02)},
        "embed": {
            "kind": "adaptive",
            "cutoffs": Custom(_cutoffs, lambda value, found: found.update(cutoffs=list(value))),
            "width": Key("d_embed", int, 1024),
            "divide": Key("div_val", int, 4),
            "dropout": DROPOUT,
        },
        "stack": {
            "layers": Key("n_layer", int, 18, ("num_hidden_layers",)),
            "norm": {"kind": "none"},
            "dropout": DROPOUT,
            "recurrence": {"length": MEMORY, "start": "zeros"},
            "position": {"kind": "wave", "clamp": CLAMP, "shared": UNTIED, "dropout": DROPOUT},
            "block": {
                "wiring": {
                    "kind": Key("pre_lnorm", bool, False, code=table({False: "post", True: "pre"})),
                    "dropout": DROPOUT,
                },
                "sublayers": {
                    "attn": {
                        "kind": "attention",
                        "heads": Key("n_head", int, 16, ("num_attention_heads",)),
                        "head_dim": Key("d_head", int, 64),
                        "bias": False,
                        "dropout": Key("dropatt", float, 0.0),
                        "mask": Custom(_mask, _write_mask),
                    },
                    "ffn": {
                        "kind": "mlp",
                        "hidden": Key("d_inner", int, 4096),
                        "act": "relu",
                        "dropout": DROPOUT,
                    },
                },
            },
        },
        "heads": form.heads,
    }


SAMPLED = Custom(_unsampled, lambda value, found: None)
ADAPTIVE = {
    "sampled": SAMPLED,
    "tied": Key("tie_word_embeddings", bool, True),
    "own_projections": Custom(_own, _write_own),
}
SEQUENCE = {"labels": LABELS, "pick": "before-pad", "bias": False, "dropout": 0.0, "problem": PROBLEM}

FORMS = (
    Form("TransfoXLLMHeadModel", "transformer.", {"adaptive": ADAPTIVE}),
    Form("TransfoXLModel", "", {}),
    Form("TransfoXLForSequenceClassification", "transformer.", {"sequence": SEQUENCE}),
)


def _shared(config: Any, theirs: str, ours: str) -> Rule:
    """A bias of all layers, which their files hold once more for each."""
    copies = [f"layers.{number}.dec_attn.{theirs}" for number in range(config.stack.layers)]
    return Rule((theirs, *copies), (ours,), Copies(len(copies) + 1))


def _trunk(config: Config) -> Sequence[Rule]:
    theirs, block = "layers.{layer}", "stack.blocks.{layer}"
    attn = f"{block}.attn"
    return (
        one("word_emb.emb_layers.{band}.weight", "embed.tables.{band}.weight"),
        one("word_emb.emb_projs.{band}", "embed.projections.{band}.weight"),
        _shared(config, "r_w_bias", "stack.shared.turns.0.biases.content"),
        _shared(config, "r_r_bias", "stack.shared.turns.0.biases.place"),
        one(f"{theirs}.dec_attn.r_w_bias", f"{attn}.relative.biases.content"),
        one(f"{theirs}.dec_attn.r_r_bias", f"{attn}.relative.biases.place"),
        Rule((f"{theirs}.dec_attn.qkv_net.weight",), tuple(f"{attn}.{name}.weight" for name in "qkv"), Split()),
        one(f"{theirs}.dec_attn.r_net.weight", f"{attn}.relative.r.weight"),
        one(f"{theirs}.dec_attn.o_net.weight", f"{attn}.o.weight"),
        *layer(f"{theirs}.dec_attn.layer_norm", f"{block}.wiring.norm.attn"),
        *layer(f"{theirs}.pos_ff.CoreNet.0", f"{block}.ffn.up"),
        *layer(f"{theirs}.pos_ff.CoreNet.3", f"{block}.ffn.down"),
        *layer(f"{theirs}.pos_ff.layer_norm", f"{block}.wiring.norm.ffn"),
    )


def _ties(config: Any, prefix: str) -> Mapping[str, str]:
    head, embed = config.heads.get("adaptive"), config.embed
    found: dict[str, str] = {}
    if head is None:
        return found
    bands = len(embed.cutoffs) + 1
    merged = embed.divide == 1
    if head.tied:
        for band in range(1 if merged else bands):
            found[f"crit.out_layers.{band}.weight"] = f"{prefix}word_emb.emb_layers.{band}.weight"
    if not merged or embed.width not in (None, config.dim):
        for band in range(bands):
            if band not in head.own_projections:
                found[f"crit.out_projs.{band}"] = f"{prefix}word_emb.emb_projs.{0 if merged else band}"
    return found


FREQUENCIES = "pos_emb.inv_freq"


def _dead(config: Any) -> Shapes:
    return {FREQUENCIES: ((config.dim + 1) // 2,)}


def _known(config: Any) -> Mapping[str, Tensor]:
    return {FREQUENCIES: 1 / (10000 ** (torch.arange(0.0, config.dim, 2.0) / config.dim))}


@contextmanager
def _runnable() -> Iterator[None]:
    """The reference asks a tensor for a type by name where torch takes another tensor: within, both are heard."""

    def type_as(self: Tensor, other: Tensor | None = None, *, dtype: torch.dtype | None = None) -> Tensor:
        return self.to(dtype if other is None else other.dtype)

    with patch.object(torch.Tensor, "type_as", type_as):
        yield


TRANSFO_XL = Family(
    name="transfo-xl",
    types=("transfo-xl",),
    title="Transformer-XL",
    template=_template,
    forms=FORMS,
    trunk=_trunk,
    heads=(
        *layer("crit.out_layers.{band}", "heads.adaptive.bands.{band}"),
        one("crit.cluster_weight", "heads.adaptive.clusters.weight"),
        one("crit.cluster_bias", "heads.adaptive.clusters.bias"),
        one("crit.out_projs.{band}", "heads.adaptive.projections.{band}.weight"),
        *layer("score", "heads.sequence.classifier"),
    ),
    ties=_ties,
    dead=_dead,
    known=_known,
    time_first=True,
    runnable=_runnable,
    prefixes=("transformer.", ""),
    fixed={"attn_type": (0,), "is_encoder_decoder": (False,), "is_decoder": (False,)},
    neutral=frozenset(
        """
        adaptive init init_range proj_init_std proj_share_all_but_first tie_projs trainer_compatible tie_weight
        tie_word_embeddings ext_len tgt_len add_cross_attention sample_softmax
        """.split()
    ),
)
