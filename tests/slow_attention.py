"""Attention with all its options as the papers write it: one query at a time, one visible key at a time, float64."""

from __future__ import annotations

import cmath
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

Weights = Mapping[str, Tensor]
Bias = Callable[[int, int, int], Tensor]
"""What is added to the score of head h, query i and key j."""


@dataclass
class Case:
    """One attention: its config, weights under `prefix`, and what it is given."""

    config: dict[str, Any]
    weights: Weights
    prefix: str
    heads: int
    bias: Bias | None = None
    scale: float = 1.0
    carried: dict[str, list[Any]] = field(default_factory=dict)
    """What each chain carries: the sums of raw scores [row][head][query], and how many layers are in them."""

    def __getitem__(self, name: str) -> Tensor:
        return self.weights[self.prefix + name]

    def linear(self, name: str, x: Tensor) -> Tensor:
        return F.linear(x, self[f"{name}.weight"], self.weights.get(f"{self.prefix}{name}.bias"))


def stages(config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The score's stages by kind, with their fields and where their parameters are."""
    score = config.get("score", "softmax")
    score = {"kind": score} if isinstance(score, str) else score
    listed = score["of"] if score["kind"] == "chain" else [score]
    whole = [{"kind": stage} if isinstance(stage, str) else stage for stage in listed]
    at = "score.of.{}." if score["kind"] == "chain" else "score."
    return {stage["kind"]: stage | {"at": at.format(number)} for number, stage in enumerate(whole)}


def entmax(z: Tensor) -> Tensor:
    """1.5-entmax of a vector: tau by halving an interval, then one Newton step, whose gradient is that of the root."""
    half = z / 2
    low, high = half.max().detach() - 1, half.max().detach()
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if (half - middle).clamp(min=0).square().sum() > 1 else (low, middle)
    above = (half - low).clamp(min=0)
    tau = low + (above.square().sum() - 1) / (2 * above.sum().detach())
    return (half - tau).clamp(min=0).square()


def attention(case: Case, x: Tensor, source: Tensor, seen: Callable[[int, int, int], bool], chain: str) -> Tensor:
    """x (B, T, D) reads `source` (B, S, D'); `seen(row, i, j)` says which keys are visible."""
    config, parts = case.config, stages(case.config)
    rows, queries, _ = x.shape
    placed, placed_keys = x, source
    if config.get("infused"):
        placed = x + waves(queries, x.shape[-1])
        placed_keys = placed
    groups = config.get("kv_heads") or case.heads
    q = case.linear("q", placed).unflatten(-1, (case.heads, -1))
    k = case.linear("k", placed_keys).unflatten(-1, (groups, -1))
    v = case.linear("v", source).unflatten(-1, (groups, -1))
    width = q.shape[-1]
    if config.get("qk_norm") == "unit":
        q, k = q / q.norm(dim=-1, keepdim=True), k / k.norm(dim=-1, keepdim=True)
    if config.get("rotary"):
        q, k = turned(q), turned(k)
    first_k, first_v = torch.zeros(groups, 0, width), torch.zeros(groups, 0, width)
    count = config.get("memory") or 0
    if count:
        first_k, first_v = case["memory.k"], case["memory.v"]
        if config.get("qk_norm") == "unit":
            first_k = first_k / first_k.norm(dim=-1, keepdim=True)
    scale = (config.get("scale") or width**-0.5) * case.scale
    before, layers = case.carried.get(chain, (None, 0))
    carry: list[Any] = []
    out = []
    for row in range(rows):
        of_head = [h * groups // case.heads for h in range(case.heads)]
        keys = [torch.cat((first_k[g], k[row, :, g])) for g in range(groups)]
        values = [torch.cat((first_v[g], v[row, :, g])) for g in range(groups)]
        raw = [[keys[of_head[h]] @ q[row, i, h] * scale for i in range(queries)] for h in range(case.heads)]
        if before is not None:
            raw = [[raw[h][i] + before[row][h][i] for i in range(queries)] for h in range(case.heads)]
        carry.append(raw)
        lines = []
        for i in range(queries):
            heads = [raw[h][i] for h in range(case.heads)]
            if "residual" in parts and parts["residual"].get("mean"):
                heads = [one / (layers + 1) for one in heads]
            talk = parts.get("talking-heads")
            if talk and talk.get("pre", True):
                mix = case[talk["at"] + "pre"]
                heads = [sum(mix[a, b] * heads[a] for a in range(case.heads)) for b in range(case.heads)]
            visible = list(range(count)) + [count + j for j in range(source.shape[1]) if seen(row, i, j)]
            weights = [weigh(case, parts, one, h, i, visible, count) for h, one in enumerate(heads)]
            if talk and talk.get("post", True):
                mix = case[talk["at"] + "post"]
                weights = [sum(mix[a, b] * weights[a] for a in range(case.heads)) for b in range(case.heads)]
            lines.append(torch.cat([weights[h] @ values[of_head[h]] for h in range(case.heads)]))
        out.append(torch.stack(lines))
    if "residual" in parts:
        case.carried[chain] = [carry, layers + 1]
    return leave(case, torch.stack(out), x)


def weigh(
    case: Case, parts: Mapping[str, Any], scores: Tensor, h: int, i: int, visible: list[int], count: int
) -> Tensor:
    """Scores of one query to the weights of all keys, 0 for those that are hidden."""
    if case.bias is not None:
        added = [case.bias(h, i, j - count) if j >= count else torch.zeros(()) for j in range(len(scores))]
        scores = scores + torch.stack([one.double() for one in added])
    if "softcap" in parts:
        cap = parts["softcap"]["cap"]
        scores = cap * torch.tanh(scores / cap)
    if "top-k" in parts:
        k = parts["top-k"].get("k", 8)
        order = sorted((scores[j].item() for j in visible), reverse=True)
        visible = [j for j in visible if scores[j].item() >= order[min(k, len(order)) - 1]]
    shown = scores[visible]
    shares = entmax(shown) if "entmax" in parts else shown.exp() / shown.exp().sum()
    return torch.zeros_like(scores).index_put((torch.tensor(visible),), shares)


def leave(case: Case, y: Tensor, x: Tensor) -> Tensor:
    """The output projection or its gates."""
    out = case.config.get("out", "plain")
    if out == "plain":
        return case.linear("o", y)
    read = torch.cat((y, x), -1) if out == "gated" else y
    return case.linear("o.value", read) / (1 + (-case.linear("o.gate", read)).exp())


def waves(length: int, width: int) -> Tensor:
    """Sines, then cosines, of places times 10000^(-2i / width)."""
    table = torch.zeros(length, width, dtype=torch.float64)
    for p in range(length):
        for i in range(width // 2):
            angle = p * 10000 ** (-2 * i / width)
            table[p, i], table[p, width // 2 + i] = math.sin(angle), math.cos(angle)
    return table


def turned(x: Tensor) -> Tensor:
    """(B, T, H, d): dimension m and m + d / 2 as a complex number, times e^(i place 10000^(-2m / d))."""
    half = x.shape[-1] // 2
    angles = [[cmath.exp(1j * p * 10000 ** (-m / half)) for m in range(half)] for p in range(x.shape[1])]
    turned = torch.complex(x[..., :half], x[..., half:]) * torch.tensor(angles)[None, :, None]
    return torch.cat((turned.real, turned.imag), -1)


def bucket(step: int, buckets: int, furthest: int, causal: bool) -> int:
    """T5's bucket of key - query, counted in integers: the n-th rest bucket begins where n / rest of the way is done."""
    start = 0
    if not causal:
        buckets //= 2
        start = buckets if step > 0 else 0
    steps = max(-step, 0) if causal else abs(step)
    exact = buckets // 2
    if steps < exact:
        return start + steps
    rest = buckets - exact
    # steps / exact >= (furthest / exact)^(n / rest), both sides to the power of rest
    n = max(n for n in range(rest) if steps**rest * exact**n >= furthest**n * exact**rest)
    return start + exact + n
