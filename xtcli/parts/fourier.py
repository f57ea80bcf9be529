"""Mixing of places without weights: the real part of a Fourier transform.

    y = Re F_places(F_width(x))        Lee-Thorp et al. 2021, arXiv:2105.03824, unnormalised

Every place reads every other one, padding too: there is no mask that could hide one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from xtcli import registry
from xtcli.errors import refuse
from xtcli.parts.context import Ctx
from xtcli.parts.linear import widen
from xtcli.parts.scope import Impossible, Scope
from xtcli.registry import field, part


@part("mixer", "fourier")
class Fourier(nn.Module):
    """The real part of the transform over places and width, in float32; no parameters and no mask."""

    hides = False  # neither padding nor other documents

    class Config(registry.Config):
        """The real part of a Fourier transform over places and width."""

        length: int | None = field("places that every text must have; null = any number", None, gt=0, tiny=128)

    def __init__(self, config: Config, scope: Scope) -> None:
        super().__init__()
        if scope.causal:
            raise Impossible("", "a Fourier transform sees both ways", "use it in an encoder")
        self.length = config.length

    def new_state(self, batch: int, capacity: int, device: Any, dtype: Any) -> None:
        return None

    def forward(self, x: Tensor, ctx: Ctx) -> Tensor:
        """x (B, T, D) -> (B, T, D); raises UserError for documents that should not see each other, or another T."""
        if ctx.documents is not None:
            raise refuse("a Fourier transform mixes all documents of a row", "set objective.pack=stream or none")
        if self.length not in (None, x.shape[1]):
            raise refuse(
                f"a text has {x.shape[1]} places, and the transform is made for {self.length}", "pad the texts"
            )
        mixed: Tensor = torch.fft.fft2(widen(x), dim=(1, 2)).real
        return mixed.to(x.dtype)
