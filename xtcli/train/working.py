"""Sixteen-bit copies of the weights that products read, made once a step instead of once a product.

Weights and optimizer state stay float32 and are the model's parameters. While a forward and backward pass runs, the
copies are lent to the modules in their place: they are leaves of the graph, their gradients go on to the float32
weights as soon as they are there, summed in float32 over micro-batches. Products come out as under autocast alone,
which would round the same weights at each use; what enters through a table starts the stream in 16 bits.

A module says by name, in `products`, which of its parameters are read by products or looked up, and nothing else.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn


class Working:
    """The copies of one model in `dtype`; with float32 there are none and nothing changes."""

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        self.masters: list[Tensor] = []
        self.copies: list[Tensor] = []
        self.places: list[tuple[nn.Module, str, nn.Parameter, nn.Parameter]] = []
        if dtype.itemsize >= 4:
            return
        made: dict[nn.Parameter, nn.Parameter] = {}
        for module in model.modules():
            for name in getattr(module, "products", ()):
                master = module._parameters[name]
                if master is None:
                    continue
                if master not in made:
                    made[master] = copy = nn.Parameter(master.detach().to(dtype), master.requires_grad)
                    if master.requires_grad:
                        copy.register_post_accumulate_grad_hook(partial(_hand_on, master))
                        self.masters.append(master)
                        self.copies.append(copy)
                self.places.append((module, name, master, made[master]))

    def refresh(self) -> None:
        """Round the weights anew, after they have changed."""
        if self.copies:
            with torch.no_grad():
                torch._foreach_copy_(self.copies, self.masters)

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


def _hand_on(master: nn.Parameter, copy: Tensor) -> None:
    """Add the gradient of a copy to that of its master."""
    if master.grad is None:
        master.grad = copy.grad.to(master.dtype)  # type: ignore[union-attr]
    else:
        master.grad += copy.grad  # type: ignore[arg-type]
    copy.grad = None
