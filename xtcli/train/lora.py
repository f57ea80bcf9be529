"""Low-rank adapters (Hu et al. 2021, arXiv:2106.09685): a transform of a built model.

    y = W x + b + (alpha / rank) * up(down(dropout(x)))        down (rank, in), up (out, rank)

W and b are frozen; `down` starts from N(0, 1 / in) and `up` from 0, so an adapted model begins as the model that it
was. An adapter lies below its layer: `....attn.q.weight` keeps its name beside `....attn.q.lora.down` and
`....attn.q.lora.up`. Checkpoints of a run hold both; `plain` (tensors by name) and `merge` (a module) make the
weights W + (alpha / rank) up down of them.

Patterns are matched against whole module paths: `*` and `?` stay within a name, `**` stands for any number of names,
`{q,v}` for one of several.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from xtcli.config.train import LoraConfig
from xtcli.errors import Problem, UserError, nearest
from xtcli.parts.linear import Linear

UP, DOWN = ".lora.up", ".lora.down"
_TOKENS = re.compile(r"(\*\*\.|\*\*|\*|\?|\[[^\]]+\]|\{[^}]*\})")
_KNOWN = {"**.": r"(?:[^.]+\.)*", "**": r".+", "*": r"[^.]*", "?": r"[^.]"}


class Adapter(nn.Module):
    """(..., in) -> (..., out): what an adapter adds; zero until it is trained."""

    def __init__(self, config: LoraConfig, like: Tensor) -> None:
        super().__init__()
        outer, inner = like.shape
        self.down = nn.Parameter(like.new_empty(config.rank, inner))
        self.up = nn.Parameter(like.new_zeros(outer, config.rank))
        self.dropout = nn.Dropout(config.dropout)
        self.scale = config.alpha / config.rank

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.linear(self.dropout(x), self.down), self.up) * self.scale


class Adapted(Linear):
    """A linear layer that shares the weights of `base`, with an adapter beside them."""

    def __init__(self, base: Linear, config: LoraConfig) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.role = base.in_features, base.out_features, base.role
        self.weight, self.bias = base.weight, base.bias
        self.lora = Adapter(config, base.weight.detach())
        self.train(base.training)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias) + self.lora(x)  # type: ignore[no-any-return]


def adapt(model: nn.Module, config: LoraConfig, seed: int = 0, place: str = "") -> list[str]:
    """Put adapters on the linear layers that `config.on` names, in place, and freeze everything else.

    Returns the paths of these layers. What `config.whole` names is trained as it is. Adapters are drawn on the CPU,
    so that they depend on the seed alone; on the meta device nothing is drawn. Raises UserError, with `place`, for
    a pattern that names no linear layer (`whole`: no module).
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    layers = [path for path, module in modules.items() if isinstance(module, Linear)]
    whole = _find(config.whole or (), [path for path in modules if path], "module", "train.lora.whole", place)
    chosen = _find(config.on, layers, "linear layer", "train.lora.on", place)
    chosen = [path for path in chosen if not any(path == one or path.startswith(one + ".") for one in whole)]
    if not chosen:
        cause = "names only layers that train.lora.whole trains as they are"
        raise UserError(Problem(cause, place, "train.lora.on", "name other layers"))
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for path in whole:
        for parameter in modules[path].parameters():
            parameter.requires_grad_(True)
    generator = torch.Generator().manual_seed(seed)
    made: dict[int, Adapted] = {}
    for path in chosen:
        base = modules[path]
        assert isinstance(base, Linear)
        # A layer that several blocks share gets one adapter, which they share too.
        if id(base) not in made:
            made[id(base)] = adapted = Adapted(base, config)
            if not adapted.weight.is_meta:
                drawn = torch.randn(adapted.lora.down.shape, generator=generator) / math.sqrt(base.in_features)
                adapted.lora.down.data.copy_(drawn)
        _put(model, path, made[id(base)])
    return chosen


def merge(model: nn.Module) -> nn.Module:
    """Turn every adapted layer into a plain one with the same outputs, in place; all weights can be trained again."""
    made: dict[int, Linear] = {}
    for path, module in list(model.named_modules(remove_duplicate=False)):
        if isinstance(module, Adapted):
            if id(module) not in made:
                made[id(module)] = _merged(module)
            _put(model, path, made[id(module)])
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    return model


def plain(state: Mapping[str, Tensor], config: LoraConfig | None) -> dict[str, Tensor]:
    """The tensors of a checkpoint with each adapter added to its weight; as they are where there is no adapter."""
    if config is None:
        return dict(state)
    merged = {name: tensor for name, tensor in state.items() if not name.endswith((UP, DOWN))}
    # Names that are tied stand for one tensor, and are to stand for one afterwards.
    made: dict[int, Tensor] = {}
    for name in merged:
        layer = name.removesuffix(".weight")
        if layer + UP in state and layer + DOWN in state and name != layer:
            up, down, weight = state[layer + UP], state[layer + DOWN], state[name]
            if id(weight) not in made:
                made[id(weight)] = added(weight, up, down, config.alpha / config.rank)
            merged[name] = made[id(weight)]
    return merged


def added(weight: Tensor, up: Tensor, down: Tensor, scale: float) -> Tensor:
    """weight + scale * up down, summed in float32 at least, in the type of `weight`."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    return (weight.to(wide) + scale * (up.to(wide) @ down.to(wide))).to(weight.dtype)


def find(pattern: str, paths: Iterable[str]) -> list[str]:
    """The paths that a pattern names."""
    parts = []
    for token in _TOKENS.split(pattern):
        if token.startswith("{"):
            parts.append("(?:" + "|".join(map(re.escape, token[1:-1].split(","))) + ")")
        elif token.startswith("[") and token.endswith("]"):
            parts.append("[^" + token[2:] if token[1] == "!" else token)
        else:
            parts.append(_KNOWN.get(token) or re.escape(token))
    return [path for path in paths if re.fullmatch("".join(parts), path)]


def _find(patterns: Sequence[str], paths: Sequence[str], what: str, field: str, place: str) -> list[str]:
    """All paths that the patterns name, in order; raises UserError for those that name none."""
    found: set[str] = set()
    problems = []
    for pattern in patterns:
        matched = find(pattern, paths)
        found.update(matched)
        if not matched:
            near = _near(pattern, paths)
            remedy = f"did you mean '{near}'?" if near else f"one is '{paths[0]}'" if paths else ""
            problems.append(Problem(f"'{pattern}' names no {what} of the model", place, field, remedy))
    if problems:
        raise UserError(*problems)
    return [path for path in paths if path in found]


def _near(pattern: str, paths: Sequence[str]) -> str | None:
    """The pattern that was most likely meant, written in the same way: with `*` for numbers, with `**` in front."""
    for below in (f"{pattern}.*", f"{pattern}.**"):
        if find(below, paths):
            return below
    if pattern.startswith("**."):
        known = {".".join(("**", *path.split(".")[-names:])) for path in paths for names in range(1, 4)}
    elif "*" in pattern:
        known = {re.sub(r"(?<=\.)\d+(?=\.)", "*", path) for path in paths}
    else:
        known = set(paths)
    return nearest(pattern, sorted(known))


def _put(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)


def _merged(layer: Adapted) -> Linear:
    made = Linear.__new__(Linear)
    nn.Module.__init__(made)
    made.in_features, made.out_features, made.role = layer.in_features, layer.out_features, layer.role
    weight = added(layer.weight.detach(), layer.lora.up.detach(), layer.lora.down.detach(), layer.lora.scale)
    made.weight, made.bias = nn.Parameter(weight), layer.bias
    made.training = layer.training
    return made
