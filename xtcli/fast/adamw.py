"""AdamW over all parameters at once: the norm of the gradients in one reading, the update in one more.

    norm    sqrt(sum over all parameters of g^2)
    g'      g * min(1, limit / (norm + 1e-6))
    m, v    b1 m + (1 - b1) g',  b2 v + (1 - b2) g'^2
    p       p (1 - lr decay) - lr / (1 - b1^t) m / (sqrt(v / (1 - b2^t)) + eps)     Loshchilov, Hutter, arXiv:1711.05101

Weights and running values are float32. Gradients may be in 16 bits, where a parameter has a working copy; the copy is
written in the same pass. An update moves 28 bytes a parameter: 12 read and 12 written of weights and running values, 2
read of the gradient, 2 written of the copy; PyTorch's own, with clipping and the casts of copies apart, moves 50.

Or they are all bfloat16, rounded by chance as train/rounded.py says, which moves 14.

Kernels find tensors by tables of addresses and work in chunks, so that a bias costs one program and not one launch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

CHUNK = 2048
"""Elements that one program updates."""
BLOCK = 1024
"""Elements that it holds at once: few enough that many programs fit beside one another."""
WARPS = 4
ALIGN = 16
"""Bytes of which the addresses of weights, running values and gradients must be a multiple."""

TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@triton.jit
def _squares(gradients, sizes, tensor_of, start_of, sums, TYPE: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """The sum of squares of each chunk."""
    chunk = tl.program_id(0)
    number = tl.load(tensor_of + chunk)
    # What is known to be a multiple of 16 is loaded 16 bytes at a time; a mask would undo that.
    start = tl.multiple_of(tl.load(start_of + chunk), CHUNK)
    size = tl.load(sizes + number)
    g_at = tl.multiple_of(tl.load(gradients + number).to(tl.pointer_type(TYPE)), 16)
    total = tl.zeros((BLOCK,), tl.float32)
    if start + CHUNK <= size:
        for offset in tl.static_range(0, CHUNK, BLOCK):
            g = tl.load(g_at + start + offset + tl.arange(0, BLOCK)).to(tl.float32)
            total += g * g
    else:
        for offset in tl.static_range(0, CHUNK, BLOCK):
            place = start + offset + tl.arange(0, BLOCK)
            g = tl.load(g_at + place, mask=place < size, other=0.0).to(tl.float32)
            total += g * g
    tl.store(sums + chunk, tl.sum(total))


@triton.jit
def _hashed(x):  # type: ignore[no-untyped-def]
    """uint32 -> uint32, `hashed` of train/rounded.py."""
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def _rounded(x, chance):  # type: ignore[no-untyped-def]
    """x in bfloat16, `rounded` of train/rounded.py."""
    up = ((x.to(tl.uint32, bitcast=True) + chance) & 0xFFFF0000).to(tl.float32, bitcast=True)
    return tl.where(x == x, up, x).to(tl.bfloat16)


@triton.jit
def _stored(m, v, p, place, key, ROUNDS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Running values and weights as they are kept; `chances` of train/rounded.py."""
    if ROUNDS:
        drawn = _hashed(place.to(tl.uint32) ^ key)
        m = _rounded(m, drawn >> 16)
        v = _rounded(v, (drawn * 0x9E3779B1) >> 16)
        p = _rounded(p, drawn & 0xFFFF)
    return m, v, p


