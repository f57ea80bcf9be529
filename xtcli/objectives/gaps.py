"""Gap sentences (Zhang et al. 2019, PEGASUS, arXiv:1912.08777): important sentences are hidden and written.

    text     It is late. The cat sleeps. The dog barks at the cat.
    input    It is late. <mask> The dog barks at the cat. eos
    target   The cat sleeps. eos

A row is a document, or one of the equal pieces of a longer one. A sentence's importance is how much of it the rest
says too: o = sum over tokens of min(times in it, times elsewhere); ROUGE-1 F1 is 2 o / (tokens of the row). Each score
is multiplied by a number of [1 - noise, 1 + noise], and the share of the sentences that are hidden is drawn as well, so
that every epoch hides others. The best are taken while the target has room for them, and stand there in the order of
the text.
"""

from __future__ import annotations

from typing import Self

import numpy as np
from pydantic import model_validator

from xtcli import registry
from xtcli.data.order import Ints
from xtcli.errors import refuse
from xtcli.objectives.base import Array, Documents, Objective, Sample, Split, Tokenizer, generator
from xtcli.objectives.cuts import Cuts
from xtcli.objectives.denoise import sentence_ends
from xtcli.objectives.words import clauses, count, left_out, too_little
from xtcli.registry import field, part

SMALLEST = 8
"""Tokens of the smallest context: two sentences and eos."""


@part("objective", "gap-sentences")
class GapSentences(Objective):
    """Hidden sentences; `targets.lm` is aligned with `decoder_input_ids`, which begin with `start` (pad if None)."""

    class Config(registry.Config):
        """Important sentences are hidden and written."""

        least: float = field("smallest share of the sentences that is hidden; one at least is", 0.15, ge=0, le=1)
        most: float = field("largest share; one sentence at least stays", 0.45, gt=0, le=1)
        noise: float = field("sentences are ranked by score x a number of [1 - noise, 1 + noise]", 0.2, ge=0, lt=1)
        longest: int = field("a sentence of more tokens counts as several", 128, ge=2, tiny=16)
        target: int | None = field("longest target in tokens, eos included; null = the context", None, ge=4, tiny=64)
        multiple: int = field("rows are padded to the longest of a batch, rounded up to this many", 64, gt=0)

        @model_validator(mode="after")
        def _in_order(self) -> Self:
            if self.least > self.most:
                raise ValueError(f"least is {self.least:g} and most is {self.most:g}")
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
        super().__init__(tokenizer, context=context, seed=seed, multiple=min(config.multiple, context))
        self.config = config
        self.eos = self.need("eos", why="hiding sentences")[0]
        self.start = self.need("pad", why="the decoder's first input")[0] if start is None else start
        if "mask" in self.special:
            self.hidden = self.special["mask"]
        elif len(tokenizer.sentinels):
            self.hidden = int(tokenizer.sentinels[0])
        else:
            raise refuse(
                "hiding sentences needs a mask token or a sentinel and the tokenizer has none",
                "set tokenizer.special.mask or tokenizer.sentinels=1",
            )
        if context < SMALLEST:
            raise refuse(
                f"a context of {context} tokens is too short to hide sentences",
                f"set train.context to {SMALLEST} or more",
            )
        self.room = min(config.target or context, context) - 1
        self.width = {"": context, "decoder_": self.room + 1}
        self.ends = sentence_ends(tokenizer)
        self.documents = Documents.of(split.streams["text"], 2)
        if not len(self.documents):
            raise too_little("no document of 2 tokens or more", validation)
        self.cuts = Cuts(self.documents, context - 1)

    def __len__(self) -> int:
        return len(self.cuts)

    def sample(self, index: int, epoch: int) -> Sample:
        inputs, targets = self._hide(self.documents.read(*self.cuts.at(index)), generator(self.seed, epoch, index))
        decoder = np.concatenate([[self.start], targets[:-1]])
        return {"input_ids": inputs, "decoder_input_ids": decoder, "targets.lm": targets, "id": np.array(index)}

    def _hide(self, text: Ints, rng: np.random.Generator) -> tuple[Ints, Ints]:
        """(input_ids, targets), both ended by eos."""
        sentences = self._sentences(text)
        share = rng.uniform(self.config.least, self.config.most)
        wanted = min(max(round(share * len(sentences)), 1), max(len(sentences) - 1, 1))
        scores = importance(text, sentences) * rng.uniform(
            1 - self.config.noise, 1 + self.config.noise, size=len(sentences)
        )
        chosen: list[int] = []
        room = self.room
        for place in np.argsort(-scores, kind="stable"):
            if len(chosen) == wanted:
                break
            if sentences[place].size <= room:
                chosen.append(int(place))
                room -= sentences[place].size
        # Where no sentence fits the target the shortest is written as far as it does.
        hidden = set(chosen or [int(np.argmin([sentence.size for sentence in sentences]))])
        mask, eos = np.array([self.hidden], dtype=np.int64), np.array([self.eos], dtype=np.int64)
        left = [mask if place in hidden else sentence for place, sentence in enumerate(sentences)]
        said = np.concatenate([sentences[place] for place in sorted(hidden)])[: self.room]
        return np.concatenate([*left, eos]), np.concatenate([said, eos])

    def _sentences(self, text: Ints) -> list[Ints]:
        """The text in sentences, two at least, none longer than `longest`."""
        ends = self.ends[np.minimum(text, self.ends.size - 1)]
        # A row of ends, such as empty lines, closes one sentence.
        whole = np.split(text, np.flatnonzero(ends[:-1] & ~ends[1:]) + 1)
        parts = [part for one in whole for part in np.array_split(one, -(-one.size // self.config.longest))]
        return parts if len(parts) > 1 else np.array_split(text, 2)

    def describe(self) -> str:
        config = self.config
        return clauses(
            f"gap sentences: {config.least:.4g} to {config.most:.4g} of the sentences hidden behind id {self.hidden} "
            "each, those that the rest says best, anew each epoch",
            f"{count(len(self.documents), 'document')} in {count(len(self), 'row')}, padded",
            f"targets have at most {count(self.room + 1, 'token')} and end with eos",
            f"the decoder starts from id {self.start}",
            left_out(self.documents, 2),
        )


def importance(text: Ints, sentences: list[Ints]) -> Array:
    """ROUGE-1 F1 of each sentence with the rest of the text."""
    owner = np.repeat(np.arange(len(sentences)), [sentence.size for sentence in sentences])
    _, token = np.unique(text, return_inverse=True)
    kinds = int(token.max()) + 1
    everywhere = np.bincount(token, minlength=kinds)
    pairs, inside = np.unique(owner * kinds + token, return_counts=True)
    both = np.minimum(inside, everywhere[pairs % kinds] - inside)
    found: Array = np.bincount(pairs // kinds, both, minlength=len(sentences))
    return 2 * found / text.size
