"""What the attentions of one stack make once per call instead of once per layer.

While a stack is built its attentions ask for rotations, additive biases and masks; equal wishes get
the same number. At each call `Shared.prepare` computes every distinct one and puts them in the
context, where layer code finds them by number.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from xtcli.parts.context import Ctx
from xtcli.parts.masks import render
from xtcli.parts.scope import Scope
from xtcli.registry import Config


@dataclass(frozen=True)
class View:
    """One distinct mask of a stack: a rule, the bias joined to it, and whether it must be stored."""

    rule: Config
    bias: int | None
    dense: bool


class Shared(nn.Module):
    """The rotations, biases and views of one stack."""

    def __init__(self) -> None:
        super().__init__()
        self.turns = nn.ModuleList()
        self.biases = nn.ModuleList()
        self.views: list[View] = []
        self._known: dict[object, int] = {}

    def turn(self, config: Config, scope: Scope, head_dim: int) -> int:
        """The number of a rotation of `head_dim` wide heads."""
        return self._enter(self.turns, ("turn", config, head_dim), lambda: scope.make("position", config, head_dim))

    def bias(self, config: Config, scope: Scope, heads: int) -> int:
        """The number of an additive bias for `heads` heads."""
        return self._enter(self.biases, ("bias", config, heads), lambda: scope.make("position", config, heads))

    def view(self, rule: Config, bias: int | None, dense: bool) -> int:
        """The number of a mask."""
        view = View(rule, bias, dense)
        if view not in self.views:
            self.views.append(view)
        return self.views.index(view)

    def _enter(self, modules: nn.ModuleList, key: object, make: object) -> int:
        if key not in self._known:
            self._known[key] = len(modules)
            modules.append(make())  # type: ignore[operator]
        return self._known[key]

    def prepare(self, x: Tensor, ctx: Ctx) -> Ctx:
        """The context with all tables, for queries x (B, T, D)."""
        queries = x.shape[1]
        turns = tuple(turn.tables(ctx, x.dtype) for turn in self.turns)  # type: ignore[operator]
        biases = [bias.scores(ctx, queries).to(x.dtype) for bias in self.biases]  # type: ignore[operator]
        visible = tuple(
            render(view.rule, ctx, queries, None if view.bias is None else biases[view.bias], view.dense)
            for view in self.views
        )
        return replace(ctx, turns=turns, visible=visible)


def slot_distance(ctx: Ctx, queries: int) -> Tensor:
    """Key slot minus query slot, (T, S) int64."""
    device = ctx.keys.device
    q = torch.arange(ctx.offset, ctx.offset + queries, device=device)
    return torch.arange(ctx.keys.shape[1], device=device)[None, :] - q[:, None]
