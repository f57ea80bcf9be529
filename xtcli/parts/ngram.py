"""Streams that predict tokens ahead (Qi et al. 2020, arXiv:2001.04063): n tokens at each place, by one set of weights.

    main       h_t = tokens,  sees h_s with s <= t
    stream i   g_t = one learned vector of its own at the place t + 1,  sees h_s with s <= t - i, the first token of its
               text always, and itself, but no other g; i = 0 ... n - 1
    score(t, s) = q_t k_s / sqrt(d) + (W x_t)[bucket of the distance], x what the layer reads
    distance   s - t from h_t, s - 1 - t from g_t, 0 from g_t to itself

Stream 0 knows h up to t and answers what comes next; stream i knows i tokens less and answers the same, as though it
stood i places earlier and looked i + 1 tokens ahead. The streams run end to end behind the main one, (B, (1 + n) T, D),
through the same layers: cross-attention, feed-forwards and norms are applied to all. Buckets are T5's of one side. Only
keys and values of the main stream are kept in decoding. Axes as in context.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from xtcli.parts import masks
from xtcli.parts.attention import Heads
from xtcli.parts.context import Ctx, KeyValues, Visible
from xtcli.parts.linear import Draw, Linear
from xtcli.parts.scope import Impossible, Scope
from xtcli.parts.shared import slot_distance
from xtcli.parts.stack import Layers, Stack
from xtcli.registry import Config, field, part

SEES = (
    "stream i of those that predict sees the text up to i places before it, the first token of the text, and itself; "
    "the picture is that of the text's own stream"
)


@dataclass(frozen=True)
class Streams:
    """What the layers of one call share.

    steps (B|1, T, S): query slot - key slot. seen (B|1, T, S): whether a token sees a key; real: the same without the
    order of the text; first (B|1, 1, S): whether the key is the first of its text. near, far (B|1, T, S): buckets of
    the distance from h and from g.
    """

    steps: Tensor
    seen: Tensor
    real: Tensor
    first: Tensor
    near: Tensor
    far: Tensor


def one_sided(steps: Tensor, buckets: int, furthest: int) -> Tensor:
    """The bucket of `steps` back: half of them exact, the rest logarithmic up to `furthest`."""
    exact = buckets // 2
    steps = steps.clamp(min=0)
    # Summed before it is cut, as the published weights were trained: a distance on the border falls by this rounding.
    far = exact + torch.log(steps.float().clamp(min=1) / exact) / math.log(furthest / exact) * (buckets - exact)
    return torch.where(steps < exact, steps, far.clamp(max=buckets - 1).long())


class Layout(nn.Module):
    """Makes masks and buckets once a call."""

    def __init__(self, buckets: int, furthest: int) -> None:
        super().__init__()
        self.buckets, self.furthest = buckets, furthest

    def lay(self, x: Tensor, ctx: Ctx, biases: Any) -> Streams:
        """For h (B, T, D)."""
        length = x.shape[1]
        steps = -slot_distance(ctx, length)
        real = torch.ones_like(steps, dtype=torch.bool)
        if ctx.documents is not None:
            own = ctx.documents[:, ctx.offset : ctx.offset + length, None]
            real = real & (own == ctx.documents[:, None, :])
        if ctx.keep is not None:
            real = real & ctx.keep[:, None, :]
        seen = real & (steps >= 0)
        seen = seen | (~seen.any(-1, keepdim=True) & (steps == 0))
        return Streams(
            steps,
            seen,
            real,
            (ctx.keys == 0)[:, None, :],
            one_sided(steps, self.buckets, self.furthest),
            one_sided(steps + 1, self.buckets, self.furthest),
        )


@part("mixer", "n-gram")
class NGram(Heads):
    """Attention of the main stream and of those that predict, which come and go end to end: (B, (1 + n) T, D)."""

    # Carried scores would mix the streams, and keys in front of the text stand at no place.
    honours = ("score", "out")
    carries = False

    class Config(Heads.Config):
        """Attention of a text and of the streams that predict what follows each of its places."""

        buckets: int = field("buckets of distance", 32, ge=2, tiny=16)
        furthest: int = field("distance from which all share the last bucket", 128, gt=0)

    def __init__(self, config: Config, scope: Scope) -> None:
        super().__init__(config, scope, scope.dim)
        if scope.shared is None:
            raise AssertionError("attention is built inside a stack")
        if not scope.causal:
            raise Impossible("", "attention that predicts ahead reads from left to right alone", "use it in a decoder")
        if scope.recurrence is not None:
            cause = "streams that predict ahead remember nothing of the segment before"
            raise Impossible("", cause, "leave out the recurrence")
        if config.furthest <= config.buckets // 2:
            exact = config.buckets // 2
            raise Impossible("furthest", f"must exceed the {exact} exact distances of {config.buckets} buckets")
        self.buckets = config.buckets
        self.relative = Linear(scope.dim, config.buckets * self.heads, True)
        self.rule, self.sees = masks.CAUSAL, SEES
        buckets, furthest = config.buckets, config.furthest
        self.layout = scope.shared.layout(("n-gram", buckets, furthest), lambda: Layout(buckets, furthest))

    def new_state(self, batch: int, capacity: int, device: Any, dtype: Any) -> KeyValues:
        """An empty cache of the main stream."""
        return KeyValues.new(batch, self.groups, capacity, self.head_dim, device, dtype)

    def forward(self, x: Tensor, ctx: Ctx) -> Tensor:
        """x (B, (1 + n) T, D), the main stream first -> the same."""
        rows, length = x.shape[0], ctx.positions.shape[1]
        h, g = x[:, :length], x[:, length:]
        streams: Streams = ctx.layouts[self.layout]
        k, v = self.keys(h)
        if ctx.state is not None:
            k, v = ctx.state.append(k, v, ctx.keys.shape[1] - length)
        y = self.answer(h, k, v, streams.near, streams.seen, ctx)
        count = g.shape[1] // length
        if not count:
            return y
        g = g.unflatten(1, (count, length)).flatten(0, 1)
        own_k, own_v = self.keys(g)
        k = torch.cat((k.repeat_interleave(count, 0), own_k), 2)
        v = torch.cat((v.repeat_interleave(count, 0), own_v), 2)
        behind = torch.arange(count, device=x.device)[:, None, None]
        back = (streams.steps[:, None] >= behind) | (streams.first & (streams.steps >= 0))[:, None]
        seen = (back & streams.real[:, None]).expand(rows, -1, -1, -1).flatten(0, 1)
        itself = torch.eye(length, dtype=torch.bool, device=x.device).expand(len(seen), -1, -1)
        near = torch.zeros(length, length, dtype=torch.long, device=x.device).expand(len(streams.far), -1, -1)
        far = torch.cat((streams.far, near), 2)
        far = far if len(far) == 1 else far.repeat_interleave(count, 0)
        told = self.answer(g, k, v, far, torch.cat((seen, itself), 2), ctx)
        return torch.cat((y, told.unflatten(0, (rows, count)).flatten(1, 2)), 1)

    def keys(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values (B, G, T, d) of x (B, T, D)."""
        return self.k_norm(self.split(self.k(x), self.groups)), self.split(self.v(x), self.groups)

    def answer(self, x: Tensor, k: Tensor, v: Tensor, buckets: Tensor, seen: Tensor, ctx: Ctx) -> Tensor:
        """x (B, T, D), keys (B, G, S, d), buckets and what is seen (B|1, T, S) -> (B, T, D)."""
        q = self.q_norm(self.split(self.q(x), self.heads))
        values = self.relative(x).unflatten(-1, (self.buckets, self.heads)).permute(0, 3, 1, 2)
        scores = values.gather(-1, buckets[:, None].expand(*values.shape[:3], -1))
        hidden = ~seen[:, None]
        return self.attend(q, k, v, Visible(scores.masked_fill(hidden, float("-inf"))), x, ctx)


