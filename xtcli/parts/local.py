"""Attention to what is near: cost and memory grow with the length, not with its square (bands.py).

    local              y = o(softmax(q k^T scale + positions) v) over the keys at most `radius` places away
    transient-global   the same, and every `block` places make one side token that all queries see besides
                       (Guo et al. 2021, LongT5, arXiv:2112.07916)

    side token g = norm(sum of the inputs x_i of its block), with the layer's own k and v
    its score for query i has a position of its own: the distance of g to the side token of i

A last run shorter than `block` joins the side token before it; a text that fills no block has none. Both kinds see
to either side: in a decoder, attention with a `window` mask is what reads only the past.

Axes as in bands.py; E side tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, Any

import torch
from pydantic import Strict
from torch import Tensor, nn
from torch.nn import functional as F

from xtcli.parts import masks, norms, positions
from xtcli.parts.attention import Attention, Heads
from xtcli.parts.bands import Aside, Band, Whole, WindowLayout, by_distance
from xtcli.parts.context import Ctx, Visible
from xtcli.parts.kernels import fused
from xtcli.parts.norms import NormSlot, make_norm
from xtcli.parts.positions import PositionSlot
from xtcli.parts.scope import Impossible, Scope
from xtcli.registry import field, part, part_of

PerLayer = int | Annotated[tuple[int, ...], Strict(False)]
"""One number, or one for each layer."""


def of_layer(name: str, value: Any, scope: Scope) -> int:
    """The number of the layer that is being built; raises Impossible for a list that ends before it."""
    numbers = value if isinstance(value, tuple) else (value,) * (scope.layer + 1)
    if scope.layer >= len(numbers):
        raise Impossible(
            name, f"has {len(numbers)} numbers, and the stack has more layers", "state one, or one for each layer"
        )
    if numbers[scope.layer] < 1:
        raise Impossible(name, f"{numbers[scope.layer]} is less than 1")
    return int(numbers[scope.layer])


def smaller(value: Any, most: int) -> Any:
    """A number, or all of several, at most `most`."""
    return tuple(min(number, most) for number in value) if isinstance(value, tuple) else min(value, most)


def refuse_in_decoder(kind: str, scope: Scope) -> None:
    """Raise Impossible where only the past may be read."""
    if scope.causal:
        raise Impossible(
            "", f"'{kind}' sees both ways", "in a decoder use attention with mask {kind: window, left: ...}"
        )


class Near(Attention):
    """What attentions with a window share. `sees` says what a picture of the window does not show."""

    honours = ("out",)
    linear = True
    sees = ""
    biased: tuple[int, ...] = ()  # numbers of the biases of its scores
    more: tuple[Any, ...] = ()  # what its layout is made of besides the window

    class Config(Heads.Config):
        """Attention to the keys around the query."""

        radius: PerLayer = field("places seen on each side of the query; a list has one for each layer", example=3)
        dilation: PerLayer = field("only every n-th place of the window, which reaches n times as far", 1)
        position: PositionSlot = field("how attention knows places", positions.INHERIT)

        def tiny(self) -> Any:
            """Small windows and few heads."""
            less = {"radius": smaller(self.radius, 8), "dilation": smaller(self.dilation, 2)}
            return super().tiny().model_copy(update=less)

    def __init__(self, config: Config, scope: Scope) -> None:
        refuse_in_decoder(config.kind, scope)
        super().__init__(config, scope)  # type: ignore[arg-type]

    def look(self, config: Any, scope: Scope, bias: int | None) -> None:
        radius, dilation = (of_layer(name, getattr(config, name), scope) for name in ("radius", "dilation"))
        if self.recurs:
            raise Impossible("", f"'{config.kind}' reads a text at once and keeps no memory", "use attention")
        if self.relative is not None:
            raise Impossible("position", "scores of queries and distances need all pairs", "use one that adds a bias")
        if bias is not None and not getattr(scope.shared.biases[bias], "slides", False):
            raise Impossible("position", "this bias is not one of the distance alone", "use t5 or alibi")
        if bias is not None and dilation > 1:
            raise Impossible("dilation", "a bias of the distance needs windows without gaps", "set dilation: 1")
        self.biased = self.biased if bias is None else (bias, *self.biased)
        self.rule = masks.Window.Config(left=radius * dilation, right=radius * dilation, dilation=dilation)
        free = self.rate == 0.0
        self.layout: int = scope.shared.layout(
            (config.kind, radius, dilation, bias, free, self.head_dim, self.more),
            lambda: self.lay_out(radius, dilation, bias, free, self.head_dim, *self.more),
        )

    def lay_out(self, *sizes: Any) -> nn.Module:
        """What finds out about a text for all layers with such a window."""
        return WindowLayout(*sizes)

    def new_state(self, batch: int, capacity: int, device: Any, dtype: Any) -> None:  # type: ignore[override]
        """None: a text is read at once."""
        return None

    def kernel(self, q: Tensor, k: Tensor, v: Tensor, visible: Visible) -> Tensor:
        """(B, H, T, D) and keys, values -> (B, H, T, D)."""
        return fused(q, k, v, visible, self.scale, self.rate if self.training else 0.0)

    def queries_keys_values(self, x: Tensor, ctx: Ctx) -> tuple[Tensor, Tensor, Tensor]:
        """x (B, T, dim) -> q (B, H, T, D), k and v (B, G, T, D)."""
        placed = self.place(x, ctx)
        q = self.turn_queries(self.q_norm(self.split(self.q(placed), self.heads)), ctx)
        k = self.turn_keys(self.k_norm(self.split(self.k(placed), self.groups)), ctx)
        return q, k, self.split(self.v(x), self.groups)

    def leave(self, y: Tensor, x: Tensor, ctx: Ctx) -> Tensor:
        """(B, H, T, D) -> (B, T, dim); nothing but the output's bias at padding."""
        y = y.transpose(1, 2).flatten(-2)
        if ctx.keep is not None:
            y = y * ctx.keep[..., None]
        return self.o(y, x) if self.out_reads_input else self.o(y)  # type: ignore[no-any-return]


