"""What a step of decoding computes, read off the parts of a model: norms, matrices, heads, layer after layer.

A plan holds the parameters themselves. It is made where the structure is one that the kernels know: blocks of an
attention over its own past and a feed-forward, each read through a norm and added to the stream. `Unplanned` says
which part of a model is another.

Axes: B rows, K inputs, N outputs, H query heads, G key/value heads, D head width, C slots.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from xtcli.parts.activations import ACTIVATIONS
from xtcli.parts.attention import Attention
from xtcli.parts.context import Ctx
from xtcli.parts.embed import NoPlaces, Tokens
from xtcli.parts.ffn import GLU, MLP
from xtcli.parts.graphs import Graph
from xtcli.parts.int8 import Int8Linear
from xtcli.parts.linear import Linear
from xtcli.parts.norms import LayerNorm, NoNorm, RMSNorm
from xtcli.parts.onestack import Decoder
from xtcli.parts.rotary import Rotary
from xtcli.parts.scores import Softmax
from xtcli.parts.stack import Stack
from xtcli.parts.vocabulary import LanguageModel, NoTransform
from xtcli.parts.wiring import Joining, Parallel, ParallelShared, PreNorm

KNOWN = ("silu", "gelu", "gelu_tanh", "gelu_fast", "quick_gelu", "relu", "relu2", "identity")
"""Activations of the kernels."""
WIDEST = 8192
"""Widest row that a program of a kernel holds at once, as it must to norm it."""


class Unplanned(Exception):
    """A part of a model that the kernels do not know; the words say which."""


@dataclass(frozen=True)
class Matrix:
    """A linear layer: weight (N, K), in 8 bits with a scale (N,) for each output; bias (N,)."""

    weight: Tensor
    bias: Tensor | None = None
    scale: Tensor | None = None


@dataclass(frozen=True)
class Norm:
    """A norm over the last axis: `rms` has a gain to which `offset` is added, `layer` a gain and perhaps a shift."""

    kind: str
    gain: Tensor
    shift: Tensor | None
    eps: float
    offset: float = 0.0


@dataclass(frozen=True)
class Turn:
    """Rotation of queries and keys: cos and sin (C, r / 2) of every slot's place; `interleaved` or by halves."""

    cos: Tensor
    sin: Tensor
    interleaved: bool


@dataclass(frozen=True)
class Heads:
    """Attention of one new token over its past: sizes, what is done to q and k, and how far back it looks."""

    heads: int
    groups: int
    width: int
    scale: float
    q_norm: Norm | None = None
    k_norm: Norm | None = None
    turn: Turn | None = None
    left: int | None = None  # slots before its own that a token sees; None: all


@dataclass(frozen=True)
class Layer:
    """One block. `parallel`: the feed-forward reads the stream as the attention does, not what that added to it."""

    norm: Norm | None
    qkv: tuple[Matrix, ...]
    heads: Heads
    out: Matrix
    weight: float
    ffn_norm: Norm | None
    up: tuple[Matrix, ...]  # gate and up, or up alone
    act: str
    down: Matrix
    ffn_weight: float
    parallel: bool


@dataclass(frozen=True)
class Plan:
    """A whole step, from tokens to logits. `places` (C, K) is added to the token vectors of the slots."""

    table: Tensor
    scale: float
    places: Tensor | None
    layers: tuple[Layer, ...]
    norm: Norm | None
    head: Matrix
    cap: float | None

    @property
    def width(self) -> int:
        """Of the stream."""
        return self.table.shape[1]


def plan(model: Graph, capacity: int) -> Plan:
    """The step of a model whose texts have `capacity` slots; raises Unplanned."""
    _exactly(model, Decoder, "the graph")
    known: Any = model
    embed, stack, heads = known.embed, known.stack, known.heads
    _exactly(stack, Stack, "the stack")
    if known.prefix is not None or stack.recurrence is not None or known.accepts:
        raise Unplanned("memory tokens, recurrence and further inputs are not among the kernels' parts")
    if known.dim > WIDEST:
        raise Unplanned(f"the stream is {known.dim:,} wide, and kernels norm {WIDEST:,} at most")
    if "lm" not in heads:
        raise Unplanned("the head is no plain language model")
    slots = torch.arange(capacity, device=model.device)[None]
    ctx = Ctx(positions=slots, keys=slots)
    turns = [_turn(turn, ctx, model.dtype) for turn in stack.shared.turns]
    layers = tuple(_layer(block, stack, turns) for block in stack.blocks)
    head, cap = _head(heads["lm"], model)
    table, scale, places = _embed(embed, ctx, model.dtype)
    return Plan(table, scale, places, layers, _norm(stack.norm), head, cap)


def _exactly(module: Any, kind: type, what: str) -> None:
    """Raise Unplanned where a part is not of this kind itself: a kind made from it may compute something else."""
    if type(module) is not kind:
        raise Unplanned(f"{what} is a {type(module).__name__}")


def _norm(module: nn.Module) -> Norm | None:
    if type(module) is NoNorm:
        return None
    if type(module) is RMSNorm:
        return Norm("rms", module.weight, None, module.eps, module.offset)
    if type(module) is LayerNorm:
        return Norm("layer", module.weight, module.bias, module.eps)
    raise Unplanned(f"a norm is a {type(module).__name__}")


