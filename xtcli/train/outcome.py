"""What an optimizer step came to, on its device until the host looks, and where it went wrong if it did."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from xtcli.data.batch import Batch
from xtcli.train.optim import first_non_finite, non_finite_gradients


@dataclass
class Outcome:
    """The losses of step `step`, and whether they and the norm of the gradients are numbers.

    `flag` is a float32 scalar on the device, 1 where they are not: what PyTorch's fused optimizers take as `found_inf`,
    and then leave the weights as they are. `lost` is True once the host knows of it.
    """

    step: int
    batch: Batch
    losses: Mapping[str, Tensor]
    flag: Tensor
    lost: bool = False
    arrived: torch.cuda.Event | None = field(default=None, repr=False)
    seen: Tensor | None = field(default=None, repr=False)  # `flag` in the host's memory, once it has arrived

    @classmethod
    def of(cls, step: int, batch: Batch, losses: Mapping[str, Tensor], norm: Tensor | None) -> Outcome:
        """The outcome of a step with these mean losses; `norm` is that of its gradients where it counts."""
        values = [*losses.values(), *(() if norm is None else (norm,))]
        whole = torch.stack([value.detach().float() for value in values])
        made = cls(step, batch, losses, (~torch.isfinite(whole).all()).float())
        if made.flag.is_cuda:
            # Asking the device for a number waits for all that was queued; a copy of its own arrives by itself.
            made.seen = torch.empty((), pin_memory=True).copy_(made.flag, non_blocking=True)
            made.arrived = torch.cuda.Event()
            made.arrived.record()
        return made

    def finite(self) -> bool:
        """Wait for the device to get there, and say whether all are numbers."""
        if self.arrived is not None:
            self.arrived.synchronize()
        self.lost = bool(self.flag if self.seen is None else self.seen)
        return not self.lost


@dataclass(frozen=True)
class Fault:
    """Where a step's first NaN or infinity arose: a module's path, or else gradients of parameters."""

    outcome: Outcome
    where: str | None
    gradients: list[str]

    @property
    def losses(self) -> dict[str, float]:
        """The mean loss of each head."""
        return {head: float(loss) for head, loss in self.outcome.losses.items()}

    @property
    def facts(self) -> dict[str, Any]:
        """For the log."""
        facts = {"step": self.outcome.step, "losses": self.losses, "module": self.where}
        return facts | {"gradients": self.gradients[:20], "samples": self.outcome.batch.ids}

    @property
    def sentence(self) -> str:
        """For the user."""
        step, samples = self.outcome.step, self.outcome.batch.ids
        shown = ", ".join(f"{head} {value}" for head, value in self.losses.items())
        named = f"in the gradient of {', '.join(self.gradients[:3])}"
        source = f"first in the output of {self.where}" if self.where else named
        ids = ", ".join(map(str, samples[:8])) + (" ..." if len(samples) > 8 else "")
        return (
            f"stopped before step {step}: not finite, {source}; loss {shown}; samples {ids}. "
            f"The weights are those of step {step - 1}; checkpoints are untouched. "
            "Lower train.lr, lengthen train.warmup, or set train.on_non_finite=skip."
        )


def search(
    model: nn.Module,
    outcome: Outcome,
    passes: Iterable[Callable[[], Any]],
    gradient: Callable[[Tensor], Tensor | None],
) -> Fault:
    """Find the fault of a step whose gradients are still there, where `gradient` finds a parameter's; `passes` run its
    micro-batches forward again."""
    gradients = non_finite_gradients(model, gradient)
    found = (first_non_finite(model, forward) for forward in passes)
    return Fault(outcome, next((path for path in found if path), None), gradients)
