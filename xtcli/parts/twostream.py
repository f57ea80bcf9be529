"""Two streams over one text (Yang et al. 2019, arXiv:1906.08237): one knows each token, one only where it stands.

    content  h_i = tokens,  queries of h_i see keys of h_j where the order allows it, and always h_i itself
    query    g_m = one learned vector,  queries of g_m, standing at its target's place, see keys of h_j where the order
             allows it - not the target itself
    score(i, j) = ((q_i + u) k_j + (q_i + v) W r(i - j) + (q_i + s) e[same or other segment]) / sqrt(d)

`perm_mask` (B, T, T) is 1 where i may not see j; `target_mapping` (B, P, T) says which places the P targets are. With
targets the stack gives what the query stream ends as, (B, P, D); without, the content stream, (B, T, D). Weights are
the same for both. Memories are of the content stream, and count as segment 0. A query that may see no key sees all of
them alike. Axes as in context.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from xtcli.parts import masks, positions
from xtcli.parts.attention import Heads
from xtcli.parts.context import Ctx, KeyValues, Memory, Visible
from xtcli.parts.kernels import add_scores
from xtcli.parts.linear import Draw
from xtcli.parts.masks import MaskSlot
from xtcli.parts.positions import PositionSlot
from xtcli.parts.recurrence import joined
from xtcli.parts.scope import Impossible, Scope
from xtcli.parts.stack import Layers, Stack
from xtcli.parts.waves import Wave
from xtcli.registry import Config, field, part

SEES = (
    "with a perm_mask only what comes before in that order: the query stream does not see its own token, the content "
    "stream does"
)
HIDDEN = -1e30
"""What is added to the score of a key that must not be seen: where no key may be seen all are alike."""


@dataclass(frozen=True)
class Streams:
    """What the layers of one call share: what is added to the scores of each stream, (B|1, 1, T, S), which keys lie in
    another segment (B, 1, T, S), and where the targets are (B, P, T)."""

    content: Tensor
    query: Tensor
    other: Tensor | None
    targets: Tensor | None


class Layout(nn.Module):
    """Makes the streams' masks once a call."""

    reads = ("perm_mask", "input_mask")

    def __init__(self, rule: Config, same_length: bool) -> None:
        super().__init__()
        self.rule, self.same_length = rule, same_length

    def lay(self, x: Tensor, ctx: Ctx, biases: Any) -> Streams:
        """For h (B, T, D)."""
        length, span, device = x.shape[1], ctx.keys.shape[1], x.device
        q = torch.arange(ctx.offset, ctx.offset + length, device=device)[:, None]
        k = torch.arange(span, device=device)[None, :]
        seen = masks.allowed(self.rule, q, k)
        if self.same_length:
            seen = seen & (k >= q - ctx.offset)
        seen = seen[None, None]
        if ctx.documents is not None:
            own = ctx.documents[:, None, ctx.offset : ctx.offset + length, None]
            seen = seen & (own == ctx.documents[:, None, None, :])
        if ctx.keep is not None:
            seen = seen & ctx.keep[:, None, None, :]
        if "input_mask" in ctx.extras:
            hidden = ctx.extras["input_mask"].flatten(0, -2)
            past = torch.zeros_like(hidden[:, :1]).expand(-1, span - length)
            seen = seen & (torch.cat((past, hidden), 1) == 0)[:, None, None]
        order = ctx.extras.get("perm_mask")
        if order is not None:
            past = order.new_zeros(1, 1, 1).expand(order.shape[0], length, span - length)
            seen = seen & (torch.cat((past, order), 2) == 0)[:, None]
        targets = ctx.extras.get("target_mapping")
        other = None
        if ctx.segments is not None:
            past = torch.zeros_like(ctx.segments[:, :1]).expand(-1, span - length)
            other = (ctx.segments[:, :, None] != torch.cat((past, ctx.segments), 1)[:, None])[:, None]
        low = max(HIDDEN, torch.finfo(x.dtype).min / 2)
        return Streams(
            torch.zeros((), dtype=x.dtype, device=device).masked_fill(~(seen | (q == k)), low),
            torch.zeros((), dtype=x.dtype, device=device).masked_fill(~seen, low),
            other,
            None if targets is None else targets.to(x.dtype),
        )


class Segments(nn.Module):
    """s (H, d), and e of the same and of another segment (2, H, d)."""

    def __init__(self, heads: int, head_dim: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.empty(heads, head_dim))
        self.kinds = nn.Parameter(torch.empty(2, heads, head_dim))

    def draw(self, normal: Draw) -> None:
        """As matrices are drawn."""
        normal(self.bias, 0.02)
        normal(self.kinds, 0.02)

    def scores(self, q: Tensor, other: Tensor) -> Tensor:
        """q (B, H, T, d), other (B, 1, T, S) -> (B, H, T, S), not scaled."""
        asking = q + self.bias[:, None]
        same, different = torch.einsum("bhtd,shd->sbht", asking, self.kinds)[..., None]
        return torch.where(other, different, same)


