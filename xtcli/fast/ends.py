"""The two ends of a step: token ids to vectors, and logits to the likeliest token. `twins` has the specification."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from xtcli.fast.lanes import early, late


@triton.jit
def _embed(  # type: ignore[no-untyped-def]
    tokens, slots, pads, table, places, y, scale, width,
    SCALED: tl.constexpr, BLOCK: tl.constexpr, ROUND: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    early(PDL)
    late(PDL)
    b = tl.program_id(0)
    k = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = k < width
    x = tl.load(table + tl.load(tokens + b) * width + k, mask=inside, other=0.0)
    if SCALED:
        x = (x.to(tl.float32) * scale).to(ROUND)
    if places is not None:
        place = tl.maximum(tl.load(slots + b) - tl.load(pads + b), 0)
        x = (x.to(tl.float32) + tl.load(places + place * width + k, mask=inside, other=0.0).to(tl.float32)).to(ROUND)
    tl.store(y + b * width + k, x, mask=inside)


@triton.jit
def _likeliest(  # type: ignore[no-untyped-def]
    logits, tokens, slots, said, stride, vocab, rows, BLOCK: tl.constexpr, PDL: tl.constexpr
):
    early(PDL)
    late(PDL)
    b = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    best = tl.full((BLOCK,), float("-inf"), tl.float32)
    place = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, vocab, BLOCK):
        n = start + lane
        x = tl.load(logits + b * stride + n, mask=n < vocab, other=float("-inf"))
        # What is no number stands above all, as it does for torch, and is found out below.
        x = tl.where(x == x, x, float("inf"))
        place = tl.where(x > best, n, place)
        best = tl.maximum(best, x)
    top = tl.max(best)
    chosen = tl.min(tl.where(best == top, place, 2147483647)).to(tl.int64)
    slot = tl.load(slots + b)
    fine = (top < float("inf")) & (top > float("-inf"))
    tl.store(tokens + b, chosen)
    tl.store(said + (slot + 1) * rows + b, tl.where(fine, chosen, -1))
    tl.store(slots + b, slot + 1)


TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def embed(
    tokens: Tensor,
    slots: Tensor,
    pads: Tensor,
    table: Tensor,
    scale: float,
    places: Tensor | None,
    out: Tensor,
    *,
    pdl: bool = False,
) -> None:
    """Tokens (B,) in slots (B,) of rows with pads (B,) in front -> out (B, K); as in `twins.embed`."""
    rows, width = out.shape
    block = min(triton.next_power_of_2(width), 1024)
    _embed[(rows, triton.cdiv(width, block))](
        tokens, slots, pads, table, places, out, scale, width, scale != 1.0, block, TYPES[out.dtype], pdl, num_warps=4
    )


def likeliest(logits: Tensor, vocab: int, tokens: Tensor, slots: Tensor, said: Tensor, *, pdl: bool = False) -> None:
    """The best of the first `vocab` logits (B, V) becomes each row's token and enters `said`; as in `twins`."""
    launch = {"launch_pdl": True} if pdl else {}
    block = 8192 if vocab > 4096 else 1024
    _likeliest[(logits.shape[0],)](
        logits, tokens, slots, said, logits.stride(0), vocab, logits.shape[0], block, pdl, num_warps=16, **launch
    )