@part("mixer", "local")
class Local(Near):
    """Self-attention within a window on both sides."""

    def forward(self, x: Tensor, ctx: Ctx) -> Tensor:
        """x (B, T, dim) -> (B, T, dim)."""
        band: Band | Whole = ctx.layouts[self.layout]
        return self.leave(band.attend(self.kernel, *self.queries_keys_values(x, ctx)), x, ctx)


@dataclass(frozen=True)
class Sides:
    """The side tokens of a text. `own` (B|1, T): that of each place, E for none; `first` and `last` (B|1, T): the
    side tokens of its document, `last` excluded; `count` is E; `bias` (2 E - 1, H) by distance, or None.

    `block` is their size where each place belongs to the side token of its slot or to the one before it, as it does
    unless rows begin with padding or hold several documents; `whole` says that every query sees them all."""

    own: Tensor
    first: Tensor
    last: Tensor
    count: int
    bias: Tensor | None
    block: int | None = None
    whole: bool = False

    def sums(self, x: Tensor) -> Tensor:
        """x (B, T, dim) -> the sums of each side token's places (B, E, dim)."""
        places = self.own.expand(x.shape[0], -1)[..., None].expand(-1, -1, x.shape[-1])
        return x.new_zeros(x.shape[0], self.count + 1, x.shape[-1]).scatter_add(1, places, x)[:, : self.count]

    def mask(self, start: int, stop: int) -> Tensor:
        """What the queries from `start` to `stop` see of the side tokens, (B|1, H|1, queries, E)."""
        number = torch.arange(self.count, device=self.own.device)
        first, last = self.first[:, start:stop, None], self.last[:, start:stop, None]
        seen = ((number >= first) & (number < last))[:, None]
        if self.bias is None:
            return seen
        scores = self.scores(self.own[:, start:stop].clamp(max=self.count - 1), number, start, stop)
        return scores if self.whole else scores.masked_fill(~seen, float("-inf"))

    def scores(self, own: Tensor, number: Tensor, start: int, stop: int) -> Tensor:
        """The bias of queries with these side tokens, (B|1, H, queries, E)."""
        assert self.bias is not None
        if self.block is None:
            return F.embedding(number - own[..., None] + self.count - 1, self.bias).movedim(-1, 1)
        # Few side tokens own these queries: their biases are looked up once and handed out.
        low, high = max(start // self.block - 1, 0), min((stop - 1) // self.block, self.count - 1)
        mine = torch.arange(low, high + 1, device=own.device)
        few = F.embedding(number - mine[:, None] + self.count - 1, self.bias).permute(2, 0, 1).contiguous()
        rows = (own - low).clamp(0, high - low)
        return torch.stack([few.index_select(1, row) for row in rows])

    def runs(self, start: int, stop: int) -> Tensor:
        """`mask` for each run of `block` queries from `start`, a multiple of it; `stop` may lie behind the text."""
        assert self.block is not None and self.bias is not None
        number = torch.arange(self.count, device=self.own.device)
        first = torch.arange(start, stop, self.block, device=self.own.device).clamp(max=self.own.shape[1] - 1)
        own, last = self.own[:, first].clamp(max=self.count - 1), self.last[:, first, None]
        # Row e of `turned` holds the biases of the distances from -e on, so that a run's scores lie in one piece.
        turned = self.bias.t().contiguous().unfold(1, self.count, 1)
        scores = turned[:, self.count - 1 - own].movedim(1, 0)
        # A run that padding cuts is one of real queries.
        return scores if self.whole else scores.masked_fill((number >= last)[:, None], float("-inf"))


class SideLayout(WindowLayout):
    """A window, and side tokens of `block` places; `side` is the number of the bias of their distances."""

    def __init__(
        self, radius: int, dilation: int, bias: int | None, free: bool, width: int, block: int, side: int | None
    ) -> None:
        super().__init__(radius, dilation, bias, False, width)
        self.block, self.side = block, side

    def lay(self, x: Tensor, ctx: Ctx, biases: Any) -> tuple[Band | Whole, Sides | None]:  # type: ignore[override]
        """The band and the side tokens for queries x (B, T, dim); None where no block is full."""
        band = super().lay(x, ctx, biases)
        count = x.shape[1] // self.block
        if not count:
            return band, None
        bias = None
        if self.side is not None:
            bias = by_distance(biases[self.side], count - 1, 1, 2 * count - 1, x)[0, :, 0].t()
        block, keep = self.block if ctx.documents is None else None, ctx.keep
        if keep is not None and not keep.is_meta and bool((keep[:, 1:] & ~keep[:, :-1]).any()):
            block = None
        found = self.side_of(x.shape[1], keep, ctx.documents, x.device, count)
        return band, Sides(*found, count, bias, block, block is not None and keep is None)

    def side_of(
        self, length: int, keep: Tensor | None, documents: Tensor | None, device: torch.device, count: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """`own`, `first` and `last` of `Sides`, each document counted from its own start."""
        slot = torch.arange(length, device=device)[None]
        real = torch.ones_like(slot, dtype=torch.bool) if keep is None else keep
        document, place = torch.zeros_like(slot), slot
        if documents is not None:
            begins = F.pad(documents[:, 1:] != documents[:, :-1], (1, 0), value=True)
            document = begins.long().cumsum(-1) - 1
            place = slot - torch.where(begins, slot, 0).cummax(-1).values
            real = real & (documents >= 0)
        rows = max(real.shape[0], document.shape[0])
        real, document, place = (value.expand(rows, -1) for value in (real, document, place))
        ends = (place % self.block == self.block - 1) & real
        full = torch.zeros_like(document).scatter_add(1, document, ends.long())  # side tokens of each document
        before = full.cumsum(-1) - full
        mine, first = full.gather(1, document), before.gather(1, document)
        own = first + torch.minimum(place // self.block, mine - 1)
        hidden = ~real | (mine == 0)
        # Padding sees none, so that no softmax meets a side token of another text.
        return own.masked_fill(hidden, count), first, torch.where(real, first + mine, first)


@part("mixer", "transient-global")
class TransientGlobal(Near):
    """Self-attention within a window and to side tokens that sum up blocks of the text."""

    class Config(Near.Config):
        """A window and side tokens."""

        block: int = field("places that make one side token", 16, gt=0, tiny=4)
        side_position: PositionSlot = field("how side tokens know places, with weights of its own", positions.INHERIT)
        side_norm: NormSlot = field("norm of the sums", norms.INHERIT)

    def __init__(self, config: Config, scope: Scope) -> None:
        super().__init__(config, scope)
        self.side_norm = make_norm(scope, "side_norm", config.side_norm)

    def look(self, config: Any, scope: Scope, bias: int | None) -> None:
        inherited = config.side_position.kind == "inherit"
        position = (scope.position or positions.NONE) if inherited else config.side_position
        side = None
        if part_of(position).reach == "bias":
            side = scope.shared.bias(position, scope.at("", head_dim=self.head_dim), self.heads, "side tokens")
            if not getattr(scope.shared.biases[side], "slides", False):
                raise Impossible("side_position", "this bias is not one of the distance alone", "use t5 or alibi")
        elif not inherited and position.kind != "none":
            raise Impossible("side_position", f"'{position.kind}' adds no bias", "use t5, alibi or none")
        self.more, self.biased = (config.block, side), () if side is None else (side,)
        self.sees = f"1 side token for every {config.block} places, which all queries see"
        super().look(config, scope, bias)

    def lay_out(self, *sizes: Any) -> nn.Module:
        return SideLayout(*sizes)

    def pairs(self, length: int) -> int:
        """How many keys, side tokens among them, all queries of a text see together."""
        slot = torch.arange(length)
        radius, gap = self.rule.left, self.rule.dilation
        before, after = slot.clamp(max=radius) // gap, (length - 1 - slot).clamp(max=radius) // gap
        return int((before + after + 1).sum()) + length * (length // int(self.more[0]))

    def forward(self, x: Tensor, ctx: Ctx) -> Tensor:
        """x (B, T, dim) -> (B, T, dim)."""
        band, sides = ctx.layouts[self.layout]
        q, k, v = self.queries_keys_values(x, ctx)
        aside = None
        if sides is not None:
            sums = self.side_norm(sides.sums(x))
            keys, values = self.k_norm(self.split(self.k(sums), self.groups)), self.split(self.v(sums), self.groups)
            aside = Aside(keys, values, sides.mask)
            if sides.block is not None and sides.bias is not None:
                aside = replace(aside, run=sides.block, runs=sides.runs)
        dropout = self.rate if self.training else 0.0
        return self.leave(band.attend(self.kernel, q, k, v, aside, self.scale, dropout), x, ctx)
