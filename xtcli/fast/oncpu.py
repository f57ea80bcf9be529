"""A step of decoding for one row on the CPU: few operators, each over no more than it needs.

    h = x + w o(attention(norm(x)))          x = h + w down(act(gate(norm(h))) up(norm(h)))

What takes time is reading the weights once, by products of a matrix and a vector; all else is to stay small beside
that. The residual sum is the start of the product's own sum, keys are read from the slots in use alone, and what can
be is settled before the first step. Where the C kernels are there, a step is one call of them (cpu/decode.py). The
specification is the model's own parts.

Axes as in plan.py; one row, so vectors are (K,).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from xtcli.fast.cpu import decode
from xtcli.fast.engine import Step
from xtcli.fast.plan import Layer, Matrix, Norm, Plan, Turn, Unplanned
from xtcli.fast.twins import likeliest
from xtcli.parts.activations import ACTIVATIONS
from xtcli.parts.context import KeyValues, ModelState, Newest
from xtcli.parts.rotary import turn_half, turn_interleaved

Read = Callable[[Tensor], Tensor]


class Lean(Step):
    """A step by a plan; raises Unplanned for weights of other types than float32 and float64."""

    def __init__(self, plan: Plan, rows: int, capacity: int) -> None:
        super().__init__(rows, capacity, plan.table.device)
        if plan.table.dtype not in (torch.float32, torch.float64):
            raise Unplanned("weights have 16 bits")
        self.plan = plan
        made = [_Layer(layer, capacity, plan.table) for layer in plan.layers]
        self.layers = made
        self.norm = _norm(plan.norm)
        self.head = _whole(plan.head)
        caches = [(layer.keys, layer.values) for layer in made]
        self.native = decode.Native(plan, caches, capacity) if decode.takes(plan) else None

    def begin(self, state: ModelState, tokens: Tensor, width: int, pads: Tensor | None) -> None:
        super().begin(state, tokens, width, pads)
        for layer, block in zip(self.layers, state.blocks, strict=True):
            (cache,) = (one for one in block.values() if one is not None)
            assert isinstance(cache, KeyValues), "a planned layer remembers keys and values"
            held = min(width, cache.k.shape[2]) if isinstance(cache, Newest) else width
            layer.keys[:, width - held : width] = cache.k[0, :, :held]
            layer.values[:, width - held : width] = cache.v[0, :, :held]

    def logits(self) -> Tensor:
        plan = self.plan
        slot, pad = int(self.slots[0]), int(self.pads[0])
        if self.native is not None:
            return self.native(int(self.tokens[0]), slot, pad)[None]
        place = max(slot - pad, 0)
        x = plan.table[int(self.tokens[0])]
        x = x * plan.scale if plan.scale != 1.0 else x
        if plan.places is not None:
            x = x + plan.places[place]
        turns: dict[int, tuple[Tensor, Tensor]] = {}
        for layer in self.layers:
            x = layer.step(x, slot, pad, place, turns)
        y = self.head(self.norm(x))
        y = y if plan.cap is None else plan.cap * torch.tanh(y / plan.cap)
        return y.float()[None]

    def likeliest(self, logits: Tensor, vocab: int) -> None:
        likeliest(logits, vocab, self.tokens, self.slots, self.said)


class _Layer:
    """One block with its caches: keys and values (G, C, D)."""

    def __init__(self, layer: Layer, capacity: int, like: Tensor) -> None:
        heads = layer.heads
        shape = (heads.groups, capacity, heads.width)
        self.keys, self.values = (torch.zeros(shape, dtype=like.dtype, device=like.device) for _ in range(2))
        self.heads, self.parallel = heads, layer.parallel
        self.norm, self.ffn_norm = _norm(layer.norm), _norm(layer.ffn_norm)
        self.q, self.k, self.v = (_whole(part) for part in layer.qkv)
        self.q_norm, self.k_norm = _norm(heads.q_norm), _norm(heads.k_norm)
        self.out, self.down = _onto(layer.out, layer.weight), _onto(layer.down, layer.ffn_weight)
        self.up = [_whole(part) for part in layer.up]
        self.act = ACTIVATIONS[layer.act]

    def step(self, x: Tensor, slot: int, pad: int, place: int, turns: dict[int, tuple[Tensor, Tensor]]) -> Tensor:
        """x (K,) in a slot, `pad` slots behind the first -> (K,)."""
        heads, read = self.heads, self.norm(x)
        q, k, v = self.q(read), self.k(read), self.v(read)
        q, k = self.q_norm(q.view(heads.heads, heads.width)), self.k_norm(k.view(heads.groups, heads.width))
        if heads.turn is not None:
            cos, sin = _turned(heads.turn, place, x.dtype, turns)
            turn = turn_interleaved if heads.turn.interleaved else turn_half
            q, k = turn(q, cos, sin), turn(k, cos, sin)
        self.keys[:, slot], self.values[:, slot] = k, v.view(heads.groups, heads.width)
        h = self.out(self._mixed(q, slot, pad), x)
        read = self.ffn_norm(x if self.parallel else h)
        inner = self.act(self.up[0](read))
        return self.down(inner if len(self.up) == 1 else inner * self.up[1](read), h)

    def _mixed(self, q: Tensor, slot: int, pad: int) -> Tensor:
        """What queries (H, D) make of the slots that they see: (H D,)."""
        heads = self.heads
        first = min(pad, slot) if heads.left is None else max(slot - heads.left, min(pad, slot))
        keys, values = self.keys[:, first : slot + 1], self.values[:, first : slot + 1]
        q = (q * heads.scale).view(heads.groups, -1, heads.width)
        weights = torch.bmm(q, keys.transpose(1, 2)).softmax(-1)
        return torch.bmm(weights, values).view(-1)


def _turned(
    turn: Turn, place: int, dtype: torch.dtype, known: dict[int, tuple[Tensor, Tensor]]
) -> tuple[Tensor, Tensor]:
    """cos and sin (r / 2,) of a place, looked up once a step."""
    if id(turn) not in known:
        known[id(turn)] = turn.cos[place].to(dtype), turn.sin[place].to(dtype)
    return known[id(turn)]


def _norm(norm: Norm | None) -> Read:
    """The norm of a vector, or of each of several."""
    if norm is None:
        return lambda x: x
    size, eps = norm.gain.shape, norm.eps
    if norm.kind == "layer":
        gain, shift = norm.gain, norm.shift
        return lambda x: torch.layer_norm(x, size, gain, shift, eps)
    gain = norm.gain + norm.offset if norm.offset else norm.gain
    return lambda x: F.rms_norm(x, size, gain, eps)


def _whole(part: Matrix) -> Read:
    """The product with a matrix."""
    if part.scale is not None:
        raise Unplanned("weights have 8 bits")
    weight, bias = part.weight, part.bias
    if bias is None:
        return lambda x: torch.mv(weight, x)
    return lambda x: torch.addmv(bias, weight, x)


def _onto(part: Matrix, scale: float) -> Callable[[Tensor, Tensor], Tensor]:
    """The product with a matrix, by `scale`, added to a stream."""
    if part.scale is not None:
        raise Unplanned("weights have 8 bits")
    weight, bias = part.weight, part.bias
    if bias is None:
        return lambda x, stream: torch.addmv(stream, weight, x, alpha=scale)
    return lambda x, stream: torch.addmv(torch.add(stream, bias, alpha=scale), weight, x, alpha=scale)
