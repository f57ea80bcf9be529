"""What masks, biases and rotations look like: their values over a grid of cells.

Rules and biases are rendered as in a forward pass over `length` tokens, a band of queries at a time, so that long
texts take no quadratic memory. A learned bias needs weights: those of a checkpoint, or else a table in which each
row has its own number, which shows the distances that share a row.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from xtcli.parts import masks
from xtcli.parts.context import Ctx
from xtcli.registry import Config

BAND = 2**22
"""Query-key pairs that are computed at once, for each head."""

Weights = Callable[[str], Tensor]
"""A tensor of a checkpoint by its name."""


@dataclass(frozen=True)
class MaskView:
    """One distinct mask: `grid` (cells, cells) of shares seen, queries down, keys across."""

    stack: str
    users: str
    rule: str
    length: int
    seen: float
    grid: Tensor


@dataclass(frozen=True)
class BiasView:
    """One distinct bias: `keys` (heads, cells) for the query at `query`, which are `low` to `high` before they are
    averaged; `grid` (cells, cells) of the first head."""

    stack: str
    users: str
    kind: str
    length: int
    query: int
    learned: str
    low: float
    high: float
    keys: Tensor
    grid: Tensor


@dataclass(frozen=True)
class TurnView:
    """One distinct rotation: `grid` (pairs, cells) of cosines by place; wavelengths in tokens."""

    stack: str
    users: str
    kind: str
    length: int
    pairs: int
    shortest: float
    longest: float
    grid: Tensor


def kind_of(module: nn.Module) -> str:
    """The kind of a part, or else the name of its class."""
    return getattr(getattr(type(module), "Config", None), "kind", "") or type(module).__name__


def mask_grid(rule: Config, length: int, cells: int) -> tuple[Tensor, float]:
    """The share of pairs seen in each of cells x cells cells, and of all pairs."""
    grid = _reduce(lambda ctx, queries: _seen(rule, ctx, queries), length, cells)
    weight = torch.bincount(_cell(length, cells), minlength=cells).double() / length
    return grid, float(weight @ grid.double() @ weight)


def _seen(rule: Config, ctx: Ctx, queries: int) -> Tensor:
    mask = masks.render(rule, ctx, queries, None, dense=True).mask
    assert mask is not None, "a dense mask is stored"
    return mask.float().mean(dim=(0, 1))


def bias_view(
    bias: nn.Module, stack: str, users: str, path: str, length: int, cells: int, weights: Weights | None
) -> BiasView:
    bias, learned = _filled(bias, path, weights)
    query = length - 1 if not getattr(bias, "both_sides", False) else length // 2
    with torch.no_grad():
        row = bias.scores(_ctx(length, query, 1), 1)[0, :, 0].float()  # type: ignore[operator]
        grid = _reduce(lambda ctx, n: bias.scores(ctx, n)[0, 0].float(), length, cells)  # type: ignore[operator]
    keys = row @ _averages(length, cells)
    return BiasView(stack, users, kind_of(bias), length, query, learned, float(row.min()), float(row.max()), keys, grid)


def is_numbered(bias: nn.Module) -> bool:
    """Whether all that a bias learns are tables, whose rows can be told apart by numbers."""
    return all(isinstance(module, nn.Embedding) for module in bias.modules() if list(module.parameters(recurse=False)))


def _filled(bias: nn.Module, path: str, weights: Weights | None) -> tuple[nn.Module, str]:
    """A copy with values, and where they come from: `trained`, `rows numbered`, or nothing to learn."""
    if not any(True for _ in bias.parameters()):
        return bias, ""
    real = copy.deepcopy(bias).to_empty(device="cpu").float()
    with torch.no_grad():
        for name, parameter in real.named_parameters():
            if weights is not None:
                parameter.copy_(weights(f"{path}.{name}").float())
            else:
                rows = torch.arange(parameter.shape[0], dtype=torch.float32)
                parameter.copy_(rows.reshape(-1, *[1] * (parameter.ndim - 1)).expand_as(parameter))
    return real, "rows numbered" if weights is None else "trained"


def turn_view(turn: nn.Module, stack: str, users: str, length: int, cells: int) -> TurnView:
    table: Any = turn.tables(_ctx(length, 0, length), torch.float32)  # type: ignore[operator]
    cos, sin = (
        table.cos.reshape(-1, length, table.cos.shape[-1])[0],
        table.sin.reshape(-1, length, table.sin.shape[-1])[0],
    )
    first = min(1, length - 1)
    angles = torch.atan2(sin[first], cos[first]).clamp(min=1e-12)
    waves = 2 * math.pi / angles
    grid = (cos.T @ _averages(length, cells)) if cells < length else cos.T
    return TurnView(
        stack, users, kind_of(turn), length, cos.shape[-1], float(waves.min()), float(waves.max()), grid.contiguous()
    )


def _ctx(length: int, start: int, queries: int) -> Ctx:
    places = torch.arange(length)[None]
    return Ctx(positions=places[:, start : start + queries], keys=places, offset=start)


def _cell(length: int, cells: int) -> Tensor:
    """The cell of each of `length` places."""
    return torch.arange(length) * cells // length


def _averages(length: int, cells: int) -> Tensor:
    """(length, cells): a row of values times this is the mean of each cell."""
    ones = torch.zeros(length, cells).index_put_((torch.arange(length), _cell(length, cells)), torch.tensor(1.0))
    return ones / ones.sum(0)


def _reduce(values: Callable[[Ctx, int], Tensor], length: int, cells: int) -> Tensor:
    """Means over cells of what `values(ctx, queries)` gives, (queries, keys), for all queries, band by band."""
    across = _averages(length, cells)
    total = torch.zeros(cells, cells)
    step = max(1, BAND // length)
    for start in range(0, length, step):
        queries = min(step, length - start)
        band = values(_ctx(length, start, queries), queries) @ across
        total.index_add_(0, _cell(length, cells)[start : start + queries], band)
    return total / torch.bincount(_cell(length, cells), minlength=cells)[:, None]
