"""Mamba's mixer, a state space whose step, input and output depend on the token (Gu, Dao 2023, arXiv:2312.00752).

    u = act(conv(up(x)))                     a causal convolution of each channel by itself
    step = softplus(W rank(u) + bias),  b = b(u),  c = c(u)
    s_t = exp(step_t A) s_(t-1) + step_t u_t b_t,   A = -exp(decay)
    y = down((s c + skip u) act(gate(x)))

Padding is zero before and behind the convolution, so that what is padded on the left equals what is alone; behind
padding in the middle the state still decays. Its state has one size however long the text: the last kernel - 1 inputs
of the convolution, and s in at least float32. Axes: B rows, T tokens, I inner width, N states of a channel.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from xtcli import registry
from xtcli.parts import masks
from xtcli.parts.activations import ACTIVATIONS, Activation
from xtcli.parts.context import Ctx
from xtcli.parts.linear import Draw, Linear, exactly, widen
from xtcli.parts.previous import THROUGH, goes_on, new_documents, real_tokens
from xtcli.parts.scans import selective
from xtcli.parts.scope import Impossible, Scope
from xtcli.registry import field, part


@dataclass
class ScanState:
    """The last inputs of the convolution (B, kernel - 1, I), and the states of the scan (B, I, N)."""

    conv: Tensor
    scan: Tensor

    def select(self, rows: Tensor) -> None:
        self.conv, self.scan = self.conv[rows], self.scan[rows]


class CausalConv(nn.Module):
    """y_t = sum over j of weight_j x_(t - kernel + 1 + j) + bias, channel by channel."""

    def __init__(self, width: int, kernel: int, bias: bool) -> None:
        super().__init__()
        self.kernel = kernel
        self.weight = nn.Parameter(torch.empty(width, kernel))
        self.bias = nn.Parameter(torch.empty(width)) if bias else None

    def draw(self, normal: Draw) -> None:
        """Uniform within 1 / sqrt(kernel); no bias."""
        uniform(self.weight, self.kernel**-0.5, normal)
        if self.bias is not None:
            self.bias.zero_()

    def forward(self, x: Tensor, before: Tensor, documents: Tensor | None) -> Tensor:
        """x (B, T, I) behind its last kernel - 1 inputs -> (B, T, I); other documents (B, T) are not mixed in."""
        line = torch.cat((before, x), 1)
        if documents is None:
            y = F.conv1d(line.transpose(1, 2), self.weight[:, None], self.bias, groups=x.shape[2])
            return y.transpose(1, 2)
        numbers = F.pad(documents, (self.kernel - 1, 0), value=-1)
        total = torch.zeros_like(x) if self.bias is None else self.bias.expand_as(x)
        for tap in range(self.kernel):
            same = numbers[:, tap : tap + x.shape[1]] == documents
            total = total + line[:, tap : tap + x.shape[1]] * same[..., None] * self.weight[:, tap]
        return total


class Steps(nn.Module):
    """From the low rank to each channel's step, before the softplus."""

    def __init__(self, config: Mamba.Config, rank: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.inner, rank))
        self.bias = nn.Parameter(torch.empty(config.inner))
        self.bound, self.constant = rank**-0.5 * config.step_scale, config.step_init == "constant"
        self.range, self.floor = (math.log(config.step_min), math.log(config.step_max)), config.step_floor

    def draw(self, normal: Draw) -> None:
        """Steps that are log-uniform between `step_min` and `step_max`."""
        if self.constant:
            self.weight.fill_(self.bound)
        else:
            uniform(self.weight, self.bound, normal)
        uniform(self.bias, 1.0, normal)
        low, high = self.range
        step = torch.exp((self.bias + 1) / 2 * (high - low) + low).clamp(min=self.floor)
        self.bias.copy_(step + torch.log(-torch.expm1(-step)))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


def uniform(weight: Tensor, bound: float, normal: Draw) -> None:
    """Fill a tensor uniformly within +-bound, from the model's normal numbers."""
    normal(weight, 1.0)
    weight.copy_(torch.erf(weight / math.sqrt(2.0)) * bound)


