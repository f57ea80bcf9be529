"""Masks: an algebra of rules that say which keys a query may see.

    causal          k <= q
    full            everything
    window          -left <= k - q <= right, every `dilation`-th key
    all, any        intersection, union of rules

Rules speak of slots (places in the row as fed), so that padding on the left does not move a window.
Padding and document borders are data, not rules: `render` joins them to whatever the rule says.
A query that would see nothing (padding) sees itself, or all of a text that is nothing but padding, so that no softmax
is empty.
"""

from __future__ import annotations

from functools import reduce
from typing import Annotated, Any

import torch
from pydantic import Strict
from torch import Tensor

from xtcli import registry
from xtcli.errors import refuse
from xtcli.parts.context import Ctx, Visible
from xtcli.registry import Config, Slot, field, part, part_of

MaskSlot = Annotated[Config, Slot("mask")]

Ends = tuple[Tensor, Tensor]
"""The first and the last slots of blocks: (N, 1) of queries, (1, M) of keys."""


class Mask:
    """A rule made from its config: static methods only, since rules hold no parameters.

    `aligned`: what a query sees depends on the slot it stands in, and not on distances alone.
    """

    aligned = False

    @staticmethod
    def allowed(rule: Any, q: Tensor, k: Tensor) -> Tensor:
        """True where a query in slot `q` (T, 1) may see a key in slot `k` (1, S)."""
        raise AssertionError("a mask kind must say what it allows")

    @staticmethod
    def ahead(rule: Any) -> bool:
        """Whether a query may see keys behind it."""
        return True

    @staticmethod
    def bounds(rule: Any, q: Ends, k: Ends) -> tuple[Tensor, Tensor]:
        """For blocks of slots: whether one pair may be seen, and whether all are. The first may be True where none is,
        the second False where all are, as here, where nothing is known."""
        unknown = torch.ones_like(q[0], dtype=torch.bool) & torch.ones_like(k[0], dtype=torch.bool)
        return unknown, ~unknown

    @staticmethod
    def stretch(rule: Any) -> tuple[int | None, int | None] | None:
        """Slots seen to the left and to the right where all between are (None: to the end), or None."""
        return None


@part("mask", "causal")
class Causal(Mask):
    """Only the past and oneself."""

    class Config(registry.Config):
        """Only the past and oneself."""

        most: int | None = field("texts of more tokens are refused; null: of any length", None, gt=0, tiny=128)

    @staticmethod
    def allowed(rule: Any, q: Tensor, k: Tensor) -> Tensor:
        return k <= q

    @staticmethod
    def ahead(rule: Any) -> bool:
        return False

    @staticmethod
    def bounds(rule: Any, q: Ends, k: Ends) -> tuple[Tensor, Tensor]:
        return k[0] <= q[1], k[1] <= q[0]

    @staticmethod
    def stretch(rule: Any) -> tuple[int | None, int | None] | None:
        return None, 0


@part("mask", "full")
class Full(Mask):
    """Everything."""

    class Config(registry.Config):
        """Every key."""

    @staticmethod
    def allowed(rule: Any, q: Tensor, k: Tensor) -> Tensor:
        return torch.ones_like(q, dtype=torch.bool) & torch.ones_like(k, dtype=torch.bool)

    @staticmethod
    def bounds(rule: Any, q: Ends, k: Ends) -> tuple[Tensor, Tensor]:
        seen = Full.allowed(rule, q[0], k[0])
        return seen, seen

    @staticmethod
    def stretch(rule: Any) -> tuple[int | None, int | None] | None:
        return None, None


@part("mask", "inherit")
class Inherited(Mask):
    """A stand-in for what the graph implies."""

    class Config(registry.Config):
        """Causal in a decoder, full in an encoder."""


INHERIT: Config = Inherited.Config()
CAUSAL: Config = Causal.Config()
FULL: Config = Full.Config()


