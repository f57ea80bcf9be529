"""Embeddings: what enters the network -> x (B, T, D).

    tokens     x = dropout(norm(token table * scale + positions + segments))

Absolute positions are a slot of their own:

    learned      a table; the place p reads row p + offset
    sinusoidal   fixed waves, sin half | cos half (or interleaved), of geometric frequencies
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from xtcli import registry
from xtcli.parts import norms
from xtcli.parts.context import Ctx
from xtcli.parts.linear import Table
from xtcli.parts.norms import NormSlot, make_norm
from xtcli.parts.scope import Impossible, Scope
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

    def __init__(self, config: Config, scope: Scope) -> None:
        super().__init__()
        if scope.context is None:
            raise Impossible("", "learned positions need model.context, the number of places")
        self.offset = config.offset
        self.limit = scope.context
        self.table = Table(scope.context + config.offset, scope.dim)

    def forward(self, x: Tensor, places: Tensor) -> Tensor:
        return x + self.table(places + self.offset)  # type: ignore[no-any-return]


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

    `tokens` is the token table, None where it belongs to another part; `limit` the most places there are.
    """

    reads: tuple[str, ...] = ()
    tokens: nn.Module | None
    limit: int | None

    def size(
        self, ids: Tensor | None, vectors: Tensor | None, extras: Mapping[str, Tensor]
    ) -> tuple[int, int, torch.device]:
        """Rows and tokens that x will have, and where the inputs are."""
        given = ids if ids is not None else vectors
        if given is None:
            raise ValueError("neither input_ids nor inputs_embeds were given")
        return given.shape[0], given.shape[1], given.device


@part("embed", "tokens")
class Tokens(Embedding):
    """Token ids (or vectors given in their place), positions and segments, normed and dropped out.

    `shares` is True where the table belongs to another part and comes with the context.
    """

    class Config(registry.Config):
        """Token, position and segment embeddings."""

        positions: AbsoluteSlot = field("absolute positions", NoPlaces.Config())
        segments: int | Literal["tokens"] | None = field(
            "rows of a segment table; 'tokens' reads segment ids from the token table", None
        )
        scale: float | Literal["sqrt-dim"] = field("multiplies token vectors", 1.0)
        norm: NormSlot = field("norm of the sum", norms.NONE)
        dropout: float | None = field("dropout of the sum; null = model.dropout", None, ge=0, lt=1)

    def __init__(self, config: Config, scope: Scope, shares: bool = False) -> None:
        super().__init__()
        self.tokens = None if shares else Table(scope.vocab, scope.dim)
        self.scale = math.sqrt(scope.dim) if config.scale == "sqrt-dim" else float(config.scale)
        self.positions = scope.make("positions", config.positions)
        self.segments = Table(config.segments, scope.dim) if isinstance(config.segments, int) else None
        self.segments_read_tokens = config.segments == "tokens"
        self.norm = make_norm(scope, "norm", config.norm)
        self.dropout = nn.Dropout(scope.dropout if config.dropout is None else config.dropout)

    @property
    def limit(self) -> int | None:  # type: ignore[override]
        """The most places there are, or None."""
        return self.positions.limit  # type: ignore[return-value]

    def forward(self, ids: Tensor | None, vectors: Tensor | None, segments: Tensor | None, ctx: Ctx) -> Tensor:
        """ids (B, T) or vectors (B, T, D); segments (B, T) or None for segment 0 -> (B, T, D)."""
        x = F.embedding(ids, ctx.table) if vectors is None else vectors  # type: ignore[arg-type]
        x = self.positions(x * self.scale if self.scale != 1.0 else x, ctx.positions)
        if self.segments is not None:
            x = x + (self.segments.weight[0] if segments is None else self.segments(segments))
        elif self.segments_read_tokens and segments is not None:
            x = x + F.embedding(segments, ctx.table)  # type: ignore[arg-type]
        elif segments is not None:
            raise ValueError("token_type_ids were given, but this architecture has no segments")
        return self.dropout(self.norm(x))  # type: ignore[no-any-return]
