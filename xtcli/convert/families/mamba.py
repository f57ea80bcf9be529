"""Mamba: one selective scan behind a norm in each layer, a stream in float32; weights of the scan lie fused."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from xtcli.convert.families.common import activation, pad
from xtcli.convert.family import Family, Form
from xtcli.convert.options import Custom, Key, Options, Switch
from xtcli.convert.rules import Rule, Split, Unit, layer, one
from xtcli.registry import Config

DIM = Key("hidden_size", int, 768)


def _inner(options: Options) -> int:
    """`intermediate_size`, which a file states beside what it follows from, decides."""
    expand = options.get("expand", float, 2.0)
    stated = options.get("intermediate_size", int, None)
    return int(expand * DIM.load(options)) if stated is None else int(stated)


def _write_inner(value: Any, found: dict[str, Any]) -> None:
    whole, rest = divmod(value, found["hidden_size"])
    found |= {"intermediate_size": value, "expand": value / found["hidden_size"] if rest else whole}


def _rank(options: Options) -> int | None:
    stated = options.values.get("time_step_rank", "auto")
    if stated == "auto":
        options.used.add("time_step_rank")
        return None
    return int(options.get("time_step_rank", int))


def _write_rank(value: Any, found: dict[str, Any]) -> None:
    found["time_step_rank"] = -(-found["hidden_size"] // 16) if value is None else value


def _template(form: Form) -> dict[str, Any]:
    return {
        "kind": "decoder",
        "vocab": Key("vocab_size", int, 50280),
        "dim": DIM,
        "dropout": 0.0,
        "pad": pad(0),
        "norm": {"kind": "rms", "eps": Key("layer_norm_epsilon", float, 1e-5)},
        "init": {"kind": "normal", "std": Key("initializer_range", float, 0.1), "residual": RESIDUAL},
        "embed": {"kind": "tokens"},
        "stack": {
            "layers": Key("num_hidden_layers", int, 32),
            "trace": "outputs",
            "block": {
                "wiring": Switch(
                    Key("residual_in_fp32", bool, True),
                    {True: {"kind": "pre-wide", "dropout": 0.0}, False: {"kind": "pre", "dropout": 0.0}},
                ),
                "sublayers": {
                    "mixer": {
                        "kind": "mamba",
                        "inner": Custom(_inner, _write_inner),
                        "state": Key("state_size", int, 16),
                        "kernel": Key("conv_kernel", int, 4),
                        "rank": Custom(_rank, _write_rank),
                        "act": Key("hidden_act", str, "silu", code=activation("silu")),
                        "bias": Key("use_bias", bool, False),
                        "conv_bias": Key("use_conv_bias", bool, True),
                        "step_min": Key("time_step_min", float, 0.001),
                        "step_max": Key("time_step_max", float, 0.1),
                        "step_floor": Key("time_step_floor", float, 1e-4),
                        "step_scale": Key("time_step_scale", float, 1.0),
                        "step_init": Key("time_step_init_scheme", str, "random"),
                    },
                },
            },
        },
        "heads": form.heads,
    }


RESIDUAL = Key("rescale_prenorm_residual", bool, False)
FORMS = (
    Form("MambaForCausalLM", "backbone.", {"lm": {"tied": Key("tie_word_embeddings", bool, True)}}),
    Form("MambaModel", "", {}),
)


def _trunk(config: Config) -> Sequence[Rule]:
    theirs, ours = "layers.{layer}.mixer", "stack.blocks.{layer}.mixer"

    def parts(*names: str) -> tuple[str, ...]:
        return tuple(f"{ours}.{name}" for name in names)

    return (
        one("embeddings.weight", "embed.tokens.weight"),
        *layer("layers.{layer}.norm", "stack.blocks.{layer}.wiring.norm.mixer"),
        Rule((f"{theirs}.in_proj.weight",), parts("up.weight", "gate.weight"), Split()),
        Rule((f"{theirs}.in_proj.bias",), parts("up.bias", "gate.bias"), Split()),
        one(f"{theirs}.conv1d.weight", f"{ours}.conv.weight", Unit((1,))),
        one(f"{theirs}.conv1d.bias", f"{ours}.conv.bias"),
        Rule((f"{theirs}.x_proj.weight",), parts("rank.weight", "b.weight", "c.weight"), Split()),
        *layer(f"{theirs}.dt_proj", f"{ours}.step"),
        one(f"{theirs}.A_log", f"{ours}.decay"),
        one(f"{theirs}.D", f"{ours}.skip"),
        *layer(f"{theirs}.out_proj", f"{ours}.down"),
        *layer("norm_f", "stack.norm"),
    )


def _ties(config: Any, prefix: str) -> Mapping[str, str]:
    lm = config.heads.get("lm")
    return {"lm_head.weight": f"{prefix}embeddings.weight"} if lm is not None and lm.tied else {}


MAMBA = Family(
    name="mamba",
    types=("mamba",),
    title="Mamba",
    template=_template,
    forms=FORMS,
    trunk=_trunk,
    heads=(one("lm_head.weight", "heads.lm.decoder.weight"),),
    ties=_ties,
    aliases=(("embedding.weight", "embeddings.weight"),),
    prefixes=("backbone.", ""),
    fixed={
        # Options of the first release that the reference reads no more; these are what it does.
        "rms_norm": (True,),
        "ssm_cfg": ({}, None),
    },
    neutral=frozenset(
        """
        use_mambapy expand tie_word_embeddings is_encoder_decoder is_decoder add_cross_attention
        d_model d_inner n_layer fused_add_norm pad_vocab_size_multiple time_step_rank
        """.split()
    ),
)
