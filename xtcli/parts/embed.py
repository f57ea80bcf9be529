"""Embeddings: what enters the network -> x (B, T, D).

    tokens      x = dropout(norm(token table * scale + positions + segments))
    factorised  the same in a narrow width, and a projection to dim on the way (Lan et al. 2019, arXiv:1909.11942)

Absolute positions are a slot of their own:

    learned      a table; the place p reads row p + offset
    sinusoidal   fixed waves, sin half | cos half (or interleaved), of geometric frequencies
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Annotated, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from xtcli import registry
from xtcli.parts import norms
from xtcli.parts.context import Ctx
from xtcli.parts.linear import Linear, Table
from xtcli.parts.norms import NormSlot, make_norm
from xtcli.parts.scope import Impossible, Scope
from xtcli.parts.segments import QUESTION, behind
from xtcli.registry import Config, Slot, field, part


@part("absolute", "none")
class NoPlaces(nn.Module):
    """Nothing is added."""

    limit: int | None = None

    class Config(registry.Config):
        """No absolute positions."""

    def __init__(self, config: Config, scope: Scope) -> None:
        super().__init__()

    def forward(self, x: Tensor, places: Tensor) -> Tensor:
        return x


@part("absolute", "learned")
class LearnedPlaces(nn.Module):
    """A learned vector for each place; `limit` is how many there are."""

    class Config(registry.Config):
        """Learned absolute positions."""

        offset: int = field("place p reads row p + offset; the rows before are kept but idle", 0, ge=0)
        clamp: bool = field("places beyond the last read its row; false: there are none", False)
        dropout: float = field("dropout of these vectors before they are added", 0.0, ge=0, lt=1)

    def __init__(self, config: Config, scope: Scope) -> None:
        super().__init__()
        if scope.context is None:
            raise Impossible("", "learned positions need model.context, the number of places")
        self.offset = config.offset
        self.last = scope.context - 1 if config.clamp else None
        self.limit = None if config.clamp else scope.context
        self.table = Table(scope.context + config.offset, scope.dim)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, places: Tensor) -> Tensor:
        rows = self.table((places if self.last is None else places.clamp(max=self.last)) + self.offset)
        return x + self.dropout(rows.expand(x.shape[0], -1, -1) if self.dropout.p else rows)  # type: ignore[no-any-return]


@part("absolute", "sinusoidal")
class SinusoidalPlaces(nn.Module):
    """Fixed waves: frequencies 10000^(-2i/D), or exp(-i ln 10000 / (D/2 - 1)) with `inclusive`."""

    limit: int | None = None

    class Config(registry.Config):
        """Fixed sinusoidal positions (Vaswani et al. 2017)."""

        offset: int = field("place p gets the wave of p + offset", 0, ge=0)
        inclusive: bool = field("the last frequency is exactly 1 / 10000", False)
        layout: Literal["halves", "interleaved"] = field("sines then cosines, or in turn", "halves")

    def __init__(self, config: Config, scope: Scope) -> None:
        super().__init__()
        if scope.dim % 2:
            raise Impossible("", f"sinusoidal positions need an even dim, not {scope.dim}")
        self.config, self.width = config, scope.dim // 2

    def forward(self, x: Tensor, places: Tensor) -> Tensor:
        steps = torch.arange(self.width, device=x.device).float()
        last = self.width - 1 if self.config.inclusive else self.width
        angles = (places + self.config.offset)[..., None].float() * torch.exp(-math.log(10000.0) / last * steps)
        waves = (angles.sin(), angles.cos())
        table = torch.cat(waves, -1) if self.config.layout == "halves" else torch.stack(waves, -1).flatten(-2)
        return x + table.to(x.dtype)


AbsoluteSlot = Annotated[Config, Slot("absolute")]


class Embedding(nn.Module):
    """What enters a tower. `reads` names the inputs of its own that it finds in `ctx.extras`.

    `tokens` is the token table, None where it belongs to another part; `limit` the most places there are, `places` how
    many there are where inputs have one size, such as images.
    """

    reads: tuple[str, ...] = ()
    tokens: nn.Module | None
    limit: int | None
    places: int | None = None  # of x, where the inputs are of one size

    def size(
        self, ids: Tensor | None, vectors: Tensor | None, extras: Mapping[str, Tensor]
    ) -> tuple[int, int, torch.device]:
        """Rows and tokens that x will have, and where the inputs are."""
        given = ids if ids is not None else vectors
        if given is None:
            raise ValueError("neither input_ids nor inputs_embeds were given")
        if ids is not None and vectors is not None:
            raise ValueError("input_ids and inputs_embeds are the same text, and both were given; leave one out")
        return given.shape[0], given.shape[1], given.device

    def blank(self, rows: int, length: int, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
        """Inputs of the size of `rows` texts of `length` places, for measuring."""
        return {"input_ids": torch.zeros(rows, length, dtype=torch.long, device=device)}


def longest_text(model: nn.Module) -> int | None:
    """The most tokens that every part of a model can tell apart; what reads no text does not count."""
    sized = [module for module in model.modules() if isinstance(module, Embedding) and module.places is not None]
    inside = {id(part) for module in sized for part in module.modules()}
    limits = (getattr(module, "limit", None) for module in model.modules() if id(module) not in inside)
    return min((limit for limit in limits if isinstance(limit, int)), default=None)


@part("embed", "tokens")
class Tokens(Embedding):
    """Token ids (or vectors given in their place), positions and segments, normed and dropped out.

    `shares` is True where the table belongs to another part and comes with the context. `look_up` reads its rows;
    another that gives the same may stand in its place.
    """

    look_up: Callable[[Tensor, Tensor], Tensor] = staticmethod(F.embedding)

    class Config(registry.Config):
        """Token, position and segment embeddings."""

        positions: AbsoluteSlot = field("absolute positions", NoPlaces.Config())
        segments: int | Literal["tokens", "scores", "unread"] | None = field(
            "rows of a segment table; 'tokens' reads segment ids from the token table, 'scores' leaves them to mixers",
            None,
        )
        separator: int | None = field(
            "id of the token that ends the first text: where no segments are given, what follows it is segment 1",
            None,
            ge=0,
            tiny=511,
        )
        scale: float | Literal["sqrt-dim"] = field("multiplies token vectors", 1.0)
        scale_given: bool = field("multiplies vectors given in place of ids too", True)
        token_dropout: float = field("dropout of token vectors before anything is added", 0.0, ge=0, lt=1)
        norm: NormSlot = field("norm of the sum", norms.NONE)
        dropout: float | None = field("dropout of the sum; null = model.dropout", None, ge=0, lt=1)

    def __init__(
        self,
        config: Config,
        scope: Scope,
        shares: bool = False,
        summed: Scope | None = None,
        normed: Scope | None = None,
    ) -> None:
        """`summed` and `normed` are the scopes of what is added and of the norm where `scope` has another width."""
        super().__init__()
        summed, normed = summed or scope, normed or scope
        self.tokens = None if shares else Table(scope.vocab, scope.dim)
        self.scale = math.sqrt(scope.dim) if config.scale == "sqrt-dim" else float(config.scale)
        self.scale_given = self.scale if config.scale_given else 1.0
        self.positions = summed.make("positions", config.positions)
        if isinstance(config.segments, int) and config.segments < 1:
            raise Impossible("segments", f"is {config.segments}, and a table has one row or more", "null: no segments")
        self.segments = Table(config.segments, summed.dim) if isinstance(config.segments, int) else None
        self.segments_read_tokens = config.segments == "tokens"
        self.segments_pass = config.segments in ("scores", "unread")
        self.separator = config.separator
        if config.separator is not None:
            self.reads = (QUESTION,)
        self.token_dropout = nn.Dropout(config.token_dropout)
        self.norm = make_norm(normed, "norm", config.norm)
        self.dropout = nn.Dropout(scope.dropout if config.dropout is None else config.dropout)

    @property
    def limit(self) -> int | None:  # type: ignore[override]
        """The most places there are, or None."""
        return self.positions.limit  # type: ignore[return-value]

    def read(self, ids: Tensor | None, vectors: Tensor | None, ctx: Ctx) -> Tensor:
        """The vectors of the tokens, scaled."""
        x = self.look_up(ids, ctx.table) if vectors is None else vectors  # type: ignore[arg-type]
        scale = self.scale if vectors is None else self.scale_given
        return self.token_dropout(x * scale if scale != 1.0 else x)  # type: ignore[no-any-return]

    def add(self, x: Tensor, segments: Tensor | None, ctx: Ctx) -> Tensor:
        """x with positions and segments."""
        counted = getattr(self.positions, "counted", None)
        x = self.positions(x, ctx.positions if counted is None else counted(ctx))
        if segments is None and self.separator is not None:
            segments = behind(ctx.ids, ctx.extras, self.separator, x.shape[1])
        if self.segments is not None:
            return x + (self.segments.weight[0] if segments is None else self.segments(segments))
        if self.segments_read_tokens and segments is not None:
            return x + F.embedding(segments, ctx.table)  # type: ignore[arg-type]
        if segments is not None and not self.segments_pass:
            raise ValueError("token_type_ids were given, but this architecture has no segments")
        return x

    def unprojected(self, ids: Tensor | None, vectors: Tensor | None, segments: Tensor | None, ctx: Ctx) -> Tensor:
        """All but a projection: ids (B, T) or vectors (B, T, E); segments (B, T) or None for segment 0 -> (B, T, E)."""
        return self.dropout(self.norm(self.add(self.read(ids, vectors, ctx), segments, ctx)))  # type: ignore[no-any-return]

    def forward(self, ids: Tensor | None, vectors: Tensor | None, segments: Tensor | None, ctx: Ctx) -> Tensor:
        """ids (B, T) or vectors (B, T, D); segments (B, T) or None for segment 0 -> (B, T, D)."""
        return self.unprojected(ids, vectors, segments, ctx)


STAGES = ("tokens", "sum", "norm", "dropout")


@part("embed", "factorised")
class Factorised(Tokens):
    """A narrow token table, E wide, and a projection to the width of the model; `width` is E.

    What stands before the projection is E wide: the token table always, then positions and segments, then the norm.
    Vectors given in place of ids are E wide.
    """

    class Config(Tokens.Config):
        """Token, position and segment embeddings in a width of their own, projected to dim."""

        width: int | None = field("width of the token table's rows; null = dim", None, gt=0, tiny=32, example=64)
        project_after: Literal["tokens", "sum", "norm", "dropout"] = field(
            "the step behind which the projection stands: token vectors, positions and segments, norm, dropout",
            "dropout",
        )
        project_bias: bool = field("adds a bias to the projection", True)

    def __init__(self, config: Config, scope: Scope, shares: bool = False) -> None:
        stage = STAGES.index(config.project_after)
        width = config.width or scope.dim
        narrow = scope.at("", dim=width)
        super().__init__(config, narrow, shares, narrow if stage > 0 else scope, narrow if stage > 1 else scope)
        if shares and width != (scope.table or scope.dim):
            raise Impossible("width", f"is {width}, the shared token table's is {scope.table or scope.dim}")
        if stage == 0 and self.segments_read_tokens:
            raise Impossible("segments", "'tokens' adds rows of the token table, which are projected before the sum")
        self.width, self.stage = width, stage
        self.project = Linear(width, scope.dim, config.project_bias)

    def forward(self, ids: Tensor | None, vectors: Tensor | None, segments: Tensor | None, ctx: Ctx) -> Tensor:
        """ids (B, T) or vectors (B, T, E); segments (B, T) or None for segment 0 -> (B, T, D)."""
        x = self.lift(0, self.read(ids, vectors, ctx))
        x = self.lift(1, self.add(x, segments, ctx))
        return self.lift(3, self.dropout(self.lift(2, self.norm(x))))

    def lift(self, stage: int, x: Tensor) -> Tensor:
        """x, projected where this is the stage for it."""
        return self.project(x) if stage == self.stage else x
