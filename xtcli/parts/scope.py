"""What parents pass down while a config tree becomes a module tree.

A `Scope` carries the sizes that a preset states once (width, vocabulary, context), the defaults that
parts inherit (norm, dropout) and the path of the node being built. Mistakes that only a build can
see are collected, not raised one by one: a constructor raises `Impossible`, `Scope.make` files it
under the node's path and goes on, and the graph refuses with all of them at the end.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from xtcli.errors import Problem, UserError
from xtcli.registry import Config, part_of


class Impossible(Exception):
    """Raised by a part's constructor: this value cannot be built. `name` is the field, relative to the part."""

    def __init__(self, name: str, cause: str, remedy: str = "") -> None:
        self.name, self.cause, self.remedy = name, cause, remedy
        super().__init__(cause)


class Refused(UserError):
    """All that a build found impossible; each problem's `path` is a path of the config tree."""


@dataclass(frozen=True)
class Scope:
    """The inherited sizes and defaults at one node of the tree."""

    dim: int
    vocab: int
    context: int | None
    causal: bool
    norm: Config
    dropout: float
    position: Config | None = None  # what attentions of this stack inherit
    pad: int | None = None
    table: int | None = None  # width of the token table's rows, where it differs from dim
    outer: int | None = None  # width of the stream, where a wiring narrows what its sublayers see
    memory: int | None = None  # width of the encoder memory that cross-attention reads
    layer: int = 0
    layers: int = 1  # of the stack being built
    path: str = "model"
    shared: Any = None  # the `Shared` of the stack being built
    heads: int | None = None  # heads that a position is made for
    recurrence: Any = None  # the `Recurrence` of a stack that remembers earlier segments
    bands: Any = None  # the `Bands` of an embedding that cuts its vocabulary
    prefix: int = 0  # memory tokens in front of every text
    head_dim: int | None = None  # width of the heads that a position is made for
    entities: tuple[int, int] | None = None  # rows and width of the table of the entities that stand behind a text
    problems: dict[tuple[str, str], Problem] = field(default_factory=dict)

    def at(self, name: str, **changes: object) -> Scope:
        """The scope of a child node."""
        return replace(self, path=f"{self.path}.{name}" if name else self.path, **changes)  # type: ignore[arg-type]

    def make(self, name: str, config: Config, *args: object, **changes: object) -> nn.Module:
        """Build the child at `name`; what is impossible is filed and stands in as an identity."""
        scope = self.at(name, **changes)
        try:
            return part_of(config)(config, scope, *args)  # type: ignore[no-any-return]
        except Impossible as mistake:
            scope.file(mistake)
            return nn.Identity()

    def file(self, mistake: Impossible) -> None:
        """Remember one mistake, once per path and cause."""
        path = f"{self.path}.{mistake.name}" if mistake.name else self.path
        self.problems.setdefault((path, mistake.cause), Problem(mistake.cause, path=path, remedy=mistake.remedy))

    def settle(self) -> None:
        """Raise `Refused` when anything was filed."""
        if self.problems:
            raise Refused(*self.problems.values())
