"""Span corruption (Raffel et al. 2020): spans of the text give way to sentinels, and the decoder says them.

    text     Thank you for inviting me to your party last week
    input    Thank you <0> me to your party <1> week eos
    target   <0> for inviting <1> last <2> eos

Of n tokens, round(density * n) are noise, in round(noise / mean_span) spans. The lengths of the spans are a uniformly
random partition of the noise, and so are the gaps between them; the gaps at both ends may be empty (in the paper's
code a row begins with text and ends with noise, so that a row of one span always hides its end). Rows are cut longer
than the context, so that what is left of them fills it.
"""

from __future__ import annotations

import numpy as np

from xtcli.data.order import Ints
from xtcli.errors import refuse
from xtcli.objectives.base import Sample, Split, Tokenizer, generator
from xtcli.objectives.rewritten import Rewritten
from xtcli.objectives.words import clauses, count, left_out
from xtcli.registry import field, part

SMALLEST = 8
"""Tokens of the smallest context: a span, its sentinel, eos, and text on both sides."""


@part("objective", "span-corruption")
class SpanCorruption(Rewritten):
    """T5's denoising; `targets.lm` is aligned with `decoder_input_ids`, which begin with `start` (pad if None)."""

    class Config(Rewritten.Config):
        """T5's denoising."""

        density: float = field("share of the tokens that is noise", 0.15, gt=0, lt=1)
        mean_span: float = field("mean length of a span of noise, in tokens", 3.0, ge=1)
        final_sentinel: bool = field("close the target with one more sentinel, as the paper's figure has it", True)

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
        multiple = min(config.multiple, context) if config.pack == "none" else 0
        super().__init__(tokenizer, context=context, seed=seed, multiple=multiple)
        self.config = config
        self.masks = "always" if config.pack == "none" else "needed"
        self.eos = self.need("eos", why="span corruption")[0]
        self.start = self.first(start)
        self.refuse_short(SMALLEST, "corrupt")
        self.sentinels = np.array(tokenizer.sentinels, dtype=np.int64)
        block = self._longest()
        noise, spans = self._counts(block)
        wanted = spans + config.final_sentinel
        if wanted > self.sentinels.size:
            raise refuse(
                f"span corruption of {block:,} tokens needs {count(wanted, 'sentinel')}, and the tokenizer has "
                f"{self.sentinels.size}",
                f"set tokenizer.sentinels={wanted}, or a shorter train.context",
            )
        self.width = {"": block - noise + spans + 1, "decoder_": noise + wanted + 1}
        least = 2 if config.pack == "none" else 1
        self.lay(split, block, validation, self._fits, least, "a span")

    def _fits(self, total: int) -> int:
        """The context that `total` tokens take when corrupted."""
        noise, spans = self._counts(total)
        return total - noise + spans + 1

    def _counts(self, length: int) -> tuple[int, int]:
        """(noise tokens, spans) of a row of `length` tokens, 2 or more."""
        noise = min(max(round(length * self.config.density), 1), length - 1)
        spans = min(max(round(noise / self.config.mean_span), 1), noise, length - noise)
        return noise, spans

    def _longest(self) -> int:
        """The most tokens whose corrupted form, eos included, fits the context."""
        length = self.context // 2
        while True:
            noise, spans = self._counts(length + 1)
            if length + 1 - noise + spans + 1 > self.context:
                return length
            length += 1

    def sample(self, index: int, epoch: int) -> Sample:
        inputs, targets = self._corrupt(self.text(index), generator(self.seed, epoch, index))
        decoder = np.concatenate([[self.start], targets[:-1]])
        return {"input_ids": inputs, "decoder_input_ids": decoder, "targets.lm": targets, "id": np.array(index)}

    def _corrupt(self, text: Ints, rng: np.random.Generator) -> tuple[Ints, Ints]:
        """(input_ids, targets), both ended by eos."""
        noise, spans = self._counts(text.size)
        runs = np.empty(2 * spans + 1, dtype=np.int64)
        runs[0::2] = _partition(text.size - noise + 2, spans + 1, rng)
        runs[[0, -1]] -= 1
        runs[1::2] = _partition(noise, spans, rng)
        hidden = np.repeat(np.arange(2 * spans + 1) % 2 == 1, runs)
        begins = (np.cumsum(runs) - runs)[1::2]
        marked = text.copy()
        marked[begins] = self.sentinels[:spans]
        keep = ~hidden
        keep[begins] = True
        ends = np.cumsum(runs[1::2]) - runs[1::2]
        said = np.insert(text[hidden], ends, self.sentinels[:spans])
        tail = [self.sentinels[spans]] if self.config.final_sentinel else []
        return np.append(marked[keep], self.eos), np.concatenate([said, np.array([*tail, self.eos], dtype=np.int64)])

    def describe(self) -> str:
        config = self.config
        return clauses(
            f"span corruption: {config.density:.4g} of the tokens hidden, "
            f"in spans of {config.mean_span:.4g} on average, drawn anew each epoch",
            f"{self.block:,} tokens become {self.width['']:,} of input and {self.width['decoder_']:,} of target",
            *self.told(),
            f"targets end with {'a last sentinel and ' if config.final_sentinel else ''}eos",
            f"the decoder starts from id {self.start}",
            left_out(self.documents, self.least),
        )


def _partition(items: int, parts: int, rng: np.random.Generator) -> Ints:
    """`parts` positive lengths that sum to `items`, every such partition equally likely."""
    cuts = np.sort(rng.permutation(items - 1)[: parts - 1]) + 1
    return np.diff(cuts, prepend=0, append=items)
