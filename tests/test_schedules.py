"""Learning-rate schedules against their closed forms."""

from __future__ import annotations

import math

import pytest

from xtcli.config.train import TrainConfig
from xtcli.train.schedules import describe, schedule


def rates(kind: str, **fields: float) -> list[float]:
    config = TrainConfig.model_validate(
        {"schedule": kind, "lr": 2.0, "steps": 100, "warmup": 9, "min_lr": 0.1} | fields
    )
    rate = schedule(config)
    return [rate(step) for step in range(150)]


@pytest.mark.parametrize("kind", ["cosine", "linear", "wsd", "inverse-sqrt", "constant"])
def test_warm_up_rises_in_a_line_to_the_peak(kind: str) -> None:
    found = rates(kind)
    assert found[:10] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 1.2, 1.4, 1.6, 1.8, 2.0], abs=1e-12)
    assert max(found) == 2.0
    assert rates(kind, warmup=0)[0] == 2.0


@pytest.mark.parametrize(
    ("kind", "step", "expected"),
    [
        ("cosine", 9, 2.0),
        ("cosine", 9 + 91 / 2, 0.1 * 2 + 0.9 * 2 / 2),
        ("cosine", 70, 0.2 + 0.9 * (1 + math.cos(math.pi * 61 / 91))),
        ("cosine", 100, 0.2),
        ("cosine", 149, 0.2),
        ("linear", 9 + 91 / 2, 1.1),
        ("linear", 99, 2.0 - 1.8 * 90 / 91),
        ("linear", 149, 0.2),
        ("wsd", 80, 2.0),
        ("wsd", 81, 2.0 - 1.8 / 20),
        ("wsd", 90, 1.1),
        ("wsd", 99, 2.0 - 1.8 * 19 / 20),
        ("wsd", 149, 0.2),
        ("inverse-sqrt", 39, 1.0),
        ("inverse-sqrt", 89, 2 / 3),
        ("constant", 99, 2.0),
    ],
)
def test_closed_forms(kind: str, step: float, expected: float) -> None:
    config = TrainConfig.model_validate({"schedule": kind, "lr": 2.0, "steps": 100, "warmup": 9, "min_lr": 0.1})
    assert schedule(config)(step) == pytest.approx(expected, abs=1e-12)  # type: ignore[arg-type]


@pytest.mark.parametrize("warmup", [1, 10, 4000])
def test_inverse_sqrt_is_the_transformers_rule(warmup: int) -> None:
    """d^-0.5 min(n^-0.5, n w^-1.5) for n = 1, 2 ..., whose peak is (d w)^-0.5, with w counted as warmup + 1."""
    w, d = warmup + 1, 512
    config = TrainConfig(schedule="inverse-sqrt", lr=(d * w) ** -0.5, warmup=warmup, steps=10 * w, min_lr=0.0)
    rate = schedule(config)
    for n in (1, 2, w - 1, w, w + 1, 3 * w, 10 * w):
        assert rate(n - 1) == pytest.approx(d**-0.5 * min(n**-0.5, n * w**-1.5), rel=1e-12)


@pytest.mark.parametrize("kind", ["cosine", "linear", "wsd", "inverse-sqrt", "constant"])
@pytest.mark.parametrize(("steps", "warmup"), [(1, 0), (1, 1), (2, 5), (3, 2000), (7, 6), (7, 7)])
@pytest.mark.parametrize("decay", [0.01, 1.0])
def test_short_runs_have_positive_rates_up_to_the_peak(kind: str, steps: int, warmup: int, decay: float) -> None:
    found = rates(kind, steps=steps, warmup=warmup, decay=decay)[:steps]
    assert all(0 < rate <= 2.0 for rate in found)
    rising = found[: warmup + 1]
    assert rising == sorted(rising)


def test_never_rises_after_the_warm_up_and_ends_near_the_floor() -> None:
    for kind in ("cosine", "linear", "wsd", "inverse-sqrt"):
        found = rates(kind)[9:]
        assert found == sorted(found, reverse=True)
    assert all(rates(kind, min_lr=0.0)[100] == pytest.approx(0.0, abs=1e-12) for kind in ("cosine", "linear", "wsd"))


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({}, "cosine, peak 3.00e-04 after 100 steps, 3.00e-05 at step 1,000"),
        ({"schedule": "wsd"}, "wsd, peak 3.00e-04 after 100 steps, 3.00e-05 at step 1,000, falling over the last 20%"),
        ({"schedule": "constant", "warmup": 0}, "constant, peak 3.00e-04 after 0 steps"),
        ({"steps": 3, "warmup": 2000}, "warm-up only, to 4.50e-07: the run of 3 steps ends before 2,000"),
    ],
)
def test_in_words(fields: dict[str, object], text: str) -> None:
    assert describe(TrainConfig.model_validate(fields)) == text