@part("mask", "window")
class Window(Mask):
    """A band around the query."""

    class Config(registry.Config):
        """Keys at most `left` slots before and `right` slots after the query."""

        left: int = field("slots before the query", ge=0, tiny=16, example=3)
        right: int = field("slots after the query", 0, ge=0, tiny=16)
        dilation: int = field("only every n-th slot of the band", 1, ge=1, tiny=2)

    @staticmethod
    def allowed(rule: Any, q: Tensor, k: Tensor) -> Tensor:
        step = k - q
        band: Tensor = (step >= -rule.left) & (step <= rule.right)
        return band & (step % rule.dilation == 0) if rule.dilation > 1 else band

    @staticmethod
    def ahead(rule: Any) -> bool:
        return bool(rule.right >= rule.dilation)

    @staticmethod
    def bounds(rule: Any, q: Ends, k: Ends) -> tuple[Tensor, Tensor]:
        least, most = k[0] - q[1], k[1] - q[0]
        some, every = between(least, most, -rule.left, rule.right)
        return some, every & ((least == most) | (rule.dilation == 1))

    @staticmethod
    def stretch(rule: Any) -> tuple[int | None, int | None] | None:
        return (rule.left, rule.right) if rule.dilation == 1 else None


@part("mask", "all")
class AllOf(Mask):
    """The intersection of rules."""

    class Config(registry.Config):
        """Keys that every rule allows."""

        of: Annotated[tuple[MaskSlot, ...], Strict(False)] = field(
            "the rules", example=("causal", {"kind": "window", "left": 2}), min_length=1
        )

    @staticmethod
    def allowed(rule: Any, q: Tensor, k: Tensor) -> Tensor:
        return reduce(torch.logical_and, (allowed(r, q, k) for r in rule.of))

    @staticmethod
    def ahead(rule: Any) -> bool:
        return all(ahead(one) for one in rule.of)

    @staticmethod
    def bounds(rule: Any, q: Ends, k: Ends) -> tuple[Tensor, Tensor]:
        some, every = zip(*(bounds(one, q, k) for one in rule.of), strict=True)
        return reduce(torch.logical_and, some), reduce(torch.logical_and, every)

    @staticmethod
    def stretch(rule: Any) -> tuple[int | None, int | None] | None:
        sides = [stretch(one) for one in rule.of]
        if None in sides:
            return None
        left, right = ([side for side in both if side is not None] for both in zip(*sides, strict=True))
        return min(left, default=None), min(right, default=None)


@part("mask", "any")
class AnyOf(Mask):
    """The union of rules."""

    class Config(registry.Config):
        """Keys that some rule allows."""

        of: Annotated[tuple[MaskSlot, ...], Strict(False)] = field(
            "the rules", example=("causal", {"kind": "window", "left": 2}), min_length=1
        )

    @staticmethod
    def allowed(rule: Any, q: Tensor, k: Tensor) -> Tensor:
        return reduce(torch.logical_or, (allowed(r, q, k) for r in rule.of))

    @staticmethod
    def ahead(rule: Any) -> bool:
        return any(ahead(one) for one in rule.of)

    @staticmethod
    def bounds(rule: Any, q: Ends, k: Ends) -> tuple[Tensor, Tensor]:
        some, every = zip(*(bounds(one, q, k) for one in rule.of), strict=True)
        return reduce(torch.logical_or, some), reduce(torch.logical_or, every)


def reach(rule: Any) -> int | None:
    """How many slots a rule looks back at most; None where nothing bounds it."""
    if rule.kind == "window":
        return int(rule.left)
    bounds = [reach(member) for member in rule.of] if rule.kind in ("all", "any") else []
    if rule.kind == "any":
        return None if None in bounds else max(bound for bound in bounds if bound is not None)
    return min((bound for bound in bounds if bound is not None), default=None)


def aligned(rule: Config) -> bool:
    """Whether a rule, or one that it is made of, depends on slots themselves."""
    return part_of(rule).aligned or any(aligned(one) for one in getattr(rule, "of", ()))


def limit(rule: Any) -> int | None:
    """The most tokens of a text for which a rule is made; None where it is made for any."""
    limits = [getattr(rule, "most", None), *(limit(member) for member in getattr(rule, "of", ()))]
    return min((bound for bound in limits if bound is not None), default=None)


