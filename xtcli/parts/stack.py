"""Blocks, and the stack that runs them.

A block is an ordered map of named sublayers that its wiring joins. A stack repeats one block, or
several in a pattern, computes once what all its attentions share, and ends in a norm.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal, Self

import torch
from pydantic import Strict, model_validator
from pydantic_core import PydanticCustomError
from torch import Tensor, nn

from xtcli.errors import did_you_mean
from xtcli.parts import norms, positions, recurrence
from xtcli.parts.context import Ctx, State
from xtcli.parts.norms import NormSlot, make_norm
from xtcli.parts.orders import GIVEN, OrderSlot
from xtcli.parts.positions import PositionSlot
from xtcli.parts.recurrence import Recurrence
from xtcli.parts.scope import Impossible, Scope
from xtcli.parts.shared import Shared
from xtcli.parts.wiring import PreNorm, SublayerName, WiringSlot
from xtcli.registry import Config, Slot, field, part, part_of


class BlockConfig(Config):
    """One layer: sublayers by name, in order, and how they are joined."""

    wiring: WiringSlot = field("joins sublayers, norms and the residual stream", PreNorm.Config())
    sublayers: dict[SublayerName, Annotated[Config, Slot("sublayer")]] = field("in the order they run", min_length=1)

    def only(self, name: SublayerName) -> Self:
        """The block of one of its sublayers."""
        scale = getattr(self.wiring, "scale", 1.0)
        kept = {name: scale[name]} if isinstance(scale, dict) and name in scale else {}
        wiring = self.wiring.model_copy(update={"scale": kept}) if isinstance(scale, dict) else self.wiring
        return self.model_copy(update={"wiring": wiring, "sublayers": {name: self.sublayers[name]}})


class Layers(Config):
    """Which block stands in which layer, and what the stack does around them."""

    layers: int = field("number of blocks", gt=0, tiny=2, example=2)
    block: BlockConfig | None = field("the block that all layers repeat", None)
    blocks: dict[str, BlockConfig] | None = field("several blocks by name, placed by `pattern`", None)
    pattern: Annotated[tuple[str, ...], Strict(False)] | None = field(
        "names of `blocks`, repeated over the layers", None
    )
    lead: int = field("names at the start of `pattern` that stand once and are not repeated", 0, ge=0)
    order: OrderSlot = field("which sublayers stand in which layer", GIVEN)
    position: PositionSlot = field("position that the attentions inherit", positions.NONE)
    norm: NormSlot = field("norm after the last block", norms.INHERIT)
    dropout: float = field("dropout after the last norm", 0.0, ge=0, lt=1)
    recurrence: Recurrence | None = field("what its attentions remember of the segment before", None)

    @model_validator(mode="after")
    def _one_source_of_blocks(self) -> Self:
        if (self.block is None) == (self.blocks is None):
            raise PydanticCustomError(
                "stack_blocks", "needs either 'block' or 'blocks' with 'pattern', not both or neither"
            )
        if (self.blocks is None) != (self.pattern is None):
            raise PydanticCustomError("stack_pattern", "'blocks' and 'pattern' belong together")
        if self.lead and self.lead >= len(self.pattern or ()):
            raise PydanticCustomError("stack_pattern", "'lead' leaves no name of pattern to repeat")
        for name in self.pattern or ():
            if name not in (self.blocks or {}):
                raise PydanticCustomError(
                    "stack_pattern",
                    "pattern names no block {name}; {remedy}",
                    {"name": repr(name), "remedy": did_you_mean(name, self.blocks or {})},
                )
        for name in self.blocks or {}:
            if name not in (self.pattern or ()):
                raise PydanticCustomError(
                    "stack_pattern", "block {name} stands nowhere in pattern", {"name": repr(name)}
                )
        return self

    @model_validator(mode="after")
    def _one_order(self) -> Self:
        if self.order.kind == "given":
            return self
        if self.block is None:
            raise PydanticCustomError("stack_order", "'order' and 'pattern' both say what stands where; leave one out")
        if getattr(self.order, "ends", 0) > self.layers:
            raise PydanticCustomError(
                "stack_order",
                "order: {ends} ends do not fit {layers} layers",
                {"ends": self.order.ends, "layers": self.layers},  # type: ignore[attr-defined]
            )
        for name in self.singles:
            if name is not None and name not in self.block.sublayers:
                raise PydanticCustomError(
                    "stack_order",
                    "order names no sublayer {name}; {remedy}",
                    {"name": repr(name), "remedy": did_you_mean(name, self.block.sublayers)},
                )
        return self

    def tiny(self) -> Self:
        """Two layers, or one round of the pattern."""
        return self.model_copy(update={"layers": min(self.layers, max(2, len(self.pattern or ())))})

    @property
    def singles(self) -> list[str | None]:
        """For each built layer the only sublayer that stands there, or None for the whole block."""
        return part_of(self.order).singles(self.order, self.layers)  # type: ignore[no-any-return]

    @property
    def depth(self) -> int:
        """How many layers are built."""
        return len(self.singles)

    def layer(self, number: int) -> tuple[str, BlockConfig]:
        """The config path and the block of one layer."""
        if self.block is not None:
            single = self.singles[number]
            return "block", self.block if single is None else self.block.only(single)  # type: ignore[arg-type]
        assert self.blocks is not None and self.pattern is not None
        turn = number if number < self.lead else self.lead + (number - self.lead) % (len(self.pattern) - self.lead)
        name = self.pattern[turn]
        return f"blocks.{name}", self.blocks[name]


class Block(nn.Module):
    """Sublayers under their own names, and `wiring`. One that is `reversible` keeps nothing for the backward pass."""

    reversible = False

    def __init__(self, config: BlockConfig, scope: Scope) -> None:
        super().__init__()
        self.names = tuple(config.sublayers)
        inside = part_of(config.wiring).inside(config.wiring, scope)
        for name, sublayer in config.sublayers.items():
            self.add_module(name, inside.make(f"sublayers.{name}", sublayer))
        self.wiring = scope.make("wiring", config.wiring, self.names)
        if scope.recurrence is not None:
            recurrence.check(self, config, scope)

    @property
    def sublayers(self) -> dict[str, nn.Module]:
        """By name, in the order they run."""
        return {name: self._modules[name] for name in self.names}  # type: ignore[misc]

    def new_state(self, batch: int, capacity: int, device: Any, dtype: Any) -> dict[str, State | None]:
        """The state of each sublayer."""
        return {
            name: sublayer.new_state(batch, capacity, device, dtype)  # type: ignore[operator]
            for name, sublayer in self.sublayers.items()
        }

    def forward(self, x: Tensor, ctx: Ctx) -> Tensor:
        return self.wiring(x, self.sublayers, ctx)  # type: ignore[no-any-return]


@part("stack", "blocks")
class Stack(nn.Module):
    """Blocks in order, then a norm. `width` is that of what comes out.

    `run` are the blocks as they run, those that share weights more than once; `every` counts the blocks between two
    states that a trace collects.
    """

    block = Block
    carries = True  # whether attentions may hand scores on from layer to layer
    recurs = True  # whether its attentions may remember earlier segments
    every = 1

    class Config(Layers):
        """Blocks in order, then a norm."""

        trace: Literal["inputs", "outputs", "unnormed"] = field(
            "what hidden_states hold of each block; unnormed: inputs, and what the last block puts out before the norm",
            "inputs",
        )
        layer_drop: float = field(
            "chance in training that a block is passed over by the whole batch (Fan et al. 2019, arXiv:1909.11556)",
            0.0,
            ge=0,
            lt=1,
        )

    def __init__(self, config: Layers, scope: Scope) -> None:
        super().__init__()
        self.width = scope.dim
        self.shared = Shared(self.carries)
        self.recurrence = config.recurrence
        if self.recurrence is not None and not self.recurs:
            raise Impossible("recurrence", f"stack '{config.kind}' runs blocks more than once", "leave it out")
        inner = scope.at("", shared=self.shared, position=config.position, recurrence=config.recurrence)
        self.blocks = nn.ModuleList()
        for number in range(config.depth):
            path, block = config.layer(number)
            self.blocks.append(self.block(block, inner.at(path, layer=number, layers=config.depth)))
        self.norm = make_norm(scope, "norm", config.norm)
        self.dropout = nn.Dropout(config.dropout)
        self.trace = getattr(config, "trace", "inputs")
        self.layer_drop = getattr(config, "layer_drop", 0.0)

    @property
    def run(self) -> Sequence[Block]:
        """The blocks in the order in which they run."""
        return self.blocks  # type: ignore[return-value]

    def new_state(self, batch: int, capacity: int, device: Any, dtype: Any) -> list[Any]:
        """The state of each block, one for each time that it runs."""
        return [block.new_state(batch, capacity, device, dtype) for block in self.run]

    def passes_over(self) -> bool:
        """Whether the next block is left out of this call."""
        return self.training and self.layer_drop > 0.0 and float(torch.rand(())) < self.layer_drop

    def forward(self, x: Tensor, ctx: Ctx, trace: list[Tensor] | None = None) -> Tensor:
        """x (B, T, D) -> (B, T, D); `trace` collects the input (or output) of each block and the final output."""
        run = self.run
        states = ctx.state or [None] * len(run)
        ctx = self.shared.prepare(x, ctx)
        for number, (block, state) in enumerate(zip(run, states, strict=True)):
            noted = trace if number % self.every == 0 else None
            if noted is not None and self.trace != "outputs":
                noted.append(x)
            if not self.passes_over():
                x = block(x, ctx.within(state))
            if noted is not None and self.trace == "outputs":
                noted.append(x)
        last = x
        x = self.dropout(self.norm(x))
        if trace is not None:
            trace.append(last if self.trace == "unnormed" else x)
        return x


StackSlot = Annotated[Config, Slot("stack", default="blocks")]


def applied(model: nn.Module) -> list[Block]:
    """Every block of a model, as often as it runs."""
    run = [block for module in model.modules() if isinstance(module, Stack) for block in module.run]
    known = {id(block) for block in run}
    return run + [module for module in model.modules() if isinstance(module, Block) and id(module) not in known]
