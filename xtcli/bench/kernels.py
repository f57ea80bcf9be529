"""The ways to compute an attention that this machine has.

    cudnn, flash, efficient, math   PyTorch's scaled-dot-product attention, pinned to one of its kernels
    flex                            FlexAttention, compiled; masks as blocks, biases and caps in the kernel
    xt                              ours: what training takes (parts/routes.py): one of PyTorch's, flex, or for a window
                                    (`window`) a kernel of our own
    plain                           ours: written out in tensors
    own                             ours: a mixer whose cost is linear in the length, which no other kernel can do

A kernel that cannot do a case raises `Cannot` with the reason in a few words.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from xtcli.bench.cases import Case, Shape, bias_by_distance, mixer_of, routed, scale, score_of, visible
from xtcli.parts.attention import Heads
from xtcli.parts.context import Ctx, Visible
from xtcli.parts.kernels import OURS, fused, plain, pytorchs
from xtcli.parts.linear import Linear
from xtcli.parts.scores import Softcap, Softmax, WideSoftmax
from xtcli.registry import part_of
from xtcli.runs.run import gib

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]

PINNED: Mapping[str, tuple[SDPBackend, str]] = {
    "cudnn": (SDPBackend.CUDNN_ATTENTION, "cudnn"),
    "flash": (SDPBackend.FLASH_ATTENTION, "flash"),
    "efficient": (SDPBackend.EFFICIENT_ATTENTION, "efficient"),
    "math": (SDPBackend.MATH, "math"),
}
"""Name -> the kernel, and the word by which PyTorch's warnings speak of it."""

GPU_ONLY = ("cudnn", "efficient", "flex")
NAMES = ("xt", "cudnn", "flash", "efficient", "flex", "plain", "math", "own")
WRITTEN_OUT = ("math", "plain")
"""Kernels that store the scores of all pairs."""

BEND: Mapping[type, Callable[[Any, Tensor], Tensor] | None] = {
    Softmax: None,
    WideSoftmax: None,
    Softcap: lambda config, score: config.cap * torch.tanh(score / config.cap),
}
"""Score kinds as FlexAttention writes them; it adds up in float32 whatever the type."""


class Cannot(Exception):
    """A kernel cannot do this; the text says why in a few words."""


@dataclass(frozen=True)
class Kernel:
    """A ready attention, the context to call it in, bytes of masks and biases that it reads, what to try instead where
    its tiles do not fit into the GPU's shared memory, and which way ours took."""

    attend: Attend
    context: Callable[[], AbstractContextManager[Any]] = nullcontext
    masks: int = 0
    smaller: Callable[[], Kernel] | None = None
    route: str | None = None


def never(name: str, case: Case, device: torch.device) -> str | None:
    """Why a kernel cannot do a case of any size on such a device, or None."""
    if (case.mixer is not None) != (name == "own"):
        return "only its own kernel computes it" if case.mixer is not None else "computes mixers of linear cost alone"
    score = part_of(case.score)
    masked = case.position is not None or case.rule.kind not in ("causal", "full")
    if name in GPU_ONLY and device.type != "cuda":
        return "needs an NVIDIA GPU"
    if name == "flex" and score not in BEND:
        return "this score has no FlexAttention form"
    if name not in ("flex", "plain") and not score.fused:
        return "PyTorch's kernels have only the ordinary softmax"
    if name == "flash" and device.type == "cuda" and masked:
        return "takes no mask but the causal one"
    return None


def make(name: str, case: Case, shape: Shape, device: torch.device, dtype: torch.dtype, free: int) -> Kernel:
    """The kernel `name` for a case of this size; raises Cannot."""
    impossible = never(name, case, device)
    if impossible is not None:
        raise Cannot(impossible)
    if device.type == "cuda":
        # A backward pass that is run again and again must find the buffers of the forward pass untouched.
        from torch._functorch import config

        config.donated_buffer = False
    if name == "own":
        return _own(case, shape, device, dtype)
    room = _needed(name, case, shape, dtype)
    if room > free:
        raise Cannot(f"needs about {gib(room)} of memory, {gib(free)} are free")
    if name == "flex":
        return _flex(case, shape, device)
    factor = scale(shape)
    seen = visible(case, shape, device, dtype) if name != "xt" else routed(case, shape, device, dtype)
    stored = 0 if seen.mask is None else seen.mask.untyped_storage().nbytes()
    if name == "plain":
        score = score_of(case, shape, device)
        return Kernel(lambda q, k, v: plain(q, k, v, seen, factor, 0.0, score), masks=stored)

    if name == "xt":
        return Kernel(
            lambda q, k, v: fused(q, k, v, seen, factor, 0.0), masks=stored, route=_route(seen, shape, device, dtype)
        )

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return pytorchs(q, k, v, seen, factor, 0.0)

    return Kernel(attend, lambda: sdpa_kernel([PINNED[name][0]]), stored)


