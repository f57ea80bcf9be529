"""The plan of a run, before any memory is taken: parameters, FLOPs, bytes, and whether it fits.

FLOPs are those of matrix products in the built graph, counted by running one sequence on the meta device:
2 m n k for each product, attention as if nothing were masked (so that MFU compares with the figures of
nanoGPT and PaLM, arXiv:2204.02311), the backward pass as two forwards. Activations are the tensors that
autograd would keep, counted in the same run, and what the backward pass takes at its worst moment: the loss with
its copies of the logits, or the gradients of the two widest activations. Recomputed activations count once more in
time, not in FLOPs.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from xtcli.data.batch import Batch
from xtcli.model import count_active
from xtcli.parts.graphs import Graph
from xtcli.parts.heads import Head
from xtcli.parts.losses import slab_bytes
from xtcli.parts.recurrence import remembered
from xtcli.parts.reversible import keeping
from xtcli.parts.stack import applied
from xtcli.runs.run import gib
from xtcli.train.counting import Kernels
from xtcli.train.optim import ADAMW_COPIES

MASKS = ("attention_mask", "decoder_attention_mask")
SUMMED = torch.float32.itemsize
"""Bytes of a gradient that several micro-batches add to."""
COPIES = 8
"""Bytes of the float32 copies that a loss makes of each output: its own and the gradient's."""

CPU_ROOM = 2 * 2**30
"""Bytes of activations beyond which a CPU gains nothing from larger micro-batches and pays for fresh pages."""
WORKSPACE = 0.05
"""Share of memory that kernels, fragments and the allocator take beside what is counted."""


@dataclass(frozen=True)
class Cost:
    """One forward pass."""

    flops: int
    activations: int  # bytes kept for the backward pass
    logits: int  # bytes of the heads' outputs and their float32 copies
    slabs: int  # the same of heads that make their loss a slab at a time, were it made at once
    slab: int  # the most that those take
    widest: int  # bytes of the largest activation
    stream: int  # bytes of what enters a block

    def kept(self, skeleton: Graph, checkpointing: bool) -> int:
        """Bytes kept for the backward pass; with recomputation the input of each block and the inside of one.

        Reversible blocks are always computed again, and need the two streams behind the last of them alone.
        """
        run = applied(skeleton)
        undone = any(block.reversible for block in run)
        if not checkpointing and not undone:
            return self.activations
        blocks = max(len(run), 1)
        return self.activations // blocks + (2 if undone else blocks) * self.stream

    def needed(self, rows: int, kept: int) -> int:
        """Bytes that `rows` sequences take of which each keeps `kept`: what is kept, and the worst moment beside it."""
        loss = self.logits * rows + min(self.slabs * rows, self.slab)
        return kept * rows + max(loss, 2 * self.widest * rows)


@dataclass(frozen=True)
class Plan:
    """What one optimizer step takes. All sizes in bytes."""

    parameters: int
    trained: int
    tokens: int
    flops: int
    weights: int
    gradients: int
    optimizer: int
    activations: int
    micro_batch: int
    batch: int
    active: int = 0

    @property
    def peak(self) -> int:
        """Peak memory of training."""
        whole = self.weights + self.gradients + self.optimizer + self.activations
        return int(whole * (1 + WORKSPACE))


def measure(skeleton: Graph, batch: Batch, dtype: torch.dtype, device: str = "cuda", *, carried: bool = False) -> Cost:
    """The cost of one forward pass of `batch` through a model on the meta device, as on a device of type `device`.

    Padding masks are left out: they change no sizes. Heads that only look at supervised positions are
    counted for those. carried: each row is read behind memories of earlier segments.
    """
    shown = {name: tensor for name, tensor in batch.inputs.items() if name not in MASKS}
    inputs = {name: torch.empty_like(tensor, device="meta") for name, tensor in shown.items()}
    if carried:
        inputs["mems"] = remembered(skeleton, len(batch))
    kept: dict[int, tuple[Any, int]] = {}
    owned = {parameter.untyped_storage()._cdata for parameter in skeleton.parameters()}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in owned:
            kept[storage._cdata] = (storage, storage.nbytes())
        return tensor

    counter = FlopCounterMode(display=False)
    kernels = Kernels(device, dtype)
    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with keeping(skeleton), kernels, counter, hooks:
        hidden = skeleton.hidden(**inputs)
    body = counter.get_total_flops()
    sizes = [size for key, (_, size) in kept.items() if key not in kernels.casts]
    flops, logits, slabs = body, 0, 0
    # A GPU has a slab and its slope in the products' type, in one place or two.
    beside = dtype.itemsize if device == "cuda" and dtype.itemsize < 4 else COPIES
    for name, targets in batch.targets.items():
        head: Head = skeleton.heads[name]  # type: ignore[assignment]
        counter = FlopCounterMode(display=False)
        with counter:
            made = head.outputs(skeleton.read_by(name, hidden))
        share = _supervised(targets) if head.sparse else 1.0
        flops += int(counter.get_total_flops() * share)
        entries = int(sum(tensor.numel() for tensor in made.values()) * share)
        if head.terms is None:
            logits += entries * (dtype.itemsize + COPIES)
        else:
            slabs += entries * (dtype.itemsize + beside)
    slab = slab_bytes(device) * (dtype.itemsize + beside) // dtype.itemsize
    widest, stream = max(sizes, default=0), hidden.states.numel() * 4
    return Cost(flops, sum(sizes), logits, slabs, slab, widest, stream)


