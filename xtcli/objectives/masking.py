"""BERT's corruption of a row (Devlin et al. 2018): some tokens are hidden, and the model must name them.

Of the tokens that are not special, round(probability * count), at least one, are chosen without repetition. A chosen
token becomes the mask token (80 %), an ordinary token at random (10 %) or stays (10 %); it is supervised in all three
cases. With n-grams (Lan et al. 2019) runs of tokens or words are hidden together, n of them with
probability (1/n) / (1 + 1/2 + ... + 1/longest); a run ends early at a special token, at another run, and at the goal.
"""

from __future__ import annotations

import numpy as np

from xtcli.data.batch import IGNORE
from xtcli.data.order import Ints
from xtcli.errors import refuse
from xtcli.objectives.base import Array, Tokenizer


class Masking:
    """Chooses and replaces tokens; `words` = True hides all tokens of a word together, `longest` runs of so many."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        probability: float,
        mask: float,
        random: float,
        words: bool,
        mask_id: int,
        longest: int = 1,
    ) -> None:
        self.probability, self.mask, self.random = probability, mask, random
        self.mask_id = mask_id
        sizes = np.arange(1, longest + 1)
        self.sizes, self.chances = sizes, (1 / sizes) / (1 / sizes).sum()
        special = [*tokenizer.special.values(), *tokenizer.sentinels]
        self.special = np.zeros(max(tokenizer.vocab, *special) + 1, dtype=bool)
        self.special[special] = True
        self.ordinary = np.flatnonzero(~self.special[: tokenizer.vocab])
        # An unknown token stands for text: it is neither frame nor padding, and BERT hides it like any other.
        if "unk" in tokenizer.special:
            self.special[tokenizer.special["unk"]] = False
        if not self.ordinary.size:
            raise refuse("every token of the tokenizer is special", "raise tokenizer.vocab")
        self.continues = continuations(tokenizer) if words else None

    def __call__(self, tokens: Ints, rng: np.random.Generator) -> tuple[Ints, Ints]:
        """(input_ids, targets), each (T,), of a row of tokens."""
        places = np.flatnonzero(~self.special[tokens])
        inputs, targets = tokens.copy(), np.full_like(tokens, IGNORE)
        if not places.size:
            return inputs, targets
        goal = max(1, int(places.size * self.probability + 0.5))
        if self.sizes.size > 1:
            chosen = self._runs(tokens, places, goal, rng)
        elif self.continues is not None:
            chosen = self._words(tokens, places, goal, rng)
        else:
            chosen = rng.permutation(places)[:goal]
        targets[chosen] = tokens[chosen]
        roll = rng.random(chosen.size)
        inputs[chosen[roll < self.mask]] = self.mask_id
        swapped = chosen[(roll >= self.mask) & (roll < self.mask + self.random)]
        inputs[swapped] = self.ordinary[rng.integers(self.ordinary.size, size=swapped.size)]
        return inputs, targets

    def _words(self, tokens: Ints, places: Ints, goal: int, rng: np.random.Generator) -> Ints:
        """Places of whole words, drawn in random order while they fit the goal; the first drawn always counts."""
        word = self._units(tokens, places)
        sizes = np.bincount(word)
        order = rng.permutation(sizes.size)
        hidden = np.zeros(sizes.size, dtype=bool)
        room = goal
        for number in order:
            if sizes[number] <= room or room == goal:
                hidden[number] = True
                room -= int(sizes[number])
            if room <= 0:
                break
        chosen: Ints = places[hidden[word]]
        return chosen

    def _runs(self, tokens: Ints, places: Ints, goal: int, rng: np.random.Generator) -> Ints:
        """Places of runs, drawn in random order until the goal is met; the first drawn always counts."""
        unit = self._units(tokens, places)
        sizes = np.bincount(unit)
        # Whether a unit stands right behind the one before it, with no special token between.
        follows = np.diff(places, prepend=-2)[np.flatnonzero(np.diff(unit, prepend=-1))] == 1
        hidden = np.zeros(sizes.size, dtype=bool)
        lengths = rng.choice(self.sizes, size=sizes.size, p=self.chances)
        room = goal
        for first, length in zip(rng.permutation(sizes.size), lengths, strict=True):
            for number in range(first, min(first + length, sizes.size)):
                fits = sizes[number] <= room or room == goal
                if hidden[number] or not fits or (number > first and not follows[number]):
                    break
                hidden[number] = True
                room -= int(sizes[number])
            if room <= 0:
                break
        chosen: Ints = places[hidden[unit]]
        return chosen

    def _units(self, tokens: Ints, places: Ints) -> Ints:
        """The number of the word that each place belongs to; without whole words each place is one of its own."""
        if self.continues is None:
            return np.arange(places.size)
        begins = ~self.continues[tokens[places]]
        begins[0] = True
        begins[1:] |= np.diff(places) > 1
        return np.cumsum(begins) - 1


def continuations(tokenizer: Tokenizer, also: str = "") -> Array:
    """For each id, whether it continues the word before it: behind "a" it adds a letter, a digit or a part of one, or
    one of the characters `also`.

    Asking the decoder keeps this true of every kind of tokenizer. Raises UserError for one that cannot spell "a".
    """
    anchor = tokenizer.encode("a")
    base = tokenizer.decode(anchor)
    if base.strip() != "a":
        raise refuse("whole-word masks need a tokenizer that can spell 'a'", "set objective.whole_word=false")
    table = np.zeros(tokenizer.vocab, dtype=bool)
    for token in range(tokenizer.vocab):
        added = tokenizer.decode([*anchor, token])[len(base) :]
        table[token] = bool(added) and (added[0].isalnum() or added[0] in also + "\ufffd")
    return table
