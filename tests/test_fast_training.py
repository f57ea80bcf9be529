"""Kernels of our own for training, in Triton's interpreter, against their plain twins."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from xtcli.config.preset import load_preset
from xtcli.model import build
from xtcli.parts import losses
from xtcli.parts.outputs import IGNORE
from xtcli.train.fused import fuse_products
from xtcli.train.joined import join_products
from xtcli.train.optim import build_optimizer, set_rate
from xtcli.train.transforms import compile_blocks
from xtcli.train.update import FastUpdate, Update
from xtcli.train.working import Working

pytest.importorskip("triton")


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("cap", [None, 3.0])
@pytest.mark.parametrize(("rows", "vocab", "width"), [(5, 4100, 4160), (3, 77, 77), (2, 9000, 9024), (0, 8, 8)])
def test_slabs(rows: int, vocab: int, width: int, cap: float | None, smoothing: float) -> None:
    from xtcli.fast import crossentropy

    generator = torch.Generator().manual_seed(rows)
    logits = torch.randn(rows, width, generator=generator) * 5
    targets = torch.randint(vocab, (rows,), generator=generator)
    targets[1:2] = IGNORE
    loss, slope = losses.slab_terms(logits.clone(), targets, cap, smoothing, vocab)
    own_loss, own_slope = crossentropy.slab_terms(logits, targets, cap, smoothing, vocab)
    torch.testing.assert_close(own_loss, loss, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(own_slope, slope, rtol=1e-6, atol=1e-7)


def test_slabs_of_far_logits_in_16_bits() -> None:
    from xtcli.fast import crossentropy

    logits = (torch.randn(4, 300, generator=torch.Generator().manual_seed(1)) * 1e4).bfloat16()
    targets = torch.tensor([0, 289, 7, IGNORE])
    loss, slope = losses.slab_terms(logits.clone(), targets, None, 0.0, 290)
    own_loss, own_slope = crossentropy.slab_terms(logits, targets, None, 0.0, 290)
    torch.testing.assert_close(own_loss, loss)
    torch.testing.assert_close(own_slope, slope)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(3, 5), (1,), (70, 128), (0, 4)])
def test_slopes_by_a_number(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    from xtcli.fast import crossentropy

    slope, scale = torch.randn(shape, generator=torch.Generator().manual_seed(1)), torch.tensor(0.37)
    slope = torch.cat((slope, slope))[: len(slope)].to(dtype)
    torch.testing.assert_close(
        crossentropy.scaled(slope, scale, dtype), losses.scaled(slope, scale, dtype), rtol=8e-3, atol=0
    )


def trained(kind: Any, dtype: torch.dtype, several: bool, limit: float | None) -> tuple[Any, list[float], nn.Module]:
    """A model after some steps over drawn gradients, one of them lost and one without some of the gradients."""
    preset = load_preset("gpt2-nano", ["train.weight_decay=0.3", "model.stack.layers=1"], tiny=True)
    model = build(preset, seed=1)
    optimizer = build_optimizer(model, preset.preset.train)
    working = Working(model, dtype, several)
    change = kind(model, optimizer, working, limit)
    generator = torch.Generator().manual_seed(2)
    norms = []
    copies = dict(zip(working.masters, working.copies, strict=True))
    for step in range(5):
        set_rate(optimizer, 1e-2 * (step + 1))
        for number, weight in enumerate(model.parameters()):
            drawn = torch.randn(weight.shape, generator=generator)
            if step == 0 and number == 1:
                continue
            target: Tensor = weight if several else copies.get(weight, weight)
            target.grad = drawn.to(target.dtype)
        change.gather()
        norms.append(float(change.norm()))
        change.apply(torch.tensor(float(step == 3)))
        change.clear()
    return (optimizer, working), norms, model


@pytest.mark.parametrize("limit", [None, 1.0, 1e6])
@pytest.mark.parametrize(("dtype", "several"), [(torch.float32, True), (torch.bfloat16, False), (torch.bfloat16, True)])
def test_adamw(dtype: torch.dtype, several: bool, limit: float | None) -> None:
    (plain, _), wanted, one = trained(Update, dtype, several, limit)
    (own, own_working), found, two = trained(FastUpdate, dtype, several, limit)
    torch.testing.assert_close(torch.tensor(found), torch.tensor(wanted), rtol=1e-5, atol=0)
    for mine, theirs in zip(two.parameters(), one.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=2e-6, atol=2e-7)
        state, other = own.state[mine], plain.state[theirs]
        assert set(state) == set(other) and float(state["step"]) == float(other["step"])
        torch.testing.assert_close(state["exp_avg"], other["exp_avg"], rtol=2e-5, atol=2e-7)
        torch.testing.assert_close(state["exp_avg_sq"], other["exp_avg_sq"], rtol=2e-5, atol=1e-9)
    for master, copy in zip(own_working.masters, own_working.copies, strict=True):
        # The interpreter cuts bits off where a GPU rounds.
        torch.testing.assert_close(copy.float(), master.detach(), rtol=2**-7, atol=0)
        assert copy.grad is None and master.grad is None


def test_running_values_go_from_one_to_the_other() -> None:
    (own, working), _, model = trained(FastUpdate, torch.bfloat16, False, 1.0)
    held = own.state_dict()
    change = FastUpdate(model, own, working, 1.0)
    own.load_state_dict(held)
    for weight, copy in zip(working.masters, working.copies, strict=True):
        copy.grad = torch.ones_like(copy)
        assert float(own.state[weight]["step"]) >= 3
    before = {weight: float(own.state[weight]["step"]) for weight in working.masters}
    change.norm()
    change.apply()
    assert all(float(own.state[weight]["step"]) == step + 1 for weight, step in before.items())


def test_gradients_at_odd_places_are_moved() -> None:
    """The kernels load 16 bytes at once, and a gradient of several in one may begin anywhere."""
    from xtcli.fast.adamw import ALIGN

    weights = [nn.Parameter(torch.zeros(size)) for size in (5, 3000)]
    model = nn.ParameterList(weights)
    optimizer = torch.optim.AdamW(weights, lr=1.0, weight_decay=0.0)
    change = FastUpdate(model, optimizer, Working(model, torch.float32), None)
    for weight, part in zip(weights, torch.arange(1.0, 3006.0).split([5, 3000]), strict=True):
        weight.grad = part
    assert weights[1].grad is not None and weights[1].grad.data_ptr() % ALIGN
    norm = change.norm()
    change.apply()
    assert all(weight.grad is not None and weight.grad.data_ptr() % ALIGN == 0 for weight in weights)
    torch.testing.assert_close(norm, torch.arange(1.0, 3006.0).norm())
    for weight in weights:
        torch.testing.assert_close(weight.detach(), torch.full_like(weight, -1.0))


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("name", ["gpt2-nano", "llama-7b", "bert-base", "t5-small", "falcon-7b"])
def test_products_with_biases_and_gelus(name: str, compiled: bool) -> None:
    model = build(load_preset(name, ["model.dropout=0"], tiny=True), seed=1).double().eval()
    with torch.no_grad():
        for number, weight in enumerate(model.parameters()):
            weight += 0.1 * torch.randn(
                weight.shape, generator=torch.Generator().manual_seed(number), dtype=weight.dtype
            )
    inputs = model.blank(2, 16)
    for key, value in inputs.items():
        if key.endswith("input_ids"):
            inputs[key] = torch.randint(model.vocab, value.shape, generator=torch.Generator().manual_seed(5))
    states = model.hidden(**inputs).states
    aim = torch.randn(states.shape, generator=torch.Generator().manual_seed(6), dtype=states.dtype)
    learnt = [weight for weight in model.parameters() if weight.requires_grad]
    wanted = torch.autograd.grad((states * aim).sum(), learnt, allow_unused=True)
    assert fuse_products(model) > 0
    join_products(model)
    if compiled:
        compile_blocks(model, backend="aot_eager")
    own = model.hidden(**inputs).states
    found = torch.autograd.grad((own * aim).sum(), learnt, allow_unused=True)
    torch.testing.assert_close(own, states, rtol=1e-9, atol=1e-9)
    for mine, theirs in zip(found, wanted, strict=True):
        assert (mine is None) == (theirs is None)
        if mine is not None:
            torch.testing.assert_close(mine, theirs, rtol=1e-8, atol=1e-8)
    with torch.no_grad():
        torch.testing.assert_close(model.hidden(**inputs).states, states, rtol=1e-9, atol=1e-9)


def test_products_ride_where_they_can() -> None:
    from xtcli.fast import linear

    calls: list[str] = []
    real = linear.feed_forward
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(linear, "feed_forward", lambda *given: calls.append("gelu") or real(*given))
        for name, wanted in (("gpt2-nano", 2), ("bert-base", 0), ("llama-7b", 0)):
            calls.clear()
            model = build(load_preset(name, ["model.dropout=0"], tiny=True), seed=1).train()
            fuse_products(model)
            model.hidden(**model.blank(1, 8))
            assert len(calls) == wanted, name


def test_passes_beside_a_recorded_one_leave_its_addresses_alone() -> None:
    model = build(load_preset("gpt2-nano", tiny=True), seed=1)
    optimizer = build_optimizer(model, load_preset("gpt2-nano", tiny=True).preset.train)
    change = FastUpdate(model, optimizer, Working(model, torch.float32), None)
    kept = []
    for size in (1.0, 2.0):
        for weight in model.parameters():
            weight.grad = torch.full_like(weight, size)
        kept.append([weight.grad for weight in model.parameters()])
        norm = float(change.norm())
        if size == 1.0:
            held = change.held()
    change.take(held)
    assert change.tables is held[0] and float(change.total) == pytest.approx(norm / 2)
    change.apply()
    first = 1 - optimizer.param_groups[0]["betas"][0]
    for weight, gradient in zip(model.parameters(), kept[0], strict=True):
        torch.testing.assert_close(optimizer.state[weight]["exp_avg"], first * gradient)


def test_twenty_steps_learn_what_plain_ones_do() -> None:
    """Products, loss, update and working copies of our own in bf16, against PyTorch's under autocast alone."""
    from xtcli.bench.stepping import prepare, start
    from xtcli.train.device import choose
    from xtcli.train.transforms import end_kernels
    from xtcli.train.update import update_for

    changes = ["train.precision=bf16", "train.device=cpu", "train.batch=2", "train.warmup=2", "train.lr=0.003"]
    curves = []
    for own in (False, True):
        resolved = load_preset("gpt2-nano", [*changes, "model.dropout=0", "model.stack.layers=1"], tiny=True)
        place = choose(resolved.preset.train)
        skeleton, plan, batch = prepare(resolved, place, rows=2, length=16, seed=3)
        bench = start("nano", resolved, place, plan, batch, skeleton, 3)
        trainer = bench.trainer
        if own:
            fuse_products(bench.model)
            end_kernels(bench.model)
            for head in bench.model.heads.values():
                # The interpreter would cut the same gradients off twice; a GPU rounds them.
                head.scaled = losses.scaled
            trainer.change = FastUpdate(bench.model, trainer.optimizer, trainer.working, trainer.config.clip)
        else:
            trainer.working = Working(bench.model, torch.float32)
            trainer.change = update_for(bench.model, trainer.optimizer, trainer.working, trainer.config.clip, False)
            assert type(trainer.change) is Update
        for _ in range(20):
            bench.step()
        curves.append(bench.losses)
    plain, swift = curves
    assert plain[0] - plain[-1] > 1.0
    # bfloat16 has 8 bits: rounding moves a value by 0.4 %, cutting off, as the interpreter does with copies, by 0.8 %.
    assert max(abs(one - two) / one for one, two in zip(plain, swift, strict=True)) < 2**-7
