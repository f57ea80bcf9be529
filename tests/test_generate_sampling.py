"""Filters against transformers' processors, draws against their distribution, and what fixes a draw."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers.generation import logits_process as reference

from xtcli.errors import UserError
from xtcli.generate.sampling import HEAD, Sampling, draw, penalise, random_numbers, temper

VOCAB = 97


def logits(rows: int = 16, vocab: int = VOCAB, spread: float = 3.0, seed: int = 0) -> Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * spread


def processed(sampling: Sampling, values: Tensor, ids: Tensor) -> Tensor:
    """The same settings through transformers, in the order of its `generate`."""
    steps: list[Any] = []
    if sampling.repetition_penalty != 1:
        steps.append(reference.RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty))
    if sampling.temperature != 1:
        steps.append(reference.TemperatureLogitsWarper(sampling.temperature))
    if sampling.top_k is not None:
        steps.append(reference.TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        steps.append(reference.TopPLogitsWarper(sampling.top_p))
    if sampling.min_p > 0:
        steps.append(reference.MinPLogitsWarper(sampling.min_p))
    for step in steps:
        values = step(ids, values)
    return values.softmax(-1)


SETTINGS = [
    {"temperature": 0.7},
    {"temperature": 1.3},
    {"top_k": 1},
    {"top_k": 13},
    {"top_k": 500},
    {"top_p": 0.3},
    {"top_p": 0.9},
    {"top_p": 0.97},
    {"min_p": 0.02},
    {"min_p": 0.5},
    {"min_p": 1.0},
    {"repetition_penalty": 1.3},
    {"repetition_penalty": 0.8},
    {"temperature": 0.8, "top_k": 20, "top_p": 0.9, "min_p": 0.05, "repetition_penalty": 1.2},
    {"temperature": 1.5, "top_p": 0.8, "min_p": 0.01},
]


@pytest.mark.parametrize("vocab", [VOCAB, 5 * HEAD])
@pytest.mark.parametrize("spread", [0.3, 4.0])
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_distribution_equals_transformers(settings: dict[str, Any], spread: float, vocab: int) -> None:
    sampling = Sampling(**{"temperature": 1.0, "top_p": 1.0} | settings)
    values = logits(8, vocab, spread)
    ids = torch.randint(0, vocab, (8, 12), generator=torch.Generator().manual_seed(1))
    seen = torch.zeros(8, vocab, dtype=torch.bool).scatter_(1, ids, True)
    ours = sampling.probabilities(penalise(values, seen, sampling.repetition_penalty))
    # In double precision: in single, the reference's own running sum errs by more than its rarest tokens.
    wanted = processed(sampling, values.double(), ids).float()
    torch.testing.assert_close(ours, wanted, atol=1e-6, rtol=0)


def test_tiny_temperature_is_greedy() -> None:
    values = logits()
    likeliest = temper(values, 1e-30).softmax(-1)
    assert torch.equal(likeliest.argmax(-1), values.argmax(-1))
    torch.testing.assert_close(likeliest.amax(-1), torch.ones(16))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("top_k", 0),
        ("top_k", -3),
        ("top_p", 0.0),
        ("top_p", 1.01),
        ("top_p", float("nan")),
        ("min_p", -0.1),
        ("min_p", 2.0),
        ("min_p", float("nan")),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", float("inf")),
    ],
)
def test_impossible_value_names_its_option(name: str, value: float) -> None:
    with pytest.raises(UserError) as caught:
        Sampling(**{name: value})  # type: ignore[arg-type]
    assert str(caught.value).startswith("--" + name.replace("_", "-") + ": ")
    assert len(caught.value.problems) == 1


def test_all_impossible_values_at_once() -> None:
    with pytest.raises(UserError) as caught:
        Sampling(temperature=-1, top_k=0, top_p=2, min_p=-1, repetition_penalty=0)
    assert len(caught.value.problems) == 5


def test_draws_follow_the_distribution() -> None:
    """Chi-square of 100,000 draws; 40 degrees of freedom, the bound has p = 1e-4."""
    probabilities = logits(1, 41, 1.0)[0].softmax(-1)
    count = 100_000
    numbers = random_numbers(3, [0], count)[0]
    drawn = draw(probabilities.expand(count, -1), numbers)
    expected = probabilities.double() * count
    statistic = ((torch.bincount(drawn, minlength=41) - expected) ** 2 / expected).sum()
    assert statistic < 83.0


@pytest.mark.parametrize("at", [0, 5, VOCAB - 1])
def test_left_out_tokens_are_never_drawn(at: int) -> None:
    probabilities = torch.zeros(2000, VOCAB)
    probabilities[:, at] = 1.0
    numbers = random_numbers(0, [0], 2000)[0]
    numbers[:2] = torch.tensor([0, 2**31 - 1])
    assert draw(probabilities, numbers).unique().tolist() == [at]


def test_rows_have_their_own_numbers() -> None:
    many = random_numbers(5, list(range(64)), 10)
    for row in (0, 7, 63):
        assert torch.equal(random_numbers(5, [row], 10)[0], many[row])
        assert torch.equal(random_numbers(5, [row], 4)[0], many[row, :4])
    assert many.unique().numel() == many.numel()
    assert not torch.equal(many, random_numbers(6, list(range(64)), 10))
    assert int(many.min()) >= 0 and int(many.max()) < 2**31


def test_numbers_leave_global_state_alone() -> None:
    before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()  # type: ignore[index]
    draw(logits().softmax(-1), random_numbers(1, list(range(16)), 1)[:, 0])
    after = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()  # type: ignore[index]
    assert torch.equal(before[0], after[0]) and before[1:] == after[1:]
