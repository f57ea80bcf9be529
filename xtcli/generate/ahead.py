"""Writing without waiting: steps whose choice of a token stays on the GPU, asked for before the host saw the last.

A step is the same launches on the same memory each time (xtcli.fast.engine), recorded once and replayed. The host
learns of a token some steps later, so a text that ends has a few tokens behind its end computed in vain; none of them
is shown. Rows that end stay in the batch. Steps are kept with their model: recording one takes as long as many tokens.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from xtcli.errors import refuse
from xtcli.fast.engine import Kernels, OnGpu, Planned, Step, recorded
from xtcli.fast.oncpu import Lean
from xtcli.fast.plan import Unplanned, plan
from xtcli.generate.feed import Feed
from xtcli.generate.pen import BROKEN, Pen, pick
from xtcli.generate.rules import Rules
from xtcli.generate.static import MEMORY, Static
from xtcli.parts.graphs import Graph
from xtcli.parts.seq2seq import EncoderDecoder

DEPTH = 3
"""Steps that are asked for before the host reads the first of them, where they run beside it; none elsewhere."""
FEWEST = 4
"""Tokens that are worth a step of their own."""
KEPT = 2
"""Steps kept with a model."""


@dataclass
class Choosing:
    """A step and a way to choose, recorded. numbers (C + 1, B): the random number of each slot; seen (B, V)."""

    run: Callable[[], None]
    numbers: Tensor | None
    seen: Tensor | None


@dataclass
class Made:
    """A step that is kept, and what it was made from: where its weights lie and how often they were changed.

    memory: slots of the encoder's memory; pads: whether rows may have padding in front.
    """

    step: Step
    weights: tuple[tuple[int, int], ...]
    memory: int | None = None
    pads: bool = True
    choosing: dict[Any, Choosing] = field(default_factory=dict)


_kept: WeakKeyDictionary[Graph, list[Made]] = WeakKeyDictionary()


def kernels_on(device: torch.device) -> Kernels | type[Lean] | None:
    """The kernels for a device, or a step that has its own; None where the parts of a model are as good.

    Raises Unplanned where there are none.
    """
    if device.type == "cpu":
        return Lean
    if device.type != "cuda":
        return None
    if torch.cuda.get_device_capability(device) < (8, 0):
        raise Unplanned("the GPU is older than the kernels")
    try:
        return OnGpu(device)
    except ImportError:
        raise Unplanned("Triton, which makes kernels, is not installed") from None


def pen_for(feed: Feed, rules: Rules, logits: Tensor, numbers: Tensor | None, budgets: Sequence[int]) -> Pen:
    """How the texts of a feed are written from here on; `feed.slow` says why it is step by step on a GPU."""
    most = max(budgets)
    if not feed.eager and most >= FEWEST:
        try:
            made = _made(feed, most, rules)
            pen = None if made is None else Ahead(feed, rules, logits, numbers, budgets, made)
        except Unplanned as reason:
            # Elsewhere nothing is recorded, and the parts of the model do the same with more overhead.
            feed.slow = str(reason) if feed.model.device.type == "cuda" else None
        else:
            if pen is not None:
                return pen
    return Pen(feed, rules, logits, numbers)


def _made(feed: Feed, most: int, rules: Rules) -> Made | None:
    """A step for the rows of this feed, kept from before or new; None where there are no kernels."""
    model, end = feed.model, feed.width + most
    kernels, rows = kernels_on(model.device), feed.ids.shape[0]
    if kernels is None:
        return None
    if kernels is Lean and rows > 1:
        raise Unplanned("there are several rows, and those that end are to leave")
    if rules.lens:
        raise Unplanned("what else could have stood in the place of a token is asked for")
    if type(feed) is not Feed:
        raise Unplanned("the model looks for the next token by a stream of its own")
    if feed.state is None or (feed.steady is not None and feed.longest + most > feed.steady):
        raise Unplanned("earlier tokens change when others follow")
    if torch.is_autocast_enabled(model.device.type):
        raise Unplanned("autocast is in force")
    if any(parameter.dtype != model.dtype for parameter in model.parameters()):
        raise Unplanned("weights are of several types")
    memory = None if feed.memory is None else -(-feed.memory.shape[1] // MEMORY) * MEMORY
    pads, weights = feed.pads is not None, _weights(model)
    kept = _kept.setdefault(model, [])
    for made in kept:
        serves = made.step.rows == rows and made.memory == memory and (made.pads or not pads)
        if serves and end <= made.step.capacity <= 4 * bucket(end) and made.weights == weights:
            kept.sort(key=lambda one: one is made)
            return made
    del kept[: max(0, len(kept) - KEPT + 1)]
    tower: Any = model.decoder if isinstance(model, EncoderDecoder) else model
    capacity = bucket(end) if tower.limit is None else min(bucket(end), tower.limit)
    step = _step(model, rows, capacity, kernels, memory, pads)
    kept.append(Made(step, weights, memory, pads or not isinstance(step, Static)))
    return kept[-1]


def _step(
    model: Graph, rows: int, capacity: int, kernels: Kernels | type[Lean], memory: int | None, pads: bool
) -> Step:
    """The step of few launches where a plan can be made, else that of the model's own parts."""
    try:
        planned = plan(model, capacity)
        if isinstance(kernels, type):
            return kernels(planned, rows, capacity)
        if model.dtype == torch.float64:
            raise Unplanned("weights have 64 bits")
        return Planned(planned, rows, capacity, kernels)
    except Unplanned:
        if isinstance(kernels, type):
            raise
    return Static(model, rows, capacity, kernels, memory, pads)


