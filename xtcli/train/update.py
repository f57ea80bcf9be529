"""From gradients to new weights: the norm, the clipping, AdamW, the working copies.

    plain   PyTorch's operators, one after another: the specification, and what runs where there are no kernels of ours
    fast    fast/adamw.py: one reading of the gradients for their norm, one pass over everything for the update

Both keep the same running values, under PyTorch's names, so that a run may change from one to the other.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from xtcli import fast
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


class FastUpdate(Update):
    """The same in kernels of our own; parameters are float32 and lie in one piece."""

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, working: Working, limit: float | None
    ) -> None:
        super().__init__(model, optimizer, working, limit)
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
        from xtcli.fast.adamw import Entry, Table

        entries: dict[Any, list[Entry]] = {}
        for group in self.optimizer.param_groups:
            for weight in group["params"]:
                copy = self.copies.get(weight)
                source = weight if copy is None or weight.grad is not None else copy
                if source.grad is not None:
                    state = self.state(weight)
                    entry = Entry(
                        weight,
                        state["exp_avg"],
                        state["exp_avg_sq"],
                        state["step"],
                        group["weight_decay"],
                        copy,
                        source,
                    )
                    entries.setdefault((source.dtype, copy is None), []).append(entry)
        if not _same([table.entries for table in self.known], list(entries.values())):
            self.known = [Table(each, self.optimizer.param_groups[0]["betas"]) for each in entries.values()]
        self.tables = self.known

    def state(self, weight: Tensor) -> dict[str, Tensor]:
        """The running values of a parameter, made at its first gradient."""
        state: dict[str, Tensor] = self.optimizer.state[weight]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=weight.device)
            state["exp_avg"] = torch.zeros_like(weight, memory_format=torch.contiguous_format)
            state["exp_avg_sq"] = torch.zeros_like(state["exp_avg"])
        return state


def _same(one: list[Any], other: list[Any]) -> bool:
    """Whether these lists of lists of entries are of the very same tensors."""
    if [len(each) for each in one] != [len(each) for each in other]:
        return False
    pairs = ((a, b) for left, right in zip(one, other, strict=True) for a, b in zip(left, right, strict=True))
    return all(
        a.weight is b.weight and a.mean is b.mean and a.step is b.step and a.source is b.source for a, b in pairs
    )


def update_for(
    model: nn.Module, optimizer: torch.optim.Optimizer, working: Working, limit: float | None, scaled: bool
) -> Update:
    """The fast update where every trained parameter allows it, else the plain one, as under a gradient scaler."""
    trained = [weight for group in optimizer.param_groups for weight in group["params"]]
    fits = all(_fits(weight) for weight in trained) and not scaled
    return (FastUpdate if fits else Update)(model, optimizer, working, limit)


def _fits(weight: Tensor) -> bool:
    return fast.runs_on(weight.device) and weight.is_contiguous() and weight.dtype == torch.float32
