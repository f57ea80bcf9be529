"""Multi-head attention, grouped or not, over itself or over an encoder's memory.

    y = o(softmax(q k^T * scale + positions + mask) v)     Vaswani et al. 2017, arXiv:1706.03762
    key/value head j serves query heads j g ... (j + 1) g - 1, g = heads / kv_heads (arXiv:2305.13245)

How q and k turn, which mask applies and which kernel runs is settled when the module is built; the
forward is one straight line. Axes as in context.py.
"""

from __future__ import annotations

from functools import partial
from typing import Annotated, Any, Self

from torch import Tensor, nn

from xtcli import registry
from xtcli.parts import masks, norms, positions
from xtcli.parts.context import Ctx, KeyValues, MemoryKeyValues, Visible
from xtcli.parts.linear import Linear
from xtcli.parts.masks import MaskSlot
from xtcli.parts.norms import NormSlot, make_norm
from xtcli.parts.positions import PositionSlot
from xtcli.parts.rotary import TURNS
from xtcli.parts.scope import Impossible, Scope
from xtcli.parts.scores import Softmax, add_scores, fused, plain
from xtcli.registry import Config, Slot, field, part, part_of


class Heads(nn.Module):
    """What self- and cross-attention share: projections, sizes, the kernel."""

    reads_memory = False

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
        score: Annotated[Config, Slot("score")] = field("scores to weights", Softmax.Config())
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
        self.o = Linear(wide, scope.dim, config.bias if config.out_bias is None else config.out_bias, "output")
        self.q_norm = make_norm(scope, "qk_norm", config.qk_norm, dim=self.head_dim)
        self.k_norm = make_norm(scope, "qk_norm", config.qk_norm, dim=self.head_dim)
        score = part_of(config.score)
        self.fused: bool = score.fused
        self.kernel = fused if self.fused else partial(plain, kind=score, config=config.score)

    def split(self, x: Tensor, heads: int) -> Tensor:
        """(B, T, heads D) -> (B, heads, T, D)."""
        heads_apart: Tensor = x.unflatten(-1, (heads, self.head_dim))
        return heads_apart.transpose(1, 2)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, visible: Visible) -> Tensor:
        """(B, H, T, D) and keys, values -> (B, T, dim)."""
        dropout = self.rate if self.training else 0.0
        y = self.kernel(q, k, v, visible, self.scale, dropout)
        return self.o(y.transpose(1, 2).flatten(-2))  # type: ignore[no-any-return]

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
        shared = scope.shared
        if shared is None:
            raise AssertionError("attention is built inside a stack")
        rule = config.mask
        if rule.kind == "inherit":
            rule = masks.CAUSAL if scope.causal else masks.FULL
        position = (scope.position or positions.NONE) if config.position.kind == "inherit" else config.position
        kind = part_of(position)
        self.turn_keys = self.turn_queries = _unturned
        self.store_turned = True
        self.relative: nn.Module | None = None
        bias = None
        reach = kind.reach
        if reach == "turn":
            number = shared.turn(position, scope, self.head_dim)
            self.store_turned = getattr(shared.turns[number], "static", True)
            turn = TURNS[position.layout]  # type: ignore[attr-defined]
            self.turn_queries = partial(_turn_queries, turn=turn, number=number)
            self.turn_keys = partial(_turn_keys, turn=turn, number=number)
        elif reach == "bias":
            bias = shared.bias(position, scope, self.heads)
        elif reach == "relative":
            if self.groups != self.heads:
                raise Impossible("position", f"'{position.kind}' needs as many kv_heads as heads")
            self.relative = scope.make("position", position, self.head_dim)
        self.view = shared.view(rule, bias, False)

    def new_state(self, batch: int, capacity: int, device: Any, dtype: Any) -> KeyValues:
        """An empty cache for `capacity` tokens."""
        return KeyValues.new(batch, self.groups, capacity, self.head_dim, device, dtype)

    def forward(self, x: Tensor, ctx: Ctx) -> Tensor:
        """x (B, T, dim) -> (B, T, dim)."""
        q = self.turn_queries(self.q_norm(self.split(self.q(x), self.heads)), ctx)
        k = self.k_norm(self.split(self.k(x), self.groups))
        v = self.split(self.v(x), self.groups)
        k, v = self.recall(k, v, ctx)
        visible = ctx.visible[self.view]
        if self.relative is not None:
            visible = add_scores(visible, self.relative.scores(q, k, ctx))  # type: ignore[operator]
        return self.attend(q, k, v, visible)

    def recall(self, k: Tensor, v: Tensor, ctx: Ctx) -> tuple[Tensor, Tensor]:
        """New keys and values joined to the cached ones, all turned: (B, G, S, D)."""
        if ctx.state is None:
            return self.turn_keys(k, ctx), v
        if self.store_turned:
            return ctx.state.append(self.turn_keys(k, ctx), v, ctx.offset)  # type: ignore[no-any-return]
        k, v = ctx.state.append(k, v, ctx.offset)
        return self.turn_keys(k, ctx), v


@part("mixer", "cross-attention")
class CrossAttention(Heads):
    """Attention over the encoder's memory; no positions, no causal mask, every real key visible."""

    reads_memory = True

    class Config(Heads.Config):
        """Attention over the encoder's memory."""

    def __init__(self, config: Config, scope: Scope) -> None:
        if scope.memory is None:
            raise Impossible("", "cross-attention needs an encoder's memory", "use it in a decoder that has one")
        super().__init__(config, scope, scope.memory)

    def new_state(self, batch: int, capacity: int, device: Any, dtype: Any) -> MemoryKeyValues:
        """Keys and values of the memory, made at the first step."""
        return MemoryKeyValues()

    def forward(self, x: Tensor, ctx: Ctx) -> Tensor:
        """x (B, T, dim), ctx.memory (B, M, D_m) -> (B, T, dim)."""
        q = self.q_norm(self.split(self.q(x), self.heads))
        k, v = self.recall(ctx)
        return self.attend(q, k, v, ctx.memory_visible)

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


def _unturned(x: Tensor, ctx: Ctx) -> Tensor:
    return x


def _turn_queries(x: Tensor, ctx: Ctx, *, turn: Any, number: int) -> Tensor:
    table = ctx.turns[number]
    return turn(x, table.cos, table.sin)  # type: ignore[no-any-return]


def _turn_keys(x: Tensor, ctx: Ctx, *, turn: Any, number: int) -> Tensor:
    table = ctx.turns[number]
    return turn(x, table.key_cos, table.key_sin)  # type: ignore[no-any-return]
