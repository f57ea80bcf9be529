"""Multi-head attention, grouped or not, over itself or over an encoder's memory.

    y = o(softmax(q k^T * scale + positions + mask) v)     Vaswani et al. 2017, arXiv:1706.03762
    key/value head j serves query heads j g ... (j + 1) g - 1, g = heads / kv_heads (arXiv:2305.13245)

How q and k turn, which mask applies and which kernel runs is settled when the module is built; the
forward is one straight line. Its order is the one in which the options compose:

    input positions, projections, heads, norms, rotation, cache, persistent keys, scores (scores.py), output (outs.py)

Axes as in context.py.
"""

from __future__ import annotations

from functools import partial
from typing import Any, Self

import torch
from torch import Tensor, nn

from xtcli import registry
from xtcli.parts import masks, norms, positions
from xtcli.parts.context import Ctx, KeyValues, Memory, MemoryKeyValues, Newest, Visible
from xtcli.parts.kernels import add_keys, add_scores, fused, plain
from xtcli.parts.linear import Draw, Linear
from xtcli.parts.masks import MaskSlot
from xtcli.parts.norms import NormSlot, make_norm
from xtcli.parts.outs import OutSlot, PlainOut
from xtcli.parts.positions import PositionSlot
from xtcli.parts.recurrence import joined
from xtcli.parts.rotary import TURNS
from xtcli.parts.scope import Impossible, Scope
from xtcli.parts.scores import ScoreSlot, Sizes, Softmax
from xtcli.parts.slides import WIDTHS
from xtcli.registry import Config, field, part, part_of


class Persistent(nn.Module):
    """Keys and values that belong to the layer and that every query sees (Sukhbaatar et al. 2019, arXiv:1907.01470).

    They stand on the left of the others, without positions, and take part in whatever the scores go through.
    """

    def __init__(self, groups: int, count: int, head_dim: int) -> None:
        super().__init__()
        self.k = nn.Parameter(torch.empty(groups, count, head_dim))
        self.v = nn.Parameter(torch.empty(groups, count, head_dim))

    def draw(self, normal: Draw) -> None:
        normal(self.k, 1.0)
        normal(self.v, 1.0)

    def join(self, k: Tensor, v: Tensor, norm: nn.Module) -> tuple[Tensor, Tensor]:
        """Keys (normed as the others are) and values (B, G, S, D) -> (B, G, N + S, D)."""
        first = norm(self.k).to(k.dtype)[None].expand(k.shape[0], -1, -1, -1)
        second = self.v.to(v.dtype)[None].expand(v.shape[0], -1, -1, -1)
        return torch.cat((first, k), dim=2), torch.cat((second, v), dim=2)


