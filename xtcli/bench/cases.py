"""The attentions that are measured: each mask, score and position bias of the registry, one at a time.

A case is a mask rule, a score kind and maybe an additive bias; those that are not the subject are causal, softmax and
none. A mixer whose cost grows with the length and not its square (`linear`) is a case of its own: an attention is
measured without its projections, as those of the other cases are, any other as it stands. Kinds enter from the registry
with the values of USUAL, or else those of their own examples, so that a kind added to the registry is measured without
a word here.

Axes: B batch, H query heads, G key/value heads, T tokens, D head width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
import yaml
from pydantic import ValidationError
from torch import Tensor

from xtcli.errors import did_you_mean, refuse
from xtcli.model import construct
from xtcli.parts import blockmasks, masks, routes
from xtcli.parts.attention import Heads
from xtcli.parts.context import Ctx, Visible
from xtcli.parts.graphs import Graph
from xtcli.parts.norms import LayerNorm
from xtcli.parts.scope import Refused, Scope
from xtcli.parts.scores import Residual, Sizes, Softmax
from xtcli.registry import Config, example, find, kinds, part_of, tree

USUAL: dict[tuple[str, str], dict[str, Any]] = {
    ("mask", "window"): {"left": 511},
    ("mask", "all"): {"of": ["causal", {"kind": "window", "left": 2047, "dilation": 4}]},
    ("mask", "any"): {"of": [{"kind": "window", "left": 127}, {"kind": "window", "left": 2**20, "dilation": 128}]},
    ("mask", "chunks"): {"chunk": 64},
    ("score", "softcap"): {"cap": 50.0},
    ("mixer", "local"): {"radius": 127, "position": "t5"},
    ("mixer", "transient-global"): {"radius": 127, "position": "t5"},
    ("mixer", "sliding-global"): {"radius": 256, "globals": "first"},
}
"""Values at the size of real models, by slot and kind. `any` is the strided pattern of arXiv:1904.10509."""

ROWS = 512
"""Queries whose masks are counted at once."""


@dataclass(frozen=True)
class Shape:
    """Sizes of one attention."""

    batch: int
    heads: int
    groups: int
    seq: int
    width: int


@dataclass(frozen=True)
class Case:
    """One attention; `subject` is the slot that varies."""

    name: str
    subject: str
    rule: Config
    score: Config
    position: Config | None = None
    mixer: Config | None = None

    def facts(self) -> dict[str, Any]:
        """The case as plain data."""
        if self.mixer is not None:
            return {"mixer": tree(self.mixer)}
        position = None if self.position is None else tree(self.position)
        return {"mask": tree(self.rule), "score": tree(self.score), "position": position}

    @property
    def dense(self) -> str | None:
        """The case that sees what this one sees and all between; None where this is one, or no attention."""
        if self.mixer is not None:
            return masks.FULL.kind if issubclass(part_of(self.mixer), Heads) else None
        if self.subject != "mask" or self.rule.kind in (masks.FULL.kind, masks.CAUSAL.kind):
            return None
        return masks.FULL.kind if masks.ahead(self.rule) else masks.CAUSAL.kind

    @property
    def power(self) -> int:
        """The power of the length that the time grows with."""
        return 2 if self.mixer is None else 1


def all_cases() -> list[Case]:
    """One case for each kind that a standalone attention can have."""
    found = [
        Case(kind, "mask", _make("mask", kind), Softmax.Config())
        for kind in sorted(kinds("mask"), key=lambda kind: (kind not in ("causal", "full"), kind))
        if kind != masks.INHERIT.kind
    ]
    found += [
        Case(kind, "score", masks.CAUSAL, _make("score", kind))
        for kind in kinds("score")
        if kind not in (Softmax.Config.kind, Residual.Config.kind)
    ]
    for kind, cls in kinds("position").items():
        # Those that read the width depend on the places themselves and not on their distance alone.
        if getattr(cls, "reach", "") == "bias" and not getattr(cls, "reads_width", False):
            found.append(Case(kind, "position", masks.CAUSAL, Softmax.Config(), _make("position", kind)))
    for kind, cls in kinds("mixer").items():
        if getattr(cls, "linear", False):
            found.append(Case(kind, "mixer", masks.CAUSAL, Softmax.Config(), mixer=_make("mixer", kind)))
    return found


def chosen_cases(texts: Sequence[str]) -> list[Case]:
    """Cases by name, or masks written as YAML: `window`, `{kind: window, left: 1023}`. Raises UserError."""
    known = {case.name: case for case in all_cases()}
    found = []
    for text in texts:
        if text in known:
            found.append(known[text])
            continue
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError:
            value = None
        if not isinstance(value, dict) or not isinstance(value.get("kind"), str):
            raise refuse(f"there is no attention '{text}'", did_you_mean(text, known), place="--mask")
        fields = {key: entry for key, entry in value.items() if key != "kind"}
        cls = find("mask", value["kind"])
        try:
            rule: Config = cls.Config.model_validate(fields)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            raise refuse(
                first["msg"], f"see xt inspect --parts mask.{value['kind']}", place="--mask", path=where
            ) from None
        name = " ".join([value["kind"], *(f"{key}={entry}" for key, entry in fields.items())])
        found.append(Case(name, "mask", rule, Softmax.Config()))
    return found or list(known.values())


def _make(slot: str, kind: str) -> Config:
    cls = find(slot, kind)
    config: Config = cls.Config.model_validate(example(cls.Config) | USUAL.get((slot, kind), {}))
    return config


def pairs_of(case: Case, shape: Shape) -> int:
    """How many (query, key) pairs a case computes for each head: what its mask lets through or its mixer takes."""
    if case.mixer is None:
        return pairs(case.rule, shape.seq)
    mixer: Any = mixer_of(case, shape, torch.device("meta"), torch.float32)[1]
    return int(mixer.pairs(shape.seq)) if hasattr(mixer, "pairs") else pairs(mixer.rule, shape.seq)


@lru_cache
def pairs(rule: Config, seq: int) -> int:
    """How many (query, key) pairs of a text of `seq` tokens the rule lets through."""
    keys = torch.arange(seq)[None, :]
    total = 0
    for start in range(0, seq, ROWS):
        queries = torch.arange(start, min(start + ROWS, seq))[:, None]
        total += int(masks.allowed(rule, queries, keys).sum())
    return total


def flops(case: Case, shape: Shape) -> tuple[int, int]:
    """FLOPs of the forward and of the backward pass over the visible pairs alone.

    Two products of 2 D FLOPs for each pair forward, five backward (the scores are made again), for every head.
    """
    product = 2 * shape.width * pairs_of(case, shape) * shape.batch * shape.heads
    return 2 * product, 5 * product


def inputs(shape: Shape, device: torch.device, dtype: torch.dtype, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q (B, H, T, D), k and v (B, G, T, D), and the gradient of the output (B, H, T, D): normal numbers, laid out as
    projections leave them."""
    torch.manual_seed(seed)
    size = {"q": shape.heads, "k": shape.groups, "v": shape.groups, "dy": shape.heads}
    q, k, v, dy = (
        torch.randn(shape.batch, shape.seq, heads, shape.width, device=device, dtype=dtype).transpose(1, 2)
        for heads in size.values()
    )
    return q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), dy


