"""Memory tokens: learned vectors that stand in front of every text, go through all layers and are cut off at the end.

    [m_1 ... m_M, x_1 ... x_T] -> stack -> the last T        Burtsev et al. 2020, arXiv:2006.11527

They enter behind the embedding, so that its positions count the words alone; positions inside attention
count them: 0 ... M - 1, the words from M. Every word sees all of them, whatever its mask. In an encoder
they see everything; in a decoder only those before them, so that the first step of decoding leaves
their keys and values in the caches and no later one needs them.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from xtcli.errors import refuse
from xtcli.parts.context import Ctx
from xtcli.parts.scope import Impossible, Scope
from xtcli.registry import Config


class Prefix(nn.Module):
    """M learned vectors, (M, D), drawn from N(0, 1)."""

    def __init__(self, count: int, scope: Scope) -> None:
        super().__init__()
        self.count, self.sees = count, not scope.causal
        self.vectors = nn.Parameter(torch.empty(count, scope.dim))

    def draw(self, normal: Any) -> None:
        """Like tokens of their own."""
        normal(self.vectors, 1.0)

    def enter(self, x: Tensor, ctx: Ctx) -> tuple[Tensor, Ctx]:
        """x (B, T, D) -> (B, M + T, D) in a text's first step, x in later ones; and the context that counts M in."""
        if self.sees and ctx.documents is not None:
            raise refuse(
                "memory tokens of an encoder read the whole row, and documents packed into one row would mix in them",
                "give each document a row of its own",
            )
        places = torch.arange(self.count, device=ctx.keys.device)[None, :]
        fresh = ctx.offset == 0
        inner = replace(
            ctx,
            positions=_joined(places, ctx.positions + self.count) if fresh else ctx.positions + self.count,
            keys=_joined(places, ctx.keys + self.count),
            keep=None if ctx.keep is None else _joined(torch.ones_like(places, dtype=torch.bool), ctx.keep),
            documents=None if ctx.documents is None else _joined(torch.full_like(places, -1), ctx.documents),
            offset=0 if fresh else ctx.offset + self.count,
            prefix=self.count,
            prefix_reads=self.sees,
        )
        if not fresh:
            return x, inner
        return torch.cat((self.vectors.to(x.dtype).expand(x.shape[0], -1, -1), x), dim=1), inner

    def leave(self, x: Tensor, ctx: Ctx) -> Tensor:
        """The words' share of x, (B, T, D); `ctx` is that of before `enter`."""
        return x[:, self.count :] if ctx.offset == 0 else x

    def extra_repr(self) -> str:
        return f"{self.count}"


def make_prefix(count: int | None, stack: Config, scope: Scope) -> Prefix | None:
    """The memory tokens in front of a stack, None for none; what they cannot stand before is filed."""
    if count is None:
        return None
    if getattr(stack, "recurrence", None) is not None:
        cause = "memory tokens would stand anew before each segment, between a text and what is remembered of it"
        scope.file(Impossible("memory_tokens", cause, "leave out memory_tokens or the recurrence"))
    return Prefix(count, scope)


def behind(prefix: Prefix | None, scope: Scope) -> Scope:
    """The scope of the stack that reads the prefix: its texts are longer."""
    if prefix is None:
        return scope
    context = None if scope.context is None else scope.context + prefix.count
    return scope.at("", context=context, prefix=prefix.count)


def refuse_readers(prefix: Prefix | None, stack: nn.Module, scope: Scope) -> None:
    """File the parts of a stack that know nothing of a prefix: that read inputs of their own, token by token, or
    see keys of their own choice; and a stack where nothing would see it."""
    if prefix is None:
        return
    if not any(_mixes(module) for module in stack.modules()):
        cause = "no part of this stack mixes the places of its text, so that no word would see memory tokens"
        scope.file(Impossible("memory_tokens", cause, "leave them out"))
    readers = sorted({name for module in stack.modules() for name in getattr(module, "reads", ())})
    if readers:
        cause = f"memory tokens have no place in {', '.join(readers)}, which parts of this stack read token by token"
        scope.file(Impossible("memory_tokens", cause, "leave them out"))
    if any(_chooses(module) for module in stack.modules()):
        cause = "memory tokens are seen by every word, and attention of this stack chooses among the keys by itself"
        scope.file(Impossible("memory_tokens", cause, "leave them out, or use attention with a mask"))


def _mixes(part: nn.Module) -> bool:
    """Whether a part mixes the places of the text that it reads."""
    return getattr(getattr(part, "Config", None), "slot", "") == "mixer" and not getattr(part, "reads_memory", False)


def _chooses(mixer: nn.Module) -> bool:
    """Whether a part sees keys of its own choice, by place or by content, whatever the mask says."""
    return getattr(mixer, "aligned", False) or "memory" not in getattr(mixer, "honours", ("memory",))


def _joined(front: Tensor, back: Tensor) -> Tensor:
    """(1, M) and (B|1, T) -> (B|1, M + T)."""
    return torch.cat((front.expand(back.shape[0], -1), back), dim=1)
