"""The unigram language model of pieces (Kudo 2018, https://arxiv.org/abs/1804.10959), trained by EM.

    p(word) = sum over its segmentations of the product of p(piece)

Candidates are the tokens of a BPE four times as large. Each round re-estimates p by two steps of EM over
the lattices of all words, then drops the quarter of the pieces whose loss would change the likelihood least: expected
count x (log p(piece) - log p of its best spelling by others). Lattices are arrays of edges, worked through
position by position for all words at once; every sum has a fixed order, so the result is the same each time.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

Array = np.ndarray[Any, Any]
Ints = np.ndarray[Any, np.dtype[np.int64]]
Floats = np.ndarray[Any, np.dtype[np.float64]]

CANDIDATES = 4
WORDS, WORDS_PER_PIECE = 60_000, 20
"""Different words that are looked at, the most frequent ones: so many at most, and so many for each piece wanted."""
WORD = 48
"""Characters of the longest word that is looked at."""
PIECE = 16
"""Characters of the longest piece."""
KEPT = 0.75
FLOOR = -1e30


def learn(words: Counter[str], letters: Sequence[str], size: int) -> list[tuple[str, float]]:
    """The `size` best pieces of the words with log p, the likeliest first; every letter is among them.

    Words hold their leading space mark. Fewer pieces come back where the words have no more.
    """
    known = set(letters)
    chosen = [w for w in words if len(w) <= WORD and known.issuperset(w)]
    chosen = sorted(chosen, key=lambda w: (-words[w], w))[: min(WORDS, WORDS_PER_PIECE * size)]
    counts = np.array([words[w] for w in chosen], dtype=np.float64)
    pieces = _candidates(chosen, words, letters, CANDIDATES * size)
    lattice = Lattice(chosen, pieces)
    rough = np.bincount(lattice.piece, weights=counts[lattice.word], minlength=len(pieces))
    score = _log(rough * np.array([len(piece) for piece in pieces]))
    letter = np.array([len(piece) == 1 for piece in pieces])
    while True:
        for _ in range(2):
            expected = lattice.expected(score, counts)
            score = _log(np.maximum(expected, np.where(letter, 0.5, 1e-9)))
        excess = len(pieces) - size
        if excess <= 0:
            break
        drop = min(excess, max(1, int(len(pieces) * (1 - KEPT))))
        spelt = Lattice(pieces, pieces, whole=False).best(score)
        loss = np.where(letter, np.inf, expected * (score - spelt))
        order = np.lexsort((np.arange(len(pieces)), loss))
        keep = np.ones(len(pieces), dtype=bool)
        keep[[at for at in order[:drop] if not letter[at]]] = False
        if keep.all():
            break
        lattice.prune(keep)
        pieces = [piece for piece, kept in zip(pieces, keep, strict=True) if kept]
        score, letter = score[keep], letter[keep]
    ranked = sorted(zip(pieces, score.tolist(), strict=True), key=lambda item: (-round(item[1], 6), item[0]))
    return [(piece, round(value, 6)) for piece, value in ranked]


class Lattice:
    """All pieces in all words: edge e spells word[e][start[e] : end[e]] as piece[e]. `whole` admits whole words."""

    def __init__(self, words: Sequence[str], pieces: Sequence[str], whole: bool = True) -> None:
        ids = {piece: id for id, piece in enumerate(pieces)}
        longest = max(map(len, pieces), default=1)
        edges: list[tuple[int, int, int, int]] = []
        for number, word in enumerate(words):
            size = len(word)
            for start in range(size):
                for end in range(start + 1, min(size, start + longest) + 1):
                    id = ids.get(word[start:end])
                    if id is not None and (whole or size == 1 or end - start < size):
                        edges.append((number, start, end, id))
        table = np.array(edges, dtype=np.int32).reshape(-1, 4)
        self.word, self.start, self.end, self.piece = (np.ascontiguousarray(table[:, column]) for column in range(4))
        self.sizes = np.array([len(word) for word in words], dtype=np.int64)
        self._arrange()

    def prune(self, keep: np.ndarray[Any, np.dtype[np.bool_]]) -> None:
        """Drop the edges of pieces that are not kept, and number the others anew."""
        alive = keep[self.piece]
        number = np.cumsum(keep) - 1
        self.word, self.start, self.end = self.word[alive], self.start[alive], self.end[alive]
        self.piece = number[self.piece[alive]].astype(np.int32)
        self._arrange()

    def expected(self, score: Floats, counts: Floats) -> Floats:
        """How often each piece is used, over all segmentations by their probability."""
        ahead, back = self._sums(score, self._ahead, None), self._sums(score, self._back, self.sizes)
        total = ahead[np.arange(len(self.sizes)), self.sizes]
        inside = ahead[self.word, self.start] + score[self.piece] + back[self.word, self.end] - total[self.word]
        weight = np.exp(np.minimum(inside, 0.0)) * counts[self.word]
        return np.bincount(self.piece, weights=weight, minlength=len(score)).astype(np.float64)

    def best(self, score: Floats) -> Floats:
        """log p of the likeliest segmentation of each word."""
        reach = self._sums(score, self._ahead, None, best=True)
        return reach[np.arange(len(self.sizes)), self.sizes]

    def _arrange(self) -> None:
        """Edges by the position they lead to, then by word, so that a step reads one stretch of them."""
        self._ahead = list(self._steps(self.start, self.end))
        self._back = list(self._steps(self.end, self.start))[::-1]

    def _steps(self, source: Array, target: Array) -> Iterator[tuple[int, Array, Array, Array, Array]]:
        """For each position: its number, and the word, source and piece of each edge; where a new word begins."""
        order = np.lexsort((self.word, target))
        bounds = np.searchsorted(target[order], np.arange(int(self.sizes.max(initial=0)) + 2))
        for position, (low, high) in enumerate(itertools.pairwise(bounds)):
            if low < high:
                chosen = order[low:high]
                word = self.word[chosen]
                heads = np.flatnonzero(np.concatenate(([True], word[1:] != word[:-1])))
                yield position, word, source[chosen], self.piece[chosen], heads

    def _sums(
        self,
        score: Floats,
        steps: Iterable[tuple[int, Array, Array, Array, Array]],
        origin: Ints | None,
        best: bool = False,
    ) -> Floats:
        """log of the sum (or the largest) over all paths from the origin (None: 0) of each word to each position."""
        table = np.full((len(self.sizes), int(self.sizes.max(initial=0)) + 1), FLOOR)
        table[np.arange(len(self.sizes)), 0 if origin is None else origin] = 0.0
        for position, word, source, piece, heads in steps:
            value = table[word, source] + score[piece]
            top = np.maximum.reduceat(value, heads)
            if not best:
                spread = np.repeat(top, np.diff(np.append(heads, len(word))))
                top = top + np.log(np.add.reduceat(np.exp(value - spread), heads))
            table[word[heads], position] = top
        return table


def _candidates(chosen: Sequence[str], words: Counter[str], letters: Sequence[str], size: int) -> list[str]:
    """Letters and the tokens of a BPE of the words, in a fixed order."""
    library = Tokenizer(models.BPE())
    library.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        min_frequency=2,
        initial_alphabet=list(letters),
        limit_alphabet=len(letters),
        max_token_length=PIECE,
        show_progress=False,
    )
    library.train_from_iterator((f"{word} " * min(words[word], 1000) for word in chosen), trainer)
    return [token for token, _ in sorted(library.get_vocab().items(), key=lambda item: item[1])]


def _log(counts: Floats) -> Floats:
    total: Floats = np.log(counts + 1e-12) - np.log(counts.sum() + 1e-12)
    return total
