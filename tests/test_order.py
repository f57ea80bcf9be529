"""The order of samples: a permutation for every count, pure, new each epoch, even, and cut alike for any world."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from xtcli.data.order import Order, permute, share
from xtcli.errors import UserError


@pytest.mark.parametrize("samples", [1, 2, 3, 4, 5, 7, 16, 17, 99, 1000, 4097, 65536])
@pytest.mark.parametrize("epoch", [0, 1, 7])
def test_every_sample_once(samples: int, epoch: int) -> None:
    order = permute(np.arange(samples), samples, seed=3, epoch=epoch)
    assert np.array_equal(np.sort(order), np.arange(samples))


@pytest.mark.parametrize("samples", [5, 1000, 10**6, 10**12])
def test_lookup_needs_no_neighbours(samples: int) -> None:
    places = np.random.default_rng(0).integers(samples, size=50)
    together = permute(places, samples, seed=1, epoch=2)
    alone = [int(permute(places[i : i + 1], samples, seed=1, epoch=2)[0]) for i in range(50)]
    assert together.tolist() == alone
    assert (together >= 0).all()
    assert (together < samples).all()


def test_order_is_the_same_in_every_release() -> None:
    """A run resumed under a later version must go on with the samples that it has not read."""
    assert permute(np.arange(10), 10, seed=0, epoch=0).tolist() == [3, 8, 1, 7, 0, 6, 2, 4, 5, 9]
    assert Order(1000, 42).digest(3)[:16] == "46aa156ff21e77e2"


def test_epochs_and_seeds_differ() -> None:
    digests = {Order(1000, seed).digest(epoch) for seed in range(3) for epoch in range(20)}
    assert len(digests) == 60
    assert Order(1000, 1).digest(4) == Order(1000, 1).digest(4)
    assert Order(1000, 1).digest(4) != Order(1001, 1).digest(4)


@pytest.mark.parametrize(("samples", "orders"), [(3, 6), (4, 24)])
def test_all_orders_are_about_equally_likely(samples: int, orders: int) -> None:
    trials = 200 * orders
    seen = Counter(tuple(permute(np.arange(samples), samples, 0, epoch).tolist()) for epoch in range(trials))
    assert len(seen) == orders
    chi2 = sum((n - 200) ** 2 / 200 for n in seen.values())
    assert chi2 < orders + 6 * (2 * orders) ** 0.5


def test_large_order_is_even() -> None:
    """Where the first tenth of the samples goes does not depend on the epoch's place, and neighbours part."""
    order = permute(np.arange(100_000), 100_000, seed=0, epoch=0)
    tenths = np.bincount(order[:10_000] // 10_000, minlength=10)
    assert (abs(tenths - 1000) < 150).all()
    assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.02


def test_endless_sequence_is_epoch_after_epoch() -> None:
    order = Order(7, seed=5)
    epochs, indices = order.at(np.arange(28))
    assert epochs.tolist() == [0] * 7 + [1] * 7 + [2] * 7 + [3] * 7
    for epoch in range(4):
        assert sorted(indices[epochs == epoch]) == list(range(7))
        assert np.array_equal(indices[epochs == epoch], permute(np.arange(7), 7, 5, epoch))
    assert order.epoch(20) == (2, 6)


@pytest.mark.parametrize("world", [1, 2, 3, 4, 8])
def test_ranks_together_spell_the_batch(world: int) -> None:
    rows = [row for rank in range(world) for row in share(8, rank, world)]
    assert rows == list(range(8))


def test_more_ranks_than_rows_is_refused() -> None:
    with pytest.raises(UserError, match=r"a batch of 2 samples cannot be shared by 4 processes; set train.batch"):
        share(2, 0, 4)