def _supervised(targets: Tensor) -> float:
    from xtcli.data.batch import IGNORE

    return float((targets != IGNORE).float().mean())


def make_plan(
    skeleton: Graph,
    batch: Batch,
    *,
    dtype: torch.dtype,
    stored: torch.dtype = torch.float32,
    micro_batch: int | None,
    checkpointing: bool,
    free: int,
    device: str = "cuda",
    cost: Cost | None = None,
    carried: bool = False,
) -> Plan:
    """The plan of a step over `batch`; without a given `micro_batch`, the largest that fits into `free` bytes.

    `cost` is that of the first row, where it has been measured before. dtype: of the products; stored: of the weights,
    their gradients and AdamW's running values.
    """
    cost = cost or measure(skeleton, batch.split(1)[0], dtype, device, carried=carried)
    parameters = sum(parameter.numel() for parameter in skeleton.parameters())
    trained = sum(parameter.numel() for parameter in skeleton.parameters() if parameter.requires_grad)
    kept = cost.kept(skeleton, checkpointing)
    size = stored.itemsize
    # A gradient is made beside the sum that it is added to.
    largest = max(
        (size * parameter.numel() for parameter in skeleton.parameters() if parameter.requires_grad), default=0
    )
    casts = parameters * dtype.itemsize if dtype.itemsize < size else 0

    def fixed(gradient: int) -> int:
        each = size * parameters + casts + (gradient + size * ADAMW_COPIES) * trained
        return int((each + largest) * (1 + WORKSPACE))

    def fits(gradient: int) -> int:
        room = max(int(free * 0.9 - fixed(gradient)), 0)
        if device == "cpu":
            room = min(room, CPU_ROOM)
        return bisect_right(range(2, rows + 1), room, key=lambda n: int(cost.needed(n, kept) * (1 + WORKSPACE))) + 1

    rows = len(batch.ids)
    if micro_batch is None:
        most = fits(size)
        most = most if most >= rows else min(fits(SUMMED), rows - 1)
        # Equal shares: 24 rows of which 10 fit go as 8 + 8 + 8.
        micro_batch = -(-rows // -(-rows // most))
    gradient = size if micro_batch >= rows else SUMMED
    return Plan(
        parameters,
        trained,
        batch.tokens,
        3 * cost.flops * rows,
        size * parameters + casts,
        gradient * trained,
        size * trained * ADAMW_COPIES,
        cost.needed(min(micro_batch, rows), kept) + largest,
        min(micro_batch, rows),
        rows,
        count_active(skeleton),
    )


def lines(plan: Plan, checkpoint: int, place: str, free: int) -> Mapping[str, str]:
    """The plan as label -> figure with its unit."""
    shares = plan.batch // plan.micro_batch + (plan.batch % plan.micro_batch > 0)
    fits = "fits" if plan.peak <= free else "DOES NOT FIT"
    trained = "" if plan.trained == plan.parameters else f" ({plan.trained:,} trained)"
    trained += f" ({plan.active:,} active for each token)" if plan.active not in (0, plan.parameters) else ""
    return {
        "parameters": f"{plan.parameters:,}{trained}",
        "step": f"{plan.batch} sequences, {plan.tokens:,} tokens, in {shares} x {plan.micro_batch}",
        "FLOPs": f"{plan.flops:.3e} FLOP per step",
        "memory": (
            f"{gib(plan.peak)} at the peak (weights {gib(plan.weights)}, gradients {gib(plan.gradients)}, "
            f"optimizer {gib(plan.optimizer)}, activations {gib(plan.activations)}); {gib(free)} free: {fits}"
        ),
        "checkpoint": f"{gib(checkpoint)} on disk",
        "device": place,
    }
