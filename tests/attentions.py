"""Attentions with one option or several, in small models."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from xtcli.model import construct
from xtcli.parts.graphs import Graph
from xtcli.registry import find

DIM, HEADS, LENGTH, ROWS, LAYERS, WIDE = 12, 3, 6, 2, 2, 8
TOP, TALK = {"kind": "top-k", "k": 2}, "talking-heads"


def chain(*stages: Any) -> dict[str, Any]:
    return {"score": {"kind": "chain", "of": list(stages)}}


OPTIONS: dict[str, dict[str, Any]] = {
    "softmax": {},
    "wide": {"score": "softmax-wide"},
    "softcap": {"score": {"kind": "softcap", "cap": 0.7}},
    "top-k": {"score": TOP},
    "top-more-than-there-are": {"score": {"kind": "top-k", "k": 99}},
    "entmax": {"score": "entmax"},
    "talking-heads": {"score": TALK},
    "talking-before": {"score": {"kind": TALK, "post": False}},
    "talking-after": {"score": {"kind": TALK, "pre": False, "start": "normal"}},
    "residual": {"score": "residual"},
    "residual-mean": {"score": {"kind": "residual", "mean": True}},
    "memory": {"memory": 2},
    "gated": {"out": "gated"},
    "gated-attended": {"out": "gated-attended"},
    "cosine": {"qk_norm": "unit", "scale": 10.0},
    "top-k-entmax": chain(TOP, "entmax"),
    "talking-entmax": chain(TALK, "entmax"),
    "residual-talking-capped-top-k-entmax": chain("residual", TALK, {"kind": "softcap", "cap": 2.0}, TOP, "entmax"),
    "residual-top-k": chain("residual", TOP),
    "residual-talking-wide": chain("residual", TALK, "softmax-wide"),
    "grouped-talking-memory": {"kv_heads": 1, "memory": 3, "score": TALK},
    "memory-top-k-entmax-gated": {"memory": 2, "out": "gated", **chain(TOP, "entmax")},
    "memory-residual-cosine": {"memory": 2, "score": "residual", "qk_norm": "unit", "scale": 3.0},
    "grouped-memory": {"kv_heads": 1, "memory": 2, "out": "gated-attended"},
}
TUPE_T5 = {"kind": "tupe", "relative": {"kind": "t5", "buckets": 8, "furthest": 5}, "norm": "none"}
POSITIONS: dict[str, Any] = {
    "t5": {"kind": "t5", "buckets": 8, "furthest": 5},
    "alibi": "alibi",
    "rotary": "rotary",
    "infused": "infused",
    "distance-mlp": {"kind": "distance-mlp", "hidden": 5, "depth": 2},
    "distance-mlp-log": {"kind": "distance-mlp", "hidden": 5, "depth": 1, "log": True},
    "tupe": {"kind": "tupe", "norm": "none"},
    "tupe-ordered": {"kind": "tupe", "norm": "none", "reset": False},
    "tupe-t5": TUPE_T5,
    "rotary-t5": {"kind": "all", "of": ["rotary", {"kind": "t5", "buckets": 8, "furthest": 5}]},
    "infused-alibi-rotary": {"kind": "all", "of": ["infused", "alibi", "rotary"]},
    "alibi-tupe-t5": {"kind": "all", "of": ["alibi", TUPE_T5]},
}
EVERYTHING = {"memory": 2, "out": "gated", **chain("residual", TALK, TOP, "entmax")}


def config(option: dict[str, Any], position: Any = "none", *, cross: bool = False, **more: Any) -> dict[str, Any]:
    attn = {"kind": "attention", "heads": HEADS, **option}
    sublayers = {"attn": attn}
    if cross:
        sublayers["cross"] = {**attn, "kind": "cross-attention"}
        more["memory"] = WIDE
    stack = {"layers": LAYERS, "position": position, "norm": "none", "block": {"sublayers": sublayers}}
    return {"vocab": 11, "dim": DIM, "context": 16, "norm": "none", "stack": stack} | more


def make(whole: dict[str, Any], causal: bool, spread: float = 0.6) -> Graph:
    """A model with every parameter random."""
    cls = find("graph", "decoder" if causal else "encoder")
    model: Graph = construct(cls.Config.model_validate(whole)).to_empty(device="cpu")
    model.initialise(0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * spread)
    return model.eval()


def drawn(*shape: int, seed: int = 3) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))
