"""ViT: an encoder over the patches of an image, whose projection is a convolution; a class vector in front."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from xtcli.convert.families.common import LABELS, PROBLEM, activation
from xtcli.convert.family import Family, Form
from xtcli.convert.options import Code, Custom, Key, Options
from xtcli.convert.rules import Rule, Unit, layer, one

DIM = Key("hidden_size", int, 768)
DROPOUT = Key("hidden_dropout_prob", float, 0.0)
EPS = Key("layer_norm_eps", float, 1e-12)
CHANNELS = Key("num_channels", int, 3)


@dataclass(frozen=True)
class Kernel:
    """A convolution over whole patches, (out, channels, height, width), is a matrix (out, numbers of a patch)."""

    channels: int
    patch: tuple[int, int]

    def forward(self, theirs: Sequence[Tensor], like: Sequence[Tensor]) -> list[Tensor]:
        return [tensor.flatten(1) for tensor in theirs]

    def backward(self, ours: Sequence[Tensor]) -> list[Tensor]:
        return [tensor.unflatten(1, (self.channels, *self.patch)) for tensor in ours]


def _size(name: str, usual: int) -> Custom:
    """A side in pixels, or height and width."""

    def load(options: Options) -> Any:
        if not isinstance(options.values.get(name), list):
            return options.get(name, int, usual)
        size = options.get(name, list)
        if len(size) != 2 or not all(isinstance(side, int) and not isinstance(side, bool) for side in size):
            options.refuse(name, f"is {size!r}", "it is one number of pixels, or height and width")
            return usual
        return tuple(size)

    def dump(value: Any, found: dict[str, Any]) -> None:
        found[name] = value if isinstance(value, int) else list(value)

    return Custom(load, dump)


def _embed(masks: bool) -> dict[str, Any]:
    return {
        "kind": "patches",
        "image": _size("image_size", 224),
        "patch": _size("patch_size", 16),
        "channels": CHANNELS,
        "order": "channel-row-column",
        "class_vector": True,
        "mask_vector": masks,
        "positions": {"kind": "learned"},
        "dropout": DROPOUT,
    }


def _template(form: Form) -> dict[str, Any]:
    return {
        "kind": "encoder",
        "vocab": 1,
        "dim": DIM,
        "dropout": DROPOUT,
        "norm": {"kind": "layer", "eps": EPS},
        "init": {"kind": "normal", "std": Key("initializer_range", float, 0.02)},
        "embed": _embed(masks=False),
        "stack": {
            "layers": Key("num_hidden_layers", int, 12),
            "trace": "unnormed",
            "block": {
                "wiring": {"kind": "pre", "dropout": DROPOUT},
                "sublayers": {
                    "attn": {
                        "kind": "attention",
                        "heads": Key("num_attention_heads", int, 12),
                        "bias": Key("qkv_bias", bool, True),
                        "out_bias": True,
                        "dropout": Key("attention_probs_dropout_prob", float, 0.0),
                    },
                    "ffn": {
                        "kind": "mlp",
                        "hidden": Key("intermediate_size", int, 3072),
                        "act": Key("hidden_act", str, "gelu", code=activation("gelu")),
                        "dropout": 0.0,
                    },
                },
            },
        },
        "heads": form.heads,
        **form.more,
    }


POOLER = {
    "pooler": {
        "act": Key("pooler_act", str, "tanh", code=activation("tanh")),
        "width": Key("pooler_output_size", int, None, code=Code(lambda value: value or None, lambda value: value)),
    }
}
MASKS = {"embed": _embed(masks=True)}
SEQUENCE = {"labels": LABELS, "pick": "first", "dropout": 0.0, "problem": PROBLEM}
PIXELS = {"side": Key("encoder_stride", int, 16), "channels": CHANNELS, "front": 1}

FORMS = (
    Form("ViTForImageClassification", "vit.", {"sequence": SEQUENCE}),
    Form("ViTModel", "", {}, POOLER),
    Form("ViTModel", "", {}),
    Form("ViTForMaskedImageModeling", "vit.", {"pixels": PIXELS}, MASKS),
    # Built with `use_mask_token`, which config.json does not tell.
    Form("ViTModel", "", {}, POOLER | MASKS),
    Form("ViTModel", "", {}, MASKS),
)


def _trunk(config: Any) -> Sequence[Rule]:
    theirs, block, embed = "encoder.layer.{layer}", "stack.blocks.{layer}", config.embed
    patch = (embed.patch, embed.patch) if isinstance(embed.patch, int) else tuple(embed.patch)
    return (
        one("embeddings.cls_token", "embed.class_vector", Unit((0, 1))),
        one("embeddings.mask_token", "embed.mask_vector", Unit((0, 1))),
        one("embeddings.position_embeddings", "embed.positions.table.weight", Unit((0,))),
        *layer("embeddings.patch_embeddings.projection", "embed.project", Kernel(embed.channels, patch)),
        *layer(f"{theirs}.layernorm_before", f"{block}.wiring.norm.attn"),
        *layer(f"{theirs}.attention.attention.query", f"{block}.attn.q"),
        *layer(f"{theirs}.attention.attention.key", f"{block}.attn.k"),
        *layer(f"{theirs}.attention.attention.value", f"{block}.attn.v"),
        *layer(f"{theirs}.attention.output.dense", f"{block}.attn.o"),
        *layer(f"{theirs}.layernorm_after", f"{block}.wiring.norm.ffn"),
        *layer(f"{theirs}.intermediate.dense", f"{block}.ffn.up"),
        *layer(f"{theirs}.output.dense", f"{block}.ffn.down"),
        *layer("layernorm", "stack.norm"),
        *layer("pooler.dense", "pooler.dense"),
    )


VIT = Family(
    name="vit",
    types=("vit",),
    title="ViT",
    template=_template,
    forms=FORMS,
    trunk=_trunk,
    heads=(
        *layer("classifier", "heads.sequence.classifier"),
        *layer("decoder.0", "heads.pixels.decoder", Unit((2, 3))),
    ),
    prefixes=("vit.", ""),
    fixed={"is_encoder_decoder": (False,), "is_decoder": (False,), "add_cross_attention": (False,)},
    neutral=frozenset("encoder_stride pooler_act pooler_output_size tie_word_embeddings".split()),
    rescaled=("embed.project", "heads.pixels.decoder"),
    objectives={"encoder": "image-labels", "sequence": "image-labels", "pixels": "masked-patches"},
)
