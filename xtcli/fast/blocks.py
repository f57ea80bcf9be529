"""Attention between listed blocks of a text, for those who see few of them.

    forward     a block of queries goes through the blocks of keys in its list, with a softmax on the way
    backward    a block of keys goes through the queries that list it, a block of queries through its list again
                (Dao et al. 2022, arXiv:2205.14135)

Lists may differ by head. A pair counts where both have the same label; a query that sees nothing gets zeros. The first
blocks and the last ones, which see everything, are begun first, since they take longest.

Axes: B rows, H query heads, G key/value heads, T tokens, D head width, N blocks of SIZE tokens. Scores are in units of
log 2 inside the kernels, as are the logarithms that the forward pass keeps.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2E = 1.4426950408889634


@triton.jit
def _turn(place, blocks):  # type: ignore[no-untyped-def]
    """The block that is worked on as number `place`: both ends before all others."""
    return tl.where(place == 0, 0, tl.where(place == 1, blocks - 1, place - 1))


@triton.jit
def _tile(  # type: ignore[no-untyped-def]
    x, row, head, tokens, columns, stride_row, stride_head, stride_token, length, D: tl.constexpr
):  # fmt: skip
    """Tokens (SIZE) of one row and head, (SIZE, columns); zeros behind the text."""
    start = x + row.to(tl.int64) * stride_row + head.to(tl.int64) * stride_head
    inside = (tokens < length)[:, None] & (columns < D)[None, :]
    return tl.load(start + tokens[:, None] * stride_token + columns[None, :], mask=inside, other=0.0)


@triton.jit
def _put(  # type: ignore[no-untyped-def]
    x, value, row, head, tokens, columns, stride_row, stride_head, stride_token, length, D: tl.constexpr
):  # fmt: skip
    start = x + row.to(tl.int64) * stride_row + head.to(tl.int64) * stride_head
    inside = (tokens < length)[:, None] & (columns < D)[None, :]
    tl.store(start + tokens[:, None] * stride_token + columns[None, :], value.to(x.dtype.element_ty), mask=inside)


@triton.jit
def _forward(  # type: ignore[no-untyped-def]
    q, k, v, out, top, count, index, mine, theirs,
    q_row, q_head, q_token, k_row, k_head, k_token, v_row, v_head, v_token, o_row, o_head, o_token,
    heads, group, lists, blocks, length, scale, often,
    SIZE: tl.constexpr, D: tl.constexpr, WIDE: tl.constexpr, LABELS: tl.constexpr, OFTEN: tl.constexpr,
):  # fmt: skip
    row, head = tl.program_id(0) // heads, tl.program_id(0) % heads
    block = _turn(tl.program_id(1), blocks)
    columns, inner = tl.arange(0, WIDE), tl.arange(0, SIZE)
    tokens = block * SIZE + inner
    queries = _tile(q, row, head, tokens, columns, q_row, q_head, q_token, length, D)
    if LABELS:
        label = tl.load(mine + row * length + tokens, mask=tokens < length, other=-2)
    most = tl.full([SIZE], float("-inf"), tl.float32)
    total = tl.zeros([SIZE], tl.float32)
    y = tl.zeros([SIZE, WIDE], tl.float32)
    listed = (head % lists) * blocks + block
    for i in range(tl.load(count + listed)):
        other = tl.load(index + listed * blocks + i)
        keys = other * SIZE + inner
        near = _tile(k, row, head // group, keys, columns, k_row, k_head, k_token, length, D)
        s = tl.dot(queries, tl.trans(near)) * scale
        if OFTEN:
            s += tl.where((other == 0) & (block > 0) & (block < blocks - 1), often, 0.0)
        seen = (keys < length)[None, :]
        if LABELS:
            its = tl.load(theirs + row * length + keys, mask=keys < length, other=-3)
            seen = seen & (label[:, None] == its[None, :])
        s = tl.where(seen, s, float("-inf"))
        new = tl.maximum(most, tl.max(s, 1))
        level = tl.where(new == float("-inf"), 0.0, new)
        p = tl.exp2(s - level[:, None])
        less = tl.exp2(most - level)
        total = total * less + tl.sum(p, 1)
        values = _tile(v, row, head // group, keys, columns, v_row, v_head, v_token, length, D)
        y = y * less[:, None] + tl.dot(p.to(values.dtype), values)
        most = new
    none = total == 0.0
    y = y / tl.where(none, 1.0, total)[:, None]
    _put(out, y, row, head, tokens, columns, o_row, o_head, o_token, length, D)
    # Infinity makes every weight of a query that sees nothing zero on the way back.
    logs = tl.where(none, float("inf"), most + tl.log2(tl.where(none, 1.0, total)))
    tl.store(top + tl.program_id(0) * length + tokens, logs, mask=tokens < length)


@triton.jit
def _shares(  # type: ignore[no-untyped-def]
    out, slope, share, o_row, o_head, o_token, s_row, s_head, s_token, heads, length,
    SIZE: tl.constexpr, D: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """What each query's output contributes to the slopes of all of its scores: the sum of output x slope."""
    row, head = tl.program_id(0) // heads, tl.program_id(0) % heads
    columns = tl.arange(0, WIDE)
    tokens = tl.program_id(1) * SIZE + tl.arange(0, SIZE)
    y = _tile(out, row, head, tokens, columns, o_row, o_head, o_token, length, D).to(tl.float32)
    dy = _tile(slope, row, head, tokens, columns, s_row, s_head, s_token, length, D).to(tl.float32)
    tl.store(share + tl.program_id(0) * length + tokens, tl.sum(y * dy, 1), mask=tokens < length)


