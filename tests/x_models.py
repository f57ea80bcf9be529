"""Small models in double precision, and the comparison of values and gradients with a slow twin."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from xtcli.model import construct
from xtcli.parts.context import Ctx
from xtcli.parts.graphs import Graph
from xtcli.registry import find

DIM, LENGTH, VOCAB = 16, 7, 31
ATTENTION = {"kind": "attention", "heads": 2}
FFN = {"kind": "mlp", "hidden": 24}


def model_of(kind: str = "decoder", wiring: Any = "pre", seed: int = 0, **changes: Any) -> Graph:
    """A small model in double precision with every parameter random."""
    sublayers = changes.pop("sublayers", {"attn": ATTENTION, "ffn": FFN})
    stack = {"layers": 2, "block": {"wiring": wiring, "sublayers": sublayers}, **changes.pop("stack", {})}
    config = {"vocab": VOCAB, "dim": DIM, "context": 16, "stack": stack, "heads": {"lm": {}}, **changes}
    return fresh(kind, config, seed)


def fresh(kind: str, config: dict[str, Any], seed: int = 0) -> Graph:
    model = construct(find("graph", kind).Config.model_validate(config)).to_empty(device="cpu")
    model.initialise(seed)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model.double().eval()


def random(*shape: int, seed: int = 5) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def context(x: Tensor, **more: Any) -> Ctx:
    """The context of one pass over x (B, T, D)."""
    places = torch.arange(x.shape[1])[None]
    return Ctx(positions=places, keys=places, **more)


def agree(ours: Callable[[], Tensor], theirs: Callable[[], Tensor], leaves: list[Tensor]) -> None:
    """Equal values, and equal gradients of every leaf."""
    a, b = ours(), theirs()
    torch.testing.assert_close(a, b, atol=1e-10, rtol=1e-8)
    weight = random(*a.shape, seed=9)
    ga = torch.autograd.grad((a * weight).sum(), leaves)
    gb = torch.autograd.grad((b * weight).sum(), leaves)
    for one, other in zip(ga, gb, strict=True):
        torch.testing.assert_close(one, other, atol=1e-10, rtol=1e-8)
        assert one.abs().sum() > 0


def normed(x: Tensor, norm: Any) -> Tensor:
    """Layer normalisation from its definition."""
    mean = x.mean(-1, keepdim=True)
    return (x - mean) / ((x - mean) ** 2).mean(-1, keepdim=True).add(norm.eps).sqrt() * norm.weight + norm.bias
