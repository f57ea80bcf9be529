"""Attention of blocks of queries to few keys each, so that time and memory grow with the length and not its square.

    blocks   T places = N blocks of C; block n of the queries sees K keys, gathered for it
    window   C >= radius: what lies within `radius` of a block is in the blocks before, at and after it, K = 3 C
    strands  a window with dilation d is one without in each of the d strands of every d-th place

Blocks are handed to the ordinary kernels as rows of a batch or as heads, `SLAB` scores at a time; with gradients each
slab is computed again on the way back, so that the scores of one are held and not those of the text. A text that its
window nearly spans is one dense block.

Axes: B rows, H query heads, G key/value heads, T places, D head width, N blocks, C queries and K keys of a block,
E keys that every block sees besides.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from xtcli.parts import blockmasks, routes
from xtcli.parts.blockmasks import Blocks
from xtcli.parts.context import Ctx, Visible
from xtcli.parts.linear import narrowed, widen
from xtcli.parts.windows import Near

SLAB = {"cpu": 2**22}
"""Scores that are computed at once, by device: on a CPU what its caches hold, elsewhere WIDE."""

WIDE = 2**26

EVEN = 16
"""What the sizes of large blocks are multiples of."""

Kernel = Callable[[Tensor, Tensor, Tensor, Visible], Tensor]
"""q (B, H, T, D), k and v (B, G, S, D) and what is visible -> (B, H, T, D)."""


@dataclass(frozen=True)
class Aside:
    """Keys that every block sees besides its own: k and v (B, G, E, D); `mask(start, stop)` is what the queries
    `start` to `stop` see of them, (B|1, H|1, queries, E), bool or additive. Where every `run` queries in a row see the
    same, `runs(start, stop)` is that for each run, (B|1, H, runs, E), additive."""

    k: Tensor
    v: Tensor
    mask: Callable[[int, int], Tensor]
    run: int = 0
    runs: Callable[[int, int], Tensor] | None = None


@dataclass(frozen=True)
class Band:
    """A window over one text. `seen` (B|1, N, C, K) and `bias` (1, H, C, K) or None; dense where `size` is 0: then
    N is 1, C and K are T."""

    seen: Tensor
    bias: Tensor | None = None
    size: int = 0
    dilation: int = 1

    def attend(
        self,
        kernel: Kernel,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        aside: Aside | None = None,
        scale: float = 1.0,
        dropout: float = 0.0,
    ) -> Tensor:
        """q (B, H, T, D), k and v (B, G, T, D) -> (B, H, T, D); `scale` and `dropout` are those of the kernel."""
        length, size = q.shape[2], self.size
        if not size:
            mask = self.mask(self.seen)[:, :, 0]
            if aside is not None:
                k, v = torch.cat((k, aside.k), 2), torch.cat((v, aside.v), 2)
                mask = beside(mask, aside.mask(0, length))
            return kernel(q, k, v, Visible(mask))
        q, k, v = (blocks(strands(x, self.dilation), size) for x in (q, k, v))
        k, v = neighbours(k), neighbours(v)
        rows = q.shape[0]
        more = None if aside is None else replace(aside, k=self.shared(aside.k), v=self.shared(aside.v))

        def step(first: int, last: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            mask = self.mask(tiled(self.seen[:, first:last], rows))
            if more is not None and more.runs is not None and self.bias is not None and size % more.run == 0:
                seen = more.runs(first * size, last * size)
                return jointly(q, k, v, mask, more, seen, scale, dropout)
            if more is not None:
                k, v = (torch.cat((x, spread(y, last - first)), 3) for x, y in ((k, more.k), (v, more.v)))
                mask = beside(mask, self.aside_mask(more, first, last, length, rows))
            return by_blocks(kernel, q, k, v, mask)

        extra = 0 if aside is None else aside.k.shape[2]
        y = in_slabs(step, q, k, v, rows * q.shape[1] * size * (3 * size + extra))
        return together(y.flatten(2, 3), self.dilation, length)

    def mask(self, seen: Tensor) -> Tensor:
        """Seen (B, N, C, K) and the bias as a mask, (B, H|1, N, C, K)."""
        seen = seen[:, None]
        return seen if self.bias is None else self.bias[:, :, None].masked_fill(~seen, float("-inf"))

    def shared(self, x: Tensor) -> Tensor:
        """Keys for all strands of a row: (B, G, E, D) -> (B dilation, G, E, D)."""
        return x if self.dilation == 1 else x.repeat_interleave(self.dilation, 0)

    def aside_mask(self, aside: Aside, first: int, last: int, length: int, rows: int) -> Tensor:
        """The mask of the keys aside for blocks `first` to `last` of each strand, (B|1, H|1, blocks, C, E)."""
        size, width = self.size, self.dilation
        start, stop = first * size * width, min(last * size * width, length)
        mask = aside.mask(start, stop)
        if mask.shape[2] == 1 and stop - start != 1:
            mask = mask.expand(-1, -1, stop - start, -1)
        short = last * size * width - stop
        mask = F.pad(mask, (0, 0, 0, short)) if short else mask
        whole = mask if width == 1 else mask.expand(rows // width, *mask.shape[1:])
        return strands(whole, width).unflatten(2, (last - first, size))  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Whole:
    """A window that the kernel keeps to by itself: the keys stand in their places, and those aside are among them."""

    blocks: Blocks

    def near(self, q: Tensor) -> Near | None:
        """The window with keys besides, where our kernel attends to both at once."""
        found = self.blocks.near(q.shape[-1], narrowed(q)[0].dtype)
        return found if found is not None and found.beside is not None else None

    def attend(
        self,
        kernel: Kernel,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        aside: Aside | None = None,
        scale: float = 1.0,
        dropout: float = 0.0,
    ) -> Tensor:
        """q (B, H, T, D), k and v (B, G, T, D) -> (B, H, T, D); what is `aside` is marked in the blocks."""
        return kernel(q, k, v, Visible(blocks=self.blocks))


def strands(x: Tensor, width: int) -> Tensor:
    """Every `width`-th place together: (B, H, T, D) -> (B width, H, T / width, D), T filled with zeros."""
    if width == 1:
        return x
    x = F.pad(x, (0, 0, 0, -x.shape[2] % width)).unflatten(2, (-1, width))
    return x.permute(0, 3, 1, 2, 4).flatten(0, 1)


def together(x: Tensor, width: int, length: int) -> Tensor:
    """The inverse of `strands`, cut to `length` places."""
    if width > 1:
        x = x.unflatten(0, (-1, width)).permute(0, 2, 3, 1, 4).flatten(2, 3)
    return x[:, :, :length]


def blocks(x: Tensor, size: int) -> Tensor:
    """(B, H, T, D) -> (B, H, N, size, D), filled with zeros."""
    return F.pad(x, (0, 0, 0, -x.shape[2] % size)).unflatten(2, (-1, size))  # type: ignore[no-any-return]


def neighbours(x: Tensor) -> Tensor:
    """Blocks (B, H, N, C, D) with the ones before and after them, (B, H, N, 3 C, D)."""
    padded = F.pad(x, (0, 0, 0, 0, 1, 1))
    return torch.cat((padded[:, :, :-2], x, padded[:, :, 2:]), 3)


def tiled(x: Tensor, rows: int) -> Tensor:
    """(R, ...) repeated to `rows` rows, of which R is a divisor."""
    return x.expand(rows, *x.shape[1:]) if x.shape[0] in (1, rows) else x.repeat(rows // x.shape[0], 1, 1, 1)


def spread(x: Tensor, count: int) -> Tensor:
    """(B, G, E, D) for each of `count` blocks: (B, G, count, E, D)."""
    return x[:, :, None].expand(-1, -1, count, -1, -1)


def by_blocks(kernel: Kernel, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """q (B, H, N, C, D), k and v (B, G, N, K, D), mask (B|1, H|1, N, C|1, K) -> (B, H, N, C, D).

    A mask that differs by head is laid out with the blocks as heads, so that it is not copied; any other with the
    blocks as rows, so that it is not repeated.
    """
    rows, heads, count = q.shape[:3]
    if mask.shape[1] == 1:
        part = mask.expand(rows, -1, -1, -1, -1).transpose(1, 2).flatten(0, 1)
        q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (q, k, v))
        y: Tensor = kernel(q, k, v, Visible(part)).unflatten(0, (rows, count))
        return y.transpose(1, 2)
    if k.shape[1] != heads:
        k, v = (x.repeat_interleave(heads // x.shape[1], 1) for x in (k, v))
    q, k, v = (x.flatten(1, 2) for x in (q, k, v))
    y = kernel(q, k, v, Visible(mask.flatten(1, 2))).unflatten(1, (heads, count))
    return y


def beside(mask: Tensor, other: Tensor) -> Tensor:
    """Two masks over different keys as one; both become additive where one is."""
    if mask.dtype != other.dtype:
        kind = other.dtype if mask.dtype == torch.bool else mask.dtype
        mask, other = additive(mask, kind), additive(other, kind)
    shape = torch.broadcast_shapes(mask.shape[:-1], other.shape[:-1])
    return torch.cat((mask.expand(*shape, -1), other.expand(*shape, -1)), -1)


def jointly(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, aside: Aside, seen: Tensor, scale: float, dropout: float
) -> Tensor:
    """One softmax over the keys of each block and many keys aside, whose scores are never laid side by side.

    q (B, H, N, C, D), k and v (B, G, N, K, D), mask (B|1, H, N, C, K), seen (B|1, H, runs, E) -> (B, H, N, C, D).
    """
    heads, count, size = q.shape[1:4]
    k, v, other, values = (
        x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], 1) for x in (k, v, aside.k, aside.v)
    )
    q = q * scale
    # In place throughout: what the scores cost beyond their products is going through memory.
    near = widen(q @ k.transpose(-1, -2)).add_(mask)
    far = widen(q.flatten(2, 3) @ other.transpose(-1, -2))
    far = far.unflatten(2, (-1, aside.run)).add_(seen[:, :, :, None]).flatten(2, 3).unflatten(2, (count, size))
    top = torch.maximum(near.detach().amax(-1, keepdim=True), far.detach().amax(-1, keepdim=True))
    near, far = near.sub_(top).exp_(), far.sub_(top).exp_()
    total = near.sum(-1, keepdim=True) + far.sum(-1, keepdim=True)
    if dropout > 0:
        near, far = F.dropout(near, dropout), F.dropout(far, dropout)
    y = near.to(v.dtype) @ v + (far.flatten(2, 3).to(v.dtype) @ values).unflatten(2, (count, size))
    weighed: Tensor = y / total
    return weighed.to(v.dtype)


def additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask as numbers to add to scores."""
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, float("-inf"))