@triton.jit
def _to_keys(  # type: ignore[no-untyped-def]
    q, k, v, slope, top, share, dk, dv, count, index, mine, theirs,
    q_row, q_head, q_token, k_row, k_head, k_token, v_row, v_head, v_token, s_row, s_head, s_token,
    dk_row, dk_head, dk_token, dv_row, dv_head, dv_token,
    heads, group, lists, blocks, length, scale, often, plain,
    SIZE: tl.constexpr, D: tl.constexpr, WIDE: tl.constexpr, LABELS: tl.constexpr, OFTEN: tl.constexpr,
):  # fmt: skip
    groups = heads // group
    row, own = tl.program_id(0) // groups, tl.program_id(0) % groups
    block = _turn(tl.program_id(1), blocks)
    columns, inner = tl.arange(0, WIDE), tl.arange(0, SIZE)
    keys = block * SIZE + inner
    near = _tile(k, row, own, keys, columns, k_row, k_head, k_token, length, D)
    values = _tile(v, row, own, keys, columns, v_row, v_head, v_token, length, D)
    if LABELS:
        its = tl.load(theirs + row * length + keys, mask=keys < length, other=-3)
    to_k = tl.zeros([SIZE, WIDE], tl.float32)
    to_v = tl.zeros([SIZE, WIDE], tl.float32)
    for member in range(group):
        head = own * group + member
        listed = (head % lists) * blocks + block
        at = (row * heads + head) * length
        for i in range(tl.load(count + listed)):
            other = tl.load(index + listed * blocks + i)
            tokens = other * SIZE + inner
            inside = tokens < length
            queries = _tile(q, row, head, tokens, columns, q_row, q_head, q_token, length, D)
            s = tl.dot(near, tl.trans(queries)) * scale  # (keys, queries)
            if OFTEN:
                s += tl.where((block == 0) & (other > 0) & (other < blocks - 1), often, 0.0)
            p = tl.exp2(s - tl.load(top + at + tokens, mask=inside, other=float("inf"))[None, :])
            seen = (keys < length)[:, None]
            if LABELS:
                label = tl.load(mine + row * length + tokens, mask=inside, other=-2)
                seen = seen & (its[:, None] == label[None, :])
            p = tl.where(seen, p, 0.0)
            dy = _tile(slope, row, head, tokens, columns, s_row, s_head, s_token, length, D)
            to_v += tl.dot(p.to(dy.dtype), dy)
            dp = tl.dot(values, tl.trans(dy))
            ds = p * (dp - tl.load(share + at + tokens, mask=inside, other=0.0)[None, :])
            to_k += tl.dot(ds.to(queries.dtype), queries)
    _put(dk, to_k * plain, row, own, keys, columns, dk_row, dk_head, dk_token, length, D)
    _put(dv, to_v, row, own, keys, columns, dv_row, dv_head, dv_token, length, D)


