"""Gated attention of one head over an encoder's memory.

    [u, g, q] = query(x),   u -> sigmoid,   g -> silu           Ma et al. 2022, Mega, arXiv:2209.10655
    k = key(memory),   v = act(value(memory))
    y = act(out(attend(q, k, v) g)),   the stream s becomes s + u (y - s)

    attend: as in emagated.py; biases are by the distance between the places of query and key, each in its own text

Axes: B rows, T tokens, M places of the memory, S width of queries and keys.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from xtcli import registry
from xtcli.parts.activations import ACTIVATIONS, Activation
from xtcli.parts.context import Ctx, MemoryKeyValues
from xtcli.parts.dropouts import make_dropout
from xtcli.parts.emagated import DistanceWaves
from xtcli.parts.linear import Linear, widen
from xtcli.parts.scope import Impossible, Scope
from xtcli.registry import Config, Slot, field, part


@part("mixer", "gated-cross")
class GatedCross(nn.Module):
    """Gated attention over the encoder's memory. Its gate decides how much of the stream it keeps."""

    reads_memory = True
    reads_stream = True
    irreversible = "a gate mixes the stream with what is made of it"
    honours: tuple[str, ...] = ()

    class Config(registry.Config):
        """Gated attention over the encoder's memory."""

        shared: int = field("width of queries and keys", gt=0, tiny=16, example=12)
        act: Activation = field("activation of the values and of the output", "silu")
        weights: Literal["softmax"] | Activation = field("scores to weights", "softmax")
        distance: Annotated[Config, Slot("distance")] = field("bias by distance", DistanceWaves.Config())
        dropout: float | None = field("dropout of the output; null = model.dropout", None, ge=0, lt=1)
        value_dropout: float = field("dropout of the values", 0.0, ge=0, lt=1)
        channels: bool = field("all but the dropout of weights drops whole channels of a row", False)
        weight_dropout: float = field("dropout of the weights", 0.0, ge=0, lt=1)
        required: bool = field("refuses to run without a memory; false: is passed over then", False)

    def __init__(self, config: Config, scope: Scope) -> None:
        super().__init__()
        if scope.memory is None:
            raise Impossible("", "gated-cross needs an encoder's memory", "use it in a decoder that has one")
        self.required, self.weights = config.required, config.weights
        self.widths = (scope.dim, scope.dim, config.shared)
        self.query = Linear(scope.dim, sum(self.widths), True)
        self.key = Linear(scope.memory, config.shared, True)
        self.value = Linear(scope.memory, scope.dim, True)
        self.out = Linear(scope.dim, scope.dim, True)
        self.distance = scope.make("distance", config.distance, dim=config.shared)
        self.act = ACTIVATIONS[config.act]
        self.scale = config.shared**-0.5
        self.dropout = make_dropout(scope.dropout if config.dropout is None else config.dropout, config.channels)
        self.value_dropout = make_dropout(config.value_dropout, config.channels)
        self.weight_dropout = nn.Dropout(config.weight_dropout)

    def new_state(self, batch: int, capacity: int, device: Any, dtype: Any) -> MemoryKeyValues:
        """Keys and values of the memory, made at the first step."""
        return MemoryKeyValues()

    def forward(self, x: Tensor, ctx: Ctx, stream: Tensor) -> Tensor:
        """x and the stream that it was read from, (B, T, dim) -> what the stream gets, u (y - stream)."""
        keep, gate, q = self.query(x).split(self.widths, -1)
        k, v = self.recall(ctx)
        y = self.weigh(q, k, ctx).to(v.dtype) @ self.value_dropout(v)
        y = self.dropout(self.act(self.out(y * F.silu(gate))))
        return keep.sigmoid() * (y - stream)  # type: ignore[no-any-return]

    def recall(self, ctx: Ctx) -> tuple[Tensor, Tensor]:
        """Keys (B, M, S) and values (B, M, dim) of the memory."""
        state: MemoryKeyValues | None = ctx.state
        if state is not None and state.k is not None and state.v is not None:
            return state.k, state.v
        k, v = self.key(ctx.memory), self.act(self.value(ctx.memory))
        if state is not None:
            state.k, state.v = k, v
        return k, v

    def weigh(self, q: Tensor, k: Tensor, ctx: Ctx) -> Tensor:
        """Weights (B, T, M) of the memory's places."""
        size, places = k.shape[1], ctx.positions
        end = int(places.max()) + 1 if ctx.placed else ctx.offset + q.shape[1]
        apart = torch.arange(size, device=q.device) - places[..., None]
        bias = self.distance(1 - end, size - 1)[apart + end - 1]  # (B|1, T, M)
        scores, mask = widen(q @ k.transpose(-1, -2)), ctx.memory_visible.mask
        seen = None if mask is None else mask[:, 0]
        if self.weights != "softmax":
            count = size if seen is None else seen.sum(-1, keepdim=True)
            weights = ACTIVATIONS[self.weights](scores / count + bias)
            return self.weight_dropout(weights if seen is None else weights * seen)  # type: ignore[no-any-return]
        scores = scores * self.scale + bias
        if seen is not None:
            scores = scores.masked_fill(~seen, float("-inf"))
        return self.weight_dropout(scores.softmax(-1))  # type: ignore[no-any-return]

    def extra_repr(self) -> str:
        return f"weights={self.weights}"
