"""Masks by blocks, for the kernel that passes over blocks in which nobody sees anything (FlexAttention).

    some     blocks of pairs of which one may be seen: the pairs are asked one by one
    every    blocks of which all pairs are seen: nothing is asked

Both follow by arithmetic from what the ends of a block see, so that nothing the size of all pairs is made. `some` may
hold a block too many and `every` one too few: the pairs decide.

FlexAttention's kernel runs on a GPU alone; elsewhere, and in tests, `dense` gives the same as a stored mask. A mask
that is one window goes to a kernel of ours instead (windows.py) where that takes the heads.

Axes: B rows, H query heads, T tokens, N blocks of queries or keys.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

from xtcli.parts import masks, windows
from xtcli.parts.context import Ctx, Visible
from xtcli.parts.linear import narrowed
from xtcli.registry import Config

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

KERNEL = ("cuda",)
"""Devices that have the kernel."""

T = TypeVar("T")

SIZE = 128
"""Queries and keys of a block."""

TILES = {"BLOCK_M": 128, "BLOCK_N": 64}
"""The kernel's tiles forward where it looks things up: its usual ones then leave their registers, and it takes up to
sixteen times as long."""

ROWS = 1024
"""Queries that are asked at once whether they see anything."""

Pairs = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""Row, head, query slot, key slot -> whether it is seen."""

Scores = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
"""Score, row, head, query slot, key slot -> score."""


@dataclass(frozen=True)
class Blocks:
    """PyTorch's `BlockMask`, what is done to the scores of its pairs, whether either looks something up that is stored
    of each token, and the same mask as a window if it is one. Without `mask` the window is all there is."""

    mask: BlockMask | None
    scores: Scores | None = None
    looks: bool = False
    window: windows.Near | None = None

    def near(self, width: int, dtype: torch.dtype) -> windows.Near | None:
        """The window for our kernel, if it takes heads of this width."""
        fits = self.scores is None and self.window is not None and self.window.takes(width, dtype)
        return self.window if fits else None


def attend(q: Tensor, k: Tensor, v: Tensor, blocks: Blocks, scale: float) -> Tensor:
    """q (B, H, T, D), k and v (B, G, T, D) -> (B, H, T, D)."""
    q, k, v = narrowed(q, k, v)
    window = blocks.near(q.shape[-1], q.dtype)
    if window is not None:
        return window.attend(q, k, v, scale)
    if blocks.mask is None:
        raise AssertionError(f"a window alone, for heads of {q.shape[-1]} in {q.dtype}")
    if q.device.type not in KERNEL:
        seen = dense(blocks, q.dtype, q.shape[0], q.shape[1]).mask
        return F.scaled_dot_product_attention(q, k, v, seen, scale=scale, enable_gqa=k.shape[1] != q.shape[1])
    if torch.compiler.is_compiling():
        from torch.nn.attention.flex_attention import flex_attention as kernel
    else:
        kernel = _compiled()
    y: Tensor = kernel(
        q,
        k,
        v,
        score_mod=blocks.scores,
        block_mask=blocks.mask,
        scale=scale,
        enable_gqa=k.shape[1] != q.shape[1],
        kernel_options=TILES if blocks.looks and q.shape[-1] <= 128 else None,  # type: ignore[arg-type]
    )
    return y


@lru_cache(maxsize=1)
def _compiled() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    # One program for each shape and mask; past its limit the compiler would go on without the kernel.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 256)
    return torch.compile(flex_attention, dynamic=False, fullgraph=True)


def dense(blocks: Blocks, dtype: torch.dtype, rows: int, heads: int) -> Visible:
    """The same as a stored mask (B, H|1, T, T); additive, in `dtype`, where scores are changed."""
    mask = blocks.mask
    assert mask is not None, "who asks for a stored mask has lists of blocks"
    length, size = mask.seq_lengths[0], mask.BLOCK_SIZE[0]
    device = mask.kv_num_blocks.device
    row = torch.arange(rows, device=device)[:, None, None, None]
    head = torch.arange(heads, device=device)[:, None, None]
    q, k = torch.arange(length, device=device)[:, None], torch.arange(length, device=device)[None, :]
    seen = unlisted(mask.kv_num_blocks, mask.kv_indices, size, length) & mask.mask_mod(row, head, q, k)
    if mask.full_kv_num_blocks is not None and mask.full_kv_indices is not None:
        seen = seen | unlisted(mask.full_kv_num_blocks, mask.full_kv_indices, size, length)
    if blocks.scores is None:
        return Visible(seen)
    added = blocks.scores(torch.zeros((), dtype=dtype, device=device), row, head, q, k)
    return Visible(added.to(dtype).masked_fill(~seen, float("-inf")))