@triton.jit
def _to_queries(  # type: ignore[no-untyped-def]
    q, k, v, slope, top, share, dq, count, index, mine, theirs,
    q_row, q_head, q_token, k_row, k_head, k_token, v_row, v_head, v_token, s_row, s_head, s_token,
    dq_row, dq_head, dq_token,
    heads, group, lists, blocks, length, scale, often, plain,
    SIZE: tl.constexpr, D: tl.constexpr, WIDE: tl.constexpr, LABELS: tl.constexpr, OFTEN: tl.constexpr,
):  # fmt: skip
    row, head = tl.program_id(0) // heads, tl.program_id(0) % heads
    block = _turn(tl.program_id(1), blocks)
    columns, inner = tl.arange(0, WIDE), tl.arange(0, SIZE)
    tokens = block * SIZE + inner
    inside = tokens < length
    queries = _tile(q, row, head, tokens, columns, q_row, q_head, q_token, length, D)
    dy = _tile(slope, row, head, tokens, columns, s_row, s_head, s_token, length, D)
    logs = tl.load(top + tl.program_id(0) * length + tokens, mask=inside, other=float("inf"))
    part = tl.load(share + tl.program_id(0) * length + tokens, mask=inside, other=0.0)
    if LABELS:
        label = tl.load(mine + row * length + tokens, mask=inside, other=-2)
    to_q = tl.zeros([SIZE, WIDE], tl.float32)
    listed = (head % lists) * blocks + block
    for i in range(tl.load(count + listed)):
        other = tl.load(index + listed * blocks + i)
        keys = other * SIZE + inner
        near = _tile(k, row, head // group, keys, columns, k_row, k_head, k_token, length, D)
        s = tl.dot(queries, tl.trans(near)) * scale
        if OFTEN:
            s += tl.where((other == 0) & (block > 0) & (block < blocks - 1), often, 0.0)
        p = tl.exp2(s - logs[:, None])
        seen = (keys < length)[None, :]
        if LABELS:
            its = tl.load(theirs + row * length + keys, mask=keys < length, other=-3)
            seen = seen & (label[:, None] == its[None, :])
        p = tl.where(seen, p, 0.0)
        values = _tile(v, row, head // group, keys, columns, v_row, v_head, v_token, length, D)
        ds = p * (tl.dot(dy, tl.trans(values)) - part[:, None])
        to_q += tl.dot(ds.to(near.dtype), near)
    _put(dq, to_q * plain, row, head, tokens, columns, dq_row, dq_head, dq_token, length, D)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lists: tuple[Tensor, Tensor, Tensor, Tensor],
    labels: tuple[Tensor, Tensor] | None,
    size: int,
    scale: float,
    often: float,
) -> Tensor:
    """q (B, H, T, D), k and v (B, G, T, D) -> (B, H, T, D).

    lists: how many blocks of keys each block of queries sees (H|1, N) and which (H|1, N, N), then the same with queries
    and keys changed; int32. labels: int32 (B, T) of queries and of keys, not negative for queries that see anything.
    often: added to the scores of the first block, but for the queries of both ends.
    """
    mine, theirs = (None, None) if labels is None else labels
    y: Tensor = torch.ops.xt.attend_blocks(q, k, v, *lists, mine, theirs, size, scale, often)[0]
    return y


@torch.library.custom_op("xt::attend_blocks", mutates_args=())
def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    count: Tensor,
    index: Tensor,
    q_count: Tensor,
    q_index: Tensor,
    mine: Tensor | None,
    theirs: Tensor | None,
    size: int,
    scale: float,
    often: float,
) -> tuple[Tensor, Tensor]:
    q, k, v = (_even(x) for x in (q, k, v))
    out, top = torch.empty_like(q), q.new_empty(q.shape[:3], dtype=torch.float32)
    grid, sizes, options = _launch(q, k, count, mine, size)
    _forward[grid](
        q, k, v, out, top, count, index, mine, theirs,
        *_strides(q, k, v, out), *sizes, scale * LOG2E, often * LOG2E, OFTEN=often != 0.0, **options,
    )  # fmt: skip
    return out, top


