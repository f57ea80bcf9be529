"""A step of decoding for one row by one call of the C kernels; the operators of oncpu.py say what it computes.

With gpt2-small on two cores a token takes 25 ms, of which 22 read its 497 MB of weights.

Axes as in plan.py: K width of the stream, G key/value heads, C slots, D width of a head.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import byref, c_float, c_int64, c_void_p
from typing import Any

import torch
from torch import Tensor

from xtcli.fast.cpu.build import library
from xtcli.fast.cpu.pointwise import KINDS
from xtcli.fast.plan import Layer, Matrix, Norm, Plan

LANES = 16
"""Widths of vectors are multiples of this."""
LEAST = 2**19
"""Weights from which a call of our own pays the time to compile it."""
PIECE = 1024
"""The most rows of a matrix that a thread takes at a time, as decode.c has it for rows of `LANES`."""


class _Matrix(ctypes.Structure):
    _fields_ = [*((name, c_void_p) for name in ("weight", "bias")), *((name, c_int64) for name in ("rows", "columns"))]


class _Norm(ctypes.Structure):
    _fields_ = [("kind", c_int64), ("gain", c_void_p), ("shift", c_void_p), ("eps", c_float)]


class _Layer(ctypes.Structure):
    _fields_ = [
        *((name, _Norm) for name in ("norm", "ffn_norm", "q_norm", "k_norm")),
        *((name, _Matrix) for name in ("q", "k", "v", "out", "gate", "up", "down")),
        *((name, c_void_p) for name in ("cos", "sin")),
        *((name, c_int64) for name in ("half", "interleaved", "heads", "groups", "width", "left")),
        *((name, c_float) for name in ("scale", "weight", "ffn_weight")),
        *((name, c_int64) for name in ("act", "parallel")),
        *((name, c_void_p) for name in ("keys", "values")),
    ]


class _Step(ctypes.Structure):
    _fields_ = [
        *((name, c_void_p) for name in ("table", "places")),
        *((name, c_float) for name in ("scale", "cap")),
        *((name, c_int64) for name in ("layers", "width", "capacity", "widest")),
        ("layer", c_void_p),
        ("norm", _Norm),
        ("head", _Matrix),
        *((name, c_void_p) for name in ("x", "h", "asked", "mixed", "inner", "logits", "room")),
        *((name, c_int64) for name in ("share", "token", "slot", "pad", "place", "meeting")),
        ("next", c_void_p),
    ]


class Native:
    """A step by a plan and its caches: keys and values (G, C, D) of each layer."""

    def __init__(self, plan: Plan, caches: Sequence[tuple[Tensor, Tensor]], capacity: int) -> None:
        self.kept: list[Any] = [plan, caches]  # what C has the addresses of
        self.vocab, self.tokens, self.capacity = plan.head.weight.shape[0], plan.table.shape[0], capacity
        turns = [layer.heads.turn for layer in plan.layers]
        tables = [plan.places, *(turn.cos for turn in turns if turn is not None)]
        self.most = min([capacity, *(len(table) for table in tables if table is not None)])
        layers = (_Layer * len(plan.layers))()
        for number, (layer, (keys, values)) in enumerate(zip(plan.layers, caches, strict=True)):
            self._fill(layers[number], layer, keys, values)
        asked = max((layer.heads.heads + 2 * layer.heads.groups) * layer.heads.width for layer in plan.layers)
        mixed = max(layer.out.weight.shape[1] for layer in plan.layers)
        inner = max(layer.down.weight.shape[1] for layer in plan.layers)
        self.threads = torch.get_num_threads()
        widest = max([PIECE, capacity + LANES, *(layer.heads.width for layer in plan.layers)])
        share = -(-(plan.width + 2 * widest) // LANES) * LANES
        blank = [
            torch.zeros(size, dtype=torch.float32)
            for size in (plan.width, plan.width, asked, mixed, inner, self.threads * share)
        ]
        x, h, asked_at, mixed_at, inner_at, room = (one.data_ptr() for one in blank)
        known = library()
        assert known is not None, "takes() has said that the kernels are there"
        self.call = known.xt_step
        self.step = _Step(
            table=self._at(plan.table),
            places=None if plan.places is None else self._at(plan.places),
            scale=plan.scale,
            cap=plan.cap or 0.0,
            layers=len(layers),
            width=plan.width,
            capacity=capacity,
            widest=widest,
            layer=ctypes.addressof(layers),
            norm=self._norm(plan.norm),
            head=self._matrix(plan.head, None, plan.width),
            x=x,
            h=h,
            asked=asked_at,
            mixed=mixed_at,
            inner=inner_at,
            room=room,
            share=share,
        )
        known.xt_step_rounds.restype = c_int64
        rounds = torch.zeros(known.xt_step_rounds(byref(self.step)), dtype=torch.int64)
        self.step.next = rounds.data_ptr()
        self.kept += [layers, blank, rounds]

    def __call__(self, token: int, slot: int, pad: int) -> Tensor:
        """The logits (V,) after a token in a slot, of a row with `pad` slots in front."""
        step, place = self.step, max(slot - pad, 0)
        if not (0 <= token < self.tokens and 0 <= slot < self.capacity and pad >= 0 and place < self.most):
            raise IndexError(f"token {token} in slot {slot} behind {pad} slots of padding")
        logits = torch.empty(self.vocab, dtype=torch.float32)
        step.token, step.slot, step.pad, step.place, step.logits = token, slot, pad, place, logits.data_ptr()
        self.call(byref(step), c_int64(self.threads))
        return logits

    def _fill(self, to: _Layer, layer: Layer, keys: Tensor, values: Tensor) -> None:
        heads, width, hidden = layer.heads, self.kept[0].width, layer.down.weight.shape[1]
        wide, narrow = heads.heads * heads.width, heads.groups * heads.width
        to.norm, to.ffn_norm = self._norm(layer.norm), self._norm(layer.ffn_norm)
        to.q_norm, to.k_norm = self._norm(heads.q_norm), self._norm(heads.k_norm)
        to.q = self._matrix(layer.qkv[0], wide, width)
        to.k, to.v = (self._matrix(part, narrow, width) for part in layer.qkv[1:])
        to.out = self._matrix(layer.out, width, wide)
        *gate, up = layer.up
        if gate:
            to.gate = self._matrix(gate[0], hidden, width)
        to.up, to.down = self._matrix(up, hidden, width), self._matrix(layer.down, width, hidden)
        if heads.turn is not None:
            to.cos, to.sin = self._at(heads.turn.cos), self._at(heads.turn.sin)
            to.half, to.interleaved = heads.turn.cos.shape[1], int(heads.turn.interleaved)
        to.heads, to.groups, to.width = heads.heads, heads.groups, heads.width
        to.left = -1 if heads.left is None else heads.left
        to.scale, to.weight, to.ffn_weight = heads.scale, layer.weight, layer.ffn_weight
        to.act, to.parallel = KINDS.index(_kind(layer.act)), int(layer.parallel)
        if not keys.shape == values.shape == (heads.groups, self.capacity, heads.width):
            raise AssertionError(f"caches {tuple(keys.shape)}")
        to.keys, to.values = self._at(keys), self._at(values)

    def _at(self, x: Tensor) -> int:
        if x.dtype != torch.float32 or not x.is_contiguous():
            raise AssertionError(f"{x.dtype}, strides {x.stride()}")
        self.kept.append(x)
        return x.data_ptr()

    def _matrix(self, part: Matrix, rows: int | None, columns: int) -> _Matrix:
        weight, bias = part.weight, part.bias
        shape = (weight.shape[0] if rows is None else rows, columns)
        if weight.shape != shape or (bias is not None and bias.shape != shape[:1]):
            raise AssertionError(f"a matrix of {tuple(weight.shape)}, not {shape}")
        return _Matrix(self._at(weight), None if bias is None else self._at(bias), *shape)

    def _norm(self, norm: Norm | None) -> _Norm:
        if norm is None:
            return _Norm()
        gain = norm.gain + norm.offset if norm.offset else norm.gain
        shift = None if norm.shift is None else self._at(norm.shift)
        return _Norm(1 if norm.kind == "layer" else 2, self._at(gain), shift, norm.eps)


def takes(plan: Plan) -> bool:
    """Whether a step by this plan is for the kernels: weights of float32, in vectors of whole multiples."""
    widths = {plan.width}
    parts = [plan.head]
    for layer in plan.layers:
        widths |= {layer.heads.width, layer.out.weight.shape[1], layer.down.weight.shape[1]}
        parts += [*layer.qkv, layer.out, *layer.up, layer.down]
    plain = all(_plain(part.weight) and part.scale is None for part in parts) and _plain(plan.table)
    if not plain or any(width % LANES for width in widths):
        return False
    return sum(part.weight.numel() for part in parts) >= LEAST and library() is not None


def _plain(x: Tensor) -> bool:
    return x.device.type == "cpu" and x.dtype == torch.float32 and x.is_contiguous()


def _kind(act: str) -> str:
    return "gelu_tanh" if act == "gelu_fast" else act