@triton.jit
def _corrections(steps, corrections, flag, logs, starts, keys, ROUNDS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Count the step of one parameter, unless it is lost, and the corrections of its running values for it, and what
    its chances start from."""
    number = tl.program_id(0)
    step_at = tl.load(steps + number).to(tl.pointer_type(tl.float32))
    lost = tl.load(flag) != 0
    step = tl.load(step_at) + tl.where(lost, 0.0, 1.0)
    # Barriers of one program: every thread has read the count before any writes it.
    tl.debug_barrier()
    tl.store(step_at, step)
    # In float64, for 1 - b^t is small at first.
    first = 1.0 - tl.exp(step.to(tl.float64) * tl.load(logs))
    second = 1.0 - tl.exp(step.to(tl.float64) * tl.load(logs + 1))
    tl.store(corrections + 2 * number, (1.0 / first).to(tl.float32))
    tl.store(corrections + 2 * number + 1, (1.0 / tl.sqrt(second)).to(tl.float32))
    if ROUNDS:
        key = _hashed((tl.load(starts + number) ^ step.to(tl.int32)).to(tl.uint32, bitcast=True))
        tl.store(keys + number, key.to(tl.int32, bitcast=True))


@triton.jit
def _stepped(g, m, v, p, kept, length, root, beta1, beta2, eps):  # type: ignore[no-untyped-def]
    """Running values and weights after a step by gradients g."""
    m += (1.0 - beta1) * (g - m)
    v = beta2 * v + (1.0 - beta2) * g * g
    return m, v, p * kept - length * m / (tl.sqrt(v) * root + eps)


@triton.jit
def _update(  # type: ignore[no-untyped-def]
    weights, means, squares, gradients, copies, sizes, decays, tensor_of, start_of, corrections, keys, norm, flag,
    rate, limit, beta1, beta2, eps,
    CLIPS: tl.constexpr, COPIES: tl.constexpr, TYPE: tl.constexpr, KEPT: tl.constexpr, ROUNDS: tl.constexpr,
    NARROW: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The update of each chunk, unless the step is lost; weights and running values are KEPT as float32, or as bfloat16
    and round."""
    chunk = tl.program_id(0)
    if tl.load(flag) == 0:
        number = tl.load(tensor_of + chunk)
        start = tl.multiple_of(tl.load(start_of + chunk), CHUNK)
        size = tl.load(sizes + number)
        p_at = tl.multiple_of(tl.load(weights + number).to(tl.pointer_type(KEPT)), 16)
        m_at = tl.multiple_of(tl.load(means + number).to(tl.pointer_type(KEPT)), 16)
        v_at = tl.multiple_of(tl.load(squares + number).to(tl.pointer_type(KEPT)), 16)
        g_at = tl.multiple_of(tl.load(gradients + number).to(tl.pointer_type(TYPE)), 16)
        length = rate * tl.load(corrections + 2 * number)
        root = tl.load(corrections + 2 * number + 1)
        kept = 1.0 - rate * tl.load(decays + number)
        scale = 1.0
        if CLIPS:
            scale = tl.minimum(limit / (tl.load(norm) + 1e-6), 1.0)
        key = 0
        if ROUNDS:
            key = tl.load(keys + number).to(tl.uint32, bitcast=True)
        c_at = tl.multiple_of(tl.load(copies + number).to(tl.pointer_type(NARROW)), 16)
        # Places of a chunk are 32-bit numbers beside the address where it starts.
        p_at, m_at, v_at, g_at, c_at = p_at + start, m_at + start, v_at + start, g_at + start, c_at + start
        if start + CHUNK <= size:
            for offset in tl.static_range(0, CHUNK, BLOCK):
                place = offset + tl.arange(0, BLOCK)
                g = tl.load(g_at + place).to(tl.float32) * scale
                m, v, p = _stepped(
                    g, tl.load(m_at + place).to(tl.float32), tl.load(v_at + place).to(tl.float32),
                    tl.load(p_at + place).to(tl.float32), kept, length, root, beta1, beta2, eps,
                )  # fmt: skip
                m, v, p = _stored(m, v, p, start.to(tl.int32) + place, key, ROUNDS)
                tl.store(m_at + place, m)
                tl.store(v_at + place, v)
                tl.store(p_at + place, p)
                if COPIES:
                    tl.store(c_at + place, p.to(NARROW))
        else:
            left = (size - start).to(tl.int32)
            for offset in tl.static_range(0, CHUNK, BLOCK):
                place = offset + tl.arange(0, BLOCK)
                inside = place < left
                g = tl.load(g_at + place, mask=inside, other=0.0).to(tl.float32) * scale
                m, v, p = _stepped(
                    g, tl.load(m_at + place, mask=inside, other=0.0).to(tl.float32),
                    tl.load(v_at + place, mask=inside, other=0.0).to(tl.float32),
                    tl.load(p_at + place, mask=inside, other=0.0).to(tl.float32),
                    kept, length, root, beta1, beta2, eps,
                )  # fmt: skip
                m, v, p = _stored(m, v, p, start.to(tl.int32) + place, key, ROUNDS)
                tl.store(m_at + place, m, mask=inside)
                tl.store(v_at + place, v, mask=inside)
                tl.store(p_at + place, p, mask=inside)
                if COPIES:
                    tl.store(c_at + place, p.to(NARROW), mask=inside)


@dataclass(frozen=True)
class Entry:
    """One parameter: its running values, its weight decay, its working copy, the tensor whose `grad` counts, and what
    its chances start from."""

    weight: Tensor
    mean: Tensor
    square: Tensor
    step: Tensor
    decay: float
    copy: Tensor | None
    source: Tensor
    start: int


class Table:
    """Parameters of one type whose gradients have one type, and whose copies too: addresses and chunks, on the weights'
    device."""

    def __init__(self, entries: Sequence[Entry], betas: tuple[float, float]) -> None:
        device = entries[0].weight.device
        self.entries = entries
        self.copies = entries[0].copy is not None
        self.type = TYPES[entries[0].source.dtype]
        self.kept = TYPES[entries[0].weight.dtype]
        self.rounds = self.kept == tl.bfloat16
        self.narrow = TYPES[entries[0].weight.dtype if entries[0].copy is None else entries[0].copy.dtype]
        sizes = torch.tensor([entry.weight.numel() for entry in entries], dtype=torch.int64)
        pieces = (sizes + CHUNK - 1) // CHUNK
        numbers = torch.arange(len(entries)).repeat_interleave(pieces)
        first = (pieces.cumsum(0) - pieces).repeat_interleave(pieces)
        self.chunks = len(numbers)
        self.sizes = sizes.to(device)
        self.tensor_of = numbers.to(torch.int32).to(device)
        self.start_of = ((torch.arange(self.chunks) - first) * CHUNK).to(device)
        self.decays = torch.tensor([entry.decay for entry in entries], dtype=torch.float32, device=device)
        self.weights, self.means, self.squares, self.steps = (
            addresses([getattr(entry, name) for entry in entries]).to(device)
            for name in ("weight", "mean", "square", "step")
        )
        written = [entry.weight if entry.copy is None else entry.copy for entry in entries]
        self.written = addresses(written).to(device)
        self.corrections = torch.empty(2 * len(entries), dtype=torch.float32, device=device)
        self.starts = torch.tensor([entry.start for entry in entries], dtype=torch.int32, device=device)
        self.keys = torch.empty_like(self.starts)
        self.logs = torch.tensor([math.log(beta) for beta in betas], dtype=torch.float64, device=device)
        self.gradients = torch.zeros(len(entries), dtype=torch.int64, device=device)
        self.found: Tensor | None = None

    def read(self) -> None:
        """Look up where this step's gradients are."""
        self.found = addresses([entry.source.grad for entry in self.entries])  # type: ignore[misc]
        if not (self.gradients.is_cuda and torch.cuda.is_current_stream_capturing()):
            self.write()

    def write(self) -> None:
        """Write down what was found: while a graph is recorded, addresses are known but nothing can be copied."""
        assert self.found is not None
        found = self.found.pin_memory() if self.gradients.is_cuda else self.found
        self.gradients.copy_(found, non_blocking=True)

    def squared(self, sums: Tensor) -> None:
        """The sums of squares of the chunks' gradients, into sums (chunks,)."""
        _squares[(self.chunks,)](
            self.gradients, self.sizes, self.tensor_of, self.start_of, sums, self.type, CHUNK, BLOCK, num_warps=WARPS
        )

    def update(self, group: dict[str, Any], limit: float | None, norm: Tensor, flag: Tensor) -> None:
        """New weights, running values and copies."""
        (beta1, beta2), eps = group["betas"], group["eps"]
        _corrections[(len(self.entries),)](
            self.steps, self.corrections, flag, self.logs, self.starts, self.keys, self.rounds, num_warps=1
        )
        _update[(self.chunks,)](
            self.weights, self.means, self.squares, self.gradients, self.written, self.sizes, self.decays,
            self.tensor_of, self.start_of, self.corrections, self.keys, norm, flag,
            group["lr"], 0.0 if limit is None else limit, beta1, beta2, eps,
            limit is not None, self.copies, self.type, self.kept, self.rounds, self.narrow, CHUNK, BLOCK,
            num_warps=WARPS,
        )  # fmt: skip


def addresses(tensors: Sequence[Tensor]) -> Tensor:
    """Where tensors begin in memory, int64; raises ValueError for one that lies in pieces."""
    for tensor in tensors:
        if not tensor.is_contiguous():
            raise ValueError(f"a tensor {tuple(tensor.shape)} with strides {tensor.stride()} lies in pieces")
    return torch.tensor([tensor.data_ptr() for tensor in tensors], dtype=torch.int64)
