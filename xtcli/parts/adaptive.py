"""Vocabularies cut into bands by frequency: narrow vectors for rare words (Baevski, Auli 2018, arXiv:1809.10853), and a
softmax in two steps (Grave et al. 2016, arXiv:1609.04309).

    ids [c_i, c_(i+1)) are band i, with vectors of width E / divide^i and a projection of its own to the model's width
    log p(x) = log softmax(head)[x]                                         x in band 0
    log p(x) = log softmax(head)[band i] + log softmax(tail_i)[x - c_i]     x in band i > 0

The head has the first band's words and one entry for each further band. With `divide` 1 there is one table, and one
projection where it is not as wide as the model. Matrices of the softmax are those tables, and its projections those of
the embedding but for the first, unless said otherwise; the states pass a projection backwards, h P.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Literal, Self

import torch
from pydantic import Strict
from torch import Tensor, nn
from torch.nn import functional as F

from xtcli import registry
from xtcli.parts.context import Ctx
from xtcli.parts.embed import Embedding
from xtcli.parts.heads import Head, Hidden, Labels
from xtcli.parts.linear import Linear, Table, widen
from xtcli.parts.outputs import IGNORE, Term, shifted
from xtcli.parts.scope import Impossible, Scope
from xtcli.registry import field, part

TABLES, PROJECTIONS = "band tables", "band projections"


@dataclass(frozen=True)
class Bands:
    """How a vocabulary is cut: the ends of the bands, the width of the first, what each further one is divided by."""

    ends: tuple[int, ...]
    width: int
    divide: int

    @property
    def merged(self) -> bool:
        """Whether all bands lie in one table."""
        return self.divide == 1

    def range(self, band: int) -> tuple[int, int]:
        """The ids of a band, [first, end)."""
        return (self.ends[band - 1] if band else 0), self.ends[band]

    def tables(self) -> list[tuple[int, int]]:
        """Rows and width of each table."""
        if self.merged:
            return [(self.ends[-1], self.width)]
        sizes = [end - begin for begin, end in map(self.range, range(len(self.ends)))]
        return [(size, self.width // self.divide**band) for band, size in enumerate(sizes)]


@part("embed", "adaptive")
class Adaptive(Embedding):
    """Token vectors whose width falls with the band; the tables are left for heads."""

    tokens = None
    limit = None

    class Config(registry.Config):
        """Tables and projections for bands of the vocabulary."""

        cutoffs: Annotated[tuple[int, ...], Strict(False)] = field(
            "ids with which bands begin, rising; the first begins with 0", example=(20, 40)
        )
        width: int | None = field("width of the first band's vectors; null = dim", None, gt=0, tiny=64)
        divide: int = field("each band's vectors are so many times narrower than those before", 1, gt=0)
        scale: float | Literal["sqrt-dim"] = field("multiplies the vectors of tokens", "sqrt-dim")
        dropout: float | None = field("dropout of the vectors; null = model.dropout", None, ge=0, lt=1)

        def tiny(self) -> Self:
            """As many bands, of 64 ids."""
            few = tuple(64 * (number + 1) for number in range(len(self.cutoffs)))
            return self.model_copy(
                update={
                    "cutoffs": tuple(map(min, self.cutoffs, few)),
                    "width": None if self.width is None else min(self.width, 64),
                }
            )

    def __init__(self, config: Config, scope: Scope, shares: bool = False) -> None:
        super().__init__()
        if shares:
            raise Impossible("", "has a table for each band, which two towers cannot share", "set share_tokens: false")
        ends = (*config.cutoffs, scope.vocab)
        if any(begin >= end for begin, end in zip((0, *ends), ends, strict=False)):
            raise Impossible("cutoffs", f"{list(config.cutoffs)} do not rise from 1 to below vocab {scope.vocab}")
        self.bands = Bands(ends, config.width or scope.dim, config.divide)
        if self.bands.tables()[-1][1] < 1:
            raise Impossible("divide", f"leaves nothing of width {self.bands.width} in band {len(ends)}")
        self.tables = nn.ModuleList(Table(rows, width) for rows, width in self.bands.tables())
        plain = self.bands.merged and self.bands.width == scope.dim
        widths = [] if plain else [width for _, width in self.bands.tables()]
        self.projections = nn.ModuleList(Linear(width, scope.dim, False) for width in widths)
        self.scale = math.sqrt(scope.dim) if config.scale == "sqrt-dim" else float(config.scale)
        self.dropout = nn.Dropout(scope.dropout if config.dropout is None else config.dropout)

    def forward(self, ids: Tensor | None, vectors: Tensor | None, segments: Tensor | None, ctx: Ctx) -> Tensor:
        """ids (B, T) or vectors (B, T, D) -> (B, T, D)."""
        if segments is not None:
            raise ValueError("token_type_ids were given, but this architecture has no segments")
        for name, modules in ((TABLES, self.tables), (PROJECTIONS, self.projections)):
            for number, module in enumerate(modules):
                ctx.ledger.leave(name, number, module.weight)  # type: ignore[arg-type]
        if vectors is not None:
            return self.dropout(vectors)  # type: ignore[no-any-return]
        assert ids is not None
        if self.bands.merged:
            x = self.tables[0](ids)
            return self.dropout((self.projections[0](x) if self.projections else x) * self.scale)  # type: ignore[no-any-return]
        parts = []
        for band, (table, projection) in enumerate(zip(self.tables, self.projections, strict=True)):
            begin, end = self.bands.range(band)
            here = (ids >= begin) & (ids < end)
            # Every band looks up every id, clamped: fixed shapes cost little, since rare words are narrow.
            found = projection(table((ids - begin).clamp(0, end - begin - 1)))
            parts.append(torch.where(here[..., None], found, torch.zeros((), dtype=found.dtype, device=found.device)))
        return self.dropout(torch.stack(parts).sum(0) * self.scale)  # type: ignore[no-any-return]


class Bias(nn.Module):
    """One number for each word of a band whose matrix is another part's."""

    weight: Tensor | None = None

    def __init__(self, words: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(words))


