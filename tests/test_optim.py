"""The optimizer's groups, clipping, and the search for what is not finite."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from xtcli.config.train import TrainConfig
from xtcli.train.optim import (
    build_optimizer,
    clip,
    decay_groups,
    first_non_finite,
    non_finite_gradients,
    optimizer_bytes,
    set_rate,
)


class Scan(nn.Module):
    """A part with a matrix that must not decay."""

    undecayed = ("log_rates",)

    def __init__(self) -> None:
        super().__init__()
        self.log_rates = nn.Parameter(torch.zeros(3, 4))
        self.mix = nn.Parameter(torch.ones(3, 4))


def model() -> nn.Module:
    torch.manual_seed(0)
    table, norm, head = nn.Embedding(7, 4), nn.LayerNorm(4), nn.Linear(4, 7)
    net = nn.ModuleDict({"table": table, "norm": norm, "scan": Scan(), "head": head})
    head.weight = table.weight
    norm.bias.requires_grad_(False)
    return net


def test_groups() -> None:
    decayed, plain = decay_groups(model())
    assert sorted(decayed) == ["scan.mix", "table.weight"]
    assert sorted(plain) == ["head.bias", "norm.weight", "scan.log_rates"]


def test_adamw_takes_its_numbers_from_the_config() -> None:
    net = model()
    optimizer = build_optimizer(net, TrainConfig(lr=0.5, weight_decay=0.3, betas=(0.8, 0.7), eps=1e-4))
    assert [(g["weight_decay"], len(g["params"])) for g in optimizer.param_groups] == [(0.3, 2), (0.0, 3)]
    assert {(g["lr"], g["betas"], g["eps"], g["fused"]) for g in optimizer.param_groups} == {
        (0.5, (0.8, 0.7), 1e-4, True)
    }
    set_rate(optimizer, 0.25)
    assert [g["lr"] for g in optimizer.param_groups] == [0.25, 0.25]
    for parameter in net.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    state = sum(v.nbytes for values in optimizer.state.values() for k, v in values.items() if k != "step")
    assert state == optimizer_bytes(net)


def test_one_step_is_the_papers() -> None:
    net = nn.Linear(2, 1)
    nn.init.constant_(net.weight, 2.0)
    nn.init.constant_(net.bias, 2.0)
    optimizer = build_optimizer(net, TrainConfig(lr=0.1, weight_decay=0.5, eps=1e-12))
    for parameter in net.parameters():
        parameter.grad = torch.full_like(parameter, 3.0)
    optimizer.step()
    # The first step of Adam has size lr; decay takes lr * weight_decay of the matrix and nothing of the bias.
    assert net.weight.tolist() == [[pytest.approx(2.0 * 0.95 - 0.1)] * 2]
    assert net.bias.tolist() == [pytest.approx(1.9)]


@pytest.mark.parametrize(("limit", "after"), [(None, 5.0), (10.0, 5.0), (1.0, 1.0)])
def test_clip(limit: float | None, after: float) -> None:
    net = nn.Linear(1, 1)
    net.weight.grad, net.bias.grad = torch.tensor([[3.0]]), torch.tensor([-4.0])
    assert clip(net, limit).item() == 5.0
    assert math.hypot(net.weight.grad.item(), net.bias.grad.item()) == pytest.approx(after, rel=1e-5)


def test_non_finite_gradients_are_named() -> None:
    net = nn.Linear(1, 1)
    net.weight.grad, net.bias.grad = torch.tensor([[3.0]]), torch.tensor([float("nan")])
    assert math.isnan(clip(net, None).item())
    assert non_finite_gradients(net, lambda parameter: parameter.grad) == ["bias"]


class Log(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return x, {"log": x.log()}


def test_the_innermost_first_module_is_named() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.ModuleList([nn.Identity(), Log(), nn.Identity()])

        def forward(self, x: Tensor) -> Tensor:
            x = self.inner[0](x)
            found: Tensor = self.inner[1](x)[1]["log"]
            return self.inner[2](found)  # type: ignore[no-any-return]

    net = Net()
    assert first_non_finite(net, lambda: net(torch.zeros(2))) == "inner.1"
    assert first_non_finite(net, lambda: net(torch.ones(2))) is None
    assert not any(module._forward_hooks for module in net.modules())