class Heads(nn.Module):
    """What self- and cross-attention share: projections, sizes, scores, output.

    `honours` names the options that a kind lets act; one that does not come to its weights through `attend` leaves
    out what it cannot do, and a config that asks for it is refused. One that has no scores of all queries and keys at
    once says that it `carries` none.
    """

    reads_memory = False
    carries = True
    honours: tuple[str, ...] = ("score", "memory", "out")

    class Config(registry.Config):
        """Sizes and scores of attention."""

        heads: int = field("query heads", gt=0, tiny=4, example=4)
        kv_heads: int | None = field("key/value heads; null = heads", None, gt=0)
        head_dim: int | None = field("width of a head; null = dim / heads", None, gt=0, tiny=16)
        bias: bool = field("adds biases to q, k and v", True)
        out_bias: bool | None = field("adds a bias to the output projection; null = as bias", None)
        scale: float | None = field("multiplies q k; null = 1 / sqrt(head_dim)", None, gt=0)
        scale_by_depth: bool = field("divides the scores by the number of the layer, from 1", False)
        qk_norm: NormSlot = field("norm of each query and key head", norms.NONE)
        score: ScoreSlot = field("scores to weights", Softmax.Config())
        memory: int | None = field("learned keys and values that every query sees", None, gt=0, tiny=4)
        out: OutSlot = field("output projection", PlainOut.Config())
        dropout: float | None = field("dropout of the weights; null = model.dropout", None, ge=0, lt=1)

        def tiny(self) -> Self:
            """At most 4 heads that keep the grouping (one to one, one for all, or between)."""
            heads = min(self.heads, 4)
            kv = self.kv_heads or self.heads
            grouped = heads if kv == self.heads else 1 if kv == 1 or heads < 4 else 2
            return self.model_copy(
                update={
                    "heads": heads,
                    "kv_heads": None if self.kv_heads is None else grouped,
                    "head_dim": None if self.head_dim is None else min(self.head_dim, 16),
                }
            )

    def __init__(self, config: Config, scope: Scope, source: int) -> None:
        super().__init__()
        for name, default in (("score", Softmax.Config()), ("memory", None), ("out", PlainOut.Config())):
            if name not in self.honours and getattr(config, name) != default:
                raise Impossible(name, f"'{config.kind}' makes its weights in a way of its own", f"leave {name} out")
        if config.head_dim is None and scope.dim % config.heads:
            near = [n for n in range(1, scope.dim + 1) if scope.dim % n == 0]
            best = sorted(sorted(near, key=lambda n: abs(n - config.heads))[:3])
            raise Impossible(
                "heads",
                f"{config.heads} heads do not divide dim {scope.dim}",
                f"use {best[0]}, {best[1]} or {best[2]} heads, or state head_dim"
                if len(best) == 3
                else "state head_dim",
            )
        self.heads, self.groups = config.heads, config.kv_heads or config.heads
        if self.heads % self.groups:
            divisors = [str(n) for n in range(1, self.heads + 1) if self.heads % n == 0]
            raise Impossible(
                "kv_heads", f"{self.groups} kv_heads do not divide {self.heads} heads", f"use {' or '.join(divisors)}"
            )
        self.head_dim = config.head_dim or scope.dim // config.heads
        scale = self.head_dim**-0.5 if config.scale is None else config.scale
        self.scale = scale / (scope.layer + 1) if config.scale_by_depth else scale
        self.rate = scope.dropout if config.dropout is None else config.dropout
        wide, narrow = self.heads * self.head_dim, self.groups * self.head_dim
        self.q = Linear(scope.dim, wide, config.bias, "query")
        self.k = Linear(source, narrow, config.bias)
        self.v = Linear(source, narrow, config.bias)
        self.o = scope.make("out", config.out, wide, config.bias if config.out_bias is None else config.out_bias)
        self.out_reads_input: bool = part_of(config.out).reads_input
        self.q_norm = make_norm(scope, "qk_norm", config.qk_norm, dim=self.head_dim)
        self.k_norm = make_norm(scope, "qk_norm", config.qk_norm, dim=self.head_dim)
        self.memory = None if config.memory is None else Persistent(self.groups, config.memory, self.head_dim)
        sizes = Sizes(self.heads, config.memory or 0, self.reads_memory, self.carries)
        self.score = scope.make("score", config.score, sizes)
        self.fused: bool = getattr(self.score, "fused", False)

    def split(self, x: Tensor, heads: int) -> Tensor:
        """(B, T, heads D) -> (B, heads, T, D)."""
        heads_apart: Tensor = x.unflatten(-1, (heads, self.head_dim))
        return heads_apart.transpose(1, 2)

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, visible: Visible, x: Tensor | None = None, ctx: Ctx | None = None
    ) -> Tensor:
        """(B, H, T, D) and keys, values (B, G, S, D) -> (B, T, dim); x (B, T, dim) is the sublayer's input."""
        if self.memory is not None:
            visible = add_keys(visible, self.memory.k.shape[1], q)
            k, v = self.memory.join(k, v, self.k_norm)
        dropout = self.rate if self.training else 0.0
        if self.fused:
            y = fused(q, k, v, visible, self.scale, dropout)
        else:
            y = plain(q, k, v, visible, self.scale, dropout, self.score, ctx)
        y = y.transpose(1, 2).flatten(-2)
        return self.o(y, x) if self.out_reads_input else self.o(y)  # type: ignore[no-any-return]

    def extra_repr(self) -> str:
        return f"heads={self.heads}, kv_heads={self.groups}, head_dim={self.head_dim}, scale={self.scale:.4g}"


