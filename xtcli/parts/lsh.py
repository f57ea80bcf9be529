"""Attention to keys that hash like the query: n log n in the length. Kitaev et al. 2020, arXiv:2001.04451.

    q_i = W x_i, one projection for queries and keys; k_i = q_i / |q_i|
    bucket(i) = argmax [q_i R; -q_i R], R random (D, buckets / 2)         angular hashing, arXiv:1509.02897

Tokens are sorted by (round, bucket, place) and cut into chunks; each chunk sees itself and its neighbours in a circle
over all rounds. The rounds of a token are joined by the softmax of their log-sum-exp. A token sees itself only where
there is nothing else to see, since it is the best match of its own query. `factors` of the number of buckets are hashed
apart and read as digits: fewer columns of R. Padding has a bucket of its own. The rotations are drawn anew in each
call, or from `seed`: then all layers and calls have the same.

A sorted text changes with every token that is added, and the places that a token is hashed to see are known only from
the values: beyond one chunk there is no state that decoding could continue.

Axes: B rows, H heads, T tokens, L tokens with the filling, R rounds, N chunks of all rounds, C tokens of a chunk,
W keys that a chunk sees, D head width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Any, Self

import torch
from pydantic import Field, Strict
from torch import Tensor
from torch.nn import functional as F

from xtcli import registry
from xtcli.parts import masks
from xtcli.parts.chunked import InChunks, around, fill, filled, real, slab_of
from xtcli.parts.context import Ctx, KeyValues
from xtcli.parts.linear import Linear
from xtcli.parts.scope import Impossible, Scope
from xtcli.registry import Config, field, part

EPS = 1e-6
"""Added to the mean square of a key."""

Buckets = Annotated[int, Field(gt=0, multiple_of=2)]


def usual_buckets(length: int, chunk: int, longest: int) -> tuple[int, ...]:
    """Twice as many as there are chunks, rounded down to a power of two; in two factors where they are many."""
    power = (2 * (length // chunk)).bit_length() - 1
    if 2**power > 2 * max(math.isqrt(longest // chunk), chunk):
        return 2 ** (power // 2), 2 ** (power - power // 2)
    return (2**power,)


@part("mixer", "lsh")
class HashedAttention(InChunks):
    """Attention inside buckets of similar queries."""

    static = False

    class Config(registry.Config):
        """Attention by locality-sensitive hashing, queries and keys being one."""

        heads: int = field("heads", gt=0, tiny=4, example=4)
        head_dim: int | None = field("width of a head; null = dim / heads", None, gt=0, tiny=16)
        bias: bool = field("adds biases to its projections", False)
        chunk: int = field("sorted tokens that attend to each other", 64, gt=0, tiny=16)
        before: int = field("chunks in front that are seen", 1, ge=0)
        after: int = field("chunks behind that are seen", 0, ge=0)
        rounds: int = field("times that a text is hashed", 1, gt=0)
        buckets: Buckets | Annotated[tuple[Buckets, ...], Strict(False), Field(min_length=1)] | None = field(
            "buckets of a round, or factors of their number; null = by the length", None
        )
        seed: int | None = field("of the rotations; null = new ones in each call", None)
        dropout: float | None = field("dropout of the weights; null = model.dropout", None, ge=0, lt=1)

        def tiny(self) -> Self:
            """Buckets by the length."""
            return self.model_copy(update={"buckets": None})

    def __init__(self, config: Config, scope: Scope) -> None:
        super().__init__()
        if config.head_dim is None and scope.dim % config.heads:
            raise Impossible("heads", f"{config.heads} heads do not divide dim {scope.dim}", "state head_dim")
        self.register(config, scope)
        self.heads, self.rounds, self.seed = config.heads, config.rounds, config.seed
        self.draws = config.seed is None  # in evaluation too: see chance.py
        self.head_dim = config.head_dim or scope.dim // config.heads
        self.factors = (config.buckets,) if isinstance(config.buckets, int) else config.buckets
        self.longest = scope.context
        self.rule: Config = masks.CAUSAL if scope.causal else masks.FULL
        keys = (1 + self.before + self.after) * self.chunk
        each = "" if self.rounds == 1 else f" in each of {self.rounds} rounds"
        self.sees = f"of the keys shown, a query sees at most {keys}{each}: those whose vectors hash like its own"
        self.rate = scope.dropout if config.dropout is None else config.dropout
        wide = self.heads * self.head_dim
        self.qk = Linear(scope.dim, wide, config.bias, "query")
        self.v = Linear(scope.dim, wide, config.bias)
        self.o = Linear(wide, scope.dim, config.bias, "output")

    def new_state(self, batch: int, capacity: int, device: Any, dtype: Any) -> KeyValues:
        """Keys and values, as long as the text is seen whole."""
        return KeyValues.new(batch, self.heads, min(capacity, self.steady), self.head_dim, device, dtype)

    def forward(self, x: Tensor, ctx: Ctx) -> Tensor:
        """x (B, T, dim) -> (B, T, dim)."""
        tokens = x.shape[1]
        q, v = (y.unflatten(-1, (self.heads, self.head_dim)).transpose(1, 2) for y in (self.qk(x), self.v(x)))
        k = q * torch.rsqrt(q.pow(2).mean(-1, keepdim=True) + EPS) / math.sqrt(self.head_dim)
        if ctx.state is not None and ctx.offset:
            self.refuse_more(ctx, tokens)
        if ctx.state is not None and ctx.offset + tokens <= self.steady:
            k, v = ctx.state.append(k, v, ctx.offset)
        length = filled(tokens, self.chunks)
        # Of a text that fits into one chunk all is seen, and nothing needs hashing or filling.
        y = self.whole(q, k, v, ctx) if length <= self.chunk else self.hashed(q, k, v, ctx, length)
        return self.o(y.transpose(1, 2).flatten(-2))  # type: ignore[no-any-return]

    def whole(self, q: Tensor, k: Tensor, v: Tensor, ctx: Ctx) -> Tensor:
        """q (B, H, T, D), k and v (B, H, S, D) -> (B, H, T, D), every key being near."""
        slots = torch.arange(k.shape[2], device=q.device)[None, None]
        return self.attend(q, slots[..., ctx.offset :], k, v, slots, ctx.keep, ctx)[0]

    def hashed(self, q: Tensor, k: Tensor, v: Tensor, ctx: Ctx, length: int) -> Tensor:
        """q, k, v (B, H, T, D) -> (B, H, T, D), the text sorted by buckets."""
        batch, tokens = q.shape[0], q.shape[2]
        keep = real(ctx, batch, tokens, length)
        q, k, v = (fill(y, length) for y in (q, k, v))

        factors = self.factors or usual_buckets(length, self.chunk, self.longest or length)
        # Drawn even where the buckets are known already, so that the random numbers behind are the same.
        rotations = self.rotations(sum(factors) // 2, q)

        def make() -> Tensor:
            return self.buckets(q.detach(), keep, factors, rotations)

        buckets = make() if ctx.decisions is None else ctx.decisions.settle(make)
        order = buckets.sort(dim=-1, stable=True).indices  # (B, H, R L): where each sorted token comes from
        numbers = torch.arange(order.shape[-1], device=q.device).expand_as(order)
        back = torch.empty_like(order).scatter_(-1, order, numbers)
        slots = order % length

        def cut(y: Tensor) -> Tensor:
            """(B, H, L, D) -> (B, H, N, C, D), sorted."""
            picked = y.gather(2, slots[..., None].expand(-1, -1, -1, self.head_dim))
            return picked.unflatten(2, (-1, self.chunk))  # type: ignore[no-any-return]

        places = slots.unflatten(2, (-1, self.chunk))  # (B, H, N, C)
        width = (self.before + 1 + self.after) * self.chunk
        slab = slab_of(batch * self.heads, self.chunk * width)
        near = (around(y, self.before, self.after, 2, slab) for y in (cut(k), cut(v), places))
        sides = zip(cut(q).split(slab, 2), places.split(slab, 2), *near, strict=True)
        found = [self.attend(q_, own, k_, v_, keys, keep, ctx) for q_, own, k_, v_, keys in sides]
        y = torch.cat([one for one, _ in found], 2).flatten(2, 3)
        y = y.gather(2, back[..., None].expand(-1, -1, -1, self.head_dim))
        if self.rounds > 1:
            total = torch.cat([one for _, one in found], 2).flatten(2, 3).gather(2, back)
            total = total.unflatten(2, (self.rounds, length))
            # A softmax; where a token sees itself alone its sums are -1e5 and the difference rounds as it was trained.
            shares = (total - total.logsumexp(2, keepdim=True)).exp()
            y = (y.unflatten(2, (self.rounds, length)) * shares[..., None].to(y.dtype)).sum(2)
        return y[:, :, :tokens]

    def attend(
        self, q: Tensor, queries: Tensor, k: Tensor, v: Tensor, keys: Tensor, keep: Tensor | None, ctx: Ctx
    ) -> tuple[Tensor, Tensor]:
        """q (.., C, D), k and v (.., W, D), each with the slots (.., C) and (.., W) they come from -> (.., C, D), and
        the logarithm (.., C) of what the weights were divided by."""
        scores = q @ k.transpose(-1, -2)
        hide, oneself = (-1e4, -1e3) if scores.dtype == torch.float16 else (-1e9, -1e5)
        lead = [1] * (keys.dim() - 2)

        def of(values: Tensor, slots: Tensor) -> Tensor:
            """Values (B, L) by slot."""
            rows = values.view(values.shape[0], *lead, -1).expand(*(-1, *slots.shape[1:-1], values.shape[-1]))
            return rows.gather(-1, slots.expand(values.shape[0], *slots.shape[1:]))

        hidden = None
        if self.causal:
            hidden = queries[..., :, None] < keys[..., None, :]
        if keep is not None:
            gone = ~of(keep, keys)[..., None, :]
            hidden = gone if hidden is None else hidden | gone
        if ctx.documents is not None:
            tokens = ctx.documents.shape[1]
            documents = F.pad(ctx.documents, (0, filled(tokens, self.chunks) - tokens))
            other = of(documents, queries)[..., :, None] != of(documents, keys)[..., None, :]
            hidden = other if hidden is None else hidden | other
        if hidden is not None:
            scores = scores.masked_fill(hidden, hide)
        scores = scores.masked_fill(queries[..., :, None] == keys[..., None, :], oneself)
        total = torch.logsumexp(scores, -1)
        weights = (scores - total[..., None]).exp().to(v.dtype)
        return F.dropout(weights, self.rate, self.training) @ v, total

    def buckets(self, q: Tensor, keep: Tensor | None, factors: Sequence[int], rotations: Tensor) -> Tensor:
        """q (B, H, L, D) -> the bucket of each token in each round, numbered over all rounds, (B, H, R L) int32."""
        turned = torch.einsum("bhtd,hdrn->bhrtn", q, rotations)
        found: Tensor | None = None
        count = 1
        for part_ in turned.split([factor // 2 for factor in factors], -1):
            high, low = part_.max(-1), part_.min(-1)
            digit = torch.where(high.values >= -low.values, high.indices, low.indices + part_.shape[-1])
            found = digit if found is None else found + count * digit
            count *= 2 * part_.shape[-1]
        assert found is not None
        if keep is not None:
            found = found.masked_fill(~keep[:, None, None, :], count)
        rounds = torch.arange(self.rounds, device=q.device)[:, None] * (count + 1)
        return (found + rounds).flatten(2).int()

    def rotations(self, columns: int, q: Tensor) -> Tensor:
        """Random directions (H, D, R, columns), of q's type and on its device."""
        shape = (self.heads, self.head_dim, self.rounds, columns)
        if self.seed is None:
            return torch.randn(shape, device=q.device, dtype=q.dtype)
        return seeded(self.seed, list(shape), q)  # type: ignore[no-any-return]

    def pairs(self, length: int) -> int:
        """Query-key pairs that are computed for each head."""
        whole = filled(length, self.chunks)
        return length**2 if whole <= self.chunk else whole * self.rounds * (1 + self.before + self.after) * self.chunk

    def extra_repr(self) -> str:
        buckets = "by length" if self.factors is None else " x ".join(map(str, self.factors))
        return (
            f"heads={self.heads}, head_dim={self.head_dim}, chunk={self.chunk}, before={self.before}, "
            f"after={self.after}, rounds={self.rounds}, buckets={buckets}"
        )


@torch.library.custom_op("xt::seeded", mutates_args=())
def seeded(seed: int, shape: list[int], like: Tensor) -> Tensor:
    """Normal numbers from a seed alone, of the type and on the device of `like`; a compiler sees one operator."""
    generator = torch.Generator(like.device).manual_seed(seed)
    return torch.randn(shape, generator=generator, device=like.device, dtype=like.dtype)


@seeded.register_fake
def _(seed: int, shape: list[int], like: Tensor) -> Tensor:
    return like.new_empty(shape)
