"""Masked language modelling (Devlin et al. 2018): alone (Liu et al. 2019), or with a question about two sentences.

The masks of a row are drawn anew in every epoch. Without next sentences a row is a full block of the joined text,
[CLS] block [SEP]. With them a row is a pair, [CLS] A [SEP] B [SEP]: a piece of one document is cut in two at a random
token, and in half of the pairs B comes from a random place of another document instead (of the same one, where there is
but one). `targets.nsp` is 0 where B follows A, 1 where it does not. With the order of sentences (Lan et al. 2019) both
parts stay, and in half of the pairs they change places: `targets.sop` is 1 there and else 0.
"""

from __future__ import annotations

from typing import Literal, Self

import numpy as np
from pydantic import model_validator

from xtcli import registry
from xtcli.data.order import Ints
from xtcli.errors import refuse
from xtcli.objectives.base import (
    Documents,
    Objective,
    Packing,
    Sample,
    Split,
    Tokenizer,
    generator,
)
from xtcli.objectives.cuts import Cuts
from xtcli.objectives.joined import Joined, isolate
from xtcli.objectives.masking import Masking
from xtcli.objectives.words import SHARED, clauses, count, left_out, repeated, too_little, too_short, truncated
from xtcli.registry import field, part

SMALLEST = 8
"""Tokens of the smallest context: two markers or three, and text that can be cut in two."""


