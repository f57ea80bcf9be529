"""BART: post-norms, learned positions from row 2 on, one token table for both sides, a bias of the logits that
training leaves alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from xtcli.convert.families.common import PROBLEM, activation, labels, pad, starts, token
from xtcli.convert.family import Drop, Family, Form, Shapes
from xtcli.convert.options import Key, table
from xtcli.convert.rules import Rule, Unit, layer, one
from xtcli.registry import Config

DIM = Key("d_model", int, 1024, ("hidden_size",))
DROPOUT = Key("dropout", float, 0.1)
ATTENTION_DROPOUT = Key("attention_dropout", float, 0.0)
TIED = Key("tie_word_embeddings", bool, True)
SKIPPED = 2


def _embed() -> dict[str, Any]:
    return {
        "kind": "tokens",
        "positions": {"kind": "learned", "offset": SKIPPED},
        "scale": Key("scale_embedding", bool, False, code=table({False: 1.0, True: "sqrt-dim"})),
        "scale_given": False,
        "norm": {"kind": "inherit"},
        "dropout": DROPOUT,
    }


def _stack(side: str, cross: bool) -> dict[str, Any]:
    heads = Key(f"{side}_attention_heads", int, 16, ("num_attention_heads",) if side == "encoder" else ())
    attention = {"heads": heads, "dropout": ATTENTION_DROPOUT}
    return {
        "layers": Key(f"{side}_layers", int, 12),
        "layer_drop": Key(f"{side}_layerdrop", float, 0.0),
        "norm": {"kind": "none"},
        "block": {
            "wiring": {"kind": "post", "dropout": DROPOUT},
            "sublayers": {
                "attn": {"kind": "attention", **attention},
                **({"cross": {"kind": "cross-attention", **attention}} if cross else {}),
                "ffn": {
                    "kind": "mlp",
                    "hidden": Key(f"{side}_ffn_dim", int, 4096),
                    "act": Key("activation_function", str, "gelu", code=activation("gelu")),
                    "dropout": Key("activation_dropout", float, 0.0),
                },
            },
        },
    }


def _template(form: Form) -> dict[str, Any]:
    return {
        "vocab": Key("vocab_size", int, 50265),
        "dim": DIM,
        "context": Key("max_position_embeddings", int, 1024),
        "dropout": DROPOUT,
        "pad": pad(1),
        "norm": {"kind": "layer", "eps": 1e-5},
        "init": {"kind": "normal", "std": Key("init_std", float, 0.02)},
        "heads": form.heads,
        **form.more,
    }


BOTH = {
    "kind": "encoder-decoder",
    "start": starts(2),
    "first": Key("forced_bos_token_id", int, None),
    "last": token("forced_eos_token_id", 2),
    "copies": True,
    "encoder": {"embed": _embed(), "stack": _stack("encoder", cross=False)},
    "decoder": {"embed": _embed(), "stack": _stack("decoder", cross=True)},
}
ALONE = {"kind": "decoder", "memory": DIM, "embed": _embed(), "stack": _stack("decoder", cross=True)}
SEQUENCE = {
    "labels": labels(3),
    "pick": "end",
    "end": Key("eos_token_id", int, 2),
    "hidden": True,
    "act": "tanh",
    "dropout": Key("classifier_dropout", float, 0.0),
    "problem": PROBLEM,
}


def _bias(config: Any) -> tuple[Shapes, ...]:
    return ({"final_logits_bias": (1, config.vocab)},)


FORMS = (
    Form("BartForConditionalGeneration", "model.", {"lm": {"tied": TIED, "bias": "fixed"}}, BOTH),
    # Files that leave the bias out mean zeros.
    Form("BartForConditionalGeneration", "model.", {"lm": {"tied": TIED}}, BOTH),
    Form("BartModel", "", {}, BOTH, _bias),
    Form("BartForSequenceClassification", "model.", {"sequence": SEQUENCE}, BOTH, _bias),
    Form("BartForQuestionAnswering", "model.", {"span": {}}, BOTH, _bias),
    Form("BartForCausalLM", "model.", {"lm": {"tied": TIED, "shift": False}}, ALONE),
)


def _attention(theirs: str, ours: str, norm: str) -> tuple[Rule, ...]:
    return (
        *(rule for n in "qkv" for rule in layer(f"{theirs}.{n}_proj", f"{ours}.{n}")),
        *layer(f"{theirs}.out_proj", f"{ours}.o"),
        *layer(f"{theirs}_layer_norm", norm),
    )


def _side(side: str, ours: str) -> tuple[Rule, ...]:
    theirs, block = f"{side}.layers.{{layer}}", f"{ours}stack.blocks.{{layer}}"
    return (
        one(f"{side}.embed_positions.weight", f"{ours}embed.positions.table.weight"),
        *layer(f"{side}.layernorm_embedding", f"{ours}embed.norm"),
        *_attention(f"{theirs}.self_attn", f"{block}.attn", f"{block}.wiring.norm.attn"),
        *_attention(f"{theirs}.encoder_attn", f"{block}.cross", f"{block}.wiring.norm.cross"),
        *layer(f"{theirs}.fc1", f"{block}.ffn.up"),
        *layer(f"{theirs}.fc2", f"{block}.ffn.down"),
        *layer(f"{theirs}.final_layer_norm", f"{block}.wiring.norm.ffn"),
    )


def _trunk(config: Config) -> Sequence[Rule]:
    if config.kind == "decoder":
        return one("decoder.embed_tokens.weight", "embed.tokens.weight"), *_side("decoder", "")
    return (
        one("shared.weight", "tokens.weight"),
        *_side("encoder", "encoder."),
        *_side("decoder", "decoder."),
    )


def _ties(config: Any, prefix: str) -> Mapping[str, str]:
    both = config.kind == "encoder-decoder"
    main = f"{prefix}shared.weight" if both else f"{prefix}decoder.embed_tokens.weight"
    ties = {f"{prefix}{side}.embed_tokens.weight": main for side in ("encoder", "decoder")} if both else {}
    lm = config.heads.get("lm")
    return ties | ({"lm_head.weight": main} if lm is not None and lm.tied else {})


def _is_number(tensor: Tensor, config: Config) -> bool:
    return tensor.numel() == 1 and bool(torch.isfinite(tensor.double()).all())


BART = Family(
    name="bart",
    types=("bart",),
    title="BART",
    template=_template,
    forms=FORMS,
    trunk=_trunk,
    heads=(
        one("final_logits_bias", "heads.lm.bias", Unit((0,))),
        one("lm_head.weight", "heads.lm.decoder.weight"),
        *layer("classification_head.dense", "heads.sequence.dense"),
        *layer("classification_head.out_proj", "heads.sequence.classifier"),
        *layer("qa_outputs", "heads.span.classifier"),
    ),
    ties=_ties,
    drops=(
        Drop("encoder.version", "the version of the program that wrote it", _is_number),
        Drop("decoder.version", "the version of the program that wrote it", _is_number),
    ),
    prefixes=("model.", ""),
    objectives={"encoder-decoder": "denoising"},
    fixed={
        # Options of the first release that the reference reads no more; these are what it does.
        "add_bias_logits": (False,),
        "add_final_layer_norm": (False,),
        "normalize_before": (False,),
        "normalize_embedding": (True,),
        "static_position_embeddings": (False,),
        "extra_pos_embeddings": (SKIPPED,),
    },
    neutral=frozenset(
        """
        is_encoder_decoder is_decoder add_cross_attention num_hidden_layers tie_word_embeddings classifier_dropout
        classif_dropout decoder_start_token_id eos_token_id force_bos_token_to_be_generated save_step
        encoder_layers encoder_ffn_dim encoder_attention_heads encoder_layerdrop num_attention_heads
        """.split()
    ),
)