def in_slabs(
    step: Callable[[int, int, Tensor, Tensor, Tensor], Tensor], q: Tensor, k: Tensor, v: Tensor, scores: int
) -> Tensor:
    """`step(first, last, q, k, v)` for slabs of the N blocks of q (B, H, N, C, D), k and v (B, G, N, K, D); it gives
    (B, H, blocks, C, D). All of them: (B, H, N, C, D). `scores` are those of one block of all rows."""
    count = max(SLAB.get(q.device.type, WIDE) // scores, 1)
    several = count < q.shape[2]
    again = several and torch.is_grad_enabled()
    done, first = [], 0
    for parts in zip(*(x.split(count, 2) for x in (q, k, v)), strict=True):
        last = first + parts[0].shape[2]
        y = checkpoint(step, first, last, *parts, use_reentrant=False) if again else step(first, last, *parts)
        done.append(y)
        first = last
    return torch.cat(done, 2) if several else done[0]


class WindowLayout(nn.Module):
    """The window of some layers over the text of a call; `bias` is the number of the stack's bias, if any. `free`: no
    weights are dropped, so that the kernel may keep to the window by itself. `width` is that of a head."""

    def __init__(self, radius: int, dilation: int, bias: int | None, free: bool, width: int) -> None:
        super().__init__()
        self.radius, self.dilation, self.bias, self.width = radius, dilation, bias, width
        self.free = free and bias is None

    def lay(self, x: Tensor, ctx: Ctx, biases: Any) -> Band | Whole:
        """The band for queries x (B, T, dim)."""
        if self.free and routes.suits(x):
            return self.whole(x, ctx, None)
        return self.band(x, ctx, biases, ctx.keep)

    def whole(self, x: Tensor, ctx: Ctx, marked: Tensor | None, beside: tuple[Tensor, Tensor] | None = None) -> Whole:
        """The window and the keys that are `marked` (B, T), whose places and who sees them are `beside`, for the
        kernel. Padding sees what it may: its output is not used."""
        real, documents = (None if y is None else y.expand(x.shape[0], -1) for y in (ctx.keep, ctx.documents))
        ctx = replace(ctx, documents=documents)
        return Whole(blockmasks.around(self.radius, self.dilation, marked, real, ctx, self.width, beside))

    def band(self, x: Tensor, ctx: Ctx, biases: Any, keys: Tensor | None) -> Band:
        """The band whose windows hold the keys (B, T) that are True, all of them without."""
        length, radius, width = x.shape[1], self.radius, self.dilation
        dense = length <= 3 * radius * width
        # Blocks of round sizes are handled faster, and the window has room in its neighbours all the same.
        size = length if dense else radius + -radius % (EVEN if radius >= EVEN else 1)
        bias = None
        if self.bias is not None:
            before, span = (0, size) if dense else (size, 3 * size)
            bias = by_distance(biases[self.bias], before, size, span, x)
        if dense:
            slots = torch.arange(length, device=x.device)
            step = slots[None, :] - slots[:, None]
            near = (step.abs() <= radius * width) & (step % width == 0)
            return Band(self.apart(near[None, None], keys, ctx.documents, whole=True), bias, 0, width)
        steps = torch.arange(3 * size, device=x.device)[None, :] - size - torch.arange(size, device=x.device)[:, None]
        near = (steps.abs() <= radius)[None, None]
        real = keys
        if real is None:
            # A text's rows are strands where there are gaps: as many as those of documents beside it.
            rows = 1 if ctx.documents is None else ctx.documents.shape[0]
            real = torch.ones(rows, length, dtype=torch.bool, device=x.device)
        return Band(self.apart(near, real, ctx.documents, whole=False), bias, size, width)

    def apart(self, near: Tensor, keys: Tensor | None, documents: Tensor | None, whole: bool) -> Tensor:
        """What is near, real and of the same document: (B|1, N, C, K). A query that would see nothing sees itself."""
        size = near.shape[2]

        def own(x: Tensor) -> Tensor:
            return x[:, None] if whole else blocks(strands(x[:, None, :, None], self.dilation), size)[:, 0, :, :, 0]

        def around(x: Tensor) -> Tensor:
            if whole:
                return x[:, None]
            return neighbours(blocks(strands(x[:, None, :, None], self.dilation), size))[:, 0, :, :, 0]

        seen = near
        if keys is not None:
            seen = seen & around(keys.float()).bool()[:, :, None, :]
        if documents is not None:
            # The fill of a last block has number 0, and no document may have it.
            numbers = documents + 2
            seen = seen & (own(numbers)[..., None] == around(numbers)[:, :, None, :])
        if keys is not None:
            itself = torch.zeros_like(near)
            itself.diagonal(0 if whole else size, 2, 3).fill_(True)
            seen = seen | (~seen.any(-1, keepdim=True) & itself)
        return seen


def by_distance(bias: Any, before: int, queries: int, span: int, x: Tensor) -> Tensor:
    """What a position adds for `queries` of `span` slots, the first of them at `before`: (1, H, queries, span)."""
    slots = torch.arange(span, device=x.device)[None]
    ctx = Ctx(positions=slots[:, before : before + queries], keys=slots, offset=before)
    scores: Tensor = bias.scores(ctx, queries)
    return scores.to(x.dtype)