def _matrix(module: Any) -> Matrix:
    if type(module) is Int8Linear:
        return Matrix(module.whole, module.bias, module.scale)
    _exactly(module, Linear, "a linear layer")
    if not module.weight.is_contiguous():
        raise Unplanned("weights do not lie in one piece")
    return Matrix(module.weight, module.bias)


def _turn(module: Any, ctx: Ctx, dtype: torch.dtype) -> Turn:
    _exactly(module, Rotary, "a rotation")
    if not module.static:
        raise Unplanned("rotations change with the length of the text")
    table = module.tables(ctx, dtype)
    cos, sin = (one[0, 0].float().contiguous() for one in (table.cos, table.sin))
    return Turn(cos, sin, module.config.layout == "interleaved")


def _embed(module: Any, ctx: Ctx, dtype: torch.dtype) -> tuple[Tensor, float, Tensor | None]:
    _exactly(module, Tokens, "the embedding")
    if module.segments is not None or module.separator is not None or type(module.norm) is not NoNorm:
        raise Unplanned("the embedding has segments or a norm")
    if hasattr(module.positions, "counted"):
        raise Unplanned("places are counted from the text")
    table: Tensor = module.tokens.weight
    if type(module.positions) is NoPlaces:
        return table, module.scale, None
    slots = ctx.positions.shape[1]
    limit = module.limit
    known = slots if limit is None else min(slots, limit)
    blank = torch.zeros(1, known, table.shape[1], device=table.device, dtype=dtype)
    places = module.positions(blank, ctx.positions[:, :known])[0]
    return table, module.scale, places.contiguous()


def _head(module: Any, model: Any) -> tuple[Matrix, float | None]:
    _exactly(module, LanguageModel, "the head")
    if type(module.transform) is not NoTransform or module.scale != 1.0:
        raise Unplanned("the head has a transform or a scale")
    if module.decoder is None:
        return Matrix(model.table(), module.bias), module.cap
    found = _matrix(module.decoder)
    return Matrix(found.weight, module.bias, found.scale), module.cap


def _layer(block: Any, stack: Any, turns: list[Turn]) -> Layer:
    wiring: Any = block.wiring
    if type(wiring) not in (PreNorm, Parallel, ParallelShared):
        raise Unplanned(f"the wiring is a {type(wiring).__name__}")
    kinds = [type(sublayer) for sublayer in block.sublayers.values()]
    if len(kinds) != 2 or kinds[0] is not Attention or kinds[1] not in (MLP, GLU):
        raise Unplanned(f"the sublayers are {', '.join(kind.__name__ for kind in kinds)}")
    (first, mixer), (second, ffn) = block.sublayers.items()
    norms = [wiring.norm, wiring.norm] if type(wiring) is ParallelShared else [wiring.norm[first], wiring.norm[second]]
    up = (ffn.gate, ffn.up) if isinstance(ffn, GLU) else (ffn.up,)
    act = next((name for name in KNOWN if ACTIVATIONS[name] is ffn.act), None)
    if act is None:
        raise Unplanned("no kernel knows the activation")
    weights = _weights(wiring, first, second)
    return Layer(
        norm=_norm(norms[0]),
        qkv=tuple(_matrix(one) for one in (mixer.q, mixer.k, mixer.v)),
        heads=_heads(mixer, stack, turns),
        out=_matrix(mixer.o),
        weight=weights[0],
        ffn_norm=_norm(norms[1]),
        up=_alike(tuple(_matrix(one) for one in up)),
        act=act,
        down=_matrix(ffn.down),
        ffn_weight=weights[1],
        parallel=type(wiring) is not PreNorm,
    )


def _weights(wiring: Joining, *names: str) -> list[float]:
    return [wiring.scale.get(name, 1.0) for name in names]


def _alike(parts: tuple[Matrix, ...]) -> tuple[Matrix, ...]:
    if len({(part.bias is None, part.scale is None) for part in parts}) > 1:
        raise Unplanned("some of the matrices that are read at once have a bias or 8 bits, and some have not")
    return parts


def _heads(mixer: Any, stack: Any, turns: list[Turn]) -> Heads:
    if type(mixer.score) is not Softmax or mixer.memory is not None or mixer.out_reads_input:
        raise Unplanned("the attention has scores, keys or an output of its own")
    if not mixer.reads_one or mixer.relative is not None or not mixer.store_turned:
        raise Unplanned("the attention knows places by more than a rotation")
    view = stack.shared.views[mixer.view]
    if view.bias is not None:
        raise Unplanned("positions are added to the scores")
    number = getattr(mixer.turn_keys, "keywords", {}).get("number")
    turn = None if number is None else turns[number]
    norms = [_norm(one) for one in (mixer.q_norm, mixer.k_norm)]
    if any(one is not None and one.kind != "rms" for one in norms):
        raise Unplanned("the norm of queries and keys is no rms")
    _alike(tuple(_matrix(one) for one in (mixer.q, mixer.k, mixer.v)))
    return Heads(mixer.heads, mixer.groups, mixer.head_dim, mixer.scale, norms[0], norms[1], turn, _left(view.rule))


def _left(rule: Any) -> int | None:
    """How far back a token sees, of the rules that are the whole past or a window on it."""
    if rule.kind == "causal":
        return None
    if rule.kind == "all":
        lefts = [_left(one) for one in rule.of]
        return min((left for left in lefts if left is not None), default=None)
    if rule.kind == "window" and rule.dilation == 1:
        return int(rule.left)
    raise Unplanned(f"the mask is '{rule.kind}'")
