"""A text and the entities that it mentions: two sequences read as one (Yamada et al. 2020, LUKE, arXiv:2010.01057).

    entity     e = dropout(norm(W table[id] + mean of places[p] over the mention's places p + kind))
    stack      [x_1 ... x_T, e_1 ... e_E] -> blocks -> the first T are the words, the last E the entities
    attention  q_ij = Q_ab x_i, where a and b say whether i and j are words or entities; keys and values are of one kind

`entity_ids` (B, E) are rows of a table of their own, `entity_position_ids` (B, E, M) the places in the text of each
mention, -1 where it has fewer than M (a mention of no place adds none), `entity_attention_mask` (B, E) is 1 for real
entities, `entity_token_type_ids` (B, E) their segments, 0 unless given. Without `entity_ids` the words are alone.

What an entity knows of its place stands in its vector: positions inside attention, and masks that speak of slots, have
nothing to say of it and are refused. Axes: B batch, T words, E entities, M places of a mention, D width.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from xtcli.errors import refuse
from xtcli.parts import norms
from xtcli.parts.attention import Attention
from xtcli.parts.context import Ctx
from xtcli.parts.linear import Linear, Table
from xtcli.parts.norms import NormSlot, make_norm
from xtcli.parts.scope import Impossible, Scope
from xtcli.parts.stack import Stack
from xtcli.registry import Config, field, part

IDS, PLACES, MASK, SEGMENTS = "entity_ids", "entity_position_ids", "entity_attention_mask", "entity_token_type_ids"
LAST, TRACE = "entity_last_hidden_state", "entity_hidden_states"
TABLE = "entity table"
"""The name in the ledger of the table that heads are tied to."""

SEES = "entities stand behind the words, and each sees all of both"
PAD, UNKNOWN, HIDDEN = 0, 1, 2
"""Rows of the table that stand for no entity, for one that has no row, and for one that is to be named."""
FIRST = 3
"""The row of the first entity that has one."""


class EntityConfig(Config):
    """The entities of a text."""

    vocab: int = field(
        "rows of the entity table: padding, unknown, hidden, then the entities", gt=0, tiny=96, example=9
    )
    width: int | None = field(
        "width of its rows, projected to dim without a bias where it differs; null = dim", None, gt=0, tiny=32
    )
    places: int | None = field("rows of the table of a mention's places; null = model.context", None, gt=0, tiny=130)
    segments: int = field("rows of the segment table of entities", 2, gt=0)
    norm: NormSlot = field("norm of the sum", norms.INHERIT)
    dropout: float | None = field("dropout of the sum; null = model.dropout", None, ge=0, lt=1)


class Entities(nn.Module):
    """The vectors of the entities; `limit` is how many places a mention can be at."""

    def __init__(self, config: EntityConfig, scope: Scope) -> None:
        super().__init__()
        places = config.places or scope.context
        if places is None:
            raise Impossible(
                "entities.places", "a table of places needs a size, and model.context gives none", "state it"
            )
        self.limit, self.width = places, config.width or scope.dim
        self.table = Table(config.vocab, self.width)
        self.project = None if self.width == scope.dim else Linear(self.width, scope.dim, False)
        self.places = Table(places, scope.dim)
        self.segments = Table(config.segments, scope.dim)
        self.norm = make_norm(scope, "norm", config.norm)
        self.dropout = nn.Dropout(scope.dropout if config.dropout is None else config.dropout)

    def forward(self, ids: Tensor, places: Tensor, segments: Tensor | None) -> Tensor:
        """ids (B, E), places (B, E, M), segments (B, E) or None for segment 0 -> (B, E, D)."""
        x = self.table(ids)
        if self.project is not None:
            x = self.project(x)
        real = (places >= 0).to(x.dtype)[..., None]
        sums = (self.places(places.clamp(min=0)) * real).sum(-2)
        x = x + sums / real.sum(-2).clamp(min=1)
        x = x + (self.segments.weight[0] if segments is None else self.segments(segments))
        return self.dropout(self.norm(x))  # type: ignore[no-any-return]


@part("mixer", "entity-aware")
class EntityAware(Attention):
    """Attention whose query matrix depends on what asks and what is asked: words or entities.

    `q` is that of words for words, `q_entity` of words for entities, `entity_q_word` and `entity_q` those of entities.
    A query has two faces, one for each kind of key, and a key is zero on the other face: one product gives all scores.
    Without entities it is plain attention.
    """

    # Learned keys are of neither kind.
    honours = ("score", "out")
    within = ("stack", "entities")

    class Config(Attention.Config):
        """Self-attention with queries for each pair of kinds."""

    def __init__(self, config: Config, scope: Scope) -> None:
        super().__init__(config, scope)
        if scope.entities is None:
            raise Impossible("", "there are no entities in this stack", "use mixer attention, or stack entities")
        wide = self.heads * self.head_dim
        self.q_entity = Linear(scope.dim, wide, config.bias, "query")
        self.entity_q_word = Linear(scope.dim, wide, config.bias, "query")
        self.entity_q = Linear(scope.dim, wide, config.bias, "query")

    def forward(self, x: Tensor, ctx: Ctx) -> Tensor:
        """x (B, T + E, D), the words first -> the same."""
        if not ctx.behind:
            return super().forward(x, ctx)
        length = x.shape[1] - ctx.behind
        words, entities = x[:, :length], x[:, length:]
        for_words = torch.cat((self.q(words), self.entity_q_word(entities)), 1)
        for_entities = torch.cat((self.q_entity(words), self.entity_q(entities)), 1)
        q = torch.cat([self.q_norm(self.split(face, self.heads)) for face in (for_words, for_entities)], -1)
        k = self.k_norm(self.split(self.k(x), self.groups))
        blank = torch.zeros_like(k)
        k = torch.cat(
            (
                torch.cat((k[:, :, :length], blank[:, :, length:]), 2),
                torch.cat((blank[:, :, :length], k[:, :, length:]), 2),
            ),
            -1,
        )
        return self.attend(q, k, self.split(self.v(x), self.groups), ctx.visible[self.view], x, ctx)


@part("stack", "entities")
class EntityStack(Stack):
    """Blocks over words and entities; what comes out are the words, and the entities are left in the ledger.

    Attention is of kind `attention` or `entity-aware` and sees everything, without positions. `gives` and `traces`
    name what it leaves for the outputs: a tensor, and one of each layer.
    """

    reads = (IDS, PLACES, MASK, SEGMENTS)
    gives = (LAST,)
    traces = (TRACE,)
    recurs = False

    class Config(Stack.Config):
        """Blocks over the words of a text and the entities that it mentions, then a norm."""

        entities: EntityConfig = field("the entities", example={"vocab": 9})

    def __init__(self, config: Config, scope: Scope) -> None:
        if scope.causal:
            raise Impossible("", "a text that is read together with its entities sees both ways", "use an encoder")
        # Rows and width of the table, for mixers and heads.
        self_size = (config.entities.vocab, config.entities.width or scope.dim)
        super().__init__(config, scope.at("", entities=self_size))
        self.entity_table = self_size
        self.entities = Entities(config.entities, scope)
        self._refuse()

    def _refuse(self) -> None:
        """Raises Impossible for blocks in which an entity would need a place in the row."""
        for block in self.blocks:
            for name, sublayer in block.sublayers.items():  # type: ignore[union-attr, operator]
                if getattr(getattr(sublayer, "Config", None), "slot", "") != "mixer":
                    continue
                if type(sublayer) not in (Attention, EntityAware):
                    cause = f"its '{name}' mixes places by their order, and entities have none"
                    raise Impossible("block", cause, "use mixers of kind attention or entity-aware")
                sublayer.sees = SEES
                if sublayer.relative is not None or isinstance(sublayer.place, nn.Module):
                    raise Impossible("position", "entities have no place in the row", "set it to none")
        shared = self.shared
        if shared.turns or shared.biases:
            raise Impossible("position", "entities have no place in the row", "set it to none")
        if any(view.rule.kind != "full" for view in shared.views):
            cause = "its attention sees keys by their place in the row, and entities have none"
            raise Impossible("block", cause, "set mask: full")
        readers = sorted(
            {name for block in self.blocks for part in block.modules() for name in getattr(part, "reads", ())}
        )
        if readers:
            cause = f"entities have no place in {', '.join(readers)}, which its parts read token by token"
            raise Impossible("block", cause, "use parts that read the states alone")

    def blank(self, rows: int, device: torch.device) -> dict[str, Tensor]:
        """Two entities a row, for measuring."""
        two = torch.arange(2, device=device).expand(rows, -1)
        ids = (two + UNKNOWN).clamp(max=self.entity_table[0] - 1)
        return {IDS: ids, PLACES: two.clamp(max=self.entities.limit - 1)[..., None]}

    def forward(self, x: Tensor, ctx: Ctx, trace: list[Tensor] | None = None) -> Tensor:
        """x (B, T, D) -> (B, T, D); `trace` collects the words of each layer."""
        if IDS not in ctx.extras:
            alone = sorted(set(self.reads) & set(ctx.extras))
            if alone:
                raise ValueError(f"{', '.join(alone)} were given without entity_ids")
            return super().forward(x, ctx, trace)
        length = x.shape[1]
        both: list[Tensor] | None = None if trace is None else []
        y = super().forward(*self.join(x, ctx), both)
        ctx.ledger.leave(TABLE, 0, self.entities.table.weight)
        ctx.ledger.leave(LAST, 0, y[:, length:])
        for number, states in enumerate(both or ()):
            ctx.ledger.leave(TRACE, number, states[:, length:])
        if trace is not None and both is not None:
            trace += [states[:, :length] for states in both]
        return y[:, :length]

    def join(self, x: Tensor, ctx: Ctx) -> tuple[Tensor, Ctx]:
        """Words (B, T, D) -> words and entities (B, T + E, D), and the context that counts the entities in."""
        if ctx.state is not None:
            raise ValueError("a text with entities is read in one pass, without a state")
        if ctx.documents is not None:
            raise refuse(
                "entities read the whole row, and documents packed into one row would mix in them",
                "give each document a row of its own",
            )
        ids, places = ctx.extras[IDS], ctx.extras.get(PLACES)
        if places is None or places.shape[:2] != ids.shape:
            shape = "none" if places is None else str(tuple(places.shape))
            raise ValueError(f"entity_ids has shape {tuple(ids.shape)}, and entity_position_ids {shape}")
        entities = self.entities(ids, places, ctx.extras.get(SEGMENTS)).to(x.dtype)
        known, keep = ctx.extras.get(MASK), ctx.keep
        if keep is not None or known is not None:
            words = keep if keep is not None else torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
            real = torch.ones_like(ids, dtype=torch.bool) if known is None else known.bool()
            keep = torch.cat((words, real), 1)
        # Their first places stand for them where only a row's length counts.
        first = places.amax(-1).clamp(min=0) if places.shape[-1] else torch.zeros_like(ids)
        inner = replace(
            ctx, positions=_behind(ctx.positions, first), keys=_behind(ctx.keys, first), keep=keep, behind=ids.shape[1]
        )
        return torch.cat((x, entities), 1), inner


def _behind(places: Tensor, more: Tensor) -> Tensor:
    """(B|1, T) and (B, E) -> (B, T + E)."""
    return torch.cat((places.expand(more.shape[0], -1), more), 1)