@_attend.register_fake
def _(q: Tensor, *more: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(_even(q)), q.new_empty(q.shape[:3], dtype=torch.float32)


@torch.library.custom_op("xt::attend_blocks_back", mutates_args=())
def _back(
    slope: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    top: Tensor,
    count: Tensor,
    index: Tensor,
    q_count: Tensor,
    q_index: Tensor,
    mine: Tensor | None,
    theirs: Tensor | None,
    size: int,
    scale: float,
    often: float,
) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v, slope = (_even(x) for x in (q, k, v, slope))
    share = torch.empty_like(top)
    dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))
    grid, sizes, options = _launch(q, k, count, mine, size)
    shape = {name: options[name] for name in ("SIZE", "D", "WIDE")}
    _shares[grid](out, slope, share, *_strides(out, slope), sizes[0], sizes[-1], **shape)
    given, options = (scale * LOG2E, often * LOG2E, scale), options | {"OFTEN": often != 0.0}
    _to_keys[(k.shape[0] * k.shape[1], grid[1])](
        q, k, v, slope, top, share, dk, dv, q_count, q_index, mine, theirs,
        *_strides(q, k, v, slope, dk, dv), *sizes, *given, **options,
    )  # fmt: skip
    _to_queries[grid](
        q, k, v, slope, top, share, dq, count, index, mine, theirs,
        *_strides(q, k, v, slope, dq), *sizes, *given, **options,
    )  # fmt: skip
    return dq, dk, dv


@_back.register_fake
def _(slope: Tensor, q: Tensor, k: Tensor, v: Tensor, *more: Any) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = (torch.empty_like(_even(x)) for x in (q, k, v))
    return dq, dk, dv


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, count, index, q_count, q_index, mine, theirs, *ctx.numbers = inputs
    ctx.save_for_backward(q, k, v, *output, count, index, q_count, q_index, mine, theirs)


def _slopes(ctx: Any, slope: Tensor, _: Any) -> tuple[Any, ...]:
    return *torch.ops.xt.attend_blocks_back(slope, *ctx.saved_tensors, *ctx.numbers), *(None,) * 9


_attend.register_autograd(_slopes, setup_context=_keep)


def _even(x: Tensor) -> Tensor:
    """Heads whose numbers lie side by side."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _strides(*tensors: Tensor) -> tuple[int, ...]:
    return tuple(step for x in tensors for step in x.stride()[:3])


def _launch(q: Tensor, k: Tensor, count: Tensor, mine: Tensor | None, size: int) -> tuple[Any, Any, dict[str, Any]]:
    """Programs, sizes and constants that the kernels share."""
    rows, heads, length, width = q.shape
    grid = (rows * heads, count.shape[1])
    sizes = (heads, heads // k.shape[1], count.shape[0], count.shape[1], length)
    shape = {"SIZE": size, "D": width, "WIDE": max(triton.next_power_of_2(width), 16)}
    return grid, sizes, shape | {"LABELS": mine is not None, "num_warps": 8 if size > 64 else 4, "num_stages": 2}
