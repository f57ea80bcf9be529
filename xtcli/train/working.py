"""Sixteen-bit copies of the weights that products read, made once a step instead of once a product.

Weights and optimizer state stay float32 and are the model's parameters. While a forward and backward pass runs, the
copies are lent to the modules in their place: they are leaves of the graph. In a step of several micro-batches their
gradients are summed in float32 with those of the weights, as they come; those of a single one stay with the copies
until they are handed on, or are read there. Products come out as under autocast alone, which would round the same
weights at each use; what enters through a table starts the stream in 16 bits.

A module says by name, in `products`, which of its parameters are read by products or looked up, and nothing else.

Weights that are in 16 bits themselves are read as they are; in a step of several micro-batches their gradients are
summed in float32 beside them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from xtcli.fast.stacked import laid_out


class Working:
    """The copies of one model in `dtype`; there are none where that is float32, or the type of the weights.

    several: whether a step has more than one backward pass.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype, several: bool = True) -> None:
        self.masters: list[Tensor] = []
        self.copies: list[Tensor] = []
        self.places: list[tuple[nn.Module, str, nn.Parameter, nn.Parameter]] = []
        self.sums: dict[Tensor, Tensor] = {}
        """By weight in 16 bits, the tensor whose `grad` is the sum of its gradients."""
        if dtype.itemsize >= 4:
            return
        if all(weight.dtype == dtype for weight in model.parameters()):
            lay_out(model)
            if several:
                self._sum_up(weight for weight in model.parameters() if weight.requires_grad)
            return
        made: dict[nn.Parameter, nn.Parameter] = {}
        laid = _laid_out(model, dtype)
        for module in model.modules():
            for name in getattr(module, "products", ()):
                master = module._parameters[name]
                if master is None:
                    continue
                if master not in made:
                    narrow = laid[master] if master in laid else master.detach().to(dtype)
                    made[master] = copy = nn.Parameter(narrow, master.requires_grad)
                    if master.requires_grad:
                        if several:
                            copy.register_post_accumulate_grad_hook(partial(_hand_on, master))
                        self.masters.append(master)
                        self.copies.append(copy)
                self.places.append((module, name, master, made[master]))

    def _sum_up(self, weights: Iterable[nn.Parameter]) -> None:
        for weight in weights:
            # As large as the weight, for a gradient must be, and no memory.
            self.sums[weight] = total = torch.zeros((), device=weight.device).expand(weight.shape)
            weight.register_post_accumulate_grad_hook(partial(_hand_on, total))

    def gradient(self, weight: Tensor) -> Tensor | None:
        """The gradient of a weight or of a copy, wherever it is held."""
        masters = (master for master, copy in zip(self.masters, self.copies, strict=True) if copy is weight)
        held = (self.sums.get(weight), weight, *masters)
        return next((each.grad for each in held if each is not None and each.grad is not None), None)

    def refresh(self) -> None:
        """Round the weights anew, after they have changed."""
        if self.copies:
            with torch.no_grad():
                torch._foreach_copy_(self.copies, self.masters)

    def hand_on(self) -> None:
        """Give the weights the gradients that the copies still hold, and sums those that the weights do."""
        pairs = [
            *zip(self.masters, self.copies, strict=True),
            *((total, weight) for weight, total in self.sums.items()),
        ]
        for to, source in pairs:
            if source.grad is not None:
                _hand_on(to, source)

    def clear(self) -> None:
        """Forget the gradients of the copies, and sums."""
        for tensor in (*self.copies, *self.sums.values()):
            tensor.grad = None

    @contextmanager
    def lent(self) -> Iterator[None]:
        """Inside, modules read the copies; outside, the model is its float32 self."""
        try:
            for module, name, _, copy in self.places:
                module._parameters[name] = copy
            yield
        finally:
            for module, name, master, _ in self.places:
                module._parameters[name] = master


def lay_out(model: nn.Module) -> None:
    """Move weights that enter one product one behind the other in memory, in place; they stay the same parameters."""
    for weights in _joined(model):
        for weight, place in zip(weights, laid_out(weights, weights[0].dtype), strict=True):
            weight.data = place


def _laid_out(model: nn.Module, dtype: torch.dtype) -> dict[nn.Parameter, Tensor]:
    """Copies of weights that enter one product, one behind the other in memory."""
    laid: dict[nn.Parameter, Tensor] = {}
    for weights in _joined(model):
        laid |= zip(weights, laid_out(weights, dtype), strict=True)
    return laid


def _joined(model: nn.Module) -> Iterator[list[nn.Parameter]]:
    """The weights that enter one product (`joined`, set by joined.py), each once."""
    seen: set[nn.Parameter] = set()
    for module in model.modules():
        weights = [layer.weight for layer in vars(module).get("joined", ())]
        if weights and seen.isdisjoint(weights):
            seen.update(weights)
            yield weights


def _hand_on(master: Tensor, copy: Tensor) -> None:
    """Add the gradient of a copy to that of its master, or of a weight to their sum."""
    if master.grad is None:
        master.grad = copy.grad.to(master.dtype)  # type: ignore[union-attr]
    else:
        master.grad += copy.grad  # type: ignore[arg-type]
    copy.grad = None
