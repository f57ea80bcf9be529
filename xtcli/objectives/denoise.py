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

from typing import Literal, Self

import numpy as np
from pydantic import model_validator
from pydantic_core import PydanticCustomError

from xtcli import registry
from xtcli.data.order import Ints
from xtcli.errors import refuse
from xtcli.objectives.base import Array, Documents, Objective, Sample, Split, Tokenizer, generator
from xtcli.objectives.cuts import Cuts
from xtcli.objectives.joined import Joined
from xtcli.objectives.words import SHARED, clauses, count, left_out, repeated, too_little, too_short
from xtcli.registry import field, part

SMALLEST = 8
"""Tokens of the smallest context: a frame, and some text to corrupt."""
ENDS = (".", "!", "?", "\n")


@part("objective", "denoising")
class Denoising(Objective):
    """Corrupted text to text; `targets.lm` is aligned with `decoder_input_ids`, which begin with `start`."""

    class Config(registry.Config):
        """BART's denoising."""

        infill: float = field("share of the tokens hidden in spans, one mask for each span", 0.3, ge=0, lt=1)
        mean_span: float = field("mean of the Poisson lengths of these spans", 3.0, ge=1)
        mask: float = field("share of the tokens that become the mask token", 0.0, ge=0, lt=1)
        delete: float = field("share of the tokens that are left out", 0.0, ge=0, lt=1)
        permute: float = field("probability that the sentences of a row change places", 1.0, ge=0, le=1)
        rotate: float = field("probability that a row begins at a token drawn at random", 0.0, ge=0, le=1)
        pack: Literal["stream", "none"] = field(
            "stream: documents are joined with nothing between them and see each other; none: a row is one document "
            "or a piece of it",
            "stream",
        )
        multiple: int = field("pack none: rows are padded to the longest of a batch, rounded up to this many", 64, gt=0)

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
        if context < SMALLEST:
            raise refuse(
                f"a context of {context} tokens is too short to corrupt", f"set train.context to {SMALLEST} or more"
            )
        self.hidden = self.need("mask", why="denoising")[0] if config.infill or config.mask else -1
        self.end = self.special.get("eos", self.special.get("sep"))
        if self.end is None:
            raise refuse(
                "a decoder learns where to stop from an eos token, and the tokenizer has none",
                "set tokenizer.special.eos",
            )
        self.start = self.need("pad", why="the decoder's first input")[0] if start is None else start
        begin = self.special.get("bos", self.special.get("cls"))
        self.front = [] if begin is None or begin == self.end else [begin]
        # A decoder that starts from bos has it already.
        self.target_front = [] if self.front == [self.start] else self.front
        self.block = context - len(self.front) - 1
        self.width = {"": context, "decoder_": context}
        self.ends = sentence_ends(tokenizer) if config.permute else np.zeros(0, dtype=bool)
        self.least = 2
        self.documents = Documents.of(split.streams["text"], self.least)
        total = self.documents.total
        if total < self.least:
            raise too_little(f"{count(total, 'token')}, and a row takes {self.least}", validation)
        if config.pack == "none":
            self.cuts = Cuts(self.documents, self.block)
            self.samples = len(self.cuts)
        else:
            self.joined = Joined(self.documents)
            self.samples = -(-total // self.block)
            if total < self.block and not validation:
                fits = total + context - self.block
                remedy = f"give more text, or set objective.pack=none or train.context to {fits} or less"
                raise too_short(total, self.block, remedy)

    def __len__(self) -> int:
        return self.samples

    def sample(self, index: int, epoch: int) -> Sample:
        text = self._text(index)
        inputs = self._corrupt(text, generator(self.seed, epoch, index))
        targets = np.concatenate([np.array(self.target_front, dtype=np.int64), text, [self.end]])
        return {
            "input_ids": np.concatenate([np.array(self.front, dtype=np.int64), inputs, [self.end]]),
            "decoder_input_ids": np.concatenate([[self.start], targets[:-1]]),
            "targets.lm": targets,
            "id": np.array(index),
        }

    def _text(self, index: int) -> Ints:
        if self.config.pack == "none":
            return self.documents.read(*self.cuts.at(index))
        text: Ints = self.joined.tokens(*self.joined.block(index, self.block))[0]
        return text

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
        config, documents = self.config, count(len(self.documents), "document")
        if config.pack == "none":
            rows = [f"{documents} in {count(self.samples, 'row')}, padded", "no row has text of two documents"]
        else:
            rows = [f"{documents} end to end, nothing between them, in {count(self.samples, 'block')}", SHARED]
            rows.append(repeated(self.samples, self.block, self.joined.total))
        done = [
            f"sentences permuted in {config.permute:.4g} of the rows" if config.permute else "",
            f"{config.rotate:.4g} of the rows rotated" if config.rotate else "",
            f"{config.delete:.4g} of the tokens deleted" if config.delete else "",
            f"{config.infill:.4g} hidden in spans of {config.mean_span:.4g} on average" if config.infill else "",
            f"{config.mask:.4g} masked" if config.mask else "",
        ]
        return clauses(
            "denoising: " + (", ".join(part for part in done if part) or "nothing corrupted") + ", anew each epoch",
            *rows,
            f"the decoder starts from id {self.start}",
            left_out(self.documents, self.least),
        )


def sentence_ends(tokenizer: Tokenizer) -> Array:
    """For each id, whether its text ends a sentence; the last entry stands for ids beyond the vocabulary."""
    table = np.zeros(tokenizer.vocab + 1, dtype=bool)
    for token in range(tokenizer.vocab):
        table[token] = tokenizer.decode([token]).rstrip(" ").endswith(ENDS)
    return table