@part("mixer", "mamba")
class Mamba(nn.Module):
    """A selective state space; reads left to right, knows order without positions."""

    rule = masks.CAUSAL
    sees = f"{THROUGH} of one size, and the convolution as many of the last tokens as its kernel has"

    class Config(registry.Config):
        """A selective state space."""

        inner: int = field("width inside, of the convolution and the scan", gt=0, tiny=128, example=96)
        state: int = field("states of each channel", 16, gt=0)
        kernel: int = field("tokens that the convolution sees", 4, gt=0)
        rank: int | None = field("rank of what makes the steps; null = dim / 16, rounded up", None, gt=0)
        act: Activation = field("activation behind the convolution and of the gate", "silu")
        bias: bool = field("adds biases to the projections in and out", False)
        conv_bias: bool = field("adds a bias to the convolution", True)
        step_min: float = field("smallest step at the start", 0.001, gt=0)
        step_max: float = field("largest step at the start", 0.1, gt=0)
        step_floor: float = field("no step is smaller at the start", 1e-4, gt=0)
        step_scale: float = field("multiplies the spread of the weights that make steps at the start", 1.0, gt=0)
        step_init: Literal["random", "constant"] = field("these weights at the start", "random")

    def __init__(self, config: Config, scope: Scope) -> None:
        super().__init__()
        if not scope.causal:
            raise Impossible("", "a mamba mixer reads from left to right alone", "use it in a decoder")
        rank = config.rank or math.ceil(scope.dim / 16)
        self.states = config.state
        self.up = Linear(scope.dim, config.inner, config.bias)
        self.gate = Linear(scope.dim, config.inner, config.bias)
        self.conv = CausalConv(config.inner, config.kernel, config.conv_bias)
        self.act = ACTIVATIONS[config.act]
        self.rank = Linear(config.inner, rank, False)
        self.b = Linear(config.inner, config.state, False)
        self.c = Linear(config.inner, config.state, False)
        self.step = Steps(config, rank)
        self.decay = nn.Parameter(torch.empty(config.inner, config.state))
        self.skip = nn.Parameter(torch.empty(config.inner))
        self.down = Linear(config.inner, scope.dim, config.bias, "output")

    def draw(self, normal: Draw) -> None:
        """Decays of 1 to N in each channel, and a skip of 1."""
        self.decay.copy_(torch.arange(1, self.states + 1, device=self.decay.device).float().log())
        self.skip.fill_(1.0)

    def new_state(self, batch: int, capacity: int, device: Any, dtype: Any) -> ScanState:
        """Nothing read yet; the size does not depend on `capacity`."""
        inner, wide = self.decay.shape[0], dtype if dtype == torch.float64 else torch.float32
        return ScanState(
            torch.zeros(batch, self.conv.kernel - 1, inner, device=device, dtype=dtype),
            torch.zeros(batch, inner, self.states, device=device, dtype=wide),
        )

    def forward(self, x: Tensor, ctx: Ctx) -> Tensor:
        """x (B, T, dim) -> (B, T, dim)."""
        state: ScanState = self.new_state(x.shape[0], 0, x.device, x.dtype) if ctx.state is None else ctx.state
        real = real_tokens(ctx, x.shape[1])
        u, gate = self.up(x), self.gate(x)
        if real is not None:
            u = u * real[..., None]
        before = state.conv.to(u.dtype)
        state.conv = torch.cat((before, u), 1)[:, u.shape[1] :].detach()
        documents = new_documents(ctx, x.shape[1])
        u = self.act(self.conv(u, before, documents))
        if real is not None:
            u = u * real[..., None]
        wide = widen(u)
        step = F.softplus(widen(self.step(self.rank(u))))
        decay = -torch.exp(widen(self.decay))
        b, c = widen(self.b(u)), widen(self.c(u))
        with exactly(x):
            y, last = selective(wide, step, b, c, decay, state.scan, goes_on(documents))
        state.scan = last.detach()
        y = y + wide * self.skip
        return self.down(y.to(u.dtype) * self.act(gate))  # type: ignore[no-any-return]

    def extra_repr(self) -> str:
        return f"states={self.states}"
