"""Attention inside chunks of the text and their neighbours: time and memory grow with the length.

    query i sees key j where  chunk(i) - before <= chunk(j) <= chunk(i) + after     Kitaev et al. 2020, arXiv:2001.04451

chunk(i) = i // C. Neighbours are counted in a circle: in an encoder the first chunk sees the last one, and where
there are fewer chunks than neighbours a chunk is seen more than once. A text is filled up to a multiple of all chunk
lengths in the stack; one no longer than the shortest of them is seen whole.

Axes: B rows, H query heads, G key/value heads, T tokens, L tokens with the filling, N chunks, C tokens of a chunk,
W = (before + 1 + after) C keys that a chunk sees, D head width.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from xtcli import registry
from xtcli.parts import masks
from xtcli.parts.attention import Heads
from xtcli.parts.context import Ctx, KeyValues, Visible
from xtcli.parts.scope import Impossible, Scope
from xtcli.registry import Config, field, part


@part("mask", "chunks")
class Chunks(masks.Mask):
    """The chunk of the query and its neighbours, without the circle."""

    aligned = True

    class Config(registry.Config):
        """Keys in the query's chunk, `before` chunks in front of it and `after` behind it."""

        chunk: int = field("slots of a chunk", gt=0, tiny=16, example=4)
        before: int = field("chunks in front that are seen", 1, ge=0)
        after: int = field("chunks behind that are seen", 0, ge=0)

    @staticmethod
    def allowed(rule: Any, q: Tensor, k: Tensor) -> Tensor:
        step = k // rule.chunk - q // rule.chunk
        near: Tensor = (step >= -rule.before) & (step <= rule.after)
        return near

    @staticmethod
    def bounds(rule: Any, q: masks.Ends, k: masks.Ends) -> tuple[Tensor, Tensor]:
        (first, last), (begin, end) = ((slot // rule.chunk for slot in ends) for ends in (q, k))
        return masks.between(begin - last, end - first, -rule.before, rule.after)


SLAB = 2**22
"""Scores that are computed at once: more take memory anew at each step, and leave the processor's cache."""


def filled(length: int, chunks: Sequence[int]) -> int:
    """The length of a text with its filling, for the chunk lengths of a stack."""
    whole = math.lcm(*chunks)
    return length if length <= min(chunks) else -(-length // whole) * whole


def fill(x: Tensor, length: int, value: float = 0.0) -> Tensor:
    """(..., T, D) -> (..., length, D)."""
    return x if x.shape[-2] == length else F.pad(x, (0, 0, 0, length - x.shape[-2]), value=value)


def real(ctx: Ctx, batch: int, tokens: int, length: int) -> Tensor | None:
    """Which of `length` slots hold real tokens, (B, L); None where all do."""
    if ctx.keep is None and length == tokens:
        return None
    keep = ctx.keep
    if keep is None:
        keep = torch.ones(1, tokens, dtype=torch.bool, device=ctx.keys.device).expand(batch, -1)
    return F.pad(keep, (0, length - tokens), value=False)


def around(x: Tensor, before: int, after: int, axis: int, slab: int) -> Iterator[Tensor]:
    """Chunks along `axis`, `slab` at a time, with the tokens of their neighbours in a circle.

    (..., N, C, ...) -> (..., at most slab, W, ...).
    """
    count = x.shape[axis]
    # A neighbour that is a whole round away or more is the chunk itself.
    turned = [x if step == 0 or abs(step) >= count else x.roll(-step, axis) for step in range(-before, after + 1)]
    for pieces in zip(*(one.split(slab, axis) for one in turned), strict=True):
        yield torch.cat(pieces, axis + 1)


def slab_of(rows: int, scores: int) -> int:
    """How many chunks are computed at once, for `rows` rows and heads and `scores` scores of one chunk."""
    return max(SLAB // (rows * scores), 1)


class InChunks(nn.Module):
    """What attentions in chunks share. `static`: whether a token looks the same when more text follows; if not, up to
    `steady` tokens do. `aligned`: what a token sees depends on the slot it stands in."""

    aligned = True
    linear = True  # in the length: see bench/cases.py
    chunks: list[int]
    chunk: int

    @property
    def steady(self) -> int:
        """The longest text that is seen whole."""
        return min(self.chunks)

    def register(self, config: Any, scope: Scope) -> None:
        """Tell the stack the length of the chunks, and refuse positions that would be left out."""
        if scope.shared is None:
            raise AssertionError("attention is built inside a stack")
        position = getattr(scope.position, "kind", "none")
        if position != "none":
            raise Impossible("", f"attention in chunks has no place for '{position}' positions", "use embed.positions")
        scope.shared.chunks.append(config.chunk)
        self.chunks = scope.shared.chunks
        self.chunk, self.before, self.after = config.chunk, config.before, config.after
        near = Chunks.Config(chunk=config.chunk, before=config.before, after=config.after)
        self.causal = scope.causal
        self.rule: Config = masks.AllOf.Config(of=(masks.CAUSAL, near)) if scope.causal else near

    def refuse_more(self, ctx: Ctx, tokens: int) -> None:
        """Raise ValueError where a state cannot be gone on from."""
        if ctx.offset + tokens > self.steady:
            raise ValueError(
                f"beyond {self.steady} tokens earlier ones change as more follow: no state can be continued, "
                "read the whole text"
            )


@part("mixer", "chunked")
class Chunked(Heads, InChunks):
    """Attention inside chunks and their neighbours. Its slow twin is attention under the mask `chunks`."""

    honours = ("score", "memory", "out")

    class Config(Heads.Config):
        """Attention inside chunks of the text."""

        chunk: int = field("tokens of a chunk", 64, gt=0, tiny=16)
        before: int = field("chunks in front that are seen", 1, ge=0)
        after: int = field("chunks behind that are seen", 0, ge=0)

    def __init__(self, config: Config, scope: Scope) -> None:
        # Scores of chunks have no place among those that attentions of whole texts carry on: hence no `shared`.
        super().__init__(config, scope.at("", shared=None), scope.dim)
        self.register(config, scope)
        # Seen in a circle, more neighbours than one in front mean other chunks in a longer text.
        self.static = scope.causal and config.before <= 1 and config.after == 0
        self.sees = "" if self.static else "chunks are counted in a circle: the first and the last are neighbours"

    def new_state(self, batch: int, capacity: int, device: Any, dtype: Any) -> KeyValues:
        """An empty cache for `capacity` tokens."""
        return KeyValues.new(batch, self.groups, capacity, self.head_dim, device, dtype)

    def forward(self, x: Tensor, ctx: Ctx) -> Tensor:
        """x (B, T, dim) -> (B, T, dim)."""
        q = self.q_norm(self.split(self.q(x), self.heads))
        k, v = self.k_norm(self.split(self.k(x), self.groups)), self.split(self.v(x), self.groups)
        if ctx.state is not None:
            k, v = ctx.state.append(k, v, ctx.offset)
        return self.go_on(q, k, v, x, ctx) if ctx.offset else self.read(q, k, v, x, ctx)

    def read(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, ctx: Ctx) -> Tensor:
        """A whole text, chunk by chunk."""
        batch, tokens = x.shape[:2]
        length = filled(tokens, self.chunks)
        size, before, after = (self.chunk, self.before, self.after) if length > self.chunk else (length, 0, 0)

        def cut(y: Tensor) -> Tensor:
            """(B, H, T, D) -> (B, N, H, C, D)."""
            return fill(y, length).unflatten(2, (-1, size)).transpose(1, 2)  # type: ignore[no-any-return]

        slab = slab_of(batch * self.heads, size * size * (before + 1 + after))

        def near(y: Tensor) -> Iterator[Tensor]:
            """(B, N, C, ...) -> slabs of (B, N, W, ...)."""
            return around(y, before, after, 1, slab)

        def see() -> Iterator[Tensor | None]:
            """What each slab sees, (B|1, N, C|1, W)."""
            slots = torch.arange(length, device=x.device).view(1, -1, size)
            keep = real(ctx, batch, tokens, length)
            real_keys = None if keep is None else near(keep.view(batch, -1, size))
            places = None if ctx.documents is None else F.pad(ctx.documents, (0, length - tokens)).view(batch, -1, size)
            others = None if places is None else zip(places.split(slab, 1), near(places), strict=True)
            for q_slots, k_slots in zip(slots.split(slab, 1), near(slots), strict=True):
                queries, keys = q_slots[..., None], k_slots[..., None, :]
                seen = queries >= keys if self.causal else None
                if real_keys is not None:
                    own = next(real_keys)[..., None, :]
                    seen = own if seen is None else seen & own
                if others is not None:
                    mine, theirs = next(others)
                    own = mine[..., None] == theirs[..., None, :]
                    seen = own if seen is None else seen & own
                if keep is not None and seen is not None:
                    seen = seen | (~seen.any(-1, keepdim=True) & (queries == keys))
                yield seen

        found = []
        whole = fill(x, length).unflatten(1, (-1, size))
        sides = (near(cut(y).transpose(2, 3)) for y in (k, v))
        for q_, k_, v_, seen, x_ in zip(cut(q).split(slab, 1), *sides, see(), whole.split(slab, 1), strict=True):
            if seen is not None:
                seen = seen.expand(batch, -1, size, -1).flatten(0, 1)[:, None]  # (B N, 1, C, W)
            k_, v_ = (y.transpose(2, 3).flatten(0, 1) for y in (k_, v_))
            y = self.attend(q_.flatten(0, 1), k_, v_, Visible(seen), x_.flatten(0, 1), ctx)
            found.append(y.unflatten(0, (batch, -1)).flatten(1, 2))
        return torch.cat(found, 1)[:, :tokens]

    def go_on(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, ctx: Ctx) -> Tensor:
        """New tokens behind those in the state."""
        tokens = x.shape[1]
        if not self.static:
            self.refuse_more(ctx, tokens)
        first = max(ctx.offset // self.chunk - self.before, 0) * self.chunk
        slots = torch.arange(ctx.offset + tokens, device=x.device)
        queries, keys = slots[ctx.offset :, None], slots[None, first:]
        seen = masks.allowed(self.rule, queries, keys)[None, None]
        if ctx.keep is not None:
            seen = seen & ctx.keep[:, None, None, first:]
        if ctx.documents is not None:
            own = ctx.documents[:, None, ctx.offset : ctx.offset + tokens, None]
            seen = seen & (own == ctx.documents[:, None, None, first:])
        if ctx.keep is not None:
            seen = seen | (~seen.any(-1, keepdim=True) & (queries == keys))
        return self.attend(q, k[:, :, first:], v[:, :, first:], Visible(seen), x, ctx)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, chunk={self.chunk}, before={self.before}, after={self.after}"