@part("objective", "mlm")
class MaskedLM(Objective):
    """Masked tokens (`targets.mlm`, (T,)), and whether B follows A (`targets.nsp`, ()) or stands before it (`.sop`)."""

    class Config(registry.Config):
        """Masked language modelling."""

        probability: float = field("share of the tokens that are chosen and supervised", 0.15, gt=0, le=1)
        mask: float = field("share of the chosen tokens that become the mask token", 0.8, ge=0, le=1)
        random: float = field(
            "share of the chosen tokens that become a random token; the rest stay as they are", 0.1, ge=0, le=1
        )
        whole_word: bool = field("hide all tokens of a word together", False)
        ngram: int = field(
            "hide up to this many neighbours together, n of them with a probability that falls as 1 / n", 1, ge=1
        )
        next_sentence: bool = field("rows are pairs A, B, and the model also tells whether B follows A", False)
        sentence_order: bool = field(
            "rows are pairs A, B, and the model also tells whether they have changed places", False
        )
        short: float = field("pairs: share of them that are cut to a random shorter length", 0.1, ge=0, le=1)
        pack: Packing = field(
            "without pairs. stream: documents share blocks and see each other; documents: they share blocks "
            "and do not see each other; none: one document a row, cut at the context",
            "stream",
        )
        multiple: int = field("padded rows: width is the longest of a batch, rounded up to this many", 64, gt=0)
        head: Literal["mlm", "lm"] = field("the head that names the hidden tokens", "mlm")

        @property
        def supervised(self) -> float:
            """Share of the places that have a target."""
            return self.probability

        @model_validator(mode="after")
        def _agree(self) -> Self:
            if self.mask + self.random > 1:
                raise ValueError(f"mask + random is {self.mask + self.random:g}, and shares add up to 1 at most")
            if self.next_sentence and self.sentence_order:
                raise ValueError("next_sentence and sentence_order ask two questions of one pair, set one of them")
            for name in ("next_sentence", "sentence_order"):
                if getattr(self, name) and self.pack != "stream":
                    raise ValueError(f"pack={self.pack} is for {name}=false: pairs of sentences are never packed")
            return self

        @property
        def pairs(self) -> bool:
            """Whether rows are pairs."""
            return self.next_sentence or self.sentence_order

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
        padded = config.pairs or config.pack == "none"
        super().__init__(tokenizer, context=context, seed=seed, multiple=min(config.multiple, context) if padded else 0)
        self.config = config
        self.cls, self.sep, mask = self.need("cls", "sep", "mask", why="masked language modelling")
        self.masking = Masking(
            tokenizer,
            probability=config.probability,
            mask=config.mask,
            random=config.random,
            words=config.whole_word,
            mask_id=mask,
            longest=config.ngram,
        )
        self.masks = "always" if padded else "needed"
        if context < SMALLEST:
            raise refuse(
                f"a context of {context} tokens leaves no room for text", f"set train.context to {SMALLEST} or more"
            )
        self.least = 2 if config.pairs else 1
        self.documents = Documents.of(split.streams["text"], self.least)
        if not len(self.documents):
            raise too_little(f"no document of {count(self.least, 'token')} or more", validation)
        if config.pairs:
            self.cuts = Cuts(self.documents, context - 3)
        elif config.pack != "none":
            self._init_blocks(validation)

    def _init_blocks(self, validation: bool) -> None:
        alone = self.config.pack == "documents"
        self.joined = Joined(self.documents, self.cls if alone else None, self.sep)
        self.block = self.context if alone else self.context - 2
        if self.joined.total < self.block and not validation:
            need = self.joined.total + self.context - self.block
            remedy = f"give more text, or set objective.pack=none or train.context to {need} or less"
            raise too_short(self.joined.total, self.block, remedy)

    def __len__(self) -> int:
        if self.config.pairs:
            return len(self.cuts)
        return len(self.documents) if self.config.pack == "none" else -(-self.joined.total // self.block)

    def sample(self, index: int, epoch: int) -> Sample:
        rng = generator(self.seed, epoch, index)
        tokens, extra = self._row(index, rng)
        inputs, targets = self.masking(tokens, rng)
        return {"input_ids": inputs, f"targets.{self.config.head}": targets, "id": np.array(index)} | extra

    def _row(self, index: int, rng: np.random.Generator) -> tuple[Ints, Sample]:
        """The tokens of a row before any is hidden, and what else is known of it."""
        if self.config.pairs:
            return self._pair(index, rng)
        if self.config.pack == "none":
            length = min(int(self.documents.lengths[index]), self.context - 2)
            return self._framed(self.documents.read(index, 0, length)), {}
        return self._block(index)

    def _framed(self, *parts: Ints) -> Ints:
        """[CLS] part [SEP] part [SEP] ..."""
        pieces: list[Ints] = [np.array([self.cls])]
        for one in parts:
            pieces += [one, np.array([self.sep])]
        return np.concatenate(pieces)

    def _block(self, index: int) -> tuple[Ints, Sample]:
        documents, offsets = self.joined.block(index, self.block)
        tokens = self.joined.tokens(documents, offsets)[0]
        if self.config.pack == "stream":
            return self._framed(tokens), {}
        return tokens, {name: array[0] for name, array in isolate(documents, offsets).items()}

    def _pair(self, index: int, rng: np.random.Generator) -> tuple[Ints, Sample]:
        document, start, stop = self.cuts.at(index)
        if rng.random() < self.config.short:
            size = int(rng.integers(2, stop - start + 1))
            start = int(rng.integers(start, stop - size + 1))
            stop = start + size
        cut = int(rng.integers(start + 1, stop))
        follows = rng.random() < 0.5
        places = [(document, start, cut), (document, cut, stop)]
        if not follows and self.config.sentence_order:
            places.reverse()
        elif not follows:
            places[1] = self._elsewhere(document, cut, stop - cut, rng)
        first, second = (self.documents.read(*place) for place in places)
        tokens = self._framed(first, second)
        types = (np.arange(tokens.size) >= first.size + 2).astype(np.int64)
        head = "targets.sop" if self.config.sentence_order else "targets.nsp"
        return tokens, {"token_type_ids": types, head: np.array(0 if follows else 1)}

    def _elsewhere(self, document: int, cut: int, size: int, rng: np.random.Generator) -> tuple[int, int, int]:
        """A run of at most `size` tokens that does not follow token `cut` of a document."""
        if len(self.documents) == 1:
            begin = int(rng.integers(int(self.documents.lengths[0]) - size))
            begin += begin >= cut
            return 0, begin, begin + size
        other = int(rng.integers(len(self.documents) - 1))
        other += other >= document
        size = min(size, int(self.documents.lengths[other]))
        begin = int(rng.integers(int(self.documents.lengths[other]) - size + 1))
        return other, begin, begin + size

    def describe(self) -> str:
        config = self.config
        kept = max(0.0, 1 - config.mask - config.random)
        return clauses(
            f"masked language modelling: {config.probability:.4g} of the tokens of a row"
            f"{self._together()} chosen anew each epoch "
            f"({config.mask:.4g} masked, {config.random:.4g} random, {kept:.4g} kept)",
            *self._rows(),
            left_out(self.documents, self.least),
        )

    def _together(self) -> str:
        """What is hidden together, in words."""
        words = "whole words" if self.config.whole_word else ""
        if self.config.ngram == 1:
            return f", {words}," if words else ""
        return f", up to {self.config.ngram} {words or 'tokens'} together,"

    def _rows(self) -> list[str]:
        documents, pack = count(len(self.documents), "document"), self.config.pack
        if self.config.pairs:
            elsewhere = f"B comes from another {'place' if len(self.documents) == 1 else 'document'}"
            return [
                f"{documents} give {count(len(self), 'pair')} [CLS] A [SEP] B [SEP], padded",
                f"in half of them {'A and B change places' if self.config.sentence_order else elsewhere}",
                f"{self.config.short:.4g} of the pairs are shortened at random",
            ]
        if pack == "none":
            cut = truncated(self.documents.lengths, self.context - 2)
            return [f"{documents}, one a row, [CLS] document [SEP], padded", cut]
        blocks = f"{count(len(self), 'block')} of {self.block:,} tokens"
        if pack == "documents":
            rows = [f"{documents}, each [CLS] document [SEP], end to end in {blocks}", "no document sees another"]
        else:
            rows = [f"{documents} end to end, [SEP] after each, in rows [CLS] block [SEP]: {blocks}", SHARED]
        return [*rows, repeated(len(self), self.block, self.joined.total)]
