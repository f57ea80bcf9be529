"""Whole small models with joined products as they are, and with kernels behind those products."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from xtcli.config.preset import load_preset
from xtcli.model import Model, build
from xtcli.train.fused import fuse_products
from xtcli.train.joined import join_products


def drawn(*shape: int, seed: int = 0, size: float = 1.0) -> Tensor:
    """Normal numbers."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * size


def built(name: str, changes: Sequence[str] = (), own: bool = True) -> Model:
    """A tiny model whose weights are all noisy, with kernels of our own or as it is."""
    model = build(load_preset(name, ["model.dropout=0", *changes], tiny=True), seed=1).train()
    with torch.no_grad():
        for number, weight in enumerate(model.parameters()):
            weight += drawn(*weight.shape, seed=number, size=0.1)
    if own:
        fuse_products(model)
        join_products(model)
    return model


def replaced(model: nn.Module, kind: type[nn.Module], method: str) -> list[bool]:
    """Of each part of a kind, whether a method of it has been replaced."""
    return [method in vars(module) for module in model.modules() if isinstance(module, kind)]


def assert_alike(one: Model, two: Model) -> None:
    """The same loss and gradients, and the same states where no gradient is wanted."""
    inputs = one.blank(2, 12)
    for key, value in inputs.items():
        if key.endswith("input_ids"):
            inputs[key] = torch.randint(one.vocab, value.shape, generator=torch.Generator().manual_seed(5))
    losses, slopes = [], []
    for model in (one, two):
        states = model.hidden(**inputs).states
        loss = (states * drawn(*states.shape, seed=6)).mean()
        losses.append(loss.detach())
        slopes.append(torch.autograd.grad(loss, list(model.parameters()), allow_unused=True))
        with torch.no_grad():
            torch.testing.assert_close(model.hidden(**inputs).states, states, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=1e-6)
    for mine, theirs in zip(slopes[1], slopes[0], strict=True):
        assert (mine is None) == (theirs is None)
        if mine is not None and theirs is not None:
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5 * float(theirs.abs().max()) + 1e-8)
