"""Gated attention over a moving average: EMA along the text, then attention of one head in chunks.

    e = silu(ema(x) + skip x)                                   Ma et al. 2022, Mega, arXiv:2209.10655
    [u, z, r, h] = mix(e),   u -> sigmoid,   z, r -> silu
    q = z w_q + b_q,   k = z w_k + b_k,   v = act(value(x))
    y = act(h + out(attend(q, k, v) r)),   the stream s becomes s + u (y - s)

    attend: softmax of q k / sqrt(S) + bias, or f(q k / n + bias) for n keys, f = laplace for one; bias by distance

The average (ema.py) goes through the whole text, attention sees the query's chunk alone. Padding enters the average as
zeros. From left to right n counts slots, padding among them; both ways it counts real keys.

Axes: B rows, T tokens, S width of queries and keys, I of values, P chunks, Q queries and K keys of a chunk.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from xtcli import registry
from xtcli.errors import refuse
from xtcli.parts import masks
from xtcli.parts.activations import ACTIVATIONS, Activation
from xtcli.parts.chunked import Chunks
from xtcli.parts.context import Ctx, KeyValues
from xtcli.parts.dropouts import make_dropout
from xtcli.parts.ema import DampedEma, Spread
from xtcli.parts.linear import Draw, Linear, widen
from xtcli.parts.previous import new_documents, real_tokens
from xtcli.parts.scope import Impossible, Scope
from xtcli.registry import Config, Slot, field, part

START = 0.02
"""Standard deviation, at the start, of what makes queries, keys and biases."""


@part("distance", "table")
class DistanceTable(nn.Module):
    """A learned number for each distance."""

    class Config(registry.Config):
        """A table of biases by distance."""

        span: int | None = field("distances up to span - 1 either way; null = model.context", None, gt=0, tiny=128)
        centre: int | None = field("row of distance 0; null = span - 1", None, ge=0, tiny=127)

    def __init__(self, config: Config, scope: Scope) -> None:
        super().__init__()
        span = config.span or scope.context
        if span is None:
            raise Impossible("span", "a table of distances needs their number", "state span, or model.context")
        self.centre = span - 1 if config.centre is None else config.centre
        if self.centre >= span:
            raise Impossible("centre", f"row {self.centre} of {2 * span - 1} is not in the first half", "leave it out")
        self.weight = nn.Parameter(torch.empty(2 * span - 1))

    def draw(self, normal: Draw) -> None:
        normal(self.weight, START)

    def forward(self, first: int, last: int) -> Tensor:
        """The biases of the distances k - q from `first` to `last`, in one row."""
        most = max(-first, last)
        if most > self.centre:
            raise refuse(
                f"{most + 1:,} tokens see each other, the table of distances is for {self.centre + 1:,}",
                "use shorter texts",
            )
        return self.weight[self.centre + first : self.centre + last + 1]


@part("distance", "rotary")
class DistanceWaves(nn.Module):
    """R(q) a . R(k) b = a . R(k - q) b: two learned vectors in halves, turned by the places of query and key."""

    class Config(registry.Config):
        """A bias of waves over the distance."""

    def __init__(self, config: Config, scope: Scope) -> None:
        super().__init__()
        if scope.dim % 2:
            raise Impossible("", f"rotary biases turn halves, and a width of {scope.dim} has none", "use an even width")
        self.a = nn.Parameter(torch.empty(scope.dim))
        self.b = nn.Parameter(torch.empty(scope.dim))

    def draw(self, normal: Draw) -> None:
        normal(self.a, START)
        normal(self.b, START)

    def forward(self, first: int, last: int) -> Tensor:
        """The biases of the distances k - q from `first` to `last`, in one row."""
        half = self.a.shape[0] // 2
        waves = torch.exp(torch.arange(half, device=self.a.device) * (-math.log(10000.0) / half))
        angles = torch.arange(first, last + 1, device=self.a.device)[:, None] * waves
        one, two = widen(self.b).chunk(2)
        cos, sin = angles.cos(), angles.sin()
        turned = torch.cat((one * cos - two * sin, two * cos + one * sin), -1)
        return (turned * widen(self.a)).sum(-1)


@dataclass
class EmaState:
    """The EMA's state, and keys (B, 1, chunk, S) and values (B, 1, chunk, I) of the chunk so far."""

    ema: Tensor
    cache: KeyValues

    def select(self, rows: Tensor) -> None:
        self.ema = self.ema[rows]
        self.cache.select(rows)


