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

from typing import Literal

import numpy as np

from xtcli import registry
from xtcli.data.order import Ints
from xtcli.errors import refuse
from xtcli.objectives.base import Documents, Objective, Sample, Split, Tokenizer, generator
from xtcli.objectives.cuts import Cuts
from xtcli.objectives.joined import Joined
from xtcli.objectives.words import SHARED, clauses, count, left_out, repeated, too_little, too_short
from xtcli.registry import field, part

SMALLEST = 8
"""Tokens of the smallest context: a span, its sentinel, eos, and text on both sides."""


@part("objective", "span-corruption")
class SpanCorruption(Objective):
    """T5's denoising; `targets.lm` is aligned with `decoder_input_ids`, which begin with `start` (pad if None)."""

    class Config(registry.Config):
        """T5's denoising."""

        density: float = field("share of the tokens that is noise", 0.15, gt=0, lt=1)
        mean_span: float = field("mean length of a span of noise, in tokens", 3.0, ge=1)
        final_sentinel: bool = field("close the target with one more sentinel, as the paper's figure has it", True)
        pack: Literal["stream", "none"] = field(
            "stream: documents are joined with nothing between them and see each other; none: a row is one document "
            "or a piece of it",
            "stream",
        )
        multiple: int = field("pack none: rows are padded to the longest of a batch, rounded up to this many", 64, gt=0)

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
        self.start = self.need("pad", why="the decoder's first input")[0] if start is None else start
        if context < SMALLEST:
            raise refuse(
                f"a context of {context} tokens is too short to corrupt", f"set train.context to {SMALLEST} or more"
            )
        self.sentinels = np.array(tokenizer.sentinels, dtype=np.int64)
        self.block = self._longest()
        noise, spans = self._counts(self.block)
        wanted = spans + config.final_sentinel
        if wanted > self.sentinels.size:
            raise refuse(
                f"span corruption of {self.block:,} tokens needs {count(wanted, 'sentinel')}, and the tokenizer has "
                f"{self.sentinels.size}",
                f"set tokenizer.sentinels={wanted}, or a shorter train.context",
            )
        self.width = {"": self.block - noise + spans + 1, "decoder_": noise + wanted + 1}
        self.least = 2 if config.pack == "none" else 1
        self.documents = Documents.of(split.streams["text"], self.least)
        total = self.documents.total
        if total < 2:
            raise too_little(f"{count(total, 'token')}, and a span takes 2", validation)
        if config.pack == "none":
            self.cuts = Cuts(self.documents, self.block)
            self.samples = len(self.cuts)
        else:
            self.joined = Joined(self.documents)
            self.samples = -(-total // self.block)
            if total < self.block and not validation:
                room = total - self._counts(total)[0] + self._counts(total)[1] + 1
                remedy = f"give more text, or set objective.pack=none or train.context to {room} or less"
                raise too_short(total, self.block, remedy)

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

    def __len__(self) -> int:
        return self.samples

    def sample(self, index: int, epoch: int) -> Sample:
        inputs, targets = self._corrupt(self._text(index), generator(self.seed, epoch, index))
        decoder = np.concatenate([[self.start], targets[:-1]])
        return {"input_ids": inputs, "decoder_input_ids": decoder, "targets.lm": targets, "id": np.array(index)}

    def _text(self, index: int) -> Ints:
        if self.config.pack == "none":
            return self.documents.read(*self.cuts.at(index))
        text: Ints = self.joined.tokens(*self.joined.block(index, self.block))[0]
        return text

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
        config, documents = self.config, count(len(self.documents), "document")
        if config.pack == "none":
            rows = [f"{documents} in {count(self.samples, 'row')}, padded", "no row has text of two documents"]
        else:
            rows = [f"{documents} end to end, nothing between them, in {count(self.samples, 'block')}", SHARED]
            rows.append(repeated(self.samples, self.block, self.joined.total))
        return clauses(
            f"span corruption: {config.density:.4g} of the tokens hidden, "
            f"in spans of {config.mean_span:.4g} on average, drawn anew each epoch",
            f"{self.block:,} tokens become {self.width['']:,} of input and {self.width['decoder_']:,} of target",
            *rows,
            f"targets end with {'a last sentinel and ' if config.final_sentinel else ''}eos",
            f"the decoder starts from id {self.start}",
            left_out(self.documents, self.least),
        )


def _partition(items: int, parts: int, rng: np.random.Generator) -> Ints:
    """`parts` positive lengths that sum to `items`, every such partition equally likely."""
    cuts = np.sort(rng.permutation(items - 1)[: parts - 1]) + 1
    return np.diff(cuts, prepend=0, append=items)
