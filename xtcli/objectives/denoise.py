"""Denoising (Lewis et al. 2020, arXiv:1910.13461): the encoder reads a corrupted row, the decoder says the whole row.

    permute   the sentences of a row change places          [with this probability a row]
    rotate    a row begins at one of its tokens, at random  [with this probability a row]
    delete    tokens are left out                           [this share of the row's tokens]
    infill    spans of Poisson length become one mask each  [this share]; a span of length 0 puts a mask in
    mask      tokens become mask tokens                     [this share]

They apply in this order, and any of them mix. Shares are exact: round(share * tokens) tokens are touched. For infilling
lengths are drawn until they sum to the share, and every arrangement of the spans in the row is equally likely; spans
of length 0 end where a row would grow beyond its text. A sentence ends with a token that ends in . ! ? or a line break.
"""

from __future__ import annotations

from typing import Self

import numpy as np
from pydantic import model_validator
from pydantic_core import PydanticCustomError

from xtcli.data.order import Ints
from xtcli.objectives.base import Array, Sample, Split, Tokenizer, generator
from xtcli.objectives.rewritten import Rewritten
from xtcli.objectives.words import clauses, left_out
from xtcli.registry import field, part

SMALLEST = 8
"""Tokens of the smallest context: a frame, and some text to corrupt."""
ENDS = (".", "!", "?", "\n")


@part("objective", "denoising")
class Denoising(Rewritten):
    """Corrupted text to text; `targets.lm` is aligned with `decoder_input_ids`, which begin with `start`."""

    class Config(Rewritten.Config):
        """BART's denoising."""

        infill: float = field("share of the tokens hidden in spans, one mask for each span", 0.3, ge=0, lt=1)
        mean_span: float = field("mean of the Poisson lengths of these spans", 3.0, ge=1)
        mask: float = field("share of the tokens that become the mask token", 0.0, ge=0, lt=1)
        delete: float = field("share of the tokens that are left out", 0.0, ge=0, lt=1)
        permute: float = field("probability that the sentences of a row change places", 1.0, ge=0, le=1)
        rotate: float = field("probability that a row begins at a token drawn at random", 0.0, ge=0, le=1)

        @model_validator(mode="after")
        def _room(self) -> Self:
            if self.infill + self.mask + self.delete > 1:
                raise PydanticCustomError("denoising_shares", "infill + mask + delete is more than all tokens")
            return self

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
        # Deleted tokens and hidden spans make inputs shorter than the text, each its own way.
        super().__init__(tokenizer, context=context, seed=seed, multiple=min(config.multiple, context))
        self.config = config
        self.masks = "needed"
        self.refuse_short(SMALLEST, "corrupt")
        self.hidden = self.need("mask", why="denoising")[0] if config.infill or config.mask else -1
        self.end = self.last()
        self.start = self.first(start)
        begin = self.special.get("bos", self.special.get("cls"))
        self.front = [] if begin is None or begin == self.end else [begin]
        # A decoder that starts from bos has it already.
        self.target_front = [] if self.front == [self.start] else self.front
        block = context - len(self.front) - 1
        self.width = {"": context, "decoder_": context}
        self.ends = sentence_ends(tokenizer) if config.permute else np.zeros(0, dtype=bool)
        self.lay(split, block, validation, lambda total: total + context - block)

    def sample(self, index: int, epoch: int) -> Sample:
        text = self.text(index)
        inputs = self._corrupt(text, generator(self.seed, epoch, index))
        targets = np.concatenate([np.array(self.target_front, dtype=np.int64), text, [self.end]])
        return {
            "input_ids": np.concatenate([np.array(self.front, dtype=np.int64), inputs, [self.end]]),
            "decoder_input_ids": np.concatenate([[self.start], targets[:-1]]),
            "targets.lm": targets,
            "id": np.array(index),
        }

    def _corrupt(self, text: Ints, rng: np.random.Generator) -> Ints:
        """The text with all corruptions, never longer than it was."""
        config, size = self.config, text.size
        if rng.random() < config.permute:
            text = self._permuted(text, rng)
        if rng.random() < config.rotate:
            text = np.roll(text, -int(rng.integers(size)))
        # Each share is one of the row as it was, and at least one token is left to read.
        gone = min(round(config.delete * size), size - 1)
        if gone:
            text = np.delete(text, rng.permutation(size)[:gone])
        inside = min(round(config.infill * size), text.size)
        if inside:
            text = self._infilled(text, inside, rng)
        masked = round(config.mask * size)
        if masked:
            plain = rng.permutation(np.flatnonzero(text != self.hidden))[:masked]
            text = text.copy()
            text[plain] = self.hidden
        return text

    def _permuted(self, text: Ints, rng: np.random.Generator) -> Ints:
        """The same sentences in any order."""
        ends = self.ends[np.minimum(text, self.ends.size - 1)]
        # A row of ends, such as empty lines, closes one sentence.
        last = np.flatnonzero(ends[:-1] & ~ends[1:]) + 1
        sentences = np.split(text, last)
        moved: Ints = np.concatenate([sentences[place] for place in rng.permutation(len(sentences))])
        return moved

    def _infilled(self, text: Ints, inside: int, rng: np.random.Generator) -> Ints:
        """Spans that cover `inside` tokens give way to one mask each."""
        drawn = rng.poisson(self.config.mean_span, size=2 * inside + 8)
        sums = np.cumsum(drawn)
        while sums[-1] < inside:
            drawn = np.append(drawn, rng.poisson(self.config.mean_span, size=inside + 8))
            sums = np.cumsum(drawn)
        lengths = drawn[: int(np.searchsorted(sums, inside)) + 1]
        lengths[-1] -= int(lengths.sum()) - inside
        if lengths.size > inside:
            spans, empty = lengths[lengths > 0], lengths[lengths == 0]
            lengths = rng.permutation(np.concatenate([spans, empty[: inside - spans.size]]))
        slots = text.size - inside + lengths.size
        places = np.sort(rng.permutation(slots)[: lengths.size])
        is_span = np.zeros(slots, dtype=bool)
        is_span[places] = True
        taken = np.ones(slots, dtype=np.int64)
        taken[places] = lengths
        begins = np.cumsum(taken) - taken
        out = np.full(slots, self.hidden, dtype=np.int64)
        out[~is_span] = text[begins[~is_span]]
        return out

    def describe(self) -> str:
        config = self.config
        done = [
            f"sentences permuted in {config.permute:.4g} of the rows" if config.permute else "",
            f"{config.rotate:.4g} of the rows rotated" if config.rotate else "",
            f"{config.delete:.4g} of the tokens deleted" if config.delete else "",
            f"{config.infill:.4g} hidden in spans of {config.mean_span:.4g} on average" if config.infill else "",
            f"{config.mask:.4g} masked" if config.mask else "",
        ]
        return clauses(
            "denoising: " + (", ".join(part for part in done if part) or "nothing corrupted") + ", anew each epoch",
            *self.told(),
            f"the decoder starts from id {self.start}",
            left_out(self.documents, self.least),
        )


def sentence_ends(tokenizer: Tokenizer) -> Array:
    """For each id, whether its text ends a sentence; the last entry stands for ids beyond the vocabulary."""
    table = np.zeros(tokenizer.vocab + 1, dtype=bool)
    for token in range(tokenizer.vocab):
        table[token] = tokenizer.decode([token]).rstrip(" ").endswith(ENDS)
    return table
