"""Which vector stands for a whole text.

`pick` is the pooled one, the first state, that of the last real token, of the token before the first padding, of the
last end token, or the mean of the real ones; `row-last` and `row-mean` count padding like text.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from xtcli.parts.heads import Hidden

Pick = Literal["pooled", "first", "last", "before-pad", "row-last", "end", "mean", "row-mean"]


def last_real(hidden: Hidden, pad: int | None) -> Tensor:
    """The place (B,) of the last token that is not padding, on whichever side the padding is.

    Vectors given in place of ids do not say which of them are padding: there it is the last place.
    """
    length = hidden.states.shape[1]
    places = torch.arange(length, device=hidden.states.device)
    if hidden.ids is not None and pad is not None:
        real = hidden.ids != pad
    elif hidden.ids is not None and hidden.keep is not None:
        real = hidden.keep
    else:
        return places[-1].expand(hidden.states.shape[0])
    return (places * real).argmax(-1)


def before_pad(hidden: Hidden, pad: int | None) -> Tensor:
    """The place (B,) before the first padding token; the last place where there is none, or none is known."""
    length = hidden.states.shape[1]
    if hidden.ids is None or pad is None:
        return torch.full((hidden.states.shape[0],), length - 1, device=hidden.states.device)
    return ((hidden.ids == pad).int().argmax(-1) - 1) % length


def last_end(hidden: Hidden, end: int) -> Tensor:
    """The place (B,) of the last `end` token, in an encoder-decoder that of the source."""
    ids = hidden.ids if hidden.source is None else hidden.source
    if ids is None:
        raise ValueError("the classifier reads the state at the end token: it needs input_ids")
    ends = ids == end
    if not ids.is_meta and not bool(ends.any(-1).all()):
        raise ValueError(f"the classifier reads the state at the end token {end}, and a text has none")
    return (torch.arange(ids.shape[1], device=ids.device) * ends).argmax(-1)


def pick_vector(hidden: Hidden, pick: Pick, pad: int | None, end: int = 0) -> Tensor:
    """The vector (B, D) that stands for each text."""
    if pick == "pooled":
        if hidden.pooled is None:
            raise AssertionError("checked when built")
        return hidden.pooled
    if pick == "first":
        return hidden.states[:, 0]
    if pick == "row-last":
        return hidden.states[:, -1]
    if pick == "row-mean":
        return hidden.states.mean(1)
    if pick == "before-pad":
        return hidden.states[torch.arange(hidden.states.shape[0], device=hidden.states.device), before_pad(hidden, pad)]
    if pick in ("last", "end"):
        rows = torch.arange(hidden.states.shape[0], device=hidden.states.device)
        return hidden.states[rows, last_real(hidden, pad) if pick == "last" else last_end(hidden, end)]
    if hidden.keep is None:
        return hidden.states.mean(1)
    keep = hidden.keep[..., None].to(hidden.states.dtype)
    return (hidden.states * keep).sum(1) / keep.sum(1).clamp(min=1)
