"""What the kernels of a decoding step compute, in plain tensors: their specification, on any device.

Values are rounded to the type of the stream where the parts of the model round theirs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from xtcli.fast.plan import Heads, Matrix, Norm
from xtcli.parts.activations import ACTIVATIONS
from xtcli.parts.rotary import turn_half, turn_interleaved


def normed(x: Tensor, norm: Norm | None) -> Tensor:
    """x (..., K) through a norm."""
    if norm is None:
        return x
    if norm.kind == "layer":
        return F.layer_norm(x, x.shape[-1:], norm.gain, norm.shift, norm.eps)
    wide = x.float()
    scaled = (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + norm.eps)).to(x.dtype)
    return scaled * (norm.gain + norm.offset)


def multiplied(x: Tensor, part: Matrix) -> Tensor:
    """x (B, K) times a matrix (N, K)."""
    if part.scale is None:
        return F.linear(x, part.weight, part.bias)
    y = F.linear(x.float(), part.weight.float()) * part.scale
    return (y if part.bias is None else y + part.bias.float()).to(x.dtype)


def product(
    x: Tensor,
    norm: Norm | None,
    parts: tuple[Matrix, ...],
    out: Tensor,
    *,
    paired: bool = False,
    act: str = "identity",
    stream: Tensor | None = None,
    weight: float = 1.0,
    cap: float | None = None,
    **_: Any,
) -> None:
    """x (B, K) -> out (B, N): the parts' outputs one behind the other, or act(first) * second where `paired`."""
    read = normed(x, norm)
    made = [multiplied(read, part) for part in parts]
    y = ACTIVATIONS[act](made[0]) * made[1] if paired else ACTIVATIONS[act](torch.cat(made, 1))
    y = y if cap is None else cap * torch.tanh(y / cap)
    y = y if weight == 1.0 else y * weight
    out.copy_(y if stream is None else stream + y)


def products(
    x: Tensor,
    parts: tuple[Matrix, ...],
    out: Tensor,
    *,
    paired: bool = False,
    act: str = "identity",
    cap: float | None = None,
    **_: Any,
) -> None:
    """x (B, K) -> out (B, N) as `product` without norm and stream, or sums (S, B, N) over S shares of the inputs.

    Sums are float32 and have no bias yet.
    """
    if out.dim() == 2:
        product(x, None, parts, out, paired=paired, act=act, cap=cap)
        return
    (part,) = parts
    scale = 1.0 if part.scale is None else part.scale
    out.zero_()
    out[0] = F.linear(x.float(), part.weight.float()) * scale


def settle(
    stream: Tensor,
    parts: Tensor | None,
    bias: Tensor | None,
    weight: float,
    out: Tensor,
    norm: Norm | None,
    normed_out: Tensor | None,
    **_: Any,
) -> None:
    """stream (B, K) + weight * (sum of parts (S, B, K) + bias) -> out; its norm -> normed_out (B, K).

    Without parts there is nothing to add, and `out` is left as it is.
    """
    if parts is not None:
        y = parts.sum(0)
        y = (y if bias is None else y + bias.float()).to(stream.dtype)
        stream = stream + (y if weight == 1.0 else y * weight)
        out.copy_(stream)
    if normed_out is not None:
        normed_out.copy_(normed(stream, norm))


def attend(
    qkv: Tensor, heads: Heads, keys: Tensor, values: Tensor, slots: Tensor, pads: Tensor, out: Tensor, **_: Any
) -> None:
    """New queries, keys and values (B, (H + 2 G) D), in slots (B,) behind caches (B, G, C, D) -> out (B, H D).

    The caches get the new keys and values. Slots before pads (B,) hold nothing.
    """
    rows, (h, g, d) = qkv.shape[0], (heads.heads, heads.groups, heads.width)
    q, k, v = (one.unflatten(1, (-1, d)) for one in qkv.split([h * d, g * d, g * d], 1))
    q, k = normed(q, heads.q_norm), normed(k, heads.k_norm)
    if heads.turn is not None:
        turn = turn_interleaved if heads.turn.interleaved else turn_half
        places = (slots - pads).clamp(min=0)
        cos, sin = (table[places][:, None].to(q.dtype) for table in (heads.turn.cos, heads.turn.sin))
        q, k = turn(q, cos, sin), turn(k, cos, sin)
    row = torch.arange(rows, device=qkv.device)
    keys[row, :, slots], values[row, :, slots] = k, v
    place = torch.arange(keys.shape[2], device=qkv.device)
    seen = (place <= slots[:, None]) & (place >= pads[:, None])
    if heads.left is not None:
        seen &= place >= slots[:, None] - heads.left
    # A row that is all padding still sees its own slot.
    seen |= place == slots[:, None]
    y = F.scaled_dot_product_attention(
        q[:, :, None], keys, values, seen[:, None, None], scale=heads.scale, enable_gqa=h != g
    )
    out.copy_(y.flatten(1))


def embed(
    tokens: Tensor,
    slots: Tensor,
    pads: Tensor,
    table: Tensor,
    scale: float,
    places: Tensor | None,
    out: Tensor,
    **_: Any,
) -> None:
    """Tokens (B,) in slots (B,) of rows with pads (B,) in front -> out (B, K)."""
    x = F.embedding(tokens, table)
    x = x * scale if scale != 1.0 else x
    out.copy_(x if places is None else x + places[(slots - pads).clamp(min=0)])


def likeliest(logits: Tensor, vocab: int, tokens: Tensor, slots: Tensor, said: Tensor, **_: Any) -> None:
    """The best of the first `vocab` logits (B, V) becomes each row's token.

    It enters said (C + 1, B) behind its slot, as -1 where the logits are no numbers, and slots (B,) move on by one.
    """
    best, chosen = logits[:, :vocab].max(-1)
    tokens.copy_(chosen)
    said.scatter_(0, slots[None] + 1, torch.where(best.isfinite(), chosen, -1)[None])
    slots.add_(1)
