"""Losses of routers, beside those of the heads.

    balance     E sum over experts of (choices of e per token) x (mean probability of e)    Fedus 2021, arXiv:2101.03961
    router-z    mean of logsumexp(logits)^2                                                 Zoph 2022, arXiv:2202.08906

Means are over the tokens of all layers of one tower. `balance` is a product of two means: over `rows` it is taken for
each row and averaged, over the `batch` it is one product for all rows of a call.

What a split of a batch into micro-batches does to gradients: nothing to `router-z`, and nothing to `balance` over rows,
since both are sums over tokens or rows divided by how many the whole step has. `balance` over the batch is no such sum:
each micro-batch counts as a batch of its own, in proportion to its tokens. With `padding` counted, a split changes what
is counted wherever micro-batches are cut to their longest row.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from pydantic import Strict
from torch import Tensor, nn
from torch.nn import functional as F

from xtcli import registry
from xtcli.parts.context import Ledger
from xtcli.parts.linear import widen
from xtcli.parts.moe import MixtureOfExperts
from xtcli.parts.outputs import Output, Term
from xtcli.parts.scope import Impossible, Scope
from xtcli.parts.stack import Block
from xtcli.registry import Config, field, part

Towers = Annotated[tuple[Literal["encoder", "decoder"], ...], Strict(False)]


@dataclass(frozen=True)
class Side:
    """A tower as auxiliary losses see it: its name ("" where there is one tower), and the names of its inputs."""

    name: str
    ids: str
    mask: str

    def joined(self, name: str, mark: str = ".") -> str:
        """A name of this side."""
        return f"{self.name}{mark}{name}" if self.name else name


class Routed:
    """What the routers of one tower left: `probs` and `logits` (B, L, T, E), `asked` (B, L, T, K, E) counts of choices,
    `real` (B, 1, T) True at text."""

    def __init__(self, ledger: Ledger, dropped_first: bool) -> None:
        self.logits = widen(torch.stack(list(ledger.read("router_logits")), 1))
        experts = torch.stack(list(ledger.read("router_experts")), 1)
        self.count = self.logits.shape[-1]
        # A token that goes past all experts has the number behind the last.
        number = experts % self.count if dropped_first else experts
        self.asked = F.one_hot(number, self.count + 1)[..., : self.count].sum(-2).to(self.logits.dtype)
        self.probs = self.logits.softmax(-1)
        left = ledger.read("router_real")
        self.real = left[0][:, None] if left else None


class Auxiliary(nn.Module):
    """A loss made of what routers left; `output` is its name among a model's outputs."""

    output = ""

    class Config(registry.Config):
        """A loss beside those of the heads."""

        weight: float = field("its share of the loss", 0.01, ge=0)
        shown: bool = field("a plain call adds it to its loss and returns it; else training alone does", True)
        padding: bool = field("padding counts like text", False)
        towers: Towers | None = field("which towers it measures; null = all that route", None)

    def __init__(self, config: Config, scope: Scope) -> None:
        super().__init__()
        self.weight, self.shown, self.padding, self.towers = config.weight, config.shown, config.padding, config.towers

    def measures(self, side: Side) -> bool:
        """Whether it measures a tower."""
        return not side.name or self.towers is None or side.name in self.towers

    def units(self, inputs: Mapping[str, Tensor], side: Side) -> int:
        """What the sums of a step are divided by, from the inputs of the whole step."""
        if side.mask in inputs and not self.padding:
            return int(inputs[side.mask].sum())
        return inputs[side.ids].numel()

    def term(self, ledger: Ledger) -> Term:
        """The sum over one call, and the call's own `units`."""
        raise AssertionError("an auxiliary loss must be measured")

    def counted(self, routed: Routed) -> Tensor:
        """1.0 at tokens that count, (B, 1, T)."""
        if routed.real is None or self.padding:
            return torch.ones_like(routed.logits[:, :1, :, 0])
        return routed.real.to(routed.logits.dtype)


@part("auxiliary", "balance")
class Balance(Auxiliary):
    """Large where probable experts are also the chosen ones: 1 per choice when all are alike."""

    output = "aux_loss"

    class Config(Auxiliary.Config):
        """Load balancing."""

        over: Literal["rows", "batch"] = field("what the means are taken over", "rows")
        dropped: Literal["past", "first"] = field("a token that goes past counts for none, or for expert 0", "past")

    def __init__(self, config: Config, scope: Scope) -> None:
        super().__init__(config, scope)
        self.over, self.dropped_first = config.over, config.dropped == "first"

    def units(self, inputs: Mapping[str, Tensor], side: Side) -> int:
        return len(inputs[side.ids]) if self.over == "rows" else super().units(inputs, side)

    def term(self, ledger: Ledger) -> Term:
        routed = Routed(ledger, self.dropped_first)
        real = self.counted(routed)
        layers, over = routed.logits.shape[1], (1, 2) if self.over == "rows" else (0, 1, 2)
        tokens = (real.sum(over) * layers).clamp(min=1)[..., None]
        asked = (routed.asked * real[..., None]).sum(over) / tokens
        probs = (routed.probs * real[..., None]).sum(over) / tokens
        value = routed.count * (asked * probs).sum(-1)  # (B,) or ()
        if self.over == "rows":
            return Term(value.sum(), torch.full((), len(value), device=value.device), self.weight)
        return Term(value * real.sum(), real.sum(), self.weight)


