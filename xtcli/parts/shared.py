"""What the attentions of one stack make once per call instead of once per layer.

While a stack is built its attentions ask for rotations, additive biases and masks; equal wishes get
the same number. At each call `Shared.prepare` computes every distinct one and puts them in the
context, where layer code finds them by number.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from xtcli.parts import blockmasks, routes
from xtcli.parts.context import Ctx, Visible
from xtcli.parts.masks import check_length, limit, render
from xtcli.parts.scope import Impossible, Scope
from xtcli.parts.scores import Sizes
from xtcli.parts.slides import Sliding, slide
from xtcli.registry import Config, part_of


@dataclass(frozen=True)
class View:
    """One distinct mask of a stack: a rule, the bias joined to it, whether it must be stored, and whether it may be one
    by blocks."""

    rule: Config
    bias: int | None
    dense: bool
    blocks: bool = False
    sliding: bool = False


class Shared(nn.Module):
    """The rotations, biases and views of one stack, and the order in which its attentions carry scores.

    `carries` is false in a stack that runs a block more than once in a pass, recomputes it backwards or changes the
    number of tokens on the way: no scores can travel between its layers.
    """

    def __init__(self, carries: bool = True) -> None:
        super().__init__()
        self.carries = carries
        self.turns = nn.ModuleList()
        self.biases = nn.ModuleList()
        self.layouts = nn.ModuleList()
        self.views: list[View] = []
        self.chunks: list[int] = []  # lengths of the chunks that attentions cut a text into
        self._known: dict[object, int] = {}
        self._chains: dict[bool, tuple[str, list[Sizes]]] = {}

    def turn(self, config: Config, scope: Scope, head_dim: int) -> int:
        """The number of a rotation of `head_dim` wide heads."""
        return self._enter(self.turns, ("turn", config, head_dim), lambda: scope.make("position", config, head_dim))

    def bias(self, config: Config, scope: Scope, heads: int, use: str = "") -> int:
        """The number of an additive bias for `heads` heads; biases of different use are never one."""
        width = scope.head_dim if _reads_width(config) else None
        key = ("bias", config, heads, width, use)
        return self._enter(self.biases, key, lambda: scope.make("position", config, heads))

    def layout(self, key: object, make: Callable[[], nn.Module]) -> int:
        """The number of a layout: what attentions over few keys find out about a text once, whatever the layer.

        Its `lay(x, ctx, biases)` is called with what enters the stack.
        """
        return self._enter(self.layouts, ("layout", key), make)

    def table(self, key: object, make: Callable[[], nn.Module]) -> int:
        """The number, among the rotations, of another module with `tables(ctx, dtype)`, made once for each `key`."""
        return self._enter(self.turns, key, make)

    def view(self, rule: Config, bias: int | None, dense: bool, blocks: bool = False, sliding: bool = False) -> int:
        """The number of a mask. `blocks`: it goes to `kernels.fused` as it is, without dropout. `sliding`: it goes
        there as it is, with heads that the kernels for biases of a distance take."""
        view = View(rule, bias, dense, blocks, sliding)
        if view not in self.views:
            self.views.append(view)
        return self.views.index(view)

    def link(self, scope: Scope, sizes: Sizes) -> tuple[str, int]:
        """The name of the chain that an attention with carried scores belongs to, and its place in it.

        Self- and cross-attentions have a chain each. Raises Impossible where scores cannot be carried on.
        """
        if not self.carries:
            cause = "the layers of this stack do not follow each other once, so that no scores can be carried"
            raise Impossible("", cause, "use another kind of score or stack")
        name, members = self._chains.setdefault(sizes.cross, (f"scores {scope.path} {scope.layer}", []))
        if members and members[0] != sizes:
            first = members[0]
            raise Impossible(
                "",
                f"scores of {first.heads} heads and {first.memory} persistent keys cannot be carried on to "
                f"{sizes.heads} heads and {sizes.memory} persistent keys",
                "give all layers as many heads and persistent keys",
            )
        members.append(sizes)
        return name, len(members) - 1

    @property
    def limit(self) -> int | None:
        """The most tokens that the biases can tell apart and the masks are made for, or None."""
        limits = (*(getattr(bias, "limit", None) for bias in self.biases), *(limit(view.rule) for view in self.views))
        return min((bound for bound in limits if bound is not None), default=None)

    def _enter(self, modules: nn.ModuleList, key: object, make: object) -> int:
        if key not in self._known:
            self._known[key] = len(modules)
            modules.append(make())  # type: ignore[operator]
        return self._known[key]

    def prepare(self, x: Tensor, ctx: Ctx) -> Ctx:
        """The context with all tables, for queries x (B, T, D)."""
        queries = x.shape[1]
        turns = tuple(turn.tables(ctx, x.dtype) for turn in self.turns)  # type: ignore[operator]
        suits = routes.suits(x)
        by_blocks = [
            suits and view.blocks and routes.by_blocks(view.rule, view.bias, ctx, queries) for view in self.views
        ]
        by_distance = [view.sliding and routes.by_distance(view.rule, x, ctx) for view in self.views]
        # What is stored for all pairs of a text, once for all views that read it.
        ways = list(zip(self.views, by_blocks, by_distance, strict=True))
        stored = dict.fromkeys(view.bias for view, block, slides in ways if not (block or slides))
        biases = {n: self.biases[n].scores(ctx, queries).to(x.dtype) for n in stored if n is not None}  # type: ignore[operator]
        visible = tuple(
            self.by_distance(view, ctx, queries)
            if slides
            else self.by_blocks(view, ctx, x.shape[0])
            if block
            else render(view.rule, ctx, queries, None if view.bias is None else biases[view.bias], view.dense)
            for view, block, slides in ways
        )
        layouts = tuple(layout.lay(x, ctx, self.biases) for layout in self.layouts)  # type: ignore[operator]
        return replace(ctx, turns=turns, visible=visible, layouts=layouts)

    def by_distance(self, view: View, ctx: Ctx, queries: int) -> Visible:
        """A view whose bias is left as one value for each distance."""
        check_length(view.rule, ctx)
        row = self.biases[view.bias].row(ctx, queries)  # type: ignore[index, operator]
        return Visible(sliding=Sliding.of(row, ctx.keep, view.rule.kind == "causal"))

    def by_blocks(self, view: View, ctx: Ctx, rows: int) -> Visible:
        """A view of `rows` texts as a mask by blocks."""
        check_length(view.rule, ctx)
        blocks = blockmasks.of_rule(view.rule, ctx, rows)
        if view.bias is not None:
            scores, looks = self.biases[view.bias].by_pair(ctx, rows)  # type: ignore[operator]
            blocks = replace(blocks, scores=scores, looks=looks or blocks.looks)
        return Visible(blocks=blocks)


def _reads_width(config: Config) -> bool:
    """Whether a bias depends on the width of the heads that it is made for."""
    own = getattr(config, "scaled", False) or getattr(part_of(config), "reads_width", False)
    return own or any(_reads_width(member) for member in getattr(config, "of", ()))


def slid(values: Callable[[Tensor], Tensor], ctx: Ctx, queries: int) -> Tensor:
    """A bias (B|1, H, T, S) from its values: distances of slots (N,) -> (N, H).

    Behind memory tokens distances are those of places, as in `slot_distance`.
    """
    span = ctx.keys.shape[1]
    if ctx.prefix:
        steps = slot_distance(ctx, queries).clamp(1 - span, span - 1) + span - 1
        return values(torch.arange(1 - span, span, device=steps.device))[steps].permute(0, 3, 1, 2)
    # Slots lie in a row, so a pair's bias depends on its distance alone: one value a distance, slid over the rows.
    return slide(distances(values, ctx, queries), span)[None]


def distances(values: Callable[[Tensor], Tensor], ctx: Ctx, queries: int) -> Tensor:
    """The values of all distances of slots, from 1 - T to S - 1: (H, T + S - 1)."""
    span = ctx.keys.shape[1]
    return values(torch.arange(1 - queries - ctx.offset, span - ctx.offset, device=ctx.keys.device)).t()


def slot_distance(ctx: Ctx, queries: int) -> Tensor:
    """Key slot minus query slot, (1, T, S) int64.

    Behind memory tokens it is the distance of places, (B|1, T, S): padding that lies between them and the words of
    a row, or documents packed before, must not count.
    """
    if ctx.prefix:
        return ctx.keys[:, None, :] - ctx.positions[:, :, None]
    device = ctx.keys.device
    q = torch.arange(ctx.offset, ctx.offset + queries, device=device)
    return (torch.arange(ctx.keys.shape[1], device=device)[None, :] - q[:, None])[None]