@part("mixer", "attention")
class Attention(Heads):
    """Self-attention with a key/value cache for its state."""

    class Config(Heads.Config):
        """Self-attention."""

        mask: MaskSlot = field("which keys a query sees", masks.INHERIT)
        position: PositionSlot = field("how attention knows places", positions.INHERIT)

    def __init__(self, config: Config, scope: Scope) -> None:
        super().__init__(config, scope, scope.dim)
        self.recurs = scope.recurrence is not None
        self.reach: int | None = None
        shared = scope.shared
        if shared is None:
            raise AssertionError("attention is built inside a stack")
        position = (scope.position or positions.NONE) if config.position.kind == "inherit" else config.position
        ways = positions.spread(position)
        for reach, members in ways.items():
            if len(members) > 1 and reach in ("turn", "input"):
                raise Impossible("position", f"{len(members)} positions of kind '{members[0].kind}'", "state one")
            for member in members:
                self.scale *= getattr(part_of(member), "share", 1.0)
        self.turn_keys = self.turn_queries = self.place = _unturned
        self.store_turned = True
        self.rotation: tuple[int, str] | None = None  # which of the stack's, and its layout
        for member in ways.get("turn", ()):
            number = shared.turn(member, scope, self.head_dim)
            self.rotation = (number, member.layout)  # type: ignore[attr-defined]
            self.store_turned = getattr(shared.turns[number], "static", True)
            turn = TURNS[member.layout]  # type: ignore[attr-defined]
            self.turn_queries = partial(_turn_queries, turn=turn, number=number)
            self.turn_keys = partial(_turn_keys, turn=turn, number=number)
        for member in ways.get("input", ()):
            self.place = scope.make("position", member)
        added = positions.joined(ways.get("bias", ()))
        bias = None if added is None else shared.bias(added, scope.at("", head_dim=self.head_dim), self.heads)
        added = positions.joined(ways.get("relative", ()))
        if added is not None and "turn" in ways:
            cause = (
                f"'{added.kind}' would multiply queries that are turned already, so that places count, not distances"
            )
            raise Impossible("position", cause, "use t5 or alibi beside a rotation, or one of both alone")
        self.relative = None if added is None else scope.make("position", added, self.head_dim, heads=self.heads)
        self.look(config, scope, bias)

    def look(self, config: Any, scope: Scope, bias: int | None) -> None:
        """Settle which keys are seen; `bias` is the number of what positions add to the scores."""
        rule = masks.settled(config.mask, scope.causal)
        if scope.causal and masks.ahead(rule):
            cause = f"'{rule.kind}' shows keys behind the query, which a decoder is to predict"
            raise Impossible("mask", cause, "use {kind: all, of: [causal, ...]}, or an encoder")
        self.aligned = masks.aligned(rule)
        by_pair = bias is None or getattr(scope.shared.biases[bias], "pairwise", False)
        row = bias is not None and hasattr(scope.shared.biases[bias], "row")
        sliding = row and self.untouched and isinstance(self.q_norm, norms.NoNorm) and self.turn_keys is _unturned
        sliding = sliding and self.groups == self.heads and self.head_dim in WIDTHS
        self.view: int = scope.shared.view(rule, bias, False, by_pair and self.unchanged, sliding)
        # Keys that are turned at use, or scored by their distance, must all be there; so must those in front of a text,
        # and those that another layer's scores are carried to.
        carried = any(hasattr(score, "chain") for score in self.score.modules())
        bounded = self.store_turned and self.relative is None and not (self.recurs or scope.prefix or carried)
        self.reach = masks.reach(rule) if bounded else None

    def new_state(self, batch: int, capacity: int, device: Any, dtype: Any) -> KeyValues | Memory:
        """An empty cache for `capacity` tokens, or for those that a window looks back to."""
        if self.reach is not None and self.reach < capacity:
            return Newest.new(batch, self.groups, self.reach, self.head_dim, device, dtype)
        cache = KeyValues.new(batch, self.groups, capacity, self.head_dim, device, dtype)
        return Memory(cache=cache) if self.recurs else cache

    @property
    def untouched(self) -> bool:
        """Whether `kernels.fused` is handed the mask as the stack made it."""
        usual = type(self).forward is Attention.forward and type(self).attend is Heads.attend
        return usual and self.fused and self.relative is None and self.memory is None

    @property
    def unchanged(self) -> bool:
        """The same, and no dropout."""
        return self.untouched and self.rate == 0.0

    @property
    def reads_one(self) -> bool:
        """Whether queries, keys and values are all made of the sublayer's input as it is."""
        usual = type(self).forward is Attention.forward and type(self).project is Attention.project
        return usual and self.place is _unturned and not self.recurs

    def project(self, x: Tensor, ctx: Ctx) -> tuple[Tensor, Tensor, Tensor, Ctx]:
        """Queries (B, T, H D), keys and values (B, M + T, G D) behind those of a memory; the mixer's own context."""
        placed = self.place(x, ctx)
        q = self.q(placed)
        source, ctx = joined(x, ctx)
        if source is not x:
            placed = self.place(source, ctx.own_places())
        return q, self.k(placed), self.v(source), ctx

    def prepare(self, x: Tensor, ctx: Ctx) -> tuple[Tensor, Tensor, Tensor, Ctx]:
        """Queries (B, H, T, D), all keys and values (B, G, S, D) as they are attended; the mixer's own context."""
        q, k, v, ctx = self.project(x, ctx)
        q = self.turn_queries(self.q_norm(self.split(q, self.heads)), ctx)
        k = self.k_norm(self.split(k, self.groups))
        v = self.split(v, self.groups)
        return q, *self.recall(k, v, ctx), ctx

    def forward(self, x: Tensor, ctx: Ctx) -> Tensor:
        """x (B, T, dim) -> (B, T, dim)."""
        q, k, v, ctx = self.prepare(x, ctx)
        visible = newest(ctx.visible[self.view], k.shape[2])
        if self.relative is not None:
            visible = add_scores(visible, self.relative.scores(q, k, ctx))  # type: ignore[operator]
        return self.attend(q, k, v, visible, x, ctx)

    def recall(self, k: Tensor, v: Tensor, ctx: Ctx) -> tuple[Tensor, Tensor]:
        """New keys and values joined to the cached ones, all turned: (B, G, S, D)."""
        if ctx.state is None:
            return self.turn_keys(k, ctx), v
        if self.store_turned:
            k = self.turn_keys(k, ctx)
        k, v = ctx.state.append(k, v, ctx.keys.shape[1] - k.shape[2])
        return (k if self.store_turned else self.turn_keys(k, ctx)), v


