"""Batches in the order of `xtcli.data.order`, made here or by worker processes.

Which batch comes next depends only on (objective, batch, seed, sample number): not on the number of workers, not
on where the run was cut. The cursor of a run is the number of its first unread sample; batch s of a
run that started at 0 covers samples [s * batch, (s + 1) * batch) of the endless sequence.

Nothing here draws from torch's global random state, which belongs to the model.
"""

from __future__ import annotations

import itertools
import signal
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from xtcli.data.batch import Batch
from xtcli.data.order import Ints, Lanes, Order, share
from xtcli.errors import refuse

GRACE_SECONDS = 30
"""How long a worker goes on after SIGTERM, so that the process that trains can end its step and save."""


class Samples(Protocol):
    """What the loader needs of an objective."""

    def __len__(self) -> int: ...

    @property
    def carry(self) -> bool:
        """Whether a sample goes on where the one before it ended, and a model is to remember that."""
        ...

    def batch(self, indices: Ints, epochs: Ints) -> Batch:
        """The samples `indices`, each as it is in its epoch."""
        ...


def order_of(objective: Samples, batch: int, seed: int) -> Order | Lanes:
    """The order in which batches of `batch` samples are read; raises UserError where they do not fill one lane each."""
    samples = len(objective)
    if not objective.carry:
        return Order(samples, seed)
    if samples < batch:
        raise refuse(
            f"the text gives {samples:,} samples, and each of the {batch:,} rows of a batch reads a text of its own",
            f"set train.batch to {samples} or less, or objective.carry=false",
        )
    return Lanes(samples, batch, seed)


class _Batches(Dataset[Batch]):
    """Item k: this rank's share of the global batch that starts at sample number k."""

    def __init__(self, objective: Samples, order: Order | Lanes, rows: range) -> None:
        self.objective = objective
        self.order = order
        self.rows = np.asarray(rows, dtype=np.int64)

    def __getitem__(self, number: int) -> Batch:
        epochs, indices = self.order.at(number + self.rows)
        return self.objective.batch(indices, epochs)


def batches(
    objective: Samples,
    *,
    batch: int,
    start: int = 0,
    workers: int = 0,
    seed: int,
    rank: int = 0,
    world: int = 1,
    pin: bool | None = None,
) -> Generator[Batch, None, None]:
    """This rank's rows of every global batch from sample number `start` on, without end.

    batch: samples of a global batch, over all ranks. workers: processes that make batches ahead (0: none).
    pin: page-locked memory, by default where CUDA is. Closing the iterator ends the workers.
    """
    dataset = _Batches(objective, order_of(objective, batch, seed), share(batch, rank, world))
    numbers = itertools.count(start, batch)
    pin = torch.cuda.is_available() if pin is None else pin
    return _in_workers(dataset, numbers, workers, pin) if workers else _in_process(dataset, numbers, pin)


def _in_process(dataset: _Batches, numbers: Iterator[int], pin: bool) -> Generator[Batch, None, None]:
    for number in numbers:
        made = dataset[number]
        yield made.pin_memory() if pin else made


def _in_workers(dataset: _Batches, numbers: Iterator[int], workers: int, pin: bool) -> Generator[Batch, None, None]:
    loader: DataLoader[Batch] = DataLoader(
        dataset,
        batch_size=None,
        sampler=numbers,  # an endless iterable serves: the loader only iterates it
        num_workers=workers,
        pin_memory=pin,
        prefetch_factor=4,
        worker_init_fn=_settle,
        generator=torch.Generator(),  # the loader draws a seed from it; without one, from the global state
    )
    with _signals_wait():
        iterator: Any = iter(loader)
    try:
        yield from iterator
    finally:
        # Only the iterator holds the workers; dropping it joins them now.
        del iterator


POSIX = hasattr(signal, "pthread_sigmask")
ENDING = {signal.SIGINT, signal.SIGTERM}


@contextmanager
def _signals_wait() -> Iterator[None]:
    """Workers are born with the ending signals held back, so that none arrives before `_settle`."""
    if not POSIX:
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _settle(worker: int) -> None:
    """In a worker: the trainer, not the terminal or the scheduler, decides when it ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if POSIX:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.signal(signal.SIGTERM, lambda number, frame: signal.alarm(GRACE_SECONDS) and None)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, ENDING)


def validation_batches(
    objective: Samples, *, batch: int, limit: int | None = None, rank: int = 0, world: int = 1
) -> Generator[Batch, None, None]:
    """A fixed, finite series of batches: epoch 0, in the order of the text, the last one short if it must be.

    limit: batches at most; then the samples are spread evenly over the text. With several ranks each gets its
    rows of every batch; a short last batch may leave a rank without rows, which then gets none for it. Samples that
    are carried on are read in lanes, one a row, and a limit ends all of them early.
    """
    total = len(objective)
    if objective.carry:
        yield from _lanes(objective, min(batch, total), limit, rank, world)
        return
    count = total if limit is None else min(total, limit * batch)
    indices = np.arange(count, dtype=np.int64) * total // max(count, 1)
    for at in range(0, count, batch):
        rows = indices[at : at + batch]
        mine = rows[len(rows) * rank // world : len(rows) * (rank + 1) // world]
        if mine.size:
            yield objective.batch(mine, np.zeros_like(mine))


def _lanes(objective: Samples, batch: int, limit: int | None, rank: int, world: int) -> Generator[Batch, None, None]:
    """The first epoch of as many lanes as a batch has rows, from the beginning of the text."""
    steps = len(objective) // batch
    rows = np.arange(batch * rank // world, batch * (rank + 1) // world, dtype=np.int64)
    for step in range(steps if limit is None else min(steps, limit)):
        if rows.size:
            yield objective.batch(rows * steps + step, np.zeros_like(rows))
