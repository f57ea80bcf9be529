"""The order of samples, as arithmetic.

A run reads one endless sequence: epoch 0 in its order, then epoch 1 in its own, and so on. Sample number k of
that sequence is a pure function of (seed, k), so the whole position of a run is one integer, and any
worker or rank can compute any part of it without asking the others.

The permutation of an epoch is a generalised Feistel network (Black and Rogaway, "Ciphers with arbitrary finite
domains", 2002): a number below a * b is a pair (left, right); each round adds a keyed hash of one half to
the other half, modulo its size. Numbers that land at or above the count go through again, which keeps the map a
permutation of the count. It needs no memory, whatever the count.

Where a model carries memories from batch to batch, samples are not permuted: `Lanes` reads them in rows that go on.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from xtcli.errors import refuse

Ints = np.ndarray[Any, np.dtype[np.int64]]

ROUNDS = 8
DIGEST_SAMPLES = 1 << 20


@lru_cache(maxsize=64)
def _keys(seed: int, epoch: int) -> tuple[np.uint64, ...]:
    words = np.random.SeedSequence(entropy=(seed, epoch, 0x0D3)).generate_state(ROUNDS, np.uint64)
    return tuple(words)


def _mix(x: np.ndarray[Any, np.dtype[np.uint64]], key: np.uint64) -> np.ndarray[Any, np.dtype[np.uint64]]:
    """A 64-bit hash (the finaliser of splitmix64) of `x` under `key`."""
    x = x + key
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def permute(places: Ints, samples: int, seed: int, epoch: int) -> Ints:
    """The samples that stand at `places` (each in 0..samples-1) of an epoch's order."""
    side = math.isqrt(max(samples - 1, 0)) + 1
    a, b = np.uint64(side), np.uint64(-(-samples // side))
    keys = _keys(seed, epoch)
    out = np.array(places, dtype=np.uint64)
    todo = np.arange(out.size)
    while todo.size:
        left, right = out[todo] % a, out[todo] // a
        for number, key in enumerate(keys):
            if number % 2:
                right = (right + _mix(left, key) % b) % b
            else:
                left = (left + _mix(right, key) % a) % a
        out[todo] = left + right * a
        todo = todo[out[todo] >= np.uint64(samples)]
    return out.astype(np.int64)


@dataclass(frozen=True)
class Order:
    """The endless order of `samples` samples under `seed` (0 or more)."""

    samples: int
    seed: int

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise ValueError("an order needs at least one sample")

    def at(self, numbers: Ints) -> tuple[Ints, Ints]:
        """The epoch and the sample index of each number of the endless sequence."""
        epochs, places = np.divmod(numbers, self.samples)
        indices = np.empty_like(places)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            indices[here] = permute(places[here], self.samples, self.seed, int(epoch))
        return epochs, indices

    def epoch(self, number: int) -> tuple[int, int]:
        """The epoch in which sample number `number` falls, and its place in it."""
        return divmod(number, self.samples)

    def digest(self, epoch: int) -> str:
        """SHA-256 over the number of samples and the order of an epoch (its first 1,048,576 samples)."""
        places = np.arange(min(self.samples, DIGEST_SAMPLES), dtype=np.int64)
        order = permute(places, self.samples, self.seed, epoch)
        return hashlib.sha256(f"{self.samples}:".encode() + order.astype("<i8").tobytes()).hexdigest()


@dataclass(frozen=True)
class Lanes:
    """The endless order in which row b of a batch goes on where row b of the batch before ended.

    An epoch cuts the samples, which follow one another, into `batch` lanes of equal length and reads one sample of
    each at every step. The samples that fill no step are left out at either end, in another split every epoch.
    """

    samples: int
    batch: int
    seed: int

    def __post_init__(self) -> None:
        if self.samples < self.batch or self.batch < 1:
            raise ValueError("lanes need a sample each")

    @property
    def steps(self) -> int:
        """Batches of an epoch."""
        return self.samples // self.batch

    def at(self, numbers: Ints) -> tuple[Ints, Ints]:
        """The epoch and the sample index of each number of the endless sequence."""
        batches, rows = np.divmod(numbers, self.batch)
        epochs, steps = np.divmod(batches, self.steps)
        return epochs, rows * self.steps + steps + self._first(epochs)

    def begins(self, number: int) -> bool:
        """Whether the batch of sample number `number` begins an epoch, behind which nothing is remembered."""
        return number // self.batch % self.steps == 0

    def _first(self, epochs: Ints) -> Ints:
        """The first sample of each epoch's first lane."""
        room = self.samples - self.steps * self.batch + 1
        firsts = [
            int(_mix(np.array([epoch], np.uint64), _keys(self.seed, 0)[0])[0] % np.uint64(room)) for epoch in epochs
        ]
        return np.array(firsts, dtype=np.int64)


def share(batch: int, rank: int, world: int) -> range:
    """The rows of a global batch that belong to a rank: one contiguous run, so that ranks in order spell the batch."""
    if not 0 <= rank < world:
        raise ValueError(f"rank {rank} is not one of {world}")
    if world > batch:
        raise refuse(
            f"a batch of {batch} samples cannot be shared by {world} processes", f"set train.batch to {world} or more"
        )
    return range(batch * rank // world, batch * (rank + 1) // world)
