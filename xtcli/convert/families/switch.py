"""Switch Transformers: T5's blocks, in some layers of each side a mixture of experts with room for so many tokens.

Layer i is sparse where i % step = 1, or everywhere with a step of 1; a step is layers // sparse layers, and the number
of layers where no sparse ones are asked for: there is still one. Surprises: padding takes room and counts in the losses
of routers, a token that goes past counts as one of expert 0, and a side whose layers are all sparse has no such losses.
Files state the steps beside the numbers of sparse layers; the steps decide.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from xtcli.convert.families.common import PAD, START, activation
from xtcli.convert.families.t5 import ALONE, DROPOUT, LM, ties, tower
from xtcli.convert.family import Family, Form
from xtcli.convert.options import Custom, Key, Options, Unexpressed, dump, load
from xtcli.convert.rules import Rule, Stack, layer, one

LAYERS = Key("num_layers", int, 12, ("num_hidden_layers",))
WIDTHS = {
    "hidden": Key("d_ff", int, 2048),
    "act": Key("dense_act_fn", str, "relu", code=activation("relu")),
    "bias": False,
    "dropout": DROPOUT,
}
DENSE = {"kind": "mlp", **WIDTHS}
SPARSE = {
    "kind": "moe",
    "experts": Key("num_experts", int, 8),
    "router": {
        "kind": "capacity",
        "capacity": Key("expert_capacity", int, 64),
        "padding": True,
        "bias": Key("router_bias", bool, False),
        "jitter": Key("router_jitter_noise", float, 0.01),
        "dtype": Key("router_dtype", str, "float32"),
    },
    "expert": {"kind": "mlp", **WIDTHS},
}


def _attention(kind: str) -> dict[str, Any]:
    return {
        "kind": kind,
        "heads": Key("num_heads", int, 12, ("num_attention_heads",)),
        "head_dim": Key("d_kv", int, 64, ("head_dim",)),
        "bias": False,
        "scale": 1.0,
        "dropout": DROPOUT,
    }


def _block(ffn: dict[str, Any], cross: bool) -> dict[str, Any]:
    return {
        "wiring": {"kind": "pre", "dropout": DROPOUT},
        "sublayers": {
            "attn": _attention("attention"),
            **({"cross": _attention("cross-attention")} if cross else {}),
            "ffn": ffn,
        },
    }


def _layers(options: Options, side: str) -> int:
    layers = int(LAYERS.load(options))
    if side == "encoder":
        return layers
    stated = options.get("num_decoder_layers", int, None)
    return (layers if "num_decoder_layers" in options.values else 12) if stated is None else int(stated)


def _step(options: Options, side: str) -> int:
    sparse, layers = options.get(f"num_sparse_{side}_layers", int, 3), _layers(options, side)
    stated = options.get(f"{side}_sparse_step", int, None)
    return int(stated) if stated is not None else layers // sparse if sparse > 0 else layers


def _sparse(layers: int, step: int) -> list[bool]:
    return [step > 0 and (step == 1 or i % step == 1) for i in range(layers)]


AROUND = {
    "dropout": DROPOUT,
    "position": {
        "kind": "t5",
        "buckets": Key("relative_attention_num_buckets", int, 32),
        "furthest": Key("relative_attention_max_distance", int, 128),
    },
}


def _stack(side: str) -> Custom:
    cross = side == "decoder"
    dense, sparse = _block(DENSE, cross), _block(SPARSE, cross)

    def read(options: Options) -> dict[str, Any]:
        layers, step = _layers(options, side), _step(options, side)
        kinds = ["sparse" if is_sparse else "dense" for is_sparse in _sparse(layers, step)]
        # What a side without one of the two kinds would say of it is known all the same.
        bodies = {"dense": load(dense, options), "sparse": load(sparse, options)}
        blocks: dict[str, Any] = {"block": bodies[kinds[0]]}
        if len(set(kinds)) > 1:
            blocks = {"blocks": bodies, "pattern": kinds[: step if step < layers else layers]}
        return {"layers": layers, **load(AROUND, options), **blocks}

    def write(value: Any, found: dict[str, Any]) -> None:
        dump(AROUND, value, found)
        layers = value["layers"]
        blocks, pattern = value.get("blocks"), value.get("pattern")
        kinds = [blocks[pattern[i % len(pattern)]] if blocks else value["block"] for i in range(layers)]
        mixed = [block["sublayers"].get("ffn", {}).get("kind") == "moe" for block in kinds]
        for block, is_sparse in zip(kinds, mixed, strict=True):
            dump(sparse if is_sparse else dense, block, found)
        step = next((step for step in range(layers + 1) if _sparse(layers, step) == mixed), None)
        if step is None:
            raise Unexpressed(f"no step stands for experts in layers {[i for i, is_so in enumerate(mixed) if is_so]}")
        found["num_layers" if side == "encoder" else "num_decoder_layers"] = layers
        # No number of sparse layers makes none of them sparse but one larger than that of the layers.
        found |= {f"num_sparse_{side}_layers": layers // step if step else layers + 1, f"{side}_sparse_step": step}

    return Custom(read, write)


SIDES = ("encoder", "decoder")


def _measured(options: Options) -> list[str] | None:
    sides = [side for side in SIDES if _step(options, side) > 1]
    return None if len(sides) == 2 else sides


def _losses(shown: bool, towers: Any, sides: Sequence[str]) -> Custom:
    both = {"padding": True, "shown": shown, "towers": towers}
    kinds = {
        "balance": {"weight": Key("router_aux_loss_coef", float, 0.001), "dropped": "first", "over": "rows", **both},
        "router-z": {"weight": Key("router_z_loss_coef", float, 0.001), **both},
    }

    def read(options: Options) -> dict[str, Any]:
        losses = load(kinds, options)
        # Without routers there is nothing to measure.
        return losses if any(any(_sparse(_layers(options, side), _step(options, side))) for side in sides) else {}

    return Custom(read, lambda value, found: dump(kinds, value, found) if value else None)


MEASURED = Custom(_measured, lambda value, found: None)


def _tokens(side: str) -> dict[str, Any]:
    return {"embed": {"kind": "tokens", "dropout": DROPOUT}, "stack": _stack(side)}


BOTH = {"kind": "encoder-decoder", "start": START, "encoder": _tokens("encoder"), "decoder": _tokens("decoder")}
ENCODER = {"kind": "encoder", "alone": ALONE, **_tokens("encoder")}


def _pad(options: Options) -> int | None:
    # Left out it is 0, null means none.
    return PAD.load(options) if "pad_token_id" in options.values else 0


def _template(form: Form) -> dict[str, Any]:
    return {
        "vocab": Key("vocab_size", int, 32128),
        "dim": Key("d_model", int, 768, ("hidden_size",)),
        "context": CONTEXT,
        "dropout": DROPOUT,
        "pad": Custom(_pad, lambda value, found: found.update(pad_token_id=value)),
        "norm": {"kind": "rms", "eps": Key("layer_norm_epsilon", float, 1e-6)},
        "init": {"kind": "fan_in", "factor": Key("initializer_factor", float, 1.0)},
        "heads": form.heads,
        **form.more,
    }


CONTEXT = Custom(
    lambda options: options.get("n_positions", int, None),
    lambda value, found: None if value is None else found.update(n_positions=value),
)

FORMS = (
    Form(
        "SwitchTransformersForConditionalGeneration",
        "",
        {"lm": LM},
        {**BOTH, "auxiliary": _losses(True, MEASURED, SIDES)},
    ),
    Form("SwitchTransformersModel", "", {}, {**BOTH, "auxiliary": _losses(False, MEASURED, SIDES)}),
    Form("SwitchTransformersEncoderModel", "", {}, {**ENCODER, "auxiliary": _losses(True, None, SIDES[:1])}),
)


def _trunk(config: Any) -> Sequence[Rule]:
    both = config.kind == "encoder-decoder"
    rules = [one("shared.weight", "tokens.weight" if both else "embed.tokens.weight")]
    for side in ("encoder", "decoder") if both else ("encoder",):
        ours, cross = f"{side}." if both else "", side == "decoder"
        for rule in tower(side, ours, cross, "SelfAttention"):
            rules.append(replace(rule, theirs=tuple(name.replace("DenseReluDense", "mlp") for name in rule.theirs)))
        theirs = f"{side}.block.{{layer}}.layer.{2 if cross else 1}.mlp"
        block = f"{ours}stack.blocks.{{layer}}.ffn"
        rules += layer(f"{theirs}.wi", f"{block}.up")
        rules += layer(f"{theirs}.router.classifier", f"{block}.router.classifier")
        rules += [
            Rule((f"{theirs}.experts.expert_{{e}}.{a}.weight",), (f"{block}.experts.{b}.weight",), Stack(), "e")
            for a, b in (("wi", "up"), ("wo", "down"))
        ]
    return rules


SWITCH = Family(
    name="switch_transformers",
    types=("switch_transformers",),
    title="Switch Transformers",
    template=_template,
    forms=FORMS,
    trunk=_trunk,
    heads=(one("lm_head.weight", "heads.lm.decoder.weight"),),
    ties=ties,
    neutral=frozenset(
        """
        is_decoder add_cross_attention is_encoder_decoder tie_word_embeddings add_router_probs
        router_ignore_padding_tokens router_type output_router_logits feed_forward_proj is_gated_act
        num_sparse_encoder_layers num_sparse_decoder_layers num_decoder_layers encoder_sparse_step decoder_sparse_step
        router_z_loss_coef router_aux_loss_coef
        """.split()
    ),
    mixed=("router.classifier.weight", "router.classifier.bias"),
)
