"""Joined products against their plain twin: outputs and gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from xtcli.config.preset import load_preset
from xtcli.model import Model, build
from xtcli.train.joined import join_products
from xtcli.train.lora import adapt

ADAPTED = "train.lora={rank: 2}"
PRESETS: dict[str, tuple[tuple[str, ...], int]] = {
    "gpt2-nano": ((), 2),
    "llama-7b": ((), 4),
    "tinyllama-1.1b": (("model.stack.block.sublayers.attn.bias=true",), 4),
    "bert-base": ((), 2),
    "t5-v1.1-base": ((), 8),
    "deberta-base": ((), 0),
    "transfo-xl-wt103": ((), 0),
    "squeezebert": ((), 0),
    "x-infused": ((), 0),
}


def answer(model: Model) -> tuple[Tensor, dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(2)
    inputs: dict[str, Any] = model.blank(2, 24)
    for name, value in inputs.items():
        if name.endswith("input_ids"):
            inputs[name] = torch.randint(model.vocab, value.shape, generator=generator)
    states = model.hidden(**inputs).states
    (states * torch.randn(states.shape, generator=generator, dtype=states.dtype)).mean().backward()
    slopes = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return states.detach(), slopes


@pytest.mark.parametrize("name", PRESETS)
def test_joined_products_agree(name: str) -> None:
    overrides, joined = PRESETS[name]
    model = build(load_preset(name, overrides, tiny=True), seed=3).double().eval()
    plain, slopes = answer(model)
    assert join_products(model) == joined
    made, found = answer(model)
    torch.testing.assert_close(made, plain, rtol=1e-9, atol=1e-9)
    assert found.keys() == slopes.keys()
    torch.testing.assert_close(found, slopes, rtol=1e-9, atol=1e-9)


def test_layers_with_adapters_stay_apart() -> None:
    resolved = load_preset("gpt2-nano", [ADAPTED], tiny=True)
    model = build(resolved, seed=3)
    assert resolved.preset.train.lora is not None
    adapt(model, resolved.preset.train.lora, 1)
    assert join_products(model) == 0
