"""Pairs of texts (Sutskever et al. 2014): the encoder reads the source, the decoder says the target.

Both sides get what the tokenizer frames a text with: bos (or cls) in front, eos (or sep) behind. The decoder reads its
target shifted right behind `start`. Within a batch rows stand longest first, so that micro-batches hold rows of like
length.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from xtcli import registry
from xtcli.data.order import Ints
from xtcli.errors import refuse
from xtcli.objectives.base import Documents, Objective, Sample, Split, Tokenizer
from xtcli.objectives.words import clauses, count, truncated
from xtcli.registry import field, part


@part("objective", "seq2seq")
class Pairs(Objective):
    """Source to target; `targets.lm` is aligned with `decoder_input_ids`, which begin with `start` (pad if None)."""

    streams = ("source", "target")
    longest_first = True

    class Config(registry.Config):
        """Source and target texts."""

        source_length: int | None = field("longest source in tokens, framed; default: the context", None, ge=3, tiny=64)
        target_length: int | None = field("longest target in tokens, framed; default: the context", None, ge=3, tiny=64)
        multiple: int = field("rows are padded to the longest of a batch, rounded up to this many", 8, gt=0)

    def __init__(
        self,
        config: Config,
        split: Split,
        tokenizer: Tokenizer,
        *,
        context: int,
        seed: int,
        start: int | None = None,
        validation: bool = False,
    ) -> None:
        super().__init__(tokenizer, context=context, seed=seed, multiple=config.multiple)
        self.width = {"": config.source_length or context, "decoder_": config.target_length or context}
        for name in ("source_length", "target_length"):
            asked = getattr(config, name) or 0
            if asked > context:
                cause = f"{name} is {asked:,}, and the context has {context:,} tokens"
                raise refuse(cause, f"raise train.context, or lower objective.{name}", path=f"objective.{name}")
        self.start = self.need("pad", why="the decoder's first input")[0] if start is None else start
        self.front, end = ending(self.special)
        # A decoder that starts from bos has it already.
        self.target_front = [] if self.front == [self.start] else self.front
        self.end = end
        sides = [Documents.of(split.streams[name], 0) for name in self.streams]
        if len(sides[0]) != len(sides[1]):
            raise ValueError(f"{len(sides[0])} sources and {len(sides[1])} targets")
        keep = (sides[0].lengths > 0) & (sides[1].lengths > 0)
        self.left_out = int((~keep).sum())
        self.source, self.target = (replace(s, starts=s.starts[keep], lengths=s.lengths[keep]) for s in sides)
        if not len(self.source):
            raise refuse("no pair has text on both sides", "check data.source and the names of its columns")

    def __len__(self) -> int:
        return len(self.source)

    def sample(self, index: int, epoch: int) -> Sample:
        inputs = self._framed(self.source, index, self.front, self.width[""])
        targets = self._framed(self.target, index, self.target_front, self.width["decoder_"])
        decoder = np.concatenate([[self.start], targets[:-1]])
        return {"input_ids": inputs, "decoder_input_ids": decoder, "targets.lm": targets, "id": np.array(index)}

    def _framed(self, side: Documents, index: int, front: list[int], longest: int) -> Ints:
        length = min(int(side.lengths[index]), longest - len(front) - 1)
        return np.concatenate([np.array(front, dtype=np.int64), side.read(index, 0, length), [self.end]])

    def describe(self) -> str:
        frame = f"id {self.front[0]} before and id {self.end} after" if self.front else f"id {self.end} after"
        return clauses(
            f"sequence to sequence: {count(len(self), 'pair')}, {frame} each text",
            f"the decoder starts from id {self.start}",
            "rows padded to the longest of a batch",
            truncated(self.source.lengths, self.width[""] - len(self.front) - 1, "source"),
            truncated(self.target.lengths, self.width["decoder_"] - len(self.target_front) - 1, "target"),
            f"{count(self.left_out, 'pair')} with an empty side left out" if self.left_out else "",
        )


def ending(special: Mapping[str, int]) -> tuple[list[int], int]:
    """The ids in front of a text and behind it; raises UserError for a tokenizer that ends none."""
    end = special.get("eos", special.get("sep"))
    if end is None:
        raise refuse(
            "a decoder learns where to stop from an eos token, and the tokenizer has none",
            "set tokenizer.special.eos",
        )
    begin = special.get("bos", special.get("cls"))
    return [] if begin is None or begin == end else [begin], end
