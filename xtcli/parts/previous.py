"""What stands before each token: padding and document borders as recurrent mixers need them, and the token shift.

    shift    each token beside the one before it, as read: padding is passed over, a document begins with zeros

Axes: B rows, T tokens fed now, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from xtcli.parts.context import Ctx

THROUGH = "nothing is masked: what came before is read through a state"
"""What recurrent mixers say of how they see."""


def real_tokens(ctx: Ctx, tokens: int) -> Tensor | None:
    """Which of the tokens fed now are real, bool (B, T); None: all."""
    return None if ctx.keep is None else ctx.keep[:, ctx.offset : ctx.offset + tokens]


def new_documents(ctx: Ctx, tokens: int) -> Tensor | None:
    """Document numbers (B, T) of the tokens fed now; None: all are of one."""
    return None if ctx.documents is None else ctx.documents[:, ctx.offset : ctx.offset + tokens]


def goes_on(documents: Tensor | None) -> Tensor | None:
    """Where (B, T) a token is of the document of the one before it; the first goes on from the state."""
    if documents is None:
        return None
    return torch.cat((torch.ones_like(documents[:, :1], dtype=torch.bool), documents[:, 1:] == documents[:, :-1]), 1)


def shift(x: Tensor, last: Tensor, real: Tensor | None, opens: Tensor | None) -> tuple[Tensor, Tensor]:
    """x (B, T, D), the last token before it (B, D) -> the token before each (B, T, D), the last token.

    real, opens (B, T): False where a token is padding, or begins a document; None: nowhere.
    """
    line = torch.cat((last[:, None].to(x.dtype), x), 1)  # (B, 1 + T, D)
    if real is None:
        before, newest = line[:, :-1], line[:, -1]
    else:
        slots = torch.arange(1, x.shape[1] + 1, device=x.device) * real
        newest_slots = torch.cat((torch.zeros_like(slots[:, :1]), slots), 1).cummax(1).values
        taken = line.gather(1, newest_slots[..., None].expand(-1, -1, x.shape[2]))
        before, newest = taken[:, :-1], taken[:, -1]
    if opens is not None:
        before = before * opens[..., None]
    return before, newest