@part("auxiliary", "router-z")
class RouterZ(Auxiliary):
    """Keeps the logits of routers small."""

    output = "z_loss"

    def term(self, ledger: Ledger) -> Term:
        routed = Routed(ledger, False)
        real = self.counted(routed)
        squares = routed.logits.logsumexp(-1).square()
        return Term((squares * real).sum() / squares.shape[1], real.sum(), self.weight)


class Auxiliaries(nn.ModuleDict):
    """The auxiliary losses of a graph, by kind."""

    def own(self, ledger: Ledger, side: Side) -> Ledger:
        """The ledger as one tower sees it."""
        return ledger.side(side.name) if side.name else ledger

    def found(self, ledger: Ledger, sides: tuple[Side, ...]) -> Iterator[tuple[Side, str, Auxiliary, Ledger]]:
        """Each loss of each tower whose routers left something."""
        for side in sides:
            own = self.own(ledger, side)
            for kind, auxiliary in self.items():
                if own.read("router_logits") and auxiliary.measures(side):  # type: ignore[operator]
                    yield side, kind, auxiliary, own  # type: ignore[misc]

    def terms(self, ledger: Ledger, sides: tuple[Side, ...]) -> dict[str, Term]:
        """The terms of one call, by kind and tower."""
        return {side.joined(kind): part.term(own) for side, kind, part, own in self.found(ledger, sides)}

    def units(self, inputs: Mapping[str, Tensor], sides: tuple[Side, ...]) -> dict[str, int]:
        """What the sums of a whole step are divided by, under the names of `terms`."""
        return {
            side.joined(kind): part.units(inputs, side)  # type: ignore[operator]
            for side in sides
            if side.ids in inputs
            for kind, part in self.items()
        }

    def report(self, out: Output, ledger: Ledger, graph: Any, wanted: bool | None) -> None:
        """Enter values and scores into the outputs of a plain call, and shares into its loss."""
        sides: tuple[Side, ...] = graph.sides
        shown = any(auxiliary.shown for auxiliary in self.values()) if wanted is None else wanted
        if not shown:
            return
        for side, _, auxiliary, own in self.found(ledger, sides):
            if auxiliary.shown or wanted:
                value = auxiliary.term(own).mean()
                out[side.joined(auxiliary.output, "_")] = value
                if "loss" in out:
                    out["loss"] = out["loss"] + auxiliary.weight * value
        scores = {side: reports(graph.get_submodule(side.name), self.own(ledger, side)) for side in sides}
        # Among pairs of scores and choices a layer without experts has a place of its own.
        pairs = any(isinstance(score, tuple) for layers in scores.values() for score in layers.values())
        for side, layers in scores.items():
            if pairs or layers:
                name = "router_logits" if side.name or graph.causal else "router_probs"
                count = sum(isinstance(module, Block) for module in graph.get_submodule(side.name).modules())
                blank = (torch.zeros(1, dtype=torch.long, device=graph.device),)
                listed = [layers.get(number, blank) for number in range(count)] if pairs else layers.values()
                out[side.joined(name, "_")] = tuple(listed)


def reports(tower: nn.Module, ledger: Ledger) -> dict[int, Any]:
    """What the routers of one tower have to say, by layer, as each kind reports it."""
    mixtures = {part.layer: part for part in tower.modules() if isinstance(part, MixtureOfExperts)}
    logits, experts = dict(ledger.numbered("router_logits")), dict(ledger.numbered("router_experts"))
    return {number: mixtures[number].router.report(logits[number], experts[number]) for number in logits}  # type: ignore[operator]


def make_auxiliaries(kinds: Mapping[str, Config], graph: nn.Module, scope: Scope) -> Auxiliaries:
    """The auxiliary losses of a graph, whose towers are there already."""
    if not any(isinstance(module, MixtureOfExperts) for module in graph.modules()):
        for kind in kinds:
            scope.file(Impossible(f"auxiliary.{kind}", "no layer of the model has a router", "use an ffn of kind moe"))
    return Auxiliaries({kind: scope.make(f"auxiliary.{kind}", config) for kind, config in kinds.items()})
