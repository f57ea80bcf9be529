"""WKV, the attention without queries of RWKV-4, in chunks: what a loop over T steps computes in about 2 sqrt(T).

    y_t = (n_(t-1) + e^(u + k_t) v_t) / (d_(t-1) + e^(u + k_t))        Peng et al. 2023, arXiv:2305.13048
    n_t = e^w n_(t-1) + e^(k_t) v_t,   d_t = e^w d_(t-1) + e^(k_t)

T is cut into chunks of L ~ sqrt(T). Each chunk's end is found as if it began with nothing, the ends are carried from
chunk to chunk, then all chunks run at once from where they truly begin. The largest exponent so far is taken out of n
and d, so nothing overflows, however large the keys. Memory is linear in T: in training the backward pass computes the
chunks again. `wkv_steps` is the same in a plain loop over time, which the tests hold against this.

Axes: B rows, T tokens, L tokens of a chunk, K chunks, C channels. `real` (B, T) is False where a token is padding,
which neither adds nor lets time pass; `opens` is False where a document begins, which remembers nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

NOTHING = -1e38
"""The logarithm of nothing, still finite so that differences of it are."""

WkvState = tuple[Tensor, Tensor, Tensor]
"""n e^-m, d e^-m and m, each (B, C)."""


def chunked(x: Tensor, length: int, fill: float = 0.0) -> Tensor:
    """(B, T, ...) -> (L, B, K, ...), with `fill` behind the end."""
    missing = -x.shape[1] % length
    if missing:
        x = F.pad(x, (0, 0) * (x.dim() - 2) + (0, missing), value=fill)
    pieces: Tensor = x.unflatten(1, (-1, length))
    return pieces.movedim(2, 0).contiguous()


def whole(y: Tensor, tokens: int) -> Tensor:
    """(L, B, K, ...) -> (B, T, ...)."""
    return y.movedim(0, 2).flatten(1, 2)[:, :tokens]


def wkv(
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    bonus: Tensor,
    state: WkvState,
    real: Tensor | None = None,
    opens: Tensor | None = None,
) -> tuple[Tensor, WkvState]:
    """k, v (B, T, C), decay w below 0 and bonus u (C,) -> y (B, T, C), last state. Float32 or wider."""
    given = (k, v, real, opens, decay, bonus, state)
    if torch.is_grad_enabled() and k.shape[1] > 1:
        return checkpoint(_wkv, *given, use_reentrant=False, preserve_rng_state=False)  # type: ignore[no-any-return]
    return _wkv(*given)


def _wkv(
    k: Tensor,
    v: Tensor,
    real: Tensor | None,
    opens: Tensor | None,
    decay: Tensor,
    bonus: Tensor,
    state: WkvState,
) -> tuple[Tensor, WkvState]:
    tokens = k.shape[1]
    length = math.isqrt(max(tokens - 1, 0)) + 1
    there = torch.ones_like(k[..., 0], dtype=torch.bool) if real is None else real
    keys = chunked(k.masked_fill(~there[..., None], NOTHING), length, NOTHING)  # (L, B, K, C)
    values, passes = chunked(v, length), chunked(there.to(k.dtype)[..., None], length)
    ages = (passes.sum(0) - passes.cumsum(0)) * decay  # of what each token adds, at the chunk's end
    old = passes.sum(0) * decay
    weights = keys + ages
    fresh = None if opens is None else chunked(opens[..., None], length, 1.0).bool()
    if fresh is not None:
        begun = (~fresh).flip(0).cumsum(0).flip(0)
        later = torch.cat((begun[1:], torch.zeros_like(begun[:1]))) > 0
        weights = weights.masked_fill(later, NOTHING)
        old = old.masked_fill(begun[0] > 0, NOTHING)
    top = weights.amax(0).detach()
    shares = torch.exp(weights - top)
    ends = ((shares * values).sum(0), shares.sum(0), top)

    def carry(state: WkvState, aged: Tensor, n: Tensor, d: Tensor, m: Tensor) -> tuple[WkvState, WkvState]:
        return state, joined(state, aged, n, d, m)

    begins, state = _one_by_one(carry, state, [old.unbind(1), *(end.unbind(1) for end in ends)], state)
    now: WkvState = tuple(torch.stack(parts, 1) for parts in zip(*begins, strict=True))  # type: ignore[assignment]

    def step(now: WkvState, key: Tensor, value: Tensor, passed: Tensor, goes_on: Tensor | None) -> tuple[Any, WkvState]:
        if goes_on is not None:
            now = (now[0], now[1], now[2].masked_fill(~goes_on, NOTHING))
        n, d, _ = joined(now, 0.0, value, 1.0, key + bonus)
        return n / d, joined(now, passed * decay, value, 1.0, key)

    steps = [None] * length if fresh is None else fresh.unbind()
    made, _ = _one_by_one(step, now, [keys.unbind(), values.unbind(), passes.unbind(), steps], values[0])
    return whole(torch.stack(made), tokens), state


def _one_by_one(step: Any, state: WkvState, inputs: Sequence[Sequence[Any]], like: Any) -> tuple[list[Any], WkvState]:
    """What each step gives, one after the other, and the last state.

    Where there are shapes alone, the last two stand for all, of which one begins with what another has made; the
    outputs of the others are empty tensors like `like`.
    """
    pieces = list(zip(*inputs, strict=True))
    made: list[Any] = []
    if state[0].is_meta:
        rest, pieces = max(len(pieces) - 2, 0), pieces[-2:]
        if isinstance(like, tuple):
            made = list(zip(*(one.new_empty(rest, *one.shape).unbind() for one in like), strict=True))
        else:
            made = list(like.new_empty(rest, *like.shape).unbind())
    for piece in pieces:
        out, state = step(state, *piece)
        made.append(out)
    return made, state


def joined(state: WkvState, aged: Any, n: Any, d: Any, m: Tensor) -> WkvState:
    """A state that has aged by e^aged, and another of weight e^m, in one; the largest exponent is taken out."""
    before = state[2] + aged
    top = torch.maximum(before, m).detach()
    one, other = torch.exp(before - top), torch.exp(m - top)
    return one * state[0] + other * n, one * state[1] + other * d, top


def wkv_steps(
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    bonus: Tensor,
    state: WkvState,
    real: Tensor | None = None,
    opens: Tensor | None = None,
) -> tuple[Tensor, WkvState]:
    """`wkv` in a loop over time."""
    made = []
    for t in range(k.shape[1]):
        key, value = k[:, t], v[:, t]
        if opens is not None:
            state = (state[0], state[1], state[2].masked_fill(~opens[:, t, None], NOTHING))
        n, d, _ = joined(state, 0.0, value, 1.0, key + bonus)
        made.append(n / d)
        after = joined(state, decay, value, 1.0, key)
        if real is not None:
            after = tuple(torch.where(real[:, t, None], a, b) for a, b in zip(after, state, strict=True))  # type: ignore[assignment]
        state = after
    return torch.stack(made, 1), state


def no_wkv(batch: int, width: int, device: Any) -> WkvState:
    """The state before the first token."""
    zeros = torch.zeros(batch, width, device=device)
    return zeros, zeros, torch.full_like(zeros, NOTHING)
