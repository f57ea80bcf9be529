"""From gradients to new weights: the norm, the clipping, AdamW, the working copies.

    plain   PyTorch's operators, one after another: the specification, and what runs where there are no kernels of ours
    rounded the same for weights in bfloat16, which are rounded by chance: the specification is rounded.py
    fast    fast/adamw.py: one reading of the gradients for their norm, one pass over everything for the update

All keep the same running values, under PyTorch's names, so that a run may change from one to the other.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from xtcli import fast
from xtcli.train import rounded
from xtcli.train.optim import clip
from xtcli.train.working import Working

if TYPE_CHECKING:
    from xtcli.fast.adamw import Table


class Update:
    """What happens to the weights of `model` at the end of a step; `limit` is that of the gradients' norm."""

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, working: Working, limit: float | None
    ) -> None:
        self.model, self.optimizer, self.working, self.limit = model, optimizer, working, limit

    def gather(self) -> None:
        """Gradients to where they are read from, once all micro-batches are through."""
        self.working.hand_on()

    def norm(self) -> Tensor:
        """The norm of all gradients before clipping, a float32 scalar on the device; they are clipped by the update."""
        return clip(self.model, self.limit)

    def apply(self, flag: Tensor | None = None) -> None:
        """Change the weights; not if `flag`, a float32 scalar on the device, is other than 0."""
        if flag is not None:
            self.optimizer.found_inf = flag  # type: ignore[attr-defined]
        self.optimizer.step()
        self.working.refresh()

    def clear(self) -> None:
        """Forget the gradients."""
        self.optimizer.zero_grad(set_to_none=True)
        self.working.clear()

    def state(self, weight: Tensor) -> dict[str, Tensor]:
        """The running values of a parameter, made at its first gradient."""
        state: dict[str, Tensor] = self.optimizer.state[weight]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=weight.device)
            state["exp_avg"] = torch.zeros_like(weight, memory_format=torch.contiguous_format)
            state["exp_avg_sq"] = torch.zeros_like(state["exp_avg"])
        return state


class RoundedUpdate(Update):
    """The same for parameters in bfloat16, by rounded.py; gradients are clipped on their way into the update."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        working: Working,
        limit: float | None,
        seed: int = 0,
    ) -> None:
        super().__init__(model, optimizer, working, limit)
        self.trained = _numbered(optimizer)
        device = next(iter(self.trained)).device
        self.keys = rounded.keys(seed, len(self.trained)).to(device)
        self.total = torch.zeros((), device=device)

    def norm(self) -> Tensor:
        found = (self.working.gradient(weight) for weight in self.model.parameters())
        self.total = rounded.norm_of([gradient for gradient in found if gradient is not None])
        return self.total

    @torch.no_grad()
    def apply(self, flag: Tensor | None = None) -> None:
        scale = None if self.limit is None else (self.limit / (self.total + 1e-6)).clamp(max=1.0)
        for group in self.optimizer.param_groups:
            for weight in group["params"]:
                gradient = self.working.gradient(weight)
                if gradient is not None:
                    key = self.keys[self.trained[weight]]
                    rounded.step(weight, gradient, self.state(weight), group, key, scale, flag)


class FastUpdate(Update):
    """The same in kernels of our own; parameters are float32, or bfloat16 as in `RoundedUpdate`, and lie in one
    piece."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        working: Working,
        limit: float | None,
        seed: int = 0,
    ) -> None:
        super().__init__(model, optimizer, working, limit)
        trained = _numbered(optimizer)
        self.keys = dict(zip(trained, rounded.keys(seed, len(trained)).tolist(), strict=True))
        self.copies: dict[Tensor, Tensor] = dict(zip(working.masters, working.copies, strict=True))
        self.tables: list[Table] = []  # of this step
        self.known: list[Table] = []  # of the last pass that was not a recorded one
        self.total = torch.zeros(())

    def gather(self) -> None:
        """Nothing: copies' gradients are read where they are."""

    def norm(self) -> Tensor:
        self.look_up()
        chunks = [table.chunks for table in self.tables]
        sums = torch.empty(sum(chunks), dtype=torch.float32, device=self.tables[0].sizes.device)
        for table, part in zip(self.tables, sums.split(chunks), strict=True):
            table.read()
            table.squared(part)
        self.total = sums.sum().sqrt()
        return self.total

    def apply(self, flag: Tensor | None = None) -> None:
        flag = torch.zeros_like(self.total) if flag is None else flag
        group = self.optimizer.param_groups[0]
        for table in self.tables:
            table.update(group, self.limit, self.total, flag)

    def held(self) -> tuple[list[Table], Tensor]:
        """What was found out about the gradients of a pass that has been recorded; `take` makes it that of the step."""
        for table in self.tables:
            table.write()
        # The graph reads these tables for good; a pass beside it must not write its addresses into them.
        self.known = []
        return self.tables, self.total

    def take(self, held: tuple[list[Table], Tensor]) -> None:
        """Make the gradients that a recorded pass leaves those of this step."""
        self.tables, self.total = held

    def look_up(self) -> None:
        """The tables of the parameters that have gradients in this step."""
        from xtcli.fast.adamw import ALIGN, Entry, Table

        entries: dict[Any, list[Entry]] = {}
        for group in self.optimizer.param_groups:
            for weight in group["params"]:
                copy = self.copies.get(weight)
                places = (self.working.sums.get(weight), weight, copy)
                source = next((each for each in places if each is not None and each.grad is not None), weight)
                if source.grad is not None:
                    if source.grad.data_ptr() % ALIGN:
                        # A part of a gradient of several, at an odd place.
                        source.grad = source.grad.clone()
                    state = self.state(weight)
                    entry = Entry(
                        weight,
                        state["exp_avg"],
                        state["exp_avg_sq"],
                        state["step"],
                        group["weight_decay"],
                        copy,
                        source,
                        self.keys[weight],
                    )
                    entries.setdefault((source.dtype, weight.dtype, copy is None), []).append(entry)
        if not _same([table.entries for table in self.known], list(entries.values())):
            self.known = [Table(each, self.optimizer.param_groups[0]["betas"]) for each in entries.values()]
        self.tables = self.known


def _numbered(optimizer: torch.optim.Optimizer) -> dict[Tensor, int]:
    """The trained parameters and their numbers."""
    return {
        weight: n for n, weight in enumerate(weight for group in optimizer.param_groups for weight in group["params"])
    }


def _same(one: list[Any], other: list[Any]) -> bool:
    """Whether these lists of lists of entries are of the very same tensors."""
    if [len(each) for each in one] != [len(each) for each in other]:
        return False
    pairs = ((a, b) for left, right in zip(one, other, strict=True) for a, b in zip(left, right, strict=True))
    return all(
        a.weight is b.weight and a.mean is b.mean and a.step is b.step and a.source is b.source for a, b in pairs
    )


def update_for(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    working: Working,
    limit: float | None,
    scaled: bool,
    seed: int = 0,
) -> Update:
    """The fast update where every trained parameter allows it, else a plain one, as under a gradient scaler.

    seed: what rounding by chance starts from.
    """
    trained = list(_numbered(optimizer))
    if not scaled and all(_fits(weight) for weight in trained):
        return FastUpdate(model, optimizer, working, limit, seed)
    if any(weight.dtype == torch.bfloat16 for weight in trained):
        return RoundedUpdate(model, optimizer, working, limit, seed)
    return Update(model, optimizer, working, limit)


def _fits(weight: Tensor) -> bool:
    fits = weight.is_contiguous() and weight.dtype in (torch.float32, torch.bfloat16)
    return fits and fast.runs_on(weight.device)
