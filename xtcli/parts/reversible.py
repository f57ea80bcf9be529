"""A stack of two streams that can be undone, so that no activations are kept for the backward pass.

    y1 = x1 + f(x2)        x2 = y2 - g(y1)
    y2 = x2 + g(y1)        x1 = y1 - f(x2)        Gomez et al. 2017, arXiv:1707.04585

In Transformers: Kitaev et al. 2020, arXiv:2001.04451.
Both streams start as x (B, T, D). f is all sublayers of a block up to the last one that is no feed-forward, g the
feed-forwards after it; either may be empty in some layers. Several sublayers in f run as an ordinary residual chain
over a copy of the stream that f reads; f is what they add in sum.

The forward pass keeps the last two streams. The backward pass goes from the last layer to the first: it computes f and
g again with the random numbers, the autocast and the decisions (hash buckets) of the forward pass, takes them from the
streams, and differentiates them. Rounding errors of these differences grow slowly with the depth.
With a state, without gradients, or where the caller asks for the streams of every layer, it runs the plain way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import get_device_states, set_device_states

from xtcli.parts.context import Ctx, Decisions, Ledger, Memory
from xtcli.parts.norms import make_norm
from xtcli.parts.scope import Impossible, Scope
from xtcli.parts.stack import Block, BlockConfig, Layers, Stack
from xtcli.parts.wiring import Joining, active
from xtcli.registry import field, part

Half = Literal["f", "g"]
HALVES: tuple[Half, Half] = ("f", "g")


class ReversibleBlock(Block):
    """One layer: `forward` computes f or g."""

    reversible = True

    def __init__(self, config: BlockConfig, scope: Scope) -> None:
        super().__init__(config, scope)
        mixers = [number for number, node in enumerate(config.sublayers.values()) if node.slot != "ffn"]
        cut = mixers[-1] + 1 if mixers else 0
        self.halves: dict[Half, tuple[str, ...]] = {"f": self.names[:cut], "g": self.names[cut:]}
        if isinstance(self.wiring, Joining) and not hasattr(self.wiring, "branch"):
            cause = self.wiring.irreversible or "it does more than add f(x) to x"
            scope.file(Impossible("wiring", f"'{config.wiring.kind}' cannot be undone: {cause}", "use 'pre'"))
        for name, sublayer in self.sublayers.items():
            for module in sublayer.modules():
                cause = getattr(module, "irreversible", "")
                if cause:
                    scope.file(Impossible(f"sublayers.{name}", f"cannot be undone: {cause}"))

    def forward(self, x: Tensor, ctx: Ctx, half: Half = "f") -> Tensor | None:  # type: ignore[override]
        """x (B, T, D) -> what f or g adds (B, T, D), None where nothing takes part."""
        names = self.halves[half]
        total = None
        for name, sublayer, own in active({name: self.sublayers[name] for name in names}, ctx):
            added = self.wiring.branch(name, x, sublayer, own)  # type: ignore[operator]
            total = added if total is None else total + added
            x = x + added
        return total


@part("stack", "reversible")
class Reversible(Stack):
    """Blocks over two streams, then a norm over both streams or their mean."""

    block = ReversibleBlock
    carries = False

    class Config(Layers):
        """Reversible blocks, whose activations are not kept."""

        join: Literal["concat", "mean"] = field(
            "how the streams leave: end to end (norm and heads are twice as wide) or as their mean", "mean"
        )

    def __init__(self, config: Config, scope: Scope) -> None:
        super().__init__(config, scope)
        self.join = config.join
        self.keeps = False  # whether the activations are kept: the twin that tests and plans compare with
        if config.join == "concat":
            self.width = 2 * scope.dim
            self.norm = make_norm(scope, "norm", config.norm, dim=self.width)
        blocks: list[ReversibleBlock] = list(self.blocks)  # type: ignore[arg-type]
        for half, stream in zip(HALVES, ("first", "second"), strict=True):
            if not any(block.halves[half] for block in blocks):
                what = "mixer" if half == "f" else "feed-forward behind a mixer"
                raise Impossible("", f"the {stream} stream never changes: no block has a {what}", "add one")

    def forward(self, x: Tensor, ctx: Ctx, trace: list[Tensor] | None = None) -> Tensor:
        """x (B, T, D) -> (B, T, 2 D) or (B, T, D); `trace` collects the joined streams before each block, and y."""
        states = ctx.state or [None] * len(self.blocks)
        ctx = replace(self.shared.prepare(x, ctx), state=None)
        if torch.is_grad_enabled() and trace is None and not self.keeps and not caches(states):
            first, second = walk(self.run, states, x, ctx)
        else:
            first = second = x
            for block, state in zip(self.run, states, strict=True):
                if trace is not None:
                    trace.append(self.joined(first, second))
                own = ctx.within(state)
                first = plus(first, block(second, own, "f"))
                second = plus(second, block(first, own, "g"))
        x = self.dropout(self.norm(self.joined(first, second)))
        if trace is not None:
            trace.append(x)
        return x

    def joined(self, first: Tensor, second: Tensor) -> Tensor:
        """The two streams as one."""
        return torch.cat((first, second), -1) if self.join == "concat" else (first + second) / 2


def caches(states: Sequence[Mapping[str, Any] | None]) -> bool:
    """Whether states hold more than memories of earlier segments: what is appended once cannot be again."""
    held = (state for block in states if block is not None for state in block.values())
    return any(state is not None and not (isinstance(state, Memory) and state.cache is None) for state in held)


def plus(x: Tensor, added: Tensor | None) -> Tensor:
    """The sum, x itself where nothing is added."""
    return x if added is None else x + added


@contextmanager
def keeping(model: nn.Module) -> Iterator[None]:
    """Inside, the reversible stacks of a model keep their activations, as other stacks do."""
    stacks = [module for module in model.modules() if isinstance(module, Reversible)]
    before = [stack.keeps for stack in stacks]
    for stack in stacks:
        stack.keeps = True
    try:
        yield
    finally:
        for stack, was in zip(stacks, before, strict=True):
            stack.keeps = was


@dataclass(frozen=True)
class Moment:
    """What a computation depends on besides its inputs: random states, and the autocast in force."""

    host: Tensor
    devices: list[int]
    states: list[Tensor]
    kind: str
    narrow: torch.dtype | None

    @classmethod
    def now(cls, x: Tensor) -> Moment:
        """That of a computation on x that is about to begin."""
        kind = x.device.type
        casts = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
        devices, states = get_device_states(x)
        return cls(torch.get_rng_state(), devices, states, kind, torch.get_autocast_dtype(kind) if casts else None)

    def casting(self) -> AbstractContextManager[Any]:
        """The same autocast. Nothing is cached: what is cast without gradients must not serve where there are some."""
        if not torch.amp.is_autocast_available(self.kind):
            return nullcontext()
        return torch.autocast(self.kind, self.narrow, self.narrow is not None, cache_enabled=False)

    @contextmanager
    def again(self) -> Iterator[None]:
        """Inside, random numbers and autocast are those of that moment."""
        with torch.random.fork_rng(self.devices, device_type=self.kind if self.devices else "cuda"), self.casting():
            torch.set_rng_state(self.host)
            set_device_states(self.devices, self.states, device_type=self.kind)
            yield


@dataclass
class Step:
    """One f or g of the forward pass, and what it takes to compute it again."""

    block: nn.Module
    half: Half
    state: Any
    moment: Moment
    decisions: int  # how many it made
    left: list[tuple[str, int]]  # what it left in the ledger and has a gradient


@dataclass
class Walk:
    """One pass over all blocks: its context, the tensors that gradients are wanted for, and its steps."""

    blocks: Sequence[nn.Module]
    states: Sequence[Any]
    ctx: Ctx
    wanted: list[Tensor]  # parameters of the blocks, then tensors of the context
    parameters: int
    steps: list[Step]


def walk(blocks: Sequence[nn.Module], states: Sequence[Any], x: Tensor, ctx: Ctx) -> tuple[Tensor, Tensor]:
    """Both streams (B, T, D) behind the last block; the backward pass computes everything else again."""
    parameters = [p for p in nn.ModuleList(blocks).parameters() if p.requires_grad]
    given: dict[int, Tensor] = {}
    _mapped(replace(ctx, ledger=Ledger()), lambda tensor: given.setdefault(id(tensor), tensor))
    inputs = [*parameters, *(tensor for tensor in given.values() if tensor.requires_grad)]
    plan = Walk(blocks, states, replace(ctx, ledger=Ledger()), inputs, len(parameters), [])
    first, second, *left = _Undone.apply(plan, x, *inputs)  # type: ignore[no-untyped-call]
    names = [name for step in plan.steps for name in step.left]
    whole = _entries(plan.ctx.ledger)
    whole += [(*name, tensor) for name, tensor in zip(names, left, strict=True)]
    for name, number, tensor in whole:
        ctx.ledger.leave(name, number, tensor)
    return first, second


def _mapped(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """A context, or what is inside one, with every tensor changed."""
    if isinstance(value, Tensor):
        return change(value)
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{f.name: _mapped(getattr(value, f.name), change) for f in fields(value) if f.init})
    if isinstance(value, Mapping):
        return {key: _mapped(item, change) for key, item in value.items()}
    if isinstance(value, list | tuple):
        items = [_mapped(item, change) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    return value


class _Undone(torch.autograd.Function):
    """All blocks as one function that saves the last two streams and the decisions made on the way."""

    @staticmethod
    def forward(fctx: Any, plan: Walk, x: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
        first = second = x
        left: list[Tensor] = []
        settled: list[Tensor] = []
        for block, state in zip(plan.blocks, plan.states, strict=True):
            for half in HALVES:
                moment, decisions, ledger = Moment.now(x), Decisions(), Ledger()
                own = replace(plan.ctx, decisions=decisions, ledger=ledger, state=state)
                with moment.casting():
                    added = block(second if half == "f" else first, own, half)
                if added is None:
                    continue
                first, second = (first + added, second) if half == "f" else (first, second + added)
                names = []
                for name, number, tensor in _entries(ledger):
                    if tensor.is_floating_point():
                        names.append((name, number))
                        left.append(tensor)
                    else:
                        plan.ctx.ledger.leave(name, number, tensor)
                settled += decisions.made
                plan.steps.append(Step(block, half, state, moment, len(decisions.made), names))
        fctx.plan = plan
        fctx.save_for_backward(first, second, *settled)
        return first, second, *left

    @staticmethod
    def backward(fctx: Any, *gradients: Tensor) -> Any:
        plan: Walk = fctx.plan
        first, second, *settled = fctx.saved_tensors
        first_grad, second_grad, *left = gradients
        streams, grads = {"f": first, "g": second}, {"f": first_grad, "g": second_grad}
        leaves = {id(t): t.detach().requires_grad_() for t in plan.wanted[plan.parameters :]}
        ctx = _mapped(replace(plan.ctx, ledger=Ledger()), lambda tensor: leaves.get(id(tensor), tensor))
        wanted = [*plan.wanted[: plan.parameters], *leaves.values()]
        sums: list[Tensor | None] = [None] * len(wanted)
        place = {id(tensor): number for number, tensor in enumerate(wanted)}
        for step in reversed(plan.steps):
            other: Half = "g" if step.half == "f" else "f"
            settled, made = _parted(settled, step.decisions)
            left, outer = _parted(left, len(step.left))
            inputs = [p for p in step.block.parameters() if p.requires_grad] + list(leaves.values())
            read = streams[other].detach().requires_grad_()
            ledger = Ledger()
            with torch.enable_grad(), step.moment.again():
                own = replace(ctx, decisions=Decisions(made), ledger=ledger, state=step.state)
                added = step.block(read, own, step.half)
            entries = {(name, number): tensor for name, number, tensor in _entries(ledger)}
            outputs = [(added, grads[step.half])]
            outputs += [(entries[key], grad) for key, grad in zip(step.left, outer, strict=True)]
            outputs = [(tensor, grad.to(tensor.dtype)) for tensor, grad in outputs if tensor.requires_grad]
            found = torch.autograd.grad(
                [tensor for tensor, _ in outputs], [read, *inputs], [grad for _, grad in outputs], allow_unused=True
            )
            streams[step.half] = streams[step.half] - added.detach()
            grads[other] = grads[other] if found[0] is None else grads[other] + found[0]
            for tensor, grad in zip(inputs, found[1:], strict=True):
                if grad is not None:
                    at = place[id(tensor)]
                    before = sums[at]
                    sums[at] = grad if before is None else before + grad
        return None, grads["f"] + grads["g"], *sums


def _entries(ledger: Ledger) -> list[tuple[str, int, Tensor]]:
    return [(name, number, tensor) for name, numbers in ledger.left.items() for number, tensor in numbers.items()]


def _parted(values: list[Tensor], count: int) -> tuple[list[Tensor], list[Tensor]]:
    """All but the last `count`, and those."""
    cut = len(values) - count
    return values[:cut], values[cut:]
