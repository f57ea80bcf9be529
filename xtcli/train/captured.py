"""Passes of the training loop as CUDA graphs: all kernels from a batch to the norm of its gradients, launched at once.

The host launches some hundred kernels a step, and a GPU that is through with one before the next is launched waits. A
graph is recorded for each shape of batch once it has come often enough, and replayed with the batch copied into the
place of the recorded one. What a pass computes, and the random numbers it draws, stay the same.

A model whose pass cannot be recorded runs as it did, and the user is told why: a value that the host waits for, or a
choice that it makes anew in each pass.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from xtcli.config.train import TrainConfig
from xtcli.data.batch import Batch
from xtcli.fast.counters import clear_at_once, counters
from xtcli.fast.hopper.build import Failed
from xtcli.train.transforms import compiles
from xtcli.train.update import FastUpdate, Update

USUAL = 3
"""Passes of a shape before it is recorded: compilers and libraries settle in the first."""
MOST = 8
"""Shapes that are recorded; others run as they are."""

Counts = Mapping[str, Any]
"""What the sum of each term of the loss is divided by: numbers, or scalars on the device."""
Work = Callable[[Sequence[Batch], Counts], tuple[dict[str, Tensor], Tensor]]
"""Micro-batches and counts -> the losses of the whole batch by head, and the norm of its gradients."""


@dataclass
class Recorded:
    """One graph: where it reads batches and counts, and where it leaves losses, norm and gradients."""

    graph: Any
    parts: list[Batch]
    counts: dict[str, Tensor]
    losses: dict[str, Tensor]
    norm: Tensor
    held: Any

    def read(self, parts: Sequence[Batch], counts: Counts) -> None:
        """Copy a batch into the recorded one's place."""
        for static, part in zip(self.parts, parts, strict=True):
            for name, tensor in part.inputs.items():
                static.inputs[name].copy_(tensor, non_blocking=True)
            for name, tensor in part.targets.items():
                static.targets[name].copy_(tensor, non_blocking=True)
        for head, count in counts.items():
            self.counts[head].fill_(count)


class Captured:
    """`work` by graphs where they can be recorded; `talk` hears why not."""

    def __init__(self, work: Work, change: FastUpdate, device: torch.device, talk: Callable[[str], None]) -> None:
        self.work, self.change, self.device, self.talk = work, change, device, talk
        self.pool: Any = None
        self.graphs: dict[Any, Recorded] = {}
        self.seen: Counter[Any] = Counter()
        self.off = False

    def __call__(self, parts: Sequence[Batch], counts: Counts) -> tuple[dict[str, Tensor], Tensor]:
        """What `work` gives; gradients are left for the update."""
        shape = shape_of(parts, counts)
        if shape not in self.graphs:
            self.seen[shape] += 1
            if self.off or self.seen[shape] <= USUAL or len(self.graphs) >= MOST:
                return self.work(parts, counts)
            if not self.record(shape, parts, counts):
                return self.work(parts, counts)
        recorded = self.graphs[shape]
        recorded.read(parts, counts)
        recorded.graph.replay()
        self.change.take(recorded.held)
        # The next replay writes over what this one leaves.
        return {head: loss.clone() for head, loss in recorded.losses.items()}, recorded.norm.clone()

    def record(self, shape: Any, parts: Sequence[Batch], counts: Counts) -> bool:
        """Record the pass of a batch of this shape; False, with a word to the user, where that cannot be done."""
        static = [copied(part, self.device) for part in parts]
        divisors = {head: torch.full((), float(count), device=self.device) for head, count in counts.items()}
        reason = self.obstacle(static, divisors)
        if reason is None:
            try:
                self.graphs[shape] = self.recorded(static, divisors)
            except RuntimeError as error:
                # Out of memory among them: the graph keeps its own.
                reason = str(first_of(error)).partition("\n")[0]
                end_recording(self.device)
                torch.cuda.empty_cache()
        self.change.clear()
        if reason is not None:
            self.off = True
            self.talk(f"steps are not recorded as one graph, which would be faster: {reason}")
        return reason is None

    def obstacle(self, parts: Sequence[Batch], counts: Counts) -> str | None:
        """Try a pass that may not wait: why it cannot be recorded, if so. Random states are put back."""
        host, device = torch.get_rng_state(), torch.cuda.get_rng_state(self.device)
        mode = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")
        try:
            self.work(parts, counts)
        except RuntimeError as error:
            return f"a pass waits for the GPU ({str(error).splitlines()[0]})"
        finally:
            torch.cuda.set_sync_debug_mode(mode)
            drew = not torch.equal(host, torch.get_rng_state())
            torch.set_rng_state(host)
            torch.cuda.set_rng_state(device, self.device)
            self.change.clear()
        return "the host draws random numbers in each pass" if drew else None

    def recorded(self, parts: list[Batch], counts: dict[str, Tensor]) -> Recorded:
        """Record one pass; nothing is computed yet."""
        self.pool = self.pool or torch.cuda.graph_pool_handle()
        torch.cuda.synchronize(self.device)
        torch.cuda.empty_cache()
        graph = torch.cuda.CUDAGraph(keep_graph=True)
        # Other threads (the loader's) may go on allocating; a recording that breaks off would keep its stream.
        with (
            torch.cuda.stream(torch.cuda.current_stream(self.device)),
            torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"),
        ):
            losses, norm = self.work(parts, counts)
        try:
            clear_at_once(graph.raw_cuda_graph(), counters(self.device.index))
        except Failed as error:
            self.talk(f"counters of products are cleared one by one, which is slower: {error}")
        graph.instantiate()
        return Recorded(graph, parts, counts, losses, norm, self.change.held())


def first_of(error: RuntimeError) -> RuntimeError:
    """What broke a recording off: its end then raises an error of its own, which says nothing of it."""
    before = error.__context__
    return before if isinstance(before, RuntimeError) else error


def end_recording(device: torch.device) -> None:
    """Let random numbers be drawn again where a recording broke off.

    Their generator would wait for its end for ever, and refuse each draw; the end of another one is as good.
    """
    with torch.cuda.device(device), torch.cuda.graph(torch.cuda.CUDAGraph()):
        torch.zeros((), device=device)


def captured(
    work: Work, change: Update, config: TrainConfig, device: torch.device, talk: Callable[[str], None], ahead: bool
) -> Work:
    """`work`, by graphs where the host may be `ahead` of the device and steps are compiled.

    Passes that compute parts again keep the state of random numbers, which no graph can.
    """
    fits = ahead and compiles(config, device) and not config.checkpointing
    return Captured(work, change, device, talk) if fits and isinstance(change, FastUpdate) else work


def shape_of(parts: Sequence[Batch], counts: Counts) -> Any:
    """What two batches must have in common to be read by one graph."""
    sides = ((part.inputs, part.targets) for part in parts)
    shapes = tuple(
        tuple((name, tuple(tensor.shape), tensor.dtype) for name, tensor in sorted(side.items()))
        for pair in sides
        for side in pair
    )
    return shapes, tuple(tuple(sorted(part.slots.items())) for part in parts), tuple(sorted(counts))


def copied(part: Batch, device: torch.device) -> Batch:
    """A batch in memory of its own on the device."""
    made = part.to(device)
    return replace(
        made,
        inputs={name: tensor.clone() for name, tensor in made.inputs.items()},
        targets={name: tensor.clone() for name, tensor in made.targets.items()},
    )