def bucket(slots: int) -> int:
    """Slots that a step is made for: few sizes, so that one serves many texts."""
    size = 256
    while size < min(slots, 2048):
        size *= 2
    return size if slots <= size else -(-slots // 2048) * 2048


def _weights(model: Graph) -> tuple[tuple[int, int], ...]:
    return tuple((tensor.data_ptr(), tensor._version) for tensor in (*model.parameters(), *model.buffers()))


class Ahead(Pen):
    """Writes by a step that runs ahead of the host."""

    def __init__(
        self,
        feed: Feed,
        rules: Rules,
        logits: Tensor,
        numbers: Tensor | None,
        budgets: Sequence[int],
        made: Made,
    ) -> None:
        super().__init__(feed, rules, logits, numbers)
        self.made, self.budgets = made, list(budgets)
        self.choosing = _choosing(made, rules)
        self.begun = False
        self.waiting: deque[tuple[Tensor, Any]] = deque()
        self.kept: list[int] = []
        self.asked, self.last = 1, max(self.budgets) - 1

    def take(self, step: int, budgets: Sequence[int]) -> list[int]:
        if step == 0:
            return super().take(0, budgets)
        if not self.begun:
            self._begin()
        depth = DEPTH if self.made.step.device.type == "cuda" else 0
        while self.asked <= min(step + depth, self.last):
            self._ask()
        told, done = self.waiting.popleft()
        if done is not None:
            done.synchronize()
        host = told.tolist()
        kept = [host[at] for at in self.kept]
        if -1 in kept:
            raise refuse(*BROKEN)
        # A token that stands where a text must end is the last of its row, so no later step depends on it.
        forced = self.rules.last
        if forced is not None:
            kept = [forced if step == budget - 1 else token for token, budget in zip(kept, budgets, strict=True)]
        return kept

    def select(self, going: list[int]) -> None:
        if self.begun:
            self.kept = [self.kept[at] for at in going]
        else:
            super().select(going)

    def _begin(self) -> None:
        """Hand over to the step: the first token has been chosen."""
        feed, rows = self.feed, self.feed.ids.shape[0]
        if rows != self.made.step.rows:
            made = _made(feed, max(self.budgets), self.rules)
            assert made is not None, "a batch that shrinks stays on its device"
            self.made, self.choosing = made, _choosing(made, self.rules)
        step = self.made.step
        step.begin(feed.state, self.chosen, feed.width, feed.pads)
        if feed.memory is not None:
            assert isinstance(step, Static), "only the model's own parts read a memory"
            step.remember(feed.memory, feed.memory_mask)
        if self.choosing.numbers is not None:
            assert self.numbers is not None, "draws need random numbers"
            count = self.numbers.shape[1]
            self.choosing.numbers[feed.width : feed.width + count] = self.numbers.T
        if self.choosing.seen is not None:
            assert self.seen is not None, "a penalty needs what was seen"
            self.choosing.seen.copy_(self.seen)
        self.kept = list(range(rows))
        self.begun = True

    def _ask(self) -> None:
        """Run one more step, and have its tokens sent to the host."""
        said = self.made.step.said[self.feed.width + self.asked]
        self.asked += 1
        if said.device.type != "cuda":
            self.choosing.run()
            self.waiting.append((said.clone(), None))
            return
        with torch.cuda.device(said.device):
            self.choosing.run()
            told = torch.empty(said.shape, dtype=said.dtype, pin_memory=True)
            told.copy_(said, non_blocking=True)
            done = torch.cuda.Event()
            done.record()
        self.waiting.append((told, done))


def _choosing(made: Made, rules: Rules) -> Choosing:
    """The step with this way to choose, recorded where the device can."""
    sampling, step = rules.sampling, made.step
    key = (sampling, rules.vocab)
    if key in made.choosing:
        return made.choosing[key]
    numbers = seen = None
    if not sampling.greedy:
        numbers = torch.zeros_like(step.said)
    if sampling.repetition_penalty != 1:
        seen = torch.zeros(step.rows, rules.vocab, dtype=torch.bool, device=step.device)

    def run() -> None:
        logits = step.logits()
        if numbers is None and seen is None:
            step.likeliest(logits, rules.vocab)
            return
        place = step.slots[None] + 1
        drawn = None if numbers is None else numbers.gather(0, place)[0]
        chosen, told = pick(logits[:, : rules.vocab], sampling, seen, drawn)
        if seen is not None:
            seen.scatter_(1, chosen[:, None], True)
        step.tokens.copy_(chosen)
        step.said.scatter_(0, place, told[None])
        step.slots.add_(1)

    # Runs while it is recorded: what it leaves is written over when a text begins.
    step.slots.zero_()
    made.choosing[key] = Choosing(recorded(run, step.device) if step.device.type == "cuda" else run, numbers, seen)
    return made.choosing[key]
