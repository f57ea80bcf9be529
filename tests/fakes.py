"""A token store and a tokenizer in memory, for tests that need neither files nor training."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


class FakeStream:
    """Documents given as lists of ids."""

    def __init__(self, documents: Sequence[Sequence[int]]) -> None:
        self.lengths = np.array([len(d) for d in documents], dtype=np.int64)
        self.ends = np.cumsum(self.lengths, dtype=np.int64)
        self.starts = self.ends - self.lengths
        self.tokens = np.array([t for d in documents for t in d], dtype=np.uint16)


class FakeSplit:
    """Streams by name: FakeSplit(text=[[1, 2], [3]])."""

    def __init__(self, **documents: Sequence[Sequence[int]]) -> None:
        self.streams = {name: FakeStream(value) for name, value in documents.items()}


class FakeTokenizer:
    """Ids below 16 are special or sentinels; of the others, even ids spell " w" and odd ids continue a word: "x"."""

    vocab = 200

    def __init__(self, sentinels: int = 8, **special: int) -> None:
        self.special = special
        self.sentinels = list(range(15, 15 - sentinels, -1))

    def encode(self, text: str) -> list[int]:
        return [ord(c) for c in text]

    def decode(self, ids: list[int]) -> str:
        return "".join(chr(i) if i == 97 and n == 0 else (" w", "x")[i % 2] for n, i in enumerate(ids))


def documents(count: int, longest: int, seed: int = 0, shortest: int = 1) -> list[list[int]]:
    """Random documents of ordinary tokens (ids 16 to 199)."""
    rng = np.random.default_rng(seed)
    return [rng.integers(16, 200, size=rng.integers(shortest, longest + 1)).tolist() for _ in range(count)]


def tokens(total: int, base: int = 16) -> list[int]:
    """`total` ordinary tokens in a row, going round the vocabulary."""
    return [base + i % (200 - base) for i in range(total)]
