"""RWKV-4: time mix and channel mix with token shift, a norm of the embedding, a stream that evaluation halves.

The reference divides weights when it first evaluates, and saves them so: a file must have been saved before that.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from xtcli.convert.families.common import PAD
from xtcli.convert.family import Family, Form
from xtcli.convert.options import Code, Custom, Key, Options
from xtcli.convert.rules import Rule, Unit, layer, one
from xtcli.registry import Config

DIM = Key("hidden_size", int, 4096)
UNITS = Unit((0, 1))


def _width(options: Options) -> int | None:
    """None stands for the model's width, which a file states all the same."""
    stated = options.get("attention_hidden_size", int, None)
    return None if stated == DIM.load(options) else stated


def _write_width(value: Any, found: dict[str, Any]) -> None:
    found["attention_hidden_size"] = found["hidden_size"] if value is None else value


def _hidden(options: Options) -> int:
    stated = options.get("intermediate_size", int, None)
    return 4 * int(DIM.load(options)) if stated is None else int(stated)


def _template(form: Form) -> dict[str, Any]:
    return {
        "kind": "decoder",
        "vocab": Key("vocab_size", int, 50277),
        "dim": DIM,
        "context": Key("context_length", int, 1024),
        "dropout": 0.0,
        "pad": PAD,
        "norm": {"kind": "layer", "eps": Key("layer_norm_epsilon", float, 1e-5)},
        "embed": {"kind": "tokens", "norm": {"kind": "inherit"}, "dropout": 0.0},
        "stack": {
            "layers": Key("num_hidden_layers", int, 32),
            "trace": "outputs",
            "norm": {"kind": "layer", "eps": 1e-5},
            "block": {
                "wiring": {
                    "kind": "halved",
                    "every": Key("rescale_every", int, 6, code=Code(lambda value: max(value, 0), lambda value: value)),
                    "dropout": 0.0,
                },
                "sublayers": {
                    "attn": {"kind": "time-mix", "width": Custom(_width, _write_width)},
                    "ffn": {
                        "kind": "channel-mix",
                        "hidden": Custom(_hidden, lambda value, found: found.update(intermediate_size=value)),
                    },
                },
            },
        },
        "heads": form.heads,
    }


FORMS = (
    Form("RwkvForCausalLM", "rwkv.", {"lm": {"tied": Key("tie_word_embeddings", bool, False)}}),
    Form("RwkvModel", "", {}),
)


def _trunk(config: Config) -> Sequence[Rule]:
    theirs, ours = "blocks.{layer}", "stack.blocks.{layer}"
    time, channel = (f"{theirs}.attention", f"{ours}.attn"), (f"{theirs}.feed_forward", f"{ours}.ffn")
    return (
        one("embeddings.weight", "embed.tokens.weight"),
        *layer("blocks.0.pre_ln", "embed.norm"),
        *layer(f"{theirs}.ln1", f"{ours}.wiring.norm.attn"),
        *layer(f"{theirs}.ln2", f"{ours}.wiring.norm.ffn"),
        one(f"{time[0]}.time_decay", f"{time[1]}.decay"),
        one(f"{time[0]}.time_first", f"{time[1]}.bonus"),
        *layer(f"{time[0]}.output", f"{time[1]}.o"),
        *_mixed(*time, ("key", "value", "receptance")),
        *_mixed(*channel, ("key", "receptance")),
        *layer(f"{channel[0]}.value", f"{channel[1]}.v"),
        *layer("ln_out", "stack.norm"),
    )


def _mixed(theirs: str, ours: str, names: Sequence[str]) -> tuple[Rule, ...]:
    """The projections that read a mix of two tokens, and their mixes."""
    rules: list[Rule] = []
    for name in names:
        rules += layer(f"{theirs}.{name}", f"{ours}.{name[0]}")
        rules.append(one(f"{theirs}.time_mix_{name}", f"{ours}.mix_{name[0]}", UNITS))
    return tuple(rules)


def _ties(config: Any, prefix: str) -> Mapping[str, str]:
    lm = config.heads.get("lm")
    return {"head.weight": f"{prefix}embeddings.weight"} if lm is not None and lm.tied else {}


RWKV = Family(
    name="rwkv",
    types=("rwkv",),
    title="RWKV",
    template=_template,
    forms=FORMS,
    trunk=_trunk,
    heads=(one("head.weight", "heads.lm.decoder.weight"),),
    ties=_ties,
    prefixes=("rwkv.", ""),
    mixed=("time_decay", "time_first"),
    rescaled=(".attn.o", ".ffn.v"),
    neutral=frozenset("tie_word_embeddings is_encoder_decoder is_decoder add_cross_attention".split()),
)