def settled(rule: Any, causal: bool) -> Config:
    """The rule with what it inherits put in its place."""
    if rule.kind == "inherit":
        return CAUSAL if causal else FULL
    if hasattr(rule, "of"):
        rule = rule.model_copy(update={"of": tuple(settled(one, causal) for one in rule.of)})
    return rule  # type: ignore[no-any-return]


def ahead(rule: Config) -> bool:
    """Whether a query may see keys behind it."""
    return bool(part_of(rule).ahead(rule))


def allowed(rule: Config, q: Tensor, k: Tensor) -> Tensor:
    """True where `rule` lets slot `q` see slot `k`; broadcasts q against k."""
    seen: Tensor = part_of(rule).allowed(rule, q, k)
    return seen


def bounds(rule: Config, q: Ends, k: Ends) -> tuple[Tensor, Tensor]:
    """For blocks of slots: whether one pair may be seen, and whether all are, (N, M) each; see `Mask.bounds`."""
    return part_of(rule).bounds(rule, q, k)  # type: ignore[no-any-return]


def between(least: Tensor, most: Tensor, low: int, high: int) -> tuple[Tensor, Tensor]:
    """Whether a stretch of whole numbers meets `low` to `high`, and whether it lies within."""
    return (most >= low) & (least <= high), (least >= low) & (most <= high)


def stretch(rule: Config) -> tuple[int | None, int | None] | None:
    """Slots seen to the left and to the right where all between are (None: to the end), or None."""
    return part_of(rule).stretch(rule)  # type: ignore[no-any-return]


def check_length(rule: Config, ctx: Ctx) -> None:
    """Raise UserError for a text that the rule is not made for."""
    most, length = limit(rule), ctx.keys.shape[1] - ctx.prefix
    if most is not None and length > most:
        raise refuse(f"a text has {length} tokens, and the mask is made for {most}", "shorten it")


def render(rule: Config, ctx: Ctx, queries: int, bias: Tensor | None, dense: bool) -> Visible:
    """The rule, the padding, the documents and an additive bias as one mask for the kernel.

    `queries` is T; S is the width of `ctx.keys`. `dense` asks for a stored mask even where the
    kernel could do without. Raises UserError for a text that the rule is not made for.
    """
    span = ctx.keys.shape[1]
    check_length(rule, ctx)
    plain = ctx.keep is None and ctx.documents is None and bias is None and not dense
    if plain and rule.kind == "full":
        return Visible()
    if rule.kind == "full" and ctx.documents is None and bias is None and not dense:
        # One row for all queries, which kernels read as fast as none.
        return keys_only(ctx.keep)
    plain = plain and not ctx.prefix_reads
    if plain and rule.kind == "causal" and queries == 1:
        return Visible()
    if plain and rule.kind == "causal" and queries == span:
        return Visible(causal=True)
    device = ctx.keys.device
    q = torch.arange(ctx.offset, ctx.offset + queries, device=device)[:, None]
    k = torch.arange(span, device=device)[None, :]
    seen = allowed(rule, q, k)[None, None]  # (1, 1, T, S)
    if ctx.prefix:
        seen = seen | ((k < ctx.prefix) & (k <= q))
    if ctx.prefix_reads:
        seen = seen | (k < ctx.prefix) | (q < ctx.prefix)
    if ctx.documents is not None:
        own = ctx.documents[:, None, ctx.offset : ctx.offset + queries, None]
        seen = seen & ((own == ctx.documents[:, None, None, :]) | (k < ctx.prefix))
    if ctx.keep is not None:
        seen = seen & ctx.keep[:, None, None, :]
        seen = seen | (~seen.any(-1, keepdim=True) & (q == k))
    if bias is None:
        return Visible(seen)
    return Visible(bias.masked_fill(~seen, float("-inf")))


def keys_only(keep: Tensor | None) -> Visible:
    """The mask of cross-attention: every real key; (B, M) -> (B, 1, 1, M).

    A row without any real key sees all of them, so that no softmax is empty.
    """
    if keep is None:
        return Visible()
    return Visible((keep | ~keep.any(-1, keepdim=True))[:, None, None, :])
