"""A step of decoding that runs the same launches on the same memory each time, so that a GPU can replay it as a graph.

    tokens (B,) in slots (B,)  ->  logits (B, V)  ->  tokens, slots + 1

Where a row is in its text is said by tensors on the device; the host neither reads nor writes anything in a step.
`Planned` computes with the kernels of this package (or, to be tested, their twins) and few launches a layer.

Axes as in plan.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from xtcli.fast.plan import Layer, Norm, Plan, Unplanned
from xtcli.parts.context import KeyValues, ModelState, Newest

SPLITS = 4
"""Shares of the inputs that products into the stream are made of, for several rows."""


class Kernels(Protocol):
    """The operations of a step."""

    product: Callable[..., None]
    products: Callable[..., None]
    settle: Callable[..., None]
    attend: Callable[..., None]
    embed: Callable[..., None]
    likeliest: Callable[..., None]


class Step:
    """What every step has: each row's last token, the slot that it takes, the padding before the row, all it said.

    said (C + 1, B): the token of each slot as far as it was chosen here, -1 where logits were no numbers.
    """

    def __init__(self, rows: int, capacity: int, device: torch.device) -> None:
        self.rows, self.capacity, self.device = rows, capacity, device
        self.tokens, self.slots, self.pads = (torch.zeros(rows, dtype=torch.long, device=device) for _ in range(3))
        self.said = torch.zeros(capacity + 1, rows, dtype=torch.long, device=device)

    def begin(self, state: ModelState, tokens: Tensor, width: int, pads: Tensor | None) -> None:
        """Go on from what a model has read: `width` slots in `state`, and the tokens (B,) chosen to follow."""
        self.tokens.copy_(tokens)
        self.slots.fill_(width)
        self.pads.zero_() if pads is None else self.pads.copy_(pads[:, 0])

    def logits(self) -> Tensor:
        """Read the tokens; the logits (B, V) after them, float32."""
        raise AssertionError("a step must say what it computes")

    def likeliest(self, logits: Tensor, vocab: int) -> None:
        """Take the best of the first `vocab` logits, and move on by a slot."""
        raise AssertionError("a step must be able to choose")


class Planned(Step):
    """A step by a plan."""

    def __init__(self, plan: Plan, rows: int, capacity: int, kernels: Kernels) -> None:
        table = plan.table
        super().__init__(rows, capacity, table.device)
        self.plan, self.kernels = plan, kernels

        def blank(*shape: int, dtype: torch.dtype = table.dtype) -> Tensor:
            return torch.zeros(shape, device=table.device, dtype=dtype)

        shapes = [(rows, layer.heads.groups, capacity, layer.heads.width) for layer in plan.layers]
        self.keys = [blank(*shape) for shape in shapes]
        self.values = [blank(*shape) for shape in shapes]
        # One buffer for each width; what a launch reads, the next ones do not write before it has ended.
        self.stream, self.middle = blank(rows, plan.width), blank(rows, plan.width)
        widths = {sum(part.weight.shape[0] for part in layer.qkv) for layer in plan.layers}
        self.asked = {width: blank(rows, width) for width in widths}
        widths = {layer.heads.heads * layer.heads.width for layer in plan.layers}
        self.mixed = {width: blank(rows, width) for width in widths}
        self.inner = {width: blank(rows, width) for width in {layer.up[0].weight.shape[0] for layer in plan.layers}}
        self.scores = blank(rows, plan.head.weight.shape[0], dtype=torch.float32)
        if rows > 1:
            self.read, self.other = blank(rows, plan.width), blank(rows, plan.width)
            self.sums = blank(SPLITS, rows, plan.width, dtype=torch.float32)

    def begin(self, state: ModelState, tokens: Tensor, width: int, pads: Tensor | None) -> None:
        super().begin(state, tokens, width, pads)
        for number, block in enumerate(state.blocks):
            (cache,) = (one for one in block.values() if one is not None)
            assert isinstance(cache, KeyValues), "a planned layer remembers keys and values"
            held = min(width, cache.k.shape[2]) if isinstance(cache, Newest) else width
            self.keys[number][:, :, width - held : width] = cache.k[:, :, :held]
            self.values[number][:, :, width - held : width] = cache.v[:, :, :held]

    def logits(self) -> Tensor:
        plan, do = self.plan, self.kernels
        do.embed(self.tokens, self.slots, self.pads, plan.table, plan.scale, plan.places, self.stream)
        if self.rows == 1:
            for number, layer in enumerate(plan.layers):
                self._one(number, layer)
            do.product(self.stream, plan.norm, (plan.head,), self.scores, cap=plan.cap)
            return self.scores
        do.settle(self.stream, None, None, 1.0, self.stream, plan.layers[0].norm, self.read)
        norms = [layer.norm for layer in plan.layers[1:]] + [plan.norm]
        for number, (layer, norm) in enumerate(zip(plan.layers, norms, strict=True)):
            self._several(number, layer, norm)
        do.products(self.read, (plan.head,), self.scores, cap=plan.cap)
        return self.scores

    def _one(self, number: int, layer: Layer) -> None:
        """A layer for one row, whose norms are part of the products."""
        do, heads = self.kernels, layer.heads
        asked, mixed, inner = self._buffers(layer)
        do.product(self.stream, layer.norm, layer.qkv, asked)
        do.attend(asked, heads, self.keys[number], self.values[number], self.slots, self.pads, mixed)
        do.product(mixed, None, (layer.out,), self.middle, stream=self.stream, weight=layer.weight)
        read = self.stream if layer.parallel else self.middle
        do.product(read, layer.ffn_norm, layer.up, inner, paired=len(layer.up) == 2, act=layer.act)
        do.product(inner, None, (layer.down,), self.stream, stream=self.middle, weight=layer.ffn_weight)

    def _several(self, number: int, layer: Layer, norm: Norm | None) -> None:
        """A layer for several rows, which finds its input normed and leaves that of the next so."""
        do, heads = self.kernels, layer.heads
        asked, mixed, inner = self._buffers(layer)
        out, down, read = layer.out, layer.down, self.other
        do.products(self.read, layer.qkv, asked)
        do.attend(asked, heads, self.keys[number], self.values[number], self.slots, self.pads, mixed)
        do.products(mixed, (out,), self.sums)
        if layer.parallel:
            # The feed-forward reads the stream as it was.
            do.settle(self.stream, None, None, 1.0, self.stream, layer.ffn_norm, read)
            do.settle(self.stream, self.sums, out.bias, layer.weight, self.middle, None, None)
        else:
            do.settle(self.stream, self.sums, out.bias, layer.weight, self.middle, layer.ffn_norm, read)
        do.products(read, layer.up, inner, paired=len(layer.up) == 2, act=layer.act)
        do.products(inner, (down,), self.sums)
        do.settle(self.middle, self.sums, down.bias, layer.ffn_weight, self.stream, norm, self.read)

    def _buffers(self, layer: Layer) -> tuple[Tensor, Tensor, Tensor]:
        heads = layer.heads
        asked = self.asked[(heads.heads + 2 * heads.groups) * heads.width]
        return asked, self.mixed[heads.heads * heads.width], self.inner[layer.up[0].weight.shape[0]]

    def likeliest(self, logits: Tensor, vocab: int) -> None:
        self.kernels.likeliest(logits, vocab, self.tokens, self.slots, self.said)


class OnGpu:
    """The kernels, told to begin early where the device can."""

    def __init__(self, device: torch.device) -> None:
        """Imports Triton: raises ImportError where there is none."""
        from xtcli.fast import attend, ends, product

        early = torch.cuda.get_device_capability(device) >= (9, 0)

        def told(kernel: Callable[..., None]) -> Callable[..., None]:
            def run(*given: Any, **options: Any) -> None:
                kernel(*given, **options, pdl=early)

            return run

        self.product, self.products = told(product.product), told(product.products)
        self.settle, self.attend = told(product.settle), told(attend.attend)
        self.embed, self.likeliest = told(ends.embed), told(ends.likeliest)


def recorded(run: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """`run` as a graph of launches on a GPU, which it may not wait for; it is run once before. Raises Unplanned."""
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.device(device):
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                run()
            torch.cuda.current_stream().wait_stream(stream)
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                run()
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise Unplanned(f"a step cannot be recorded ({str(error).splitlines()[0]})") from None
    return graph.replay
