"""Layer norm and RMS norm with the residual stream beside them, in one kernel each way.

    passed   x, norm(x)                     dx = ds + norm'(x) dn
    added    s = x + y, norm(s)             dx = dy = ds + norm'(s) dn
    behind   n = norm(s), n again           dx = dy = norm'(s) (dn + dm)
    normed   norm(s)                        dx = dy = norm'(s) dn

Beside dx the kernel for the way back leaves the gradients of gain and bias, and where one is asked for (passes.py) that
of another bias, the sums of the columns of ds or dx.

The operators of `xt::` have a plain form in PyTorch, which is the specification and runs on a CPU, and one in Triton
(normkernels.py). Compiled code calls them as they are. Statistics are float32, what goes out has the type of what came
in; RMS rounds to that type before its gain multiplies, as parts/norms.py does. Axes: N rows, D width.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from xtcli.parts.linear import widen
from xtcli.parts.norms import LayerNorm, RMSNorm

WIDEST = 16384
"""A program holds whole rows; wider ones are left to the compiler."""


class Norm(NamedTuple):
    """What a norm multiplies by and adds; `centred`: about its mean; `offset` is added to the gain."""

    gain: Tensor
    bias: Tensor | None
    eps: float
    offset: float
    centred: bool


def norm_of(module: nn.Module) -> Norm:
    """What these kernels need of a norm that `suits`."""
    if isinstance(module, LayerNorm):
        return Norm(module.weight, module.bias, _constant(module.eps), 0.0, True)
    assert isinstance(module, RMSNorm)
    return Norm(module.weight, None, _constant(module.eps), _constant(module.offset), False)


def _constant(number: float) -> float:
    """The number. Where models differ in one, the compiler makes it an input, which gets lost on its way into an
    autograd function; one that was written out is a constant to it."""
    return float(f"{number}")


def suits(module: nn.Module) -> bool:
    """Whether the kernels take the place of a norm."""
    return type(module) in (LayerNorm, RMSNorm) and norm_of(module).gain.shape[0] <= WIDEST


@torch.library.custom_op("xt::norm", mutates_args=(), device_types="cpu")
def norm(
    x: Tensor, gain: Tensor, bias: Tensor | None, eps: float, offset: float, centred: bool
) -> tuple[Tensor, Tensor]:
    """x (N, D), gain and bias (D,) -> its norm (N, D), and (1|2, N): 1 / deviation, and the mean if it is centred."""
    wide = widen(x)
    if centred:
        mean = wide.mean(1)
        apart = wide - mean[:, None]
        rstd = torch.rsqrt(apart.pow(2).mean(1) + eps)
        n = apart * rstd[:, None] * gain
        return (n if bias is None else n + bias).to(x.dtype), torch.stack((rstd, mean))
    rstd = torch.rsqrt(wide.pow(2).mean(1) + eps)
    scaled = (wide * rstd[:, None]).to(x.dtype)
    return (scaled * (gain + offset)).to(x.dtype), rstd[None]


@norm.register_kernel("cuda")
def _norm(
    x: Tensor, gain: Tensor, bias: Tensor | None, eps: float, offset: float, centred: bool
) -> tuple[Tensor, Tensor]:
    from xtcli.fast import normkernels

    _, n, stats = normkernels.forward(x, None, gain, bias, eps, offset, centred)
    return n, stats


def _empty_stats(x: Tensor, centred: bool) -> Tensor:
    return x.new_empty(2 if centred else 1, x.shape[0], dtype=torch.promote_types(x.dtype, torch.float32))


@norm.register_fake
def _(x: Tensor, gain: Tensor, bias: Tensor | None, eps: float, offset: float, centred: bool) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), _empty_stats(x, centred)


@torch.library.custom_op("xt::sum_norm", mutates_args=(), device_types="cpu")
def sum_norm(
    x: Tensor, y: Tensor, gain: Tensor, bias: Tensor | None, eps: float, offset: float, centred: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """x + y, (N, D) each, and what `norm` gives for the sum."""
    s = x + y
    return s, *norm(s, gain, bias, eps, offset, centred)


@sum_norm.register_kernel("cuda")
def _sum_norm(
    x: Tensor, y: Tensor, gain: Tensor, bias: Tensor | None, eps: float, offset: float, centred: bool
) -> tuple[Tensor, Tensor, Tensor]:
    from xtcli.fast import normkernels

    s, n, stats = normkernels.forward(x, y, gain, bias, eps, offset, centred)
    assert s is not None
    return s, n, stats


@sum_norm.register_fake
def _(
    x: Tensor, y: Tensor, gain: Tensor, bias: Tensor | None, eps: float, offset: float, centred: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(x), _empty_stats(x, centred)


@torch.library.custom_op("xt::norm_back", mutates_args=(), device_types="cpu")
def norm_back(
    dn: Tensor,
    dm: Tensor | None,
    ds: Tensor | None,
    x: Tensor,
    gain: Tensor,
    stats: Tensor,
    offset: float,
    biased: bool,
) -> tuple[Tensor, Tensor]:
    """dn and x (N, D), dm and ds (N, D) or None, what `norm` gave for x -> ds + norm'(x) (dn + dm), and the gradients
    of gain and bias as rows (1|2, D), float32."""
    centred = stats.shape[0] == 2
    rstd = stats[0][:, None]
    unit = (widen(x) - stats[1][:, None]) * rstd if centred else widen(x) * rstd
    slope = widen(dn) if dm is None else widen(dn) + widen(dm)
    sums = [(slope * unit).sum(0), slope.sum(0)] if biased else [(slope * unit).sum(0)]
    g = slope * (gain + offset)
    d = g - unit * (g * unit).mean(1, keepdim=True)
    d = (d - g.mean(1, keepdim=True) if centred else d) * rstd
    return (d if ds is None else d + ds).to(x.dtype), torch.stack(sums)


@norm_back.register_kernel("cuda")
def _norm_back(
    dn: Tensor,
    dm: Tensor | None,
    ds: Tensor | None,
    x: Tensor,
    gain: Tensor,
    stats: Tensor,
    offset: float,
    biased: bool,
) -> tuple[Tensor, Tensor]:
    from xtcli.fast import normkernels

    return normkernels.backward(dn, dm, ds, x, gain, stats, offset, biased)


@norm_back.register_fake
def _(
    dn: Tensor,
    dm: Tensor | None,
    ds: Tensor | None,
    x: Tensor,
    gain: Tensor,
    stats: Tensor,
    offset: float,
    biased: bool,
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), stats.new_empty(2 if biased else 1, x.shape[1])


@torch.library.custom_op("xt::norm_back_summed", mutates_args=(), device_types="cpu")
def norm_back_summed(
    dn: Tensor,
    dm: Tensor | None,
    ds: Tensor | None,
    x: Tensor,
    gain: Tensor,
    stats: Tensor,
    offset: float,
    biased: bool,
    given: bool,
) -> tuple[Tensor, Tensor]:
    """What `norm_back` gives, its rows (2|3, D); the last has the sums of the columns of ds if `given`, else of dx."""
    dx, sums = norm_back(dn, dm, ds, x, gain, stats, offset, biased)
    return dx, torch.cat((sums, widen(ds if given and ds is not None else dx).sum(0)[None]))


@norm_back_summed.register_kernel("cuda")
def _norm_back_summed(
    dn: Tensor,
    dm: Tensor | None,
    ds: Tensor | None,
    x: Tensor,
    gain: Tensor,
    stats: Tensor,
    offset: float,
    biased: bool,
    given: bool,
) -> tuple[Tensor, Tensor]:
    from xtcli.fast import normkernels

    return normkernels.backward(dn, dm, ds, x, gain, stats, offset, biased, "ds" if given else "dx")


@norm_back_summed.register_fake
def _(
    dn: Tensor,
    dm: Tensor | None,
    ds: Tensor | None,
    x: Tensor,
    gain: Tensor,
    stats: Tensor,
    offset: float,
    biased: bool,
    given: bool,
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), stats.new_empty(3 if biased else 2, x.shape[1])


class _Passed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, *norm: Any) -> Any:
        n, stats = torch.ops.xt.norm(x, *norm)
        _keep(ctx, x, stats, *norm)
        return x.view_as(x), n

    @staticmethod
    def backward(ctx: Any, ds: Tensor, dn: Tensor) -> Any:
        return _back(ctx, dn, None, ds)


class _Added(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, *norm: Any) -> Any:
        s, n, stats = torch.ops.xt.sum_norm(x, y, *norm)
        _keep(ctx, s, stats, *norm)
        return s, n

    @staticmethod
    def backward(ctx: Any, ds: Tensor, dn: Tensor) -> Any:
        dx, *more = _back(ctx, dn, None, ds)
        return dx, dx, *more


class _Behind(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor | None, *norm: Any) -> Any:
        n = _sum_normed(ctx, x, y, *norm)
        return n, n.view_as(n)

    @staticmethod
    def backward(ctx: Any, dn: Tensor, dm: Tensor) -> Any:
        dx, *more = _back(ctx, dn, dm, None)
        return dx, dx if ctx.needs_input_grad[1] else None, *more


class _Normed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor | None, *norm: Any) -> Any:
        return _sum_normed(ctx, x, y, *norm)

    @staticmethod
    def backward(ctx: Any, dn: Tensor) -> Any:
        dx, *more = _back(ctx, dn, None, None)
        return dx, dx if ctx.needs_input_grad[1] else None, *more


def _sum_normed(ctx: Any, x: Tensor, y: Tensor | None, *norm: Any) -> Tensor:
    if y is None:
        n, stats = torch.ops.xt.norm(x, *norm)
    else:
        x, n, stats = torch.ops.xt.sum_norm(x, y, *norm)
    _keep(ctx, x, stats, *norm)
    return n  # type: ignore[no-any-return]


def _keep(ctx: Any, x: Tensor, stats: Tensor, gain: Tensor, bias: Tensor | None, *numbers: Any) -> None:
    ctx.save_for_backward(x, gain, stats)
    ctx.offset, ctx.biased = numbers[1], bias is not None


def _back(ctx: Any, dn: Tensor, dm: Tensor | None, ds: Tensor | None) -> tuple[Any, ...]:
    x, gain, stats = ctx.saved_tensors
    slopes = [None if slope is None else slope.contiguous() for slope in (dn, dm, ds)]
    dx, sums = torch.ops.xt.norm_back(*slopes, x, gain, stats, ctx.offset, ctx.biased)
    return dx, sums[0].to(gain.dtype), sums[1].to(gain.dtype) if ctx.biased else None, None, None, None


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1]).contiguous()


def _alike(x: Tensor, y: Tensor | None) -> tuple[Tensor, Tensor | None]:
    if y is None:
        return _rows(x), None
    kind = torch.promote_types(x.dtype, y.dtype)
    return _rows(x.to(kind)), _rows(y.to(kind))


def passed(x: Tensor, norm: Norm) -> tuple[Tensor, Tensor]:
    """x (..., D) -> x to go on with, and its norm."""
    s, n = _Passed.apply(_rows(x), *norm)  # type: ignore[no-untyped-call]
    return s.view(x.shape), n.view(x.shape)


def added(x: Tensor, y: Tensor, norm: Norm) -> tuple[Tensor, Tensor]:
    """x and y (..., D) -> their sum and its norm."""
    s, n = _Added.apply(*_alike(x, y), *norm)  # type: ignore[no-untyped-call]
    return s.view(x.shape), n.view(x.shape)


def behind(x: Tensor, y: Tensor | None, norm: Norm) -> tuple[Tensor, Tensor]:
    """The norm of x + y (..., D), or of x alone, twice: as the stream and as what is read, whose slopes join on the way
    back."""
    n, m = _Behind.apply(*_alike(x, y), *norm)  # type: ignore[no-untyped-call]
    return n.view(x.shape), m.view(x.shape)


def normed(x: Tensor, y: Tensor | None, norm: Norm) -> Tensor:
    """The norm of x + y (..., D), or of x alone."""
    n: Tensor = _Normed.apply(*_alike(x, y), *norm)  # type: ignore[no-untyped-call]
    return n.view(x.shape)