@part("head", "adaptive")
class AdaptiveSoftmax(Head):
    """Next-token prediction in two steps; what it gives are log-probabilities."""

    class Config(registry.Config):
        """Softmax over bands of the vocabulary."""

        tied: bool = field("uses the embedding's tables as its matrices", True)
        own_projections: Annotated[tuple[int, ...], Strict(False)] = field(
            "bands with a projection of their own; the others use the embedding's", (0,)
        )
        shift: bool | None = field("labels are shifted to their successors; null = in a causal model", None)

    def __init__(self, config: Config, scope: Scope) -> None:
        super().__init__()
        bands: Bands | None = scope.bands
        if bands is None:
            raise Impossible("", "needs an embedding in bands", "set embed: {kind: adaptive, cutoffs: [...]}")
        self.bands_of, self.shift = bands, config.shift
        count = len(bands.ends)
        self.bands = nn.ModuleList(
            Bias(rows) if config.tied else Linear(width, rows, True, "head") for rows, width in bands.tables()
        )
        self.clusters = Linear(bands.width, count - 1, True, "head") if count > 1 else None
        plain = bands.merged and bands.width == scope.dim
        widths = [bands.width] * count if bands.merged else [width for _, width in bands.tables()]
        own = [] if plain else [band for band in config.own_projections if band < count]
        self.projections = nn.ModuleDict({str(band): Linear(widths[band], scope.dim, False) for band in own})
        self.projects = not plain

    def band(self, states: Tensor, band: int, hidden: Hidden) -> Tensor:
        """log softmax over the words of a band (the first: and over the bands that follow), (..., words)."""
        tables, projections = hidden.ledger.read(TABLES), hidden.ledger.read(PROJECTIONS)
        where = 0 if self.bands_of.merged else band
        module = self.bands[where]
        weight: Tensor = tables[where] if module.weight is None else module.weight  # type: ignore[assignment]
        bias: Tensor = module.bias  # type: ignore[assignment]
        if self.projects:
            own = str(band) in self.projections
            projection = self.projections[str(band)].weight if own else projections[where]
            states = states @ projection  # type: ignore[operator]
        if self.bands_of.merged:
            begin, end = self.bands_of.range(band)
            weight, bias = weight[begin:end], bias[begin:end]
        if band == 0 and self.clusters is not None:
            weight, bias = torch.cat((weight, self.clusters.weight)), torch.cat((bias, self.clusters.bias))
        return widen(F.linear(states, weight, bias)).log_softmax(-1)

    def outputs(self, hidden: Hidden) -> dict[str, Tensor]:
        head = self.band(hidden.states, 0, hidden)
        first = self.bands_of.ends[0]
        parts = [head[..., :first]]
        for band in range(1, len(self.bands_of.ends)):
            parts.append(self.band(hidden.states, band, hidden) + head[..., first + band - 1, None])
        logs = hidden.grouped(torch.cat(parts, -1))
        return {"logits": logs, "prediction_scores": logs}

    def each(self, hidden: Hidden, targets: Tensor) -> list[Tensor]:
        """-log p of the targets of each band, in the order of the text: (targets of the band,) each."""
        states, wanted = hidden.states.reshape(-1, hidden.states.shape[-1]), targets.reshape(-1)
        supervised = wanted != IGNORE
        states, wanted = states[supervised], wanted[supervised]
        head = self.band(states, 0, hidden)
        found = []
        for band in range(len(self.bands_of.ends)):
            begin, end = self.bands_of.range(band)
            here = ((wanted >= begin) & (wanted < end)).nonzero()[:, 0]
            logs = head[here] if band == 0 else self.band(states[here], band, hidden)
            loss = -logs.gather(-1, wanted[here, None] - begin)[:, 0]
            found.append(loss - head[here, self.bands_of.ends[0] + band - 1] if band else loss)
        return found

    def loss(self, hidden: Hidden, targets: Tensor) -> Term:
        return Term(torch.cat(self.each(hidden, targets)).sum(), (targets != IGNORE).sum())

    def noted(self, hidden: Hidden, targets: Tensor) -> dict[str, Tensor]:
        """The loss of each target, band after band, in the place of the tokens that have a successor: (B, T - 1)."""
        found = self.each(hidden, targets)
        rows, room = targets.shape[0], max(targets.shape[1] - 1, 0)
        if len(found) == 1:
            # One band leaves the losses where their tokens are.
            kept = torch.zeros(targets.shape, dtype=found[0].dtype, device=targets.device)
            return {"losses": kept.masked_scatter(targets != IGNORE, found[0])[:, :room]}
        flat = torch.cat(found)[: rows * room]
        return {"losses": F.pad(flat, (0, rows * room - flat.shape[0])).reshape(rows, room)}

    def targets(self, labels: Labels, causal: bool) -> Tensor | None:
        found = labels.get(self.label)
        shift = causal if self.shift is None else self.shift
        return shifted(found) if shift and found is not None else found
