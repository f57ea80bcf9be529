"""Training in bfloat16 alone, with weights and AdamW's running values rounded by chance."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from xtcli.bench.stepping import Bench, prepare
from xtcli.bench.stepping import start as begin
from xtcli.config.preset import Resolved, load_preset
from xtcli.convert import convert
from xtcli.errors import UserError
from xtcli.fast.stacked import stacked
from xtcli.model import Model, build
from xtcli.parts.linear import Linear
from xtcli.train import rounded, start
from xtcli.train.device import choose
from xtcli.train.fused import fuse_products
from xtcli.train.job import make_job, stored_in
from xtcli.train.joined import join_products
from xtcli.train.optim import build_optimizer, non_finite_gradients, set_rate
from xtcli.train.plan import Plan
from xtcli.train.update import FastUpdate, RoundedUpdate
from xtcli.train.working import Working

BF16 = torch.bfloat16


def chance_of(count: int, step: int, number: int = 0, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    key = rounded.keys(seed, number + 1)[number]
    return rounded.chances(key, torch.tensor(float(step)), count)


@pytest.mark.parametrize("value", [1.0, 1.0001, -0.02, 3e-7, 1e-30, 123.4, 0.0])
def test_rounding_is_right_on_average(value: float) -> None:
    count = 1 << 16
    x = torch.full((count,), value)
    below, exact = float(x[0].abs().view(torch.int32).bitwise_and(-0x10000).view(torch.float32)), float(x[0].abs())
    ulp = max(2.0 ** (math.floor(math.log2(abs(value))) - 7), 1e-38) if value else 0.0
    for step in (1, 2, 1000):
        for chance in chance_of(count, step):
            made = rounded.rounded(x, chance).double().abs()
            assert set(made.tolist()) <= {below, below + ulp}
            # The error of a mean of independent roundings, five times over.
            assert abs(float(made.mean()) - exact) <= 5 * 0.5 * ulp / math.sqrt(count)


def test_chances_are_even_and_independent() -> None:
    drawn = [chance.double() for step in (1, 2) for number in (0, 1) for chance in chance_of(1 << 16, step, number)]
    whole = torch.stack(drawn)
    assert float(whole.min()) >= 0 and float(whole.max()) < 2**16
    assert bool(((whole.mean(1) - 2**15).abs() < 5 * 2**16 / math.sqrt(12 * 2**16)).all())
    apart = torch.corrcoef(whole) - torch.eye(len(drawn))
    assert float(apart.abs().max()) < 5 / 2**8
    beside = torch.corrcoef(torch.stack((whole[0, 1:], whole[0, :-1])))[0, 1]
    assert abs(float(beside)) < 5 / 2**8
    assert not torch.equal(chance_of(9, 1)[0], chance_of(9, 1, seed=1 << 40)[0])


def test_what_is_no_number_stays_so() -> None:
    bits = torch.tensor([0x7F800000, -0x800000, 0x7FC00000, 0x7F800001, 0x7FFFFFFF, -1], dtype=torch.int32)
    x = bits.view(torch.float32)
    for chance in (0, 1, 0xFFFF):
        made = rounded.rounded(x, torch.full((6,), chance, dtype=torch.int32))
        assert made[:2].tolist() == [math.inf, -math.inf] and bool(made[2:].isnan().all())


def trained(kind: Any, limit: float | None) -> tuple[torch.optim.Optimizer, list[float], Model]:
    """A model after some steps over drawn gradients, one of them lost and one without some of the gradients."""
    model = stored_in(build(load_preset("gpt2-nano", tiny=True), seed=1), BF16)
    optimizer = build_optimizer(model, load_preset("gpt2-nano", ["train.weight_decay=0.3"], tiny=True).preset.train)
    change = kind(model, optimizer, Working(model, BF16), limit, 7)
    generator = torch.Generator().manual_seed(2)
    norms = []
    for step in range(4):
        set_rate(optimizer, 1e-3 * (step + 1))
        for number, weight in enumerate(model.parameters()):
            drawn = torch.randn(weight.shape, generator=generator)
            if step > 0 or number != 1:
                weight.grad = drawn.to(BF16)
        change.gather()
        norms.append(float(change.norm()))
        change.apply(torch.tensor(float(step == 2)))
        change.clear()
    return optimizer, norms, model


@pytest.mark.parametrize("limit", [None, 1.0])
def test_kernels_round_as_the_plain_update_does(limit: float | None) -> None:
    pytest.importorskip("triton")
    plain, wanted, one = trained(RoundedUpdate, limit)
    own, found, two = trained(FastUpdate, limit)
    torch.testing.assert_close(torch.tensor(found), torch.tensor(wanted), rtol=1e-5, atol=0)
    same = whole = 0
    for mine, theirs in zip(two.parameters(), one.parameters(), strict=True):
        state, other = own.state[mine], plain.state[theirs]
        assert float(state["step"]) == float(other["step"])
        for a, b in ((mine, theirs), (state["exp_avg"], other["exp_avg"]), (state["exp_avg_sq"], other["exp_avg_sq"])):
            assert a.dtype == b.dtype == BF16
            # One unit in the last place, which the steps after it carry on.
            torch.testing.assert_close(a.detach(), b.detach(), rtol=2**-6, atol=2**-8 * float(b.detach().abs().max()))
            same, whole = same + int(a.eq(b).sum()), whole + a.numel()
    assert same > 0.999 * whole


@pytest.mark.parametrize("kind", [RoundedUpdate, FastUpdate])
def test_gradients_of_micro_batches_are_summed_in_float32(kind: Any) -> None:
    """Hundred small ones beside a large one, which bfloat16 would lose; what is lost is forgotten with the rest."""
    if kind is FastUpdate:
        pytest.importorskip("triton")
    layer = torch.nn.Linear(40, 3, bias=False).to(BF16)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=1e-3)
    working = Working(layer, BF16)
    change = kind(layer, optimizer, working, 1.0, 7)
    for _ in range(2):
        for size in (4.0, *([2.0**-7] * 100)):
            (layer.weight.sum() * size).backward()
        assert layer.weight.grad is None
        change.gather()
        total = working.gradient(layer.weight)
        assert total is not None and total.dtype == torch.float32
        assert torch.equal(total, torch.full((3, 40), 4.0 + 100 * 2.0**-7))
        assert float(change.norm()) == pytest.approx((4.0 + 100 * 2.0**-7) * 120**0.5, rel=1e-6)
        change.apply(torch.zeros(()))
        change.clear()
        assert working.gradient(layer.weight) is None
    assert float(optimizer.state[layer.weight]["step"]) == 2
    assert non_finite_gradients(layer, working.gradient) == []
    (layer.weight.sum() * float("inf")).backward()
    assert non_finite_gradients(layer, working.gradient) == ["weight"]


@pytest.mark.parametrize("kind", [RoundedUpdate, FastUpdate])
def test_updates_too_small_for_eight_bits_arrive(kind: Any) -> None:
    if kind is FastUpdate:
        pytest.importorskip("triton")
    layer = Linear(64, 64, False)
    with torch.no_grad():
        layer.weight.fill_(1.0)
    layer.to(BF16)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=1e-4, weight_decay=0.0)
    change = kind(layer, optimizer, Working(layer, BF16), None)
    nearest = torch.ones(64, 64, dtype=BF16)
    for _ in range(40):
        layer.weight.grad = torch.full_like(layer.weight, 2**-8)
        change.norm()
        change.apply()
        nearest -= 1e-4
    assert bool(nearest.eq(1.0).all())
    assert float(layer.weight.detach().float().mean()) == pytest.approx(1 - 40e-4, abs=4e-4)
    state = optimizer.state[layer.weight]
    assert float(state["exp_avg"].float().mean()) == pytest.approx(2**-8 * (1 - 0.9**40), rel=2e-3)
    assert float(state["exp_avg_sq"].float().mean()) == pytest.approx(2**-16 * (1 - 0.999**40), rel=5e-3)


def test_weights_of_one_product_follow_one_another() -> None:
    model = stored_in(build(load_preset("llama-7b", tiny=True), seed=1), BF16)
    before = dict(model.named_parameters())
    values = {name: weight.detach().clone() for name, weight in before.items()}
    fuse_products(model)
    join_products(model)
    working = Working(model, BF16)
    assert working.places == [] and dict(model.named_parameters()) == before
    assert all(torch.equal(weight, values[name]) for name, weight in before.items())
    joined = [[layer.weight for layer in vars(m)["joined"]] for m in model.modules() if "joined" in vars(m)]
    assert joined
    for weights in joined:
        assert stacked(weights).data_ptr() == weights[0].data_ptr()


def bench_of(name: str, precision: str) -> Bench:
    changes = [f"train.precision={precision}", "train.device=cpu", "train.warmup=5", "train.lr=0.002"]
    resolved = load_preset(name, [*changes, "train.batch=2"], tiny=True)
    place = choose(resolved.preset.train)
    skeleton, plan, batch = prepare(resolved, place, rows=2, length=16, seed=3)
    return begin(name, resolved, place, plan, batch, skeleton, 3)


@pytest.mark.parametrize("name", ["gpt2-nano", "llama-7b", "t5-small", "mamba-130m", "x-reversible"])
def test_forty_steps_learn_what_those_of_float32_weights_do(name: str) -> None:
    wide = bench_of(name, "bf16")
    for _ in range(40):
        wide.step()
    narrow = bench_of(name, "bf16-true")
    for _ in range(40):
        narrow.step()
    assert narrow.plan.peak < wide.plan.peak and narrow.plan.optimizer == wide.plan.optimizer / 2
    assert isinstance(narrow.trainer.change, RoundedUpdate)
    assert {tensor.dtype for tensor in narrow.held if tensor.ndim} == {BF16}
    assert wide.losses[0] - wide.losses[-1] > 1.0
    assert max(abs(a - b) for a, b in zip(wide.losses, narrow.losses, strict=True)) < 0.03


def test_a_plan_counts_sums_of_micro_batches_in_float32() -> None:
    changes = ["train.precision=bf16-true", "train.device=cpu"]

    def plan(*more: str, free: int | None = None) -> Plan:
        resolved = load_preset("gpt2-nano", [*changes, *more])
        return prepare(resolved, choose(resolved.preset.train), rows=8, length=64, seed=0, free=free)[1]

    whole, shares = plan(), plan("train.micro_batch=4")
    assert (whole.gradients, shares.gradients) == (2 * whole.trained, 4 * whole.trained)
    tight = plan(free=int(whole.peak * 0.8))
    assert tight.micro_batch < 8 and tight.gradients == 4 * whole.trained and tight.peak <= whole.peak * 0.8


SETTINGS = ("data=text.txt", "train.batch=4", "train.micro_batch=2", "train.context=32", "train.schedule=constant")
SAVING = ("train.save_every=3", "train.validate_every=3", "train.sample_every=3", "train.log_every=1")


def of(*changes: str) -> Resolved:
    first = ("train.precision=bf16-true", *SETTINGS, *SAVING)
    return load_preset("llama-7b", [*first, *changes], tiny=True)


def test_a_run_is_saved_in_bfloat16_goes_on_bit_for_bit_and_converts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("the cat sat on the mat and the dog sat on the log. " * 400)

    def run(steps: int, out: str) -> Path:
        silent: Any = {"record": lambda _: None, "talk": lambda _: None}
        code, path = start.new(of(f"train.steps={steps}"), out=Path(out), command=["xt"], **silent)
        assert code == 0
        return path

    said: list[str] = []
    whole, half = run(6, "whole"), run(3, "half")
    start.resume(half, ["train.steps=6"], command=["xt"], record=lambda _: None, talk=said.append)
    one, two = (path / "checkpoints/step-6" for path in (whole, half))
    for file in ("model.safetensors", "trainer/optimizer.safetensors"):
        mine, theirs = load_file(one / file), load_file(two / file)
        assert mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)
        assert {tensor.dtype for name, tensor in mine.items() if "exp_avg" in name or "." in file[:6]} <= {BF16}
    weights = load_file(one / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {BF16}
    planned = make_job(of(), said.append).checkpoint_bytes
    written = sum((one / file).stat().st_size for file in ("model.safetensors", "trainer/optimizer.safetensors"))
    assert planned < written < 1.2 * planned
    convert(one, tmp_path / "theirs", to="hf")
    convert(tmp_path / "theirs", tmp_path / "again")
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert again.keys() == weights.keys() and all(torch.equal(again[name], weights[name]) for name in again)
    start.resume(
        half,
        ["train.steps=7", "train.precision=bf16"],
        command=["xt"],
        record=lambda _: None,
        talk=said.append,
    )
    assert "changed: train.precision 'bf16-true' -> 'bf16'" in said
    assert {tensor.dtype for tensor in load_file(half / "checkpoints/step-7/model.safetensors").values()} == {
        torch.float32
    }


def test_adapters_are_trained_beside_weights_in_bfloat16(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("the cat sat on the mat and the dog sat on the log. " * 400)
    silent: Any = {"record": lambda _: None, "talk": lambda _: None}
    code, path = start.new(of("train.steps=3", "train.lora={}"), out=Path("run"), command=["xt"], **silent)
    weights = load_file(path / "checkpoints/step-3/model.safetensors")
    assert code == 0 and {tensor.dtype for tensor in weights.values()} == {BF16}
    assert any(name.endswith(".lora.up") and bool(tensor.any()) for name, tensor in weights.items())


def test_a_wrong_precision_names_the_nearest() -> None:
    with pytest.raises(UserError, match="did you mean 'bf16-true'"):
        load_preset("gpt2-nano", ["train.precision=bf16_true"])