def _bias(case: Case, shape: Shape, ctx: Ctx, queries: int) -> Tensor:
    """The scores that the position adds, (1, H, queries, S); a learned table is filled with normal numbers."""
    with torch.no_grad():
        scores: Tensor = _bias_module(case, shape, ctx.keys.device).scores(ctx, queries)
    return scores


def _bias_module(case: Case, shape: Shape, device: torch.device) -> Any:
    """The position's part."""
    module = part_of(case.position)(case.position, _scope(shape), shape.heads)  # type: ignore[arg-type]
    return _filled(module, device, torch.float32)


def _scope(shape: Shape) -> Scope:
    size = shape.width * shape.heads
    return Scope(size, 1, shape.seq, True, LayerNorm.Config(), 0.0, head_dim=shape.width, heads=shape.heads)


def _filled(module: Any, device: torch.device, dtype: torch.dtype) -> Any:
    """A part with normal numbers for its parameters; matrices by the width that they read."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            scale = parameter.shape[-1] ** -0.5 if isinstance(module, Graph) and parameter.dim() > 1 else 1.0
            parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
    return module.to(device=device, dtype=dtype)


def score_of(case: Case, shape: Shape, device: torch.device) -> Any:
    """The score of a case as a module."""
    return _filled(part_of(case.score)(case.score, _scope(shape), Sizes(shape.heads)), device, torch.float32)


def mixer_of(case: Case, shape: Shape, device: torch.device, dtype: torch.dtype) -> tuple[Graph, Any]:
    """A model of one layer, causal where the mixer can be, and the mixer in it."""
    assert case.mixer is not None
    sizes = {"heads": shape.heads, "head_dim": shape.width}
    mixer = case.mixer.model_copy(update={k: v for k, v in sizes.items() if k in type(case.mixer).model_fields})
    whole = {
        "vocab": 1,
        "dim": shape.heads * shape.width,
        "context": shape.seq,
        "stack": {"layers": 1, "block": {"sublayers": {"attn": tree(mixer)}}},
    }
    for graph in ("decoder", "encoder"):
        try:
            model = construct(find("graph", graph).Config.model_validate(whole))
        except Refused as refused:
            wrong = refused
            continue
        if device.type != "meta":
            model = _filled(model.to_empty(device="cpu"), device, dtype)
        block: Any = model.stack.blocks[0]  # type: ignore[union-attr, index]
        return model.eval(), block.attn
    raise wrong


def visible(case: Case, shape: Shape, device: torch.device, dtype: torch.dtype) -> Visible:
    """What the kernels of ours are handed; a bias is a constant here, without a gradient.

    On the CPU, where it takes seconds, the last two are kept: a case's and its probe's.
    """
    return (_kept if device.type == "cpu" else _made)(case, shape, device, dtype)


def _made(case: Case, shape: Shape, device: torch.device, dtype: torch.dtype) -> Visible:
    places = torch.arange(shape.seq, device=device)[None, :]
    ctx = Ctx(positions=places, keys=places)
    bias = None if case.position is None else _bias(case, shape, ctx, shape.seq).to(dtype)
    return masks.render(case.rule, ctx, shape.seq, bias, False)


_kept = lru_cache(maxsize=2)(_made)


def routed(case: Case, shape: Shape, device: torch.device, dtype: torch.dtype) -> Visible:
    """The same as the stack of a model in training hands it on: by blocks where that is the faster route."""
    places = torch.arange(shape.seq, device=device)[None, :]
    ctx = Ctx(positions=places, keys=places)
    bias = None if case.position is None else _bias_module(case, shape, device)
    taken = bias is None or bias.pairwise
    x = torch.empty(shape.batch, shape.seq, 0, device=device, dtype=dtype)
    if not (taken and routes.suits(x) and routes.by_blocks(case.rule, None if bias is None else 0, ctx, shape.seq)):
        return visible(case, shape, device, dtype)
    blocks = blockmasks.of_rule(case.rule, ctx, shape.batch)
    if bias is not None:
        scores, looks = bias.by_pair(ctx, shape.batch)
        blocks = replace(blocks, scores=scores, looks=looks)
    return Visible(blocks=blocks)


def bias_by_distance(case: Case, shape: Shape, device: torch.device) -> Tensor | None:
    """The bias of the last query, (H, T): under a causal mask entry T - 1 + k - q is that of the pair (q, k)."""
    if case.position is None:
        return None
    last = shape.seq - 1
    ctx = Ctx(
        positions=torch.tensor([[last]], device=device),
        keys=torch.arange(shape.seq, device=device)[None, :],
        offset=last,
    )
    return _bias(case, shape, ctx, 1)[0, :, 0].float().contiguous()


def scale(shape: Shape) -> float:
    """1 / sqrt(D)."""
    return 1 / math.sqrt(shape.width)
