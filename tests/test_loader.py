"""The loader: the same batches whoever makes them and wherever the run was cut; batches that split without loss."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import pickle
import signal
import time
from collections.abc import Iterator
from itertools import islice

import numpy as np
import pytest
import torch
from fakes import FakeSplit, FakeTokenizer, documents

from xtcli.data import loader
from xtcli.data.batch import IGNORE, Batch, slots
from xtcli.data.loader import batches, validation_batches
from xtcli.objectives import CausalLM, MaskedLM, Objective, Pairs, SpanCorruption

ALL = FakeTokenizer(pad=0, unk=1, bos=2, eos=3, cls=4, sep=5, mask=6)
TEXT = FakeSplit(text=documents(40, 30))
SIDES = FakeSplit(source=documents(23, 20, seed=1), target=documents(23, 12, seed=2))


def objective(kind: str) -> Objective:
    if kind == "clm":
        return CausalLM(CausalLM.Config(), TEXT, ALL, context=16, seed=1)
    if kind == "mlm":
        return MaskedLM(MaskedLM.Config(next_sentence=True, multiple=4), TEXT, ALL, context=16, seed=1)
    if kind == "span-corruption":
        return SpanCorruption(SpanCorruption.Config(pack="none", multiple=4), TEXT, ALL, context=16, seed=1)
    return Pairs(Pairs.Config(multiple=4), SIDES, ALL, context=24, seed=1)


KINDS = ("clm", "mlm", "span-corruption", "seq2seq")


def digest(batch: Batch) -> str:
    parts = [repr((batch.ids, batch.tokens, batch.padded, batch.lengths))]
    for name, tensor in sorted((batch.inputs | batch.targets).items()):
        assert tensor.dtype == torch.int64
        parts.append(f"{name}{tuple(tensor.shape)}{tensor.numpy().tobytes().hex()}")
    return hashlib.sha256("".join(parts).encode()).hexdigest()


def digests(made: Iterator[Batch], count: int) -> list[str]:
    return [digest(batch) for batch in islice(made, count)]


@pytest.mark.parametrize("kind", KINDS)
def test_any_number_of_workers_makes_the_same_batches(kind: str) -> None:
    alone = digests(batches(objective(kind), batch=5, seed=7), 12)
    assert len(set(alone)) == 12
    for workers in (1, 2):
        assert digests(batches(objective(kind), batch=5, seed=7, workers=workers), 12) == alone


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_goes_on_from_any_cursor(kind: str) -> None:
    whole = digests(batches(objective(kind), batch=5, seed=7), 12)
    for step in range(12):
        assert digests(batches(objective(kind), batch=5, start=5 * step, seed=7), 12 - step) == whole[step:]
    assert digests(batches(objective(kind), batch=5, start=35, seed=7, workers=2), 5) == whole[7:]


@pytest.mark.parametrize("world", [2, 3, 4])
def test_ranks_together_read_the_global_batch(world: int) -> None:
    whole = islice(batches(objective("clm"), batch=12, seed=7), 5)
    ranks = [batches(objective("clm"), batch=12, seed=7, rank=rank, world=world) for rank in range(world)]
    for batch, *shares in zip(whole, *ranks, strict=False):
        assert torch.equal(batch.inputs["input_ids"], torch.cat([s.inputs["input_ids"] for s in shares]))
        assert batch.ids == [i for s in shares for i in s.ids]
        assert batch.supervised()["lm"] == sum(s.supervised()["lm"] for s in shares)


def test_every_sample_once_an_epoch_with_a_batch_that_does_not_divide_it() -> None:
    made = objective("seq2seq")
    samples = len(made)
    ids = [i for batch in islice(batches(made, batch=7, seed=0), samples) for i in sorted(batch.ids)]
    assert len(ids) == 7 * samples
    counts = np.bincount(ids, minlength=samples)
    assert (counts == 7).all()


def test_a_batch_larger_than_the_data_goes_round() -> None:
    made = objective("clm")
    batch = next(iter(batches(made, batch=len(made) + 1, seed=0)))
    assert len(batch) == len(made) + 1
    assert set(batch.ids) == set(range(len(made)))


@pytest.mark.parametrize("workers", [0, 2])
def test_the_global_random_state_is_left_alone(workers: int) -> None:
    state = torch.get_rng_state()
    before = np.random.get_state()[1].tolist()  # type: ignore[index]
    list(islice(batches(objective("mlm"), batch=4, seed=0, workers=workers), 3))
    assert torch.equal(torch.get_rng_state(), state)
    assert np.random.get_state()[1].tolist() == before  # type: ignore[index]


def test_closing_ends_the_workers_and_a_signal_does_not() -> None:
    """A scheduler that signals every process must leave the trainer time to save."""
    reference = digests(batches(objective("clm"), batch=4, seed=0), 40)
    made = batches(objective("clm"), batch=4, seed=0, workers=2)
    first = digest(next(made))
    workers = multiprocessing.active_children()
    assert len(workers) == 2
    for worker in workers:
        assert worker.pid is not None
        os.kill(worker.pid, signal.SIGTERM)
        os.kill(worker.pid, signal.SIGINT)
    assert [first, *digests(made, 39)] == reference
    made.close()
    assert multiprocessing.active_children() == []


@pytest.mark.skipif(not hasattr(signal, "alarm"), reason="no alarm signal on this system")
def test_a_worker_that_was_told_to_end_does_so_after_its_grace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader, "GRACE_SECONDS", 1)
    context = multiprocessing.get_context("fork")
    ready = context.Event()

    def work() -> None:
        loader._settle(0)
        ready.set()
        # By pieces: a signal that comes right before a sleep begins is handled after it.
        for _ in range(200):
            time.sleep(0.1)

    worker = context.Process(target=work, daemon=True)
    worker.start()
    assert ready.wait(10)
    assert worker.pid is not None
    os.kill(worker.pid, signal.SIGINT)
    os.kill(worker.pid, signal.SIGTERM)
    worker.join(0.3)
    assert worker.is_alive()
    worker.join(10)
    assert worker.exitcode == -signal.SIGALRM


@pytest.mark.parametrize("kind", KINDS)
def test_an_objective_travels_to_a_spawned_worker(kind: str) -> None:
    made = objective(kind)
    copy = pickle.loads(pickle.dumps(made))
    assert digests(batches(made, batch=3, seed=0), 4) == digests(batches(copy, batch=3, seed=0), 4)


@pytest.mark.parametrize("kind", KINDS)
def test_validation_reads_every_sample_once_in_a_fixed_order(kind: str) -> None:
    made = objective(kind)
    first, again = (list(validation_batches(made, batch=6)) for _ in range(2))
    assert [digest(b) for b in first] == [digest(b) for b in again]
    assert sorted(i for b in first for i in b.ids) == list(range(len(made)))
    assert [len(b) for b in first[:-1]] == [6] * (len(first) - 1)
    assert len(first[-1]) == len(made) - 6 * (len(first) - 1)


def test_limited_validation_is_spread_over_the_text() -> None:
    made = objective("clm")
    ids = [i for b in validation_batches(made, batch=2, limit=3) for i in b.ids]
    assert ids == [len(made) * i // 6 for i in range(6)]
    assert len(list(validation_batches(made, batch=2, limit=10**6))) == -(-len(made) // 2)


def test_validation_shared_by_ranks_reads_every_sample_once() -> None:
    made = objective("clm")
    ids = [i for rank in range(3) for b in validation_batches(made, batch=4, rank=rank, world=3) for i in b.ids]
    assert sorted(ids) == list(range(len(made)))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("micro", [1, 2, 3, 5, 8, 9])
def test_micro_batches_lose_nothing(kind: str, micro: int) -> None:
    """The counts by which a step's loss is divided are the same however the rows are cut (TR-1)."""
    batch = next(iter(batches(objective(kind), batch=8, seed=3)))
    parts = batch.split(micro)
    assert [i for p in parts for i in p.ids] == batch.ids
    assert sum(p.tokens for p in parts) == batch.tokens
    assert sum(p.padded for p in parts) <= batch.padded
    for head, count in batch.supervised().items():
        assert sum(p.supervised()[head] for p in parts) == count
    for name, tensor in (batch.inputs | batch.targets).items():
        pieces = [(p.inputs | p.targets)[name] for p in parts]
        at = 0
        for piece in pieces:
            rows = tensor[at : at + len(piece)]
            if piece.ndim == 2:
                cut = rows[:, piece.shape[1] :]
                behind = IGNORE if name in batch.targets else 0
                assert (cut == behind).all()
                rows = rows[:, : piece.shape[1]]
            assert torch.equal(rows, piece)
            at += len(piece)


def test_tokens_and_padding_add_up() -> None:
    for kind in KINDS:
        for batch in islice(batches(objective(kind), batch=6, seed=3), 6):
            places = sum(batch.inputs[n].numel() for n in ("input_ids", "decoder_input_ids") if n in batch.inputs)
            masks = [m for n, m in batch.inputs.items() if n.endswith("attention_mask")]
            assert batch.tokens + batch.padded == places
            if masks:
                assert batch.tokens == sum(int(mask.sum()) for mask in masks)


@pytest.mark.parametrize("kind", KINDS)
def test_slots_hold_all_targets_and_seldom_change(kind: str) -> None:
    batch = next(batches(objective(kind), batch=5, seed=7))
    moved = batch.to("cpu")
    assert moved.counts == batch.supervised() == moved.supervised()
    for head, count in batch.supervised().items():
        assert count <= batch.slots[head] <= min(batch.targets[head].numel(), count + count // 8 + 1)


def test_numbers_of_slots() -> None:
    assert [slots(n, 10**6) for n in (0, 1, 15, 16, 17, 31, 2457)] == [0, 1, 15, 16, 18, 32, 2560]
    assert slots(2457, 2500) == 2500
    assert len({slots(n, 10**6) for n in range(2048, 4097)}) == 9
