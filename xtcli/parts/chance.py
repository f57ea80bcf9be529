"""Chance in evaluation: some parts (hashing) draw random numbers whenever they run, unless their config has a seed.

A class or instance attribute `draws` says so. Whoever wants an answer that can be had again asks for it inside
`settled`: there such parts draw the same numbers at each call, and no global random state is moved.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


def draws(model: nn.Module) -> bool:
    """Whether the model draws random numbers in evaluation."""
    return any(getattr(module, "draws", False) for module in model.modules())


@contextmanager
def settled(model: nn.Module) -> Iterator[None]:
    """Inside, one call of the model draws what every other draws there."""
    if not draws(model):
        yield
        return
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield
