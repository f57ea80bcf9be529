"""Sixteen-bit copies of weights: the float32 weights stay the model's own, and learn as under autocast alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from xtcli.config.preset import load_preset
from xtcli.model import Model, build
from xtcli.parts.linear import Linear, Table
from xtcli.train import start
from xtcli.train.working import Working

PRESETS = ("gpt2-nano", "bert-base", "t5-small", "switch-base-8", "mixtral-8x7b", "mamba-130m", "albert-base-v2")
BF16 = torch.bfloat16


def model_of(name: str) -> Model:
    return build(load_preset(name, ["model.dropout=0"], tiny=True), seed=3).train()


def answer(model: Model) -> tuple[Tensor, dict[str, Tensor]]:
    """A loss over every output in bf16, and the gradients of all parameters."""
    generator = torch.Generator().manual_seed(2)
    inputs = model.blank(2, 24)
    for name, value in inputs.items():
        if value.dtype == torch.long and name.endswith("input_ids"):
            inputs[name] = torch.randint(model.vocab, value.shape, generator=generator)
    with torch.autocast("cpu", dtype=BF16):
        states = model.hidden(**inputs).states
    weights = torch.randn(states.shape, generator=generator)
    loss = (states.float() * weights).mean()
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", PRESETS)
def test_learns_as_under_autocast_alone(name: str) -> None:
    torch.manual_seed(0)
    model = model_of(name)
    before = dict(model.named_parameters())
    state = torch.get_rng_state()
    loss, slopes = answer(model)
    model.zero_grad()
    working = Working(model, BF16)
    torch.set_rng_state(state)
    with working.lent():
        assert {p.dtype for m in model.modules() if isinstance(m, Table) for p in m.parameters()} == {BF16}
        lent_loss, _ = answer(model)
    assert dict(model.named_parameters()) == before
    assert all(copy.grad is None for copy in working.copies)
    assert abs(float(lent_loss - loss)) < 2e-2 * max(1.0, abs(float(loss)))
    for path in slopes:
        found = before[path].grad
        assert found is not None and found.dtype == torch.float32, path
    total, found = (torch.cat([g.flatten() for g in each]) for each in (slopes.values(), grads(before, slopes)))
    # A stream in 16 bits rounds what adds up in it; the worst of these differs by 0.04.
    assert float((total - found).norm() / total.norm()) < 0.08


def grads(parameters: dict[str, Any], names: Any) -> list[Tensor]:
    return [parameters[name].grad for name in names]


def test_gradients_of_several_passes_are_summed_in_single_precision() -> None:
    layer = Linear(3, 2, False)
    working = Working(layer, BF16)
    x = torch.eye(3)
    with working.lent(), torch.autocast("cpu", dtype=BF16):
        for size in (256.0, 1.0):
            (layer(x) * size).sum().backward()
    assert layer.weight.grad is not None and bool(layer.weight.grad.eq(257.0).all())


def test_ties_are_one_copy_and_frozen_weights_learn_nothing() -> None:
    model = model_of("gpt2-nano")
    first = next(module for module in model.modules() if isinstance(module, Linear))
    first.weight.requires_grad_(False)
    working = Working(model, BF16)
    assert len({id(copy) for copy in working.copies}) == len(working.copies)
    with working.lent():
        assert first.weight.dtype == BF16
        answer(model)
    assert first.weight.grad is None and first.weight.dtype == torch.float32


def test_float32_has_no_copies_and_refresh_follows_the_weights() -> None:
    model = model_of("gpt2-nano")
    assert Working(model, torch.float32).places == []
    working = Working(model, BF16)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.25)
    working.refresh()
    for master, copy in zip(working.masters, working.copies, strict=True):
        assert torch.equal(copy, master.to(BF16))


def test_a_run_in_bf16_is_saved_in_float32_and_goes_on_bit_for_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("the cat sat on the mat and the dog sat on the log. " * 400)
    settings = ["data=text.txt", "train.precision=bf16", "train.batch=4", "train.micro_batch=2", "train.context=32"]
    settings += ["train.save_every=3", "train.validate_every=3", "train.sample_every=0", "train.log_every=1"]

    def run(steps: int, out: str) -> Path:
        resolved = load_preset("gpt2-nano", [*settings, f"train.steps={steps}", "train.schedule=constant"], tiny=True)
        code, path = start.new(resolved, out=Path(out), command=["xt"], record=lambda _: None, talk=lambda _: None)
        assert code == 0
        return path

    whole, half = run(6, "whole"), run(3, "half")
    start.resume(half, ["train.steps=6"], command=["xt"], record=lambda _: None, talk=lambda _: None)
    from safetensors.torch import load_file

    one, two = (load_file(path / "checkpoints/step-6/model.safetensors") for path in (whole, half))
    assert {tensor.dtype for tensor in one.values()} == {torch.float32}
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert any(not torch.equal(tensor, tensor.to(BF16).float()) for tensor in one.values())