@part("mixer", "ema-gated")
class EmaGated(nn.Module):
    """Gated attention of one head over a moving average. Its gate decides how much of the stream it keeps.

    `multiple`: what the length of a whole text is a multiple of, where it is longer.
    """

    reads_stream = True
    irreversible = "a gate mixes the stream with what is made of it"
    honours: tuple[str, ...] = ()
    sees = "queries and keys are made from a moving average of the whole text"

    class Config(registry.Config):
        """Gated attention over a moving average."""

        hidden: int = field("width of the values", gt=0, tiny=128, example=40)
        shared: int = field("width of queries and keys", gt=0, tiny=16, example=12)
        states: int = field("states of each channel's average", 16, gt=0, tiny=4)
        both: bool | None = field("averages from both sides; null = where the graph sees both ways", None)
        taps: int | None = field("tokens that the average sees to a side; null = all", None, gt=0)
        chunk: int | None = field(
            "tokens of a chunk, the only keys of its queries; null = the text", None, gt=0, tiny=16
        )
        act: Activation = field("activation of the values and of the output", "silu")
        weights: Literal["softmax"] | Activation = field("scores to weights", "softmax")
        distance: Annotated[Config, Slot("distance")] = field("bias by distance", DistanceWaves.Config())
        dropout: float | None = field("dropout of the average and the output; null = model.dropout", None, ge=0, lt=1)
        value_dropout: float = field("dropout of the values", 0.0, ge=0, lt=1)
        channels: bool = field("all but the dropout of weights drops whole channels of a row", False)
        weight_dropout: float = field("dropout of the weights", 0.0, ge=0, lt=1)
        decay_std: float = field("spread of damping and decay at the start", 0.2, ge=0)
        expand_std: float = field("spread around 1 and -1 of what enters the states at the start", 0.02, ge=0)
        contract_std: float = field("spread of what leaves the states, and of the skip, at the start", 1.0, ge=0)

    def __init__(self, config: Config, scope: Scope) -> None:
        super().__init__()
        both = not scope.causal if config.both is None else config.both
        if both and scope.causal:
            raise Impossible("both", "an average from both sides sees the future", "leave it out, or use an encoder")
        if getattr(scope.position, "kind", "none") != "none":
            raise Impossible("", "ema-gated has a bias by distance of its own", "leave out stack.position")
        self.causal, self.chunk, self.weights = scope.causal, config.chunk, config.weights
        self.widths = (scope.dim, config.shared, config.hidden, scope.dim)
        spread = Spread(config.decay_std, config.expand_std, config.contract_std)
        self.ema = DampedEma(scope.dim, config.states, both, config.taps, spread)
        self.value = Linear(scope.dim, config.hidden, True)
        self.mix = Linear(scope.dim, sum(self.widths), True)
        self.out = Linear(config.hidden, scope.dim, True)
        self.qk_weight = nn.Parameter(torch.empty(2, config.shared))
        self.qk_bias = nn.Parameter(torch.empty(2, config.shared))
        self.distance = scope.make("distance", config.distance, dim=config.shared)
        self.act = ACTIVATIONS[config.act]
        self.scale = config.shared**-0.5
        self.dropout = make_dropout(scope.dropout if config.dropout is None else config.dropout, config.channels)
        self.value_dropout = make_dropout(config.value_dropout, config.channels)
        self.weight_dropout = nn.Dropout(config.weight_dropout)
        # What is divided by counts padding where it counts slots.
        self.aligned = config.chunk is not None or (scope.causal and config.weights != "softmax")
        rule: Config = masks.CAUSAL if scope.causal else masks.FULL
        if config.chunk is not None:
            near = Chunks.Config(chunk=config.chunk, before=0, after=0)
            rule = masks.AllOf.Config(of=(masks.CAUSAL, near)) if scope.causal else near
        self.rule = rule
        self.multiple = config.chunk or 1

    def draw(self, normal: Draw) -> None:
        """Small weights of queries and keys, no biases."""
        normal(self.qk_weight, START)
        self.qk_bias.zero_()

    def new_state(self, batch: int, capacity: int, device: Any, dtype: Any) -> EmaState:
        """Nothing read yet; room for a chunk, or for `capacity` tokens where there are none."""
        slots = capacity if self.chunk is None else min(self.chunk, capacity)
        k, v = (torch.zeros(batch, 1, slots, width, device=device, dtype=dtype) for width in self.widths[1:3])
        return EmaState(self.ema.new_state(batch, device, dtype), KeyValues(k, v))

    def forward(self, x: Tensor, ctx: Ctx, stream: Tensor) -> Tensor:
        """x and the stream that it was read from, (B, T, dim) -> what the stream gets, u (y - stream)."""
        tokens, state = x.shape[1], ctx.state
        if state is None and self.chunk is not None and tokens > self.chunk and tokens % self.chunk:
            raise refuse(
                f"a text of {tokens:,} tokens is no multiple of chunks of {self.chunk:,}",
                f"fill it up to {-(-tokens // self.chunk) * self.chunk:,} tokens",
            )
        documents = new_documents(ctx, tokens)
        if ctx.documents is not None and state is not None and self.ema.taps is not None:
            documents = F.pad(ctx.documents, (self.ema.taps - 1, 0), value=-1)[:, ctx.offset :]
        e, average = self.ema(x, real_tokens(ctx, tokens), documents, None if state is None else state.ema)
        if state is not None:
            state.ema = average
        keep, z, gate, h = self.mix(self.dropout(e)).split(self.widths, -1)
        q, k = (F.silu(z)[..., None, :] * self.qk_weight + self.qk_bias).unbind(-2)
        y = self.attend(q, k, self.act(self.value(x)), ctx)
        y = self.dropout(self.act(h + self.out(y * F.silu(gate))))
        return keep.sigmoid() * (y - stream)  # type: ignore[no-any-return]

    def attend(self, q: Tensor, k: Tensor, v: Tensor, ctx: Ctx) -> Tensor:
        """q, k (B, T, S), v (B, T, I) -> (B, T, I)."""
        tokens, chunk = q.shape[1], self.chunk
        held = 0 if ctx.state is None else ctx.offset if chunk is None else ctx.offset % chunk
        if ctx.state is not None:
            k, v = self.recall(k, v, held, ctx.state.cache)
        span = held + tokens
        if chunk is None or span <= chunk:
            size, first = span, held
        else:
            # Whole chunks, from the first that has a new token; what stands in front of that has no query.
            size, first = chunk, 0
            q = F.pad(q, (0, 0, held, -span % chunk))
            k, v = (F.pad(one, (0, 0, 0, -span % chunk)) for one in (k, v))
        q = q.unflatten(1, (-1, size - first))
        k, v = k.unflatten(1, (-1, size)), v.unflatten(1, (-1, size))
        seen, count = self.look(ctx, ctx.offset - held, span, size, first)
        y = self.weigh(q, k, seen, count, first).to(v.dtype) @ self.value_dropout(v)
        y = y.flatten(1, 2)
        return y if first else y[:, held:span]  # type: ignore[no-any-return]

    def recall(self, k: Tensor, v: Tensor, held: int, cache: KeyValues) -> tuple[Tensor, Tensor]:
        """Keys and values (B, T, ...) behind the `held` ones of the chunk; the cache keeps those of the last chunk."""
        if self.chunk is None:
            k, v = cache.append(k[:, None], v[:, None], held)
            return k[:, 0], v[:, 0]
        k, v = torch.cat((cache.k[:, 0, :held], k), 1), torch.cat((cache.v[:, 0, :held], v), 1)
        left = k.shape[1] % self.chunk
        begin = k.shape[1] - left
        cache.k[:, 0, :left], cache.v[:, 0, :left] = k[:, begin:].detach(), v[:, begin:].detach()
        return k, v

    def look(self, ctx: Ctx, begin: int, span: int, size: int, first: int) -> tuple[Tensor | None, Tensor | int]:
        """What queries from place `first` of a chunk on see, (B|1, P|1, Q|1, K), and how many keys they count.

        begin: the slot of the first key; span: slots from there; size: those of a chunk.
        """
        keys = torch.arange(size, device=ctx.keys.device)
        causal = keys <= keys[first:, None] if self.causal else None  # (Q, K)
        counted, seen, fill = causal, causal, -span % size

        def cut(slots: Tensor, empty: int) -> Tensor:
            """(B, all slots) -> (B, P, K)."""
            return F.pad(slots[:, begin : begin + span], (0, fill), value=empty).unflatten(1, (-1, size))  # type: ignore[no-any-return]

        if ctx.documents is not None:
            own = cut(ctx.documents, -1)
            same = own[..., first:, None] == own[..., None, :]
            counted = seen = same if causal is None else same & causal
        if ctx.keep is not None:
            real = cut(ctx.keep, 0)[..., None, :]
            seen = real if seen is None else seen & real
            # From left to right what is padding counts, though it is not seen.
            counted = counted if self.causal else seen
        count = size if counted is None else counted.sum(-1, keepdim=True).clamp(min=1)
        return seen, count

    def weigh(self, q: Tensor, k: Tensor, seen: Tensor | None, count: Tensor | int, first: int) -> Tensor:
        """Weights (B, P, Q, K) of queries that begin at place `first` of their chunk."""
        size = k.shape[2]
        places = torch.arange(size, device=q.device)
        bias = self.distance(1 - size, size - 1)[places - places[first:, None] + size - 1]
        scores = widen(q @ k.transpose(-1, -2))
        if self.weights != "softmax":
            weights = ACTIVATIONS[self.weights](scores / count + bias)
            return self.weight_dropout(weights if seen is None else weights * seen)  # type: ignore[no-any-return]
        scores = scores * self.scale + bias
        if seen is not None:
            # A query that sees nothing, which is padding, sees its past or everything: no softmax is empty.
            usual = places <= places[first:, None] if self.causal else torch.ones_like(seen)
            scores = scores.masked_fill(~(seen | (~seen.any(-1, keepdim=True) & usual)), float("-inf"))
        return self.weight_dropout(scores.softmax(-1))  # type: ignore[no-any-return]

    def extra_repr(self) -> str:
        return f"chunk={self.chunk}, weights={self.weights}"
