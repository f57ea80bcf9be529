"""Masked spans (Song et al. 2019, MASS, arXiv:1905.02450; Qi et al. 2020, arXiv:2001.04063): the encoder reads a text
of which runs are hidden, and the decoder says them.

    text     the cat sat on the mat and went to sleep again
    input    the cat <mask> <mask> dog mat and went to sleep again eos
    target   sat on the eos

A row is cut into pieces of `every` tokens, the last one shorter. In each piece round(density * tokens) tokens in a row
are hidden, wherever they fit; every place is equally likely. A hidden token becomes the mask token (80 %), an ordinary
token at random (10 %) or stays (10 %), so that the input is as long as the text. The target is what was hidden, in the
order of the text. How many tokens ahead the decoder predicts at each place is the model's affair.
"""

from __future__ import annotations

from typing import Self

import numpy as np
from pydantic import model_validator

from xtcli.data.order import Ints
from xtcli.errors import refuse
from xtcli.objectives.base import Sample, Split, Tokenizer, generator
from xtcli.objectives.rewritten import Rewritten
from xtcli.objectives.words import clauses, count, left_out
from xtcli.registry import field, part

SMALLEST = 8
"""Tokens of the smallest context: a run, text on both sides, and the end."""


@part("objective", "masked-spans")
class MaskedSpans(Rewritten):
    """Hidden runs; `targets.lm` is aligned with `decoder_input_ids`, which begin with `start` (pad if None)."""

    class Config(Rewritten.Config):
        """Runs of the text are hidden and said."""

        density: float = field("share of the tokens that is hidden", 0.15, gt=0, lt=1)
        every: int = field("tokens of the text that have one hidden run", 64, ge=2)
        mask: float = field("share of the hidden tokens that become the mask token", 0.8, ge=0, le=1)
        random: float = field("share of the hidden tokens that become ordinary tokens at random", 0.1, ge=0, le=1)

        @model_validator(mode="after")
        def _shares(self) -> Self:
            if self.mask + self.random > 1:
                raise ValueError(f"mask + random is {self.mask + self.random:g}, more than all hidden tokens")
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
        multiple = min(config.multiple, context) if config.pack == "none" else 0
        super().__init__(tokenizer, context=context, seed=seed, multiple=multiple)
        self.config = config
        self.masks = "needed"
        self.refuse_short(SMALLEST, "hide a part of it")
        self.hidden = self.need("mask", why="hiding spans")[0] if config.mask else -1
        self.end = self.last()
        self.start = self.first(start)
        special = [*self.special.values(), *tokenizer.sentinels]
        self.ordinary = np.setdiff1d(np.arange(tokenizer.vocab), special)
        if not self.ordinary.size:
            raise refuse("every token of the tokenizer is special", "raise tokenizer.vocab")
        self.width = {"": context, "decoder_": int(self._lengths(context - 1).sum()) + 1}
        self.lay(split, context - 1, validation, lambda total: total + 1)

    def sample(self, index: int, epoch: int) -> Sample:
        inputs, targets = self._hide(self.text(index), generator(self.seed, epoch, index))
        decoder = np.concatenate([[self.start], targets[:-1]])
        return {"input_ids": inputs, "decoder_input_ids": decoder, "targets.lm": targets, "id": np.array(index)}

    def _pieces(self, size: int) -> Ints:
        """Lengths of the pieces of a text."""
        begins = np.arange(0, size, self.config.every)
        return np.diff(begins, append=size)

    def _lengths(self, size: int) -> Ints:
        """Hidden tokens of each piece; a text has one at least."""
        lengths: Ints = np.round(self._pieces(size) * self.config.density).astype(np.int64)
        lengths[0] = max(lengths[0], 1)
        return lengths

    def _hide(self, text: Ints, rng: np.random.Generator) -> tuple[Ints, Ints]:
        """(input_ids, targets), both ended by the end token."""
        pieces, lengths = self._pieces(text.size), self._lengths(text.size)
        begins = np.cumsum(pieces) - pieces + rng.integers(pieces - lengths + 1)
        chosen = np.concatenate([np.arange(b, b + n) for b, n in zip(begins, lengths, strict=True)])
        inputs = text.copy()
        roll = rng.random(chosen.size)
        mask, random = self.config.mask, self.config.random
        inputs[chosen[roll < mask]] = self.hidden
        swapped = chosen[(roll >= mask) & (roll < mask + random)]
        inputs[swapped] = self.ordinary[rng.integers(self.ordinary.size, size=swapped.size)]
        return np.append(inputs, self.end), np.append(text[chosen], self.end)

    def describe(self) -> str:
        config = self.config
        return clauses(
            f"masked spans: {config.density:.4g} of every {count(config.every, 'token')} hidden in one run, "
            f"{config.mask:.4g} of them masked and {config.random:.4g} swapped, drawn anew each epoch",
            *self.told(),
            f"targets have at most {count(self.width['decoder_'], 'token')} and end with id {self.end}",
            f"the decoder starts from id {self.start}",
            left_out(self.documents, self.least),
        )