def _route(seen: Visible, shape: Shape, device: torch.device, dtype: torch.dtype) -> str:
    """Which kernel `fused` hands this to where gradients are wanted."""
    if seen.blocks is None:
        q, k = (
            torch.empty(shape.batch, heads, shape.seq, shape.width, device=device, dtype=dtype, requires_grad=True)
            for heads in (shape.heads, shape.groups)
        )
        ours = OURS.get(device.type)
        return "ours" if ours is not None and ours.takes(q, k, k, seen, 0.0) else "PyTorch's"
    return "flex" if seen.blocks.near(shape.width, dtype) is None else "window"


def _own(case: Case, shape: Shape, device: torch.device, dtype: torch.dtype) -> Kernel:
    """The mixer over one x, the sum of what other kernels read apart."""
    model, mixer = mixer_of(case, shape, device, dtype)
    if isinstance(mixer, Heads):
        _bare(mixer)
    places = torch.arange(shape.seq, device=device)[None]

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        groups = shape.heads // shape.groups
        x = (q + (k + v).repeat_interleave(groups, 1)).transpose(1, 2).flatten(-2)
        ctx = model.stack.shared.prepare(x, Ctx(positions=places, keys=places))  # type: ignore[union-attr, operator]
        y: Tensor = mixer(x, ctx)
        return y.unflatten(-1, (shape.heads, shape.width)).transpose(1, 2)  # type: ignore[no-any-return]

    return Kernel(attend)


def _bare(mixer: Heads) -> None:
    """Leave out the projections, as the other kernels have none either."""
    for name, layer in list(mixer.named_children()):
        square = isinstance(layer, Linear) and layer.in_features == layer.out_features
        if square and name.split("_")[0] in ("q", "k", "v", "o"):
            setattr(mixer, name, nn.Identity())


def _needed(name: str, case: Case, shape: Shape, dtype: torch.dtype) -> int:
    """Bytes beyond the inputs, roughly: all scores in three narrow and three wide copies, and a stored mask."""
    square = shape.seq**2
    stored = 0
    if name != "flex":
        stored = square * (1 if case.position is None else shape.heads * (4 + 2 * dtype.itemsize))
        stored = 0 if case.position is None and case.rule.kind in ("causal", "full") else stored
    if name in WRITTEN_OUT:
        stored += shape.batch * shape.heads * square * (3 * dtype.itemsize + 12)
    return stored


SMALL_TILES = {
    "BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_M1": 32, "BLOCK_N1": 64, "BLOCK_M2": 64, "BLOCK_N2": 32, "num_stages": 1
}  # fmt: skip
"""FlexAttention's tiles where a bias that it reads leaves no room for its usual ones."""


def _flex(case: Case, shape: Shape, device: torch.device, tiles: Mapping[str, int] | None = None) -> Kernel:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    kind = part_of(case.score)
    bend, config = BEND[kind], case.score
    allowed, rule = part_of(case.rule).allowed, case.rule
    table, last = bias_by_distance(case, shape, device), shape.seq - 1

    def mask_mod(batch: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return allowed(rule, q, k)  # type: ignore[no-any-return]

    def score_mod(score: Tensor, batch: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        if table is not None:
            # Pairs that the causal mask hides would point behind the table.
            score = score + table[head, (last + k - q).clamp(max=last)]
        return score if bend is None else bend(config, score)

    torch._dynamo.reset()
    blocks = None
    if rule.kind != "full":
        blocks = create_block_mask(mask_mod, None, None, shape.seq, shape.seq, device=str(device))
    bends = table is not None or bend is not None
    compiled: Any = torch.compile(flex_attention, dynamic=False)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out: Tensor = compiled(
            q,
            k,
            v,
            score_mod=score_mod if bends else None,
            block_mask=blocks,
            scale=scale(shape),
            enable_gqa=q.shape[1] != k.shape[1],
            kernel_options=None if tiles is None else dict(tiles),
        )
        return out

    smaller = (lambda: _flex(case, shape, device, SMALL_TILES)) if tiles is None else None
    return Kernel(attend, smaller=smaller)


def reason(name: str, error: Exception, heard: list[warnings.WarningMessage]) -> str:
    """Why a kernel refused, in one short phrase: PyTorch's warning about it, or the first line of the error."""
    word = PINNED[name][1] if name in PINNED else name
    for warning in heard:
        text = str(warning.message)
        if word in text.lower() and "not used because" not in text:
            return _short(text)
    return _short(str(error) or type(error).__name__)


def _short(text: str) -> str:
    line = text.strip().splitlines()[0].split(" (Triggered")[0].rstrip(".")
    return line if len(line) <= 90 else line[:87] + "..."
