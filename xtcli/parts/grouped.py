"""A stack that runs few blocks many times (Lan et al. 2019, arXiv:1909.11942).

    step i of L runs the I blocks of group floor(i / (L / G)) in order, i = 0 ... L - 1

There are G x I blocks and the network is L x I deep. The blocks of group g are blocks g I ... (g + 1) I - 1. Weights
are shared, states are not: each run of a block has a cache of its own. A trace collects the states between steps.
"""

from __future__ import annotations

from collections.abc import Sequence

from xtcli.parts.scope import Impossible, Scope
from xtcli.parts.stack import Block, Layers, Stack
from xtcli.registry import field, part


@part("stack", "grouped")
class Grouped(Stack):
    """Groups of blocks that each run several times, then a norm."""

    carries = False

    class Config(Layers):
        """`layers` steps; each runs all blocks of one group."""

        groups: int = field("groups that share weights", 1, gt=0, tiny=2)
        inner: int = field("blocks of a group, run in order at each step", 1, gt=0, tiny=2)

        @property
        def singles(self) -> list[str | None]:
            """A whole block in each place; there are as many as have weights of their own."""
            return [None] * (self.groups * self.inner)

    def __init__(self, config: Config, scope: Scope) -> None:
        if config.groups > config.layers:
            raise Impossible("groups", f"{config.groups} groups do not fit into {config.layers} steps")
        if config.order.kind != "given":
            raise Impossible("order", "is for stacks whose every layer has weights of its own", "leave it out")
        if config.recurrence is not None:
            raise Impossible("recurrence", "would need a memory for each run of a shared block", "leave it out")
        super().__init__(config, scope)
        self.steps, self.groups, self.every = config.layers, config.groups, config.inner
        # A quotient in floating point, as the weights were trained: it matters where G does not divide L.
        chosen = [int(step / (config.layers / config.groups)) for step in range(config.layers)]
        self.order = tuple(group * config.inner + number for group in chosen for number in range(config.inner))

    @property
    def run(self) -> Sequence[Block]:
        return [self.blocks[number] for number in self.order]  # type: ignore[misc]

    def extra_repr(self) -> str:
        return f"steps={self.steps}, groups={self.groups}, inner={self.every}"