@part("mixer", "two-stream")
class TwoStream(Heads):
    """Attention of both streams, which come and go end to end: (B, T + P, D)."""

    # A gate would show the content to the query stream, and carried scores would mix the streams.
    honours = ("score", "memory")
    carries = False

    class Config(Heads.Config):
        """Attention of a content and a query stream."""

        bias: bool = field("adds biases to q, k and v", False)
        segments: bool = field("scores know whether a key lies in the query's segment", False)
        mask: MaskSlot = field("which keys a query sees, the order of the text aside", masks.INHERIT)
        same_length: bool = field("each query sees as many keys as the first: memory and itself", False)
        position: PositionSlot = field("waves of the distance; none stands for their defaults", positions.INHERIT)

    def __init__(self, config: Config, scope: Scope) -> None:
        super().__init__(config, scope, scope.dim)
        if scope.shared is None:
            raise AssertionError("attention is built inside a stack")
        self.recurs = scope.recurrence is not None
        stated = (scope.position or positions.NONE) if config.position.kind == "inherit" else config.position
        position = Wave.Config() if stated.kind == "none" else stated
        if position.kind != "wave":
            raise Impossible("position", f"is '{position.kind}', two streams know places by waves", "set it to wave")
        if self.groups != self.heads:
            raise Impossible("kv_heads", "two streams need as many kv_heads as heads")
        rule = config.mask
        if rule.kind == "inherit":
            rule = masks.CAUSAL if scope.causal else masks.FULL
        self.relative: Any = scope.make("position", position, self.head_dim, heads=self.heads)
        self.segments = Segments(self.heads, self.head_dim) if config.segments else None
        self.rule, self.sees = rule, SEES
        key = ("streams", rule, config.same_length)
        self.layout = scope.shared.layout(key, lambda: Layout(rule, config.same_length))

    def new_state(self, batch: int, capacity: int, device: Any, dtype: Any) -> KeyValues | Memory:
        """An empty cache of the content stream."""
        cache = KeyValues.new(batch, self.groups, capacity, self.head_dim, device, dtype)
        return Memory(cache=cache) if self.recurs else cache

    def forward(self, x: Tensor, ctx: Ctx) -> Tensor:
        """x (B, T + P, D), the content stream first -> the same."""
        length = ctx.positions.shape[1]
        h, g = x[:, :length], x[:, length:]
        streams: Streams = ctx.layouts[self.layout]
        source, ctx = joined(h, ctx)
        k = self.k_norm(self.split(self.k(source), self.groups))
        v = self.split(self.v(source), self.groups)
        if ctx.state is not None:
            k, v = ctx.state.append(k, v, ctx.keys.shape[1] - k.shape[2])
        q = self.q_norm(self.split(self.q(h), self.heads))
        y = self.answer(q, k, v, streams.content, streams, h, ctx)
        if not g.shape[1]:
            return y
        assert streams.targets is not None
        asked = self.q_norm(self.split(self.q(g), self.heads))
        asked = torch.einsum("bhpd,bpt->bhtd", asked, streams.targets)
        told = self.answer(asked, k, v, streams.query, streams, h, ctx)
        return torch.cat((y, streams.targets @ told), 1)

    def answer(self, q: Tensor, k: Tensor, v: Tensor, hidden: Tensor, streams: Streams, x: Tensor, ctx: Ctx) -> Tensor:
        """Attention of queries that stand at the T places: (B, T, D)."""
        scores = self.relative.scores(q, k, ctx)
        if self.segments is not None and streams.other is not None:
            scores = scores + self.segments.scores(q, streams.other) * self.relative.factor
        return self.attend(q, k, v, add_scores(Visible(hidden), scores), x, ctx)


@part("stack", "two-stream")
class TwoStreams(Stack):
    """Blocks that run over both streams at once; their mixers are of kind two-stream."""

    reads = ("target_mapping",)

    class Config(Layers):
        """Blocks over a content and a query stream, then a norm."""

    def __init__(self, config: Config, scope: Scope) -> None:
        super().__init__(config, scope)
        for block in self.blocks:
            for name, sublayer in block.sublayers.items():  # type: ignore[union-attr, operator]
                if not isinstance(sublayer, TwoStream) and hasattr(sublayer, "q"):
                    raise Impossible("block", f"its '{name}' has one stream", "use mixers of kind two-stream")
        if self.recurrence is not None and self.recurrence.lead:
            raise Impossible("recurrence.start", "zeros before a text are for stacks of one stream", "set it to empty")
        self.query = nn.Parameter(torch.empty(scope.dim))
        self.entry = nn.Dropout(scope.dropout)

    def draw(self, normal: Draw) -> None:
        """As matrices are drawn."""
        normal(self.query, 0.02)

    def forward(self, x: Tensor, ctx: Ctx, trace: list[Tensor] | None = None) -> Tensor:
        """x (B, T, D) -> (B, P, D) with targets, (B, T, D) without; `trace` collects the streams in turn."""
        length = x.shape[1]
        targets = ctx.extras.get("target_mapping")
        states = ctx.state or [None] * len(self.blocks)
        ctx = self.shared.prepare(x, ctx)
        both = x
        if targets is not None:
            blank = self.query.to(x.dtype).expand(x.shape[0], targets.shape[1], -1)
            both = torch.cat((x, self.entry(blank)), 1)
        for block, state in zip(self.blocks, states, strict=True):
            _note(trace, both, length)
            both = block(both, ctx.within(state))
        out = self.norm(both)
        _note(trace, out, length)
        return self.dropout(out[:, length:] if targets is not None else out)  # type: ignore[no-any-return]


def in_streams(model: Any) -> bool:
    """Whether a model predicts targets by a stream of their own."""
    return isinstance(getattr(model, "stack", None), TwoStreams)


def _note(trace: list[Tensor] | None, both: Tensor, length: int) -> None:
    if trace is not None:
        trace += [both] if both.shape[1] == length else [both[:, :length], both[:, length:]]
