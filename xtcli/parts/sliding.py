"""A sliding window with global tokens (Beltagy et al. 2020, Longformer, arXiv:2004.05150).

    local query    softmax over [the global tokens, the window without them], all with q, k, v
    global query   softmax over the whole text with q_global, k_global, v_global, in place of that

Which tokens are global is data: the input `global_attention_mask` (B, T), 1 for global. Without it the field
`globals` decides. An attention mask of 2 makes a token global as well. Padding is never global, and its own output
is nothing but the output's bias. Cost is linear in the length for a fixed number of global tokens (bands.py).

Axes as in bands.py; E global tokens of a row, filled up to the largest number in the batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from xtcli.parts import blockmasks, routes
from xtcli.parts.bands import Aside, Band, Whole, WindowLayout
from xtcli.parts.blockmasks import lasting
from xtcli.parts.context import Ctx, Visible
from xtcli.parts.linear import Linear, narrowed
from xtcli.parts.local import Near
from xtcli.parts.masks import keys_only
from xtcli.parts.scope import Impossible, Scope
from xtcli.registry import field, part

Globals = Literal["none", "first", "before-separator", "after-separator"]


@dataclass(frozen=True)
class Marked:
    """The global tokens: `places` (B, E), T where a row has fewer, `real` (B, E), and what the queries see of
    them, (B, 1, 1|T, E)."""

    places: Tensor
    real: Tensor
    seen: Tensor

    def pick(self, x: Tensor) -> Tensor:
        """x (B, ..., T, D) at the global tokens, (B, ..., E, D)."""
        length = x.shape[-2]
        index = self.places.clamp(max=length - 1).reshape(-1, *[1] * (x.dim() - 3), self.places.shape[1], 1)
        return x.gather(-2, index.expand(*x.shape[:-2], -1, x.shape[-1]))

    def put(self, y: Tensor, found: Tensor) -> Tensor:
        """y (B, H, T, D) with `found` (B, H, E, D) in place of what stood at the global tokens."""
        index = self.places[:, None, :, None].expand_as(found)
        # Tokens that fill up a row go to a place behind the text.
        return nn.functional.pad(y, (0, 0, 0, 1)).scatter(2, index, found)[:, :, :-1]


class MarkedLayout(WindowLayout):
    """A window without the global tokens, and those."""

    def __init__(
        self, radius: int, dilation: int, bias: int | None, free: bool, width: int, usual: Globals, separator: int
    ) -> None:
        super().__init__(radius, dilation, bias, free, width)
        self.usual, self.separator = usual, separator

    def lay(self, x: Tensor, ctx: Ctx, biases: Any) -> tuple[Band | Whole, Marked | None]:  # type: ignore[override]
        """The band and the global tokens for queries x (B, T, dim); None where no token of the batch is global."""
        first = self.usual == "first" and ctx.extras.get("global_attention_mask") is None
        plain = ctx.mask is None and ctx.keep is None and ctx.documents is None
        if first and plain and self.free and routes.suits(x):
            return lasting(_first_alone(self.radius, self.dilation, self.width, *x.shape[:2], x.device))
        found, length = self.find(x, ctx), x.shape[1]
        if ctx.mask is not None and (ctx.mask.is_meta or bool((ctx.mask > 1).any())):
            found, first = ctx.mask > 1 if found is None else found | (ctx.mask > 1), False
        if found is not None and ctx.keep is not None:
            found = found & ctx.keep
        if found is None:
            count = 0
        elif first or found.is_meta:
            # Else how many there are is in the data, which the meta device has none of.
            count = 1
        else:
            count = int(found.sum(1).max())
        if found is None or not count:
            return super().lay(x, ctx, biases), None
        keys = ~found if ctx.keep is None else ctx.keep & ~found
        slots = torch.arange(length, device=x.device)
        places = torch.where(found, slots, length).sort(1).values[:, :count]
        real = places < length
        seen = real[:, None, None, :]
        if ctx.documents is not None:
            theirs = ctx.documents.expand(len(places), -1).gather(1, places.clamp(max=length - 1))
            seen = seen & (ctx.documents[:, None, :, None] == theirs[:, None, None, :])
        marked = Marked(places, real, seen)
        if self.free and routes.suits(x):
            return self.whole(x, ctx, found.expand(x.shape[0], -1), (places, seen)), marked
        return self.band(x, ctx, biases, keys), marked

    def find(self, x: Tensor, ctx: Ctx) -> Tensor | None:
        """The global tokens (B, T), those of padding among them; None where there are none."""
        given = ctx.extras.get("global_attention_mask")
        if given is not None:
            if given.shape != x.shape[:2]:
                raise ValueError(f"global_attention_mask has shape {tuple(given.shape)}, expected {tuple(x.shape[:2])}")
            return given > 0
        if self.usual == "none" or (ctx.ids is None and self.usual != "first"):
            return None
        place = torch.arange(x.shape[1], device=x.device)
        if self.usual == "first":
            return (place == 0).expand(x.shape[:2])
        assert ctx.ids is not None
        ends = ctx.ids == self.separator
        count = ends.sum(1, keepdim=True)
        if not ends.is_meta and not bool(((count == 2) | (count == 3)).all()):
            raise ValueError(
                f"which tokens are global is told by the separator {self.separator}, of which every text has two or "
                "three: one or two between its parts and one at its end; give global_attention_mask where it has not"
            )
        first = ends.int().argmax(1)[:, None]
        return place < first if self.usual == "before-separator" else place > first + count - 2


@part("mixer", "sliding-global")
class SlidingGlobal(Near):
    """Self-attention within a window, and over everything for some tokens."""

    reads = ("global_attention_mask",)

    class Config(Near.Config):
        """A sliding window and global tokens."""

        globals: Globals = field(
            "global tokens where global_attention_mask is not given: none, the first, those before the separators "
            "between two parts (a question), or behind them (a choice)",
            "none",
        )
        separator: int = field("id of the separator", 2, ge=0, tiny=511)

    def __init__(self, config: Config, scope: Scope) -> None:
        super().__init__(config, scope)
        wide, narrow = self.heads * self.head_dim, self.groups * self.head_dim
        self.q_global = Linear(scope.dim, wide, config.bias, "query")
        self.k_global = Linear(scope.dim, narrow, config.bias)
        self.v_global = Linear(scope.dim, narrow, config.bias)

    def look(self, config: Any, scope: Scope, bias: int | None) -> None:
        if bias is not None or isinstance(self.turn_keys, partial) or isinstance(self.place, nn.Module):
            raise Impossible(
                "position", "global tokens see all places alike: attention has no positions here", "set position: none"
            )
        self.more = (config.globals, config.separator)
        self.sees = "tokens of global_attention_mask see everything and are seen by all"
        if config.globals != "none":
            self.sees += f"; without it those that `globals: {config.globals}` names"
        super().look(config, scope, bias)

    def lay_out(self, *sizes: Any) -> nn.Module:
        return MarkedLayout(*sizes)

    def forward(self, x: Tensor, ctx: Ctx) -> Tensor:
        """x (B, T, dim) -> (B, T, dim)."""
        band, marked = ctx.layouts[self.layout]
        q, k, v = self.queries_keys_values(x, ctx)
        if marked is None:
            return self.leave(band.attend(self.kernel, q, k, v), x, ctx)
        near = band.near(q) if isinstance(band, Whole) else None
        if near is not None:
            q, k, v = narrowed(q, k, v)
            y = near.attend_beside(q, k, v, self.scale, self.everywhere(x, marked, ctx))
        else:
            aside = Aside(marked.pick(k), marked.pick(v), lambda start, stop: rows(marked.seen, start, stop))
            y = band.attend(self.kernel, q, k, v, aside)
            y = marked.put(y, self.everywhere(x, marked, ctx))
        return self.leave(y, x, ctx)

    def everywhere(self, x: Tensor, marked: Marked, ctx: Ctx) -> Tensor:
        """What the global tokens find in the whole text, (B, H, E, D)."""
        q = self.q_norm(self.split(self.q_global(marked.pick(x)), self.heads))
        k = self.k_norm(self.split(self.k_global(x), self.groups))
        v = self.split(self.v_global(x), self.groups)
        seen = keys_only(ctx.keep)
        if ctx.documents is not None:
            # Padding stands in for tokens that fill up a row: it sees what has its own document.
            own = marked.seen.transpose(-1, -2) | ~marked.real[:, None, :, None]
            seen = Visible(own if seen.mask is None else own & seen.mask)
        return self.kernel(q, k, v, seen)


@lru_cache(maxsize=16)
def _first_alone(
    radius: int, dilation: int, width: int, batch: int, length: int, device: torch.device
) -> tuple[Whole, Marked]:
    """The window and the first token of each row, where nothing hides a key."""
    # Of use in training later, though made for a model that is only read.
    with torch.inference_mode(False):
        slots = torch.arange(length, device=device)[None]
        places = torch.zeros(batch, 1, dtype=torch.long, device=device)
        real = torch.ones_like(places, dtype=torch.bool)
        seen, found = real[:, None, None, :], (slots == 0).expand(batch, -1)
        ctx = Ctx(positions=slots, keys=slots)
        blocks = blockmasks.around(radius, dilation, found, None, ctx, width, (places, seen))
    return Whole(blocks), Marked(places, real, seen)


def rows(mask: Tensor, start: int, stop: int) -> Tensor:
    """The rows of a mask (B, 1, 1|T, E) for these queries."""
    return mask if mask.shape[2] == 1 else mask[:, :, start:stop]
