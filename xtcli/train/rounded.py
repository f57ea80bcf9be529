"""AdamW whose weights and running values are bfloat16 all along, with no float32 copies: rounded by chance.

    r(x)    the bfloat16 below or above x, whichever its distance makes as likely, so that E r(x) = x
    m, v    r(b1 m + (1 - b1) g),  r(b2 v + (1 - b2) g^2)
    p       r(p (1 - lr decay) - lr / (1 - b1^t) m / (sqrt(v / (1 - b2^t)) + eps))

bfloat16 has 8 bits. An update below half of its last one, which most are, is lost by rounding to the nearest, in every
step anew; rounded by chance it arrives on average (Gupta et al. 2015, arXiv:1502.02551; in the training of language
models, Ozkara et al. 2025, arXiv:2502.20566). All that stands between reading and rounding is float32. Gradients are
bfloat16 as well, but for those of several micro-batches, whose sum is float32, as their norm is.

Chance is a hash of the run's seed, the parameter's number, its count of steps and the element's place, and no state: a
step that is taken again rounds as it did, and the kernels of fast/adamw.py draw the same bits.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

SECOND = 0x9E3779B1
"""What turns 32 drawn bits into more: the high half of their product with it."""
SLICE = {"cpu": 2**16}
"""Elements that are updated at once, by type of device: a CPU finds them all in its cache."""
LARGE = 2**24
"""The same elsewhere."""


def hashed(x: Tensor) -> Tensor:
    """Each int32 of x mixed, a bijection: `lowbias32` of C. Wellons, github.com/skeeto/hash-prospector."""
    x = _high(x, 16).bitwise_xor_(x).mul_(0x7FEB352D)
    x = _high(x, 15).bitwise_xor_(x).mul_(0x846CA68B - 2**32)
    return _high(x, 16).bitwise_xor_(x)


def _high(x: Tensor, by: int) -> Tensor:
    """x >> by as of unsigned numbers."""
    return (x >> by).bitwise_and_((1 << (32 - by)) - 1)


def keys(seed: int, count: int) -> Tensor:
    """(count,) int32, what the chances of each parameter start from."""
    folded = (seed ^ (seed >> 32)) & 0xFFFFFFFF
    start = torch.tensor(folded - ((folded >> 31) << 32), dtype=torch.int32)
    return hashed(hashed(start) ^ torch.arange(1, count + 1, dtype=torch.int32))


def chances(key: Tensor, step: Tensor, count: int, first: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """16 bits for each of `count` elements of a parameter from place `first` on, of its first running value and of its
    second: int32 in [0, 2^16).

    key: the parameter's; step: its count of steps. Any two of the three are independent.
    """
    places = torch.arange(first, first + count, dtype=torch.int32, device=step.device)
    drawn = hashed(places.bitwise_xor_(hashed(key ^ step.to(torch.int32))))
    return drawn & 0xFFFF, _high(drawn, 16), _high(drawn * (SECOND - 2**32), 16)


def rounded(x: Tensor, chance: Tensor) -> Tensor:
    """x (float32) in bfloat16: away from zero where the 16 bits that are lost and `chance` make more than 16 bits."""
    up = (x.view(torch.int32) + chance).bitwise_and_(-0x10000).view(torch.float32)
    # Bits of a NaN may run over into a number; an infinity has none to lose.
    return torch.where(x.isnan(), x, up).to(torch.bfloat16)


def norm_of(gradients: list[Tensor]) -> Tensor:
    """The norm of all together, a float32 scalar."""
    if not gradients:
        return torch.zeros(())
    norms = [torch.linalg.vector_norm(gradient, dtype=torch.float32) for gradient in gradients]
    norm: Tensor = torch.linalg.vector_norm(torch.stack(norms))
    return norm


def step(
    weight: Tensor,
    gradient: Tensor,
    state: dict[str, Tensor],
    group: dict[str, Any],
    key: Tensor,
    scale: Tensor | None,
    lost: Tensor | None,
) -> None:
    """One parameter's step, in place: `weight` and running values bfloat16, `gradient` of any type.

    scale: what gradients are multiplied by, if not 1. lost: a scalar that, other than 0, leaves everything as it is.
    """
    (beta1, beta2), rate = group["betas"], group["lr"]
    count, kept = state["step"], None if lost is None else lost != 0
    after = count + 1
    length = rate / -torch.expm1(after * math.log(beta1)) if beta1 else rate
    root = torch.rsqrt(-torch.expm1(after * math.log(beta2))) if beta2 else 1.0
    held = [weight, state["exp_avg"], state["exp_avg_sq"]]
    flat = [tensor.reshape(-1) for tensor in held]
    gradient, size = gradient.reshape(-1), SLICE.get(weight.device.type, LARGE)
    for first in range(0, len(gradient), size):
        old = [tensor[first : first + size] for tensor in flat]
        p, m, v = (tensor.float() for tensor in old)
        g = gradient[first : first + size].float()
        g = g if scale is None else g * scale
        m.lerp_(g, 1 - beta1)
        v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
        p.mul_(1 - rate * group["weight_decay"]).sub_(m / (v.sqrt() * root + group["eps"]) * length)
        for before, new, chance in zip(old, (p, m, v), chances(key, after, len(g), first), strict=True):
            made = rounded(new, chance)
            before.copy_(made if kept is None else torch.where(kept, before, made))
    for tensor, line in zip(held, flat, strict=True):
        if line.data_ptr() != tensor.data_ptr():
            tensor.copy_(line.view(tensor.shape))
    count.copy_(after if kept is None else torch.where(kept, count, after))