@part("mixer", "cross-attention")
class CrossAttention(Heads):
    """Attention over the encoder's memory; no positions, no causal mask, every real key visible."""

    reads_memory = True

    class Config(Heads.Config):
        """Attention over the encoder's memory."""

        required: bool = field("refuses to run without a memory; false: is passed over then", False)

    def __init__(self, config: Config, scope: Scope) -> None:
        if scope.memory is None:
            raise Impossible("", "cross-attention needs an encoder's memory", "use it in a decoder that has one")
        super().__init__(config, scope, scope.memory)
        self.required = config.required

    def new_state(self, batch: int, capacity: int, device: Any, dtype: Any) -> MemoryKeyValues:
        """Keys and values of the memory, made at the first step."""
        return MemoryKeyValues()

    def forward(self, x: Tensor, ctx: Ctx) -> Tensor:
        """x (B, T, dim), ctx.memory (B, M, D_m) -> (B, T, dim)."""
        q = self.q_norm(self.split(self.q(x), self.heads))
        k, v = self.recall(ctx)
        return self.attend(q, k, v, ctx.memory_visible, x, ctx)

    def recall(self, ctx: Ctx) -> tuple[Tensor, Tensor]:
        """Keys and values of the memory: (B, G, M, D)."""
        state: MemoryKeyValues | None = ctx.state
        if state is not None and state.k is not None and state.v is not None:
            return state.k, state.v
        k = self.k_norm(self.split(self.k(ctx.memory), self.groups))
        v = self.split(self.v(ctx.memory), self.groups)
        if state is not None:
            state.k, state.v = k, v
        return k, v


def newest(visible: Visible, keys: int) -> Visible:
    """The mask over the last `keys` slots, which are all that a cache holds."""
    if visible.mask is None or visible.mask.shape[-1] <= keys:
        return visible
    return Visible(visible.mask[..., -keys:])


def _unturned(x: Tensor, ctx: Ctx) -> Tensor:
    return x


def _turn_queries(x: Tensor, ctx: Ctx, *, turn: Any, number: int) -> Tensor:
    table = ctx.turns[number]
    return turn(x, table.cos, table.sin)  # type: ignore[no-any-return]


def _turn_keys(x: Tensor, ctx: Ctx, *, turn: Any, number: int) -> Tensor:
    table = ctx.turns[number]
    return turn(x, table.key_cos, table.key_sin)  # type: ignore[no-any-return]
