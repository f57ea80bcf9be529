"""The order of sublayers over a whole stack: which of a block's sublayers stand in which layer.

    given       each layer has them all
    sandwich    a^k (a f)^(n-k) f^k: k layers of only the first kind, whole ones, k of only the last
                (Press et al. 2020, arXiv:1911.03864)

n is `layers`, so that each kind stands in the stack n times whatever k is; k = n - 1 and k = n are the
same. Whole layers hold every sublayer of the block: with cross-attention c that is a^k (a c f)^(n-k) f^k.
"""

from __future__ import annotations

from typing import Annotated, Any

from xtcli import registry
from xtcli.registry import Config, Slot, field, part


class Order:
    """A rule made from its config: static methods only."""

    @staticmethod
    def singles(order: Any, layers: int) -> list[str | None]:
        """For each layer the only sublayer that stands there, or None for the whole block."""
        raise AssertionError("an order kind must say what stands where")


@part("order", "given")
class Given(Order):
    """As the block says."""

    class Config(registry.Config):
        """Every layer is a whole block."""

    @staticmethod
    def singles(order: Any, layers: int) -> list[str | None]:
        return [None] * layers


@part("order", "sandwich")
class Sandwich(Order):
    """Attention gathers in front, feed-forwards behind."""

    class Config(registry.Config):
        """Layers of one sublayer at both ends."""

        ends: int = field(
            "layers of a single sublayer at each end, at most the number of layers", ge=0, tiny=1, example=1
        )
        front: str = field("the sublayer that stands alone in front", "attn")
        back: str = field("the sublayer that stands alone behind", "ffn")

    @staticmethod
    def singles(order: Any, layers: int) -> list[str | None]:
        return [order.front] * order.ends + [None] * (layers - order.ends) + [order.back] * order.ends


GIVEN: Config = Given.Config()
OrderSlot = Annotated[Config, Slot("order")]