@part("stack", "n-gram")
class NGrams(Stack):
    """Blocks that run over a text and over the streams that predict; their mixers are of kind n-gram.

    It gives what stream 0 ends as. The main stream and all that predict are outputs of their own; what streams 1 and on
    end as is left in the ledger as `further`, (B, n - 1, T, D), for the head. A stream enters as the embedding makes it
    of a vector in the place of a token at the next place, so that texts are one place shorter than the table of places.
    Stream i has row i - 1 of `starts`, stream 0 the last.
    """

    beyond = 1  # places behind a text that the streams read
    gives = ("last_hidden_state", "last_hidden_state_ngram")
    traces = ("hidden_states_ngram",)
    sided: Mapping[str, str] = {"hidden_states_ngram": "decoder_ngram_hidden_states"}  # its name beside an encoder

    class Config(Layers):
        """Blocks over a main stream and those that predict tokens ahead, then a norm."""

        streams: int = field("tokens that are predicted at each place", 2, gt=0)

    def __init__(self, config: Config, scope: Scope) -> None:
        super().__init__(config, scope)
        for block in self.blocks:
            for name, sublayer in block.sublayers.items():  # type: ignore[union-attr, operator]
                mixes = getattr(getattr(sublayer, "Config", None), "slot", "") == "mixer"
                if mixes and not isinstance(sublayer, NGram) and not getattr(sublayer, "reads_memory", False):
                    raise Impossible("block", f"its '{name}' has one stream", "use mixers of kind n-gram")
        self.streams = config.streams
        self.starts = nn.Parameter(torch.empty(config.streams, scope.dim))

    def draw(self, normal: Draw) -> None:
        """As matrices are drawn."""
        normal(self.starts, 0.02)

    def refuse(self, embed: nn.Module) -> None:
        """Raises Impossible for an embedding that cannot make the streams."""
        places = getattr(embed, "positions", None)
        if places is None or hasattr(embed, "width") or hasattr(places, "counted"):
            cause = "streams that predict enter as vectors in the place of tokens, one place further"
            raise Impossible("embed", cause, "use embed.kind=tokens with positions of the place")

    def enter(self, x: Tensor, embed: nn.Module, ctx: Ctx) -> Tensor:
        """Tokens x (B, T, D) -> (B, (1 + n) T, D), the streams behind them."""
        ctx = replace(ctx, positions=ctx.positions + self.beyond, ids=None)
        starts = self.starts.roll(1, 0).to(x.dtype)
        return torch.cat((x, *(embed(None, start.expand_as(x), None, ctx) for start in starts)), 1)

    def forward(self, x: Tensor, ctx: Ctx, trace: list[Tensor] | None = None) -> Tensor:
        """x (B, (1 + n) T, D) -> stream 0 (B, T, D); `trace` collects the main stream."""
        length = ctx.positions.shape[1]
        states = ctx.state or [None] * len(self.blocks)
        ctx = self.shared.prepare(x[:, :length], ctx)
        for number, (block, state) in enumerate(zip(self.blocks, states, strict=True)):
            self.note(trace, x, length, number, ctx)
            x = block(x, ctx.within(state))
        x = self.dropout(self.norm(x))
        self.note(trace, x, length, len(self.blocks), ctx)
        main, told = x[:, :length], x[:, length:]
        ctx.ledger.leave("last_hidden_state", 0, main)
        ctx.ledger.leave("last_hidden_state_ngram", 0, told)
        if self.streams > 1:
            ctx.ledger.leave("further", 0, told[:, length:].unflatten(1, (self.streams - 1, length)))
        return told[:, :length]

    def note(self, trace: list[Tensor] | None, x: Tensor, length: int, number: int, ctx: Ctx) -> None:
        """Collect the streams where a trace is wanted."""
        if trace is not None:
            trace.append(x[:, :length])
            ctx.ledger.leave("hidden_states_ngram", number, x[:, length:])