def of_rule(rule: Config, ctx: Ctx, rows: int) -> Blocks:
    """The mask of a rule over the texts of a call, their padding and documents: what `masks.render` stores."""
    length = ctx.keys.shape[1]
    if ctx.keep is None and ctx.documents is None:
        return lasting(_of_rule_alone(rule, length, ctx.keys.device))
    keep, documents = (None if x is None else x.expand(rows, -1) for x in (ctx.keep, ctx.documents))
    alone = None if keep is None else lonely(rule, keep, documents)
    near = windows.of_rule(rule, ctx.keys.device, labels(keep, documents), alone)
    return Blocks(_made(rule, length, ctx.keys.device, keep, documents, alone), looks=True, window=near)


_read: list[Any] = []


def lasting(found: T) -> T:
    """What was taken from a cache; for good, where a CUDA graph is being recorded, which will go on reading it."""
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        _read.append(found)
    return found


@lru_cache(maxsize=64)
def _of_rule_alone(rule: Config, length: int, device: torch.device) -> Blocks:
    near = windows.of_rule(rule, device, None, None)
    return Blocks(_made(rule, length, device, None, None, None), window=near)


def _made(
    rule: Config,
    length: int,
    device: torch.device,
    keep: Tensor | None,
    documents: Tensor | None,
    alone: Tensor | None,
) -> BlockMask:
    label = labels(keep, documents)

    def pairs(row: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        seen = masks.allowed(rule, q, k)
        if label is not None:
            seen = seen & (label[0][row, q] == label[1][row, k])
        return seen if alone is None else seen | (alone[row, q] & (q == k))

    some, every = bounds(rule, length, device)
    some, every = within(some, every, keep, documents)
    if alone is not None:
        some = some | torch.diag_embed(by_block(alone).any(-1))[:, None]
    return listed(some, every, length, pairs)


def labels(keep: Tensor | None, documents: Tensor | None) -> tuple[Tensor, Tensor] | None:
    """Labels of queries and of keys, int32, equal where a key is real and of the query's document; all (B, T). None
    where every key is seen."""
    if keep is None and documents is None:
        return None
    # Documents are numbered from -1 on.
    mine = torch.zeros_like(keep, dtype=torch.int32) if documents is None else (documents + 1).to(torch.int32)  # type: ignore[arg-type]
    theirs = mine if keep is None else torch.where(keep, mine, -1)
    return mine.contiguous(), theirs.contiguous()


def bounds(rule: Config, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """`some` and `every` of a rule alone, (1, 1, N, N)."""
    first = torch.arange(0, length, SIZE, device=device)
    last = (first + SIZE - 1).clamp(max=length - 1)
    some, every = masks.bounds(rule, (first[:, None], last[:, None]), (first[None, :], last[None, :]))
    return some[None, None], every[None, None]


def within(some: Tensor, every: Tensor, keep: Tensor | None, documents: Tensor | None) -> tuple[Tensor, Tensor]:
    """What is left of `some` and `every` (B|1, H|1, N, N) inside documents and of real keys (B, T)."""
    if documents is not None:
        numbers = by_block(documents)  # the fill repeats the last place
        low, high = numbers.amin(-1)[:, None], numbers.amax(-1)[:, None]
        some = some & (low[..., :, None] <= high[..., None, :]) & (low[..., None, :] <= high[..., :, None])
        one = (low == high)[..., :, None] & (low == high)[..., None, :]
        every = every & one & (low[..., :, None] == low[..., None, :])
    if keep is not None:
        real = by_block(keep)
        some = some & real.any(-1)[:, None, None, :]
        every = every & real.all(-1)[:, None, None, :]
    return some, every


def around(
    radius: int,
    dilation: int,
    marked: Tensor | None,
    keys: Tensor | None,
    ctx: Ctx,
    width: int,
    beside: tuple[Tensor, Tensor] | None = None,
) -> Blocks:
    """A window on both sides of a query and the keys that are `marked` (B, T), all among the real `keys` (B, T), for
    heads of this width. `beside` is what windows.py is to know of the marked ones; what marked queries find in the
    window does not count."""
    length, documents = ctx.keys.shape[1], ctx.documents
    rule = masks.Window.Config(left=radius * dilation, right=radius * dilation, dilation=dilation)
    if marked is None and keys is None and documents is None:
        return lasting(_of_rule_alone(rule, length, ctx.keys.device))

    few = beside is not None and beside[0].shape[1] <= windows.BESIDE
    if width in windows.WIDTHS and (marked is None or few):
        inside = keys if marked is None else ~marked if keys is None else keys & ~marked
        near = windows.of_rule(rule, ctx.keys.device, labels(inside, documents), None)
        if near is not None and marked is not None and near.labels is not None:
            near = replace(near, labels=(near.labels[0].masked_fill(marked, windows.NOTHING), near.labels[1]))
        if near is not None:
            return Blocks(None, window=replace(near, beside=beside))
    label = labels(keys, documents)

    def pairs(row: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        seen = masks.allowed(rule, q, k)
        if marked is not None:
            seen = seen | marked[row, k]
        return seen if label is None else seen & (label[0][row, q] == label[1][row, k])

    some, every = bounds(rule, length, ctx.keys.device)
    if marked is not None:
        known = by_block(marked)
        some, every = some | known.any(-1)[:, None, None], every | known.all(-1)[:, None, None]
    return Blocks(listed(*within(some, every, keys, documents), length, pairs), looks=True)


def by_block(x: Tensor) -> Tensor:
    """(B, T) -> (B, N, SIZE); the last place fills up the last block."""
    short = -x.shape[1] % SIZE
    if short:
        x = torch.cat((x, x[:, -1:].expand(-1, short)), 1)
    return x.unflatten(1, (-1, SIZE))  # type: ignore[no-any-return]


def lonely(rule: Config, keep: Tensor, documents: Tensor | None) -> Tensor:
    """Which queries see no real key (B, T), and therefore themselves."""
    length = keep.shape[1]
    slots = torch.arange(length, device=keep.device)
    stretch = masks.stretch(rule)
    if stretch is not None and documents is None:
        left, right = stretch
        upto = F.pad(keep.long().cumsum(1), (1, 0))  # real keys in front of each slot
        begin = torch.zeros_like(slots) if left is None else (slots - left).clamp(min=0)
        end = torch.full_like(slots, length) if right is None else (slots + right + 1).clamp(max=length)
        return upto[:, end] == upto[:, begin]
    found = []
    for part in slots.split(ROWS):
        seen = masks.allowed(rule, part[:, None], slots[None, :]) & keep[:, None, :]
        if documents is not None:
            seen = seen & (documents[:, part, None] == documents[:, None, :])
        found.append(~seen.any(-1))
    return torch.cat(found, 1)


def listed(some: Tensor, every: Tensor, length: int, pairs: Pairs) -> BlockMask:
    """The mask of blocks (B|1, 1, N, N) of a text of `length` tokens."""
    from torch.nn.attention.flex_attention import BlockMask

    # The kernel looks for the end of the text in blocks that it asks pair by pair alone.
    inside = torch.arange(every.shape[-1], device=every.device) < length // SIZE
    every = every & inside & inside[:, None]
    asked = some & ~every
    (count, index), (full_count, full_index) = ordered(asked), ordered(every)
    (q_count, q_index), (full_q_count, full_q_index) = (ordered(x.transpose(-1, -2)) for x in (asked, every))
    return BlockMask(
        seq_lengths=(length, length),
        kv_num_blocks=count,
        kv_indices=index,
        full_kv_num_blocks=full_count,
        full_kv_indices=full_index,
        q_num_blocks=q_count,
        q_indices=q_index,
        full_q_num_blocks=full_q_count,
        full_q_indices=full_q_index,
        BLOCK_SIZE=(SIZE, SIZE),
        mask_mod=pairs,
    )


def ordered(shown: Tensor) -> tuple[Tensor, Tensor]:
    """How many blocks of keys each block of queries sees, and their numbers before all others."""
    order = shown.to(torch.uint8).argsort(dim=-1, descending=True, stable=True)
    return shown.sum(-1, dtype=torch.int32), order.to(torch.int32).contiguous()


def unlisted(count: Tensor, order: Tensor, size: int, length: int) -> Tensor:
    """The inverse, for every pair: (B, H, T, T)."""
    listed_first = torch.arange(order.shape[-1], device=order.device) < count[..., None]
    shown = torch.zeros_like(listed_first).scatter(-1, order.long(), listed_first)
    pairs: Tensor = shown.repeat_interleave(size, -2).repeat_interleave(size, -1)
    return pairs[..., :length, :length]
