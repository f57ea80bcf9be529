"""Small models of many shapes, with weights large enough that their texts are lively."""

from __future__ import annotations

import copy
from typing import Any

import torch

from xtcli.model import Model, construct
from xtcli.registry import find

CONTEXT = 64


def attention(**fields: Any) -> dict[str, Any]:
    return {"kind": "attention", "heads": 4} | fields


def decoder(embed: dict[str, Any], position: dict[str, Any] | None = None, **attn: Any) -> dict[str, Any]:
    """A decoder with these positions and this attention."""
    stack: dict[str, Any] = {
        "layers": 2,
        "block": {"sublayers": {"attn": attention(**attn), "ffn": {"kind": "mlp", "hidden": 48}}},
    }
    if position is not None:
        stack["position"] = position
    return {"embed": embed, "stack": stack, "heads": {"lm": {"tied": False}}}


def rotary(**scaling: Any) -> dict[str, Any]:
    return {"kind": "rotary"} | ({"scaling": scaling} if scaling else {})


def mixture(router: dict[str, Any]) -> dict[str, Any]:
    """A decoder with experts in the place of its feed-forwards."""
    made = decoder(PLAIN, rotary(), kv_heads=2)
    made["stack"]["block"]["sublayers"]["ffn"] = {
        "kind": "moe",
        "experts": 3,
        "router": router,
        "expert": {"kind": "glu", "hidden": 24},
    }
    return made


LEARNED = {"kind": "tokens", "positions": "learned"}
PLAIN = {"kind": "tokens"}
SINES = {"kind": "tokens", "positions": "sinusoidal"}
WINDOW = {"kind": "all", "of": ["causal", {"kind": "window", "left": 5}]}

DECODERS: dict[str, dict[str, Any]] = {
    "learned": decoder(LEARNED),
    "sinusoidal": decoder(SINES),
    "multi-query": decoder(LEARNED, kv_heads=1),
    "rotary": decoder(PLAIN, rotary(), kv_heads=2),
    "rotary-interleaved": decoder(PLAIN, {"kind": "rotary", "layout": "interleaved", "fraction": 0.5}),
    "rotary-linear": decoder(PLAIN, rotary(kind="linear", factor=2.0), kv_heads=2),
    "rotary-dynamic": decoder(PLAIN, rotary(kind="dynamic", factor=2.0), kv_heads=2),
    "rotary-wavelength": decoder(PLAIN, rotary(kind="wavelength", factor=8.0, original=32), kv_heads=2),
    "rotary-yarn": decoder(PLAIN, rotary(kind="yarn", factor=4.0, original=32), kv_heads=2),
    "rotary-longrope": decoder(
        PLAIN, rotary(kind="longrope", short=[1.0, 1.1, 1.2, 1.3], long=[2.0, 3.0, 4.0, 5.0], original=40)
    ),
    "t5-bias": decoder(PLAIN, {"kind": "t5", "buckets": 8, "furthest": 20}),
    "alibi": decoder(PLAIN, {"kind": "alibi"}),
    "alibi-of-keys": decoder(PLAIN, {"kind": "alibi", "places": "counted", "scaled": True, "rounded": True}),
    "experts": mixture({"kind": "top-k", "choose": 2}),
    "experts-with-room": mixture({"kind": "capacity", "capacity": 4}),
    "shaw": decoder(PLAIN, {"kind": "shaw", "distance": 6}),
    "window": decoder(PLAIN, rotary(), mask=WINDOW),
    "window-dilated": decoder(LEARNED, mask={"kind": "window", "left": 8, "dilation": 2}),
    "softcap": decoder(PLAIN, rotary(), score={"kind": "softcap", "cap": 2.0}),
}

ENCODER: dict[str, Any] = decoder(LEARNED) | {"heads": {"mlm": {}}}

_SIDE: dict[str, Any] = {
    "layers": 2,
    "position": {"kind": "t5", "buckets": 8, "furthest": 20},
    "block": {"sublayers": {"attn": attention(scale=1.0), "ffn": {"kind": "mlp", "hidden": 48, "act": "relu"}}},
}
_WRITER = copy.deepcopy(_SIDE)
_WRITER["block"]["sublayers"] = {
    "attn": _SIDE["block"]["sublayers"]["attn"],
    "cross": {"kind": "cross-attention", "heads": 4},
    "ffn": _SIDE["block"]["sublayers"]["ffn"],
}
PAIR: dict[str, Any] = {
    "encoder": {"stack": _SIDE},
    "decoder": {"stack": _WRITER},
    "heads": {"lm": {}},
    "pad": 0,
}


def make(graph: str, config: dict[str, Any], vocab: int, seed: int = 0, **changes: Any) -> Model:
    """A model in evaluation mode; its weights have the spread that makes neighbouring logits differ."""
    whole = {"vocab": vocab, "dim": 32, "context": CONTEXT, "dropout": 0.1, "norm": "rms"} | config | changes
    model = construct(find("graph", graph).Config.model_validate(whole))  # type: ignore[attr-defined]
    model.to_empty(device="cpu")
    model.initialise(seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, 0.25, generator=generator)
    return model.eval()


def lively(name: str, vocab: int, seed: int = 0, **changes: Any) -> Model:
    """One of DECODERS."""
    return make("decoder", DECODERS[name], vocab, seed, **changes)
