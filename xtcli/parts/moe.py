"""A mixture of experts in the place of a feed-forward: x -> sum over its experts e of w_e f_e(x), (B, T, D).

A router (routers.py) chooses, experts (experts.py) compute. Only chosen pairs are computed: they are sorted by expert,
go through the experts' grouped products, and are summed where they came from. A token that goes past all experts adds
nothing to the stream. What auxiliary losses (auxiliary.py) need is left in the ledger:

    router_logits (B, T, E)    router_experts (B, T, K), E where a token goes past    router_real (B, T), with padding
"""

from __future__ import annotations

from typing import Annotated, Any

import torch
from torch import Tensor, nn

from xtcli import registry
from xtcli.parts.context import Ctx
from xtcli.parts.routers import Asked, Router, Routes, TopK
from xtcli.parts.scope import Scope
from xtcli.registry import Config, Slot, field, part


@part("ffn", "moe")
class MixtureOfExperts(nn.Module):
    """Experts side by side, of which a router chooses a few for each token."""

    class Config(registry.Config):
        """Experts and their router."""

        experts: int = field("how many there are", gt=0, tiny=4, example=4)
        router: Annotated[Config, Slot("router")] = field("chooses experts for each token", TopK.Config())
        expert: Annotated[Config, Slot("expert")] = field("each of them", example={"kind": "mlp", "hidden": 48})

    def __init__(self, config: Config, scope: Scope) -> None:
        super().__init__()
        self.layer, self.count = scope.layer, config.experts
        self.router = scope.make("router", config.router, config.experts)
        self.experts = scope.make("expert", config.expert, config.experts)

    @property
    def idle(self) -> int:
        """Parameters that one token does not pass through."""
        router: Router = self.router  # type: ignore[assignment]
        held = sum(parameter.numel() for parameter in self.experts.parameters())
        return held * (self.count - router.choices) // self.count

    def new_state(self, batch: int, capacity: int, device: Any, dtype: Any) -> Asked | None:
        return self.router.new_state(batch, capacity, device, dtype)  # type: ignore[operator, no-any-return]

    def forward(self, x: Tensor, ctx: Ctx) -> Tensor:
        real = None if ctx.keep is None else ctx.keep[:, ctx.offset : ctx.offset + x.shape[1]]
        routes: Routes = self.router(x, real, ctx)
        ctx.ledger.leave("router_logits", self.layer, routes.logits)
        ctx.ledger.leave("router_experts", self.layer, routes.experts)
        if real is not None:
            ctx.ledger.leave("router_real", self.layer, real)
        most = self.router.most(*x.shape[:2])  # type: ignore[operator]
        y = dispatch(x.flatten(0, 1), routes.experts.flatten(0, 1), routes.weights.flatten(0, 1), self.experts, most)
        return y.view_as(x)


def dispatch(x: Tensor, experts: Tensor, weights: Tensor, run: Any, most: int) -> Tensor:
    """Tokens x (N, D) through their `experts` (N, K), summed by `weights` (N, K) -> (N, D).

    `run` are the experts; a number beyond the last is none. At most `most` of the N x K pairs have one.
    """
    count = run.count
    flat = experts.flatten()  # pair i belongs to token i // K
    order = flat.argsort(stable=True)
    places = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=x.device))
    counts = (flat[:, None] == torch.arange(count, device=x.device)).sum(0)
    rows: Tensor = Sorted.apply(x, order[:most], places, experts.shape[1])  # type: ignore[no-untyped-call]
    made: Tensor = Returned.apply(run(rows, counts), order[:most], places)  # type: ignore[no-untyped-call]
    pairs = made.unflatten(0, experts.shape)  # (N, K, D)
    shares = weights.masked_fill(experts >= count, 0.0)
    total: Tensor = (pairs * shares[..., None].to(pairs.dtype)).sum(1)
    return total.to(x.dtype)


class Sorted(torch.autograd.Function):
    """The token of each pair, in the order of their experts: x (N, D) -> (M, D).

    `order` (M,) are the pairs in that order, `places` (N K,) where each pair stands in it, M or more where it does not.
    The gradient of an index would add rows one by one; here every row that is added is known, and the sum has an order.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, places: Tensor, choices: int) -> Tensor:
        ctx.save_for_backward(places)
        ctx.choices, ctx.most = choices, len(order)
        return x[order // choices]

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> Any:
        (places,) = ctx.saved_tensors
        pairs = slope[places.clamp(max=ctx.most - 1)]
        if ctx.most < len(places):
            pairs = torch.where((places < ctx.most)[:, None], pairs, 0.0)
        return pairs.unflatten(0, (-1, ctx.choices)).sum(1), None, None, None


class Returned(torch.autograd.Function):
    """What was made for each pair, in the order of the tokens: (M, D) -> (N K, D); see `Sorted`.

    A pair without an expert gets what stands last, and no gradient comes from it.
    """

    @staticmethod
    def forward(ctx: Any, made: Tensor, order: Tensor, places: Tensor) -> Tensor:
        ctx.save_for_backward(order)
        return made[places.clamp(max=len(made) - 1)]

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> Any:
        (order,) = ctx.saved_tensors
        return slope[order], None, None
