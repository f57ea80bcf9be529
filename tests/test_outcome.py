"""A step that the host looks at later is the step that it looks at at once, also when it is no number."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from xtcli.bench.stepping import prepare, start
from xtcli.config.preset import load_preset
from xtcli.errors import EXIT_NON_FINITE
from xtcli.train.device import choose
from xtcli.train.loop import Trainer
from xtcli.train.outcome import Outcome

STEPS = 6


def trainer_of(ahead: bool, poison: int | None, *overrides: str) -> tuple[Trainer, Any]:
    """A trainer of a tiny model whose gradients are infinite at step `poison`, and its one batch."""
    resolved = load_preset("gpt2-nano", [*overrides, "train.validate_every=0", "train.save_every=0"], tiny=True)
    place = choose(resolved.preset.train)
    skeleton, plan, batch = prepare(resolved, place, rows=2, length=16, seed=0)
    bench = start("nano", resolved, place, plan, batch, skeleton, 0)
    trainer = bench.trainer
    trainer.config = trainer.config.model_copy(update={"log_every": 100, "sample_every": 0})
    trainer.ahead = ahead
    heard: list[Any] = []
    trainer.run = SimpleNamespace(event=lambda name, **facts: heard.append((name, facts)))  # type: ignore[assignment]
    trainer.view.message = heard.append  # type: ignore[method-assign]
    usual = trainer.backward

    def backward(*given: Any) -> dict[str, Tensor]:
        losses = usual(*given)
        if trainer.progress.step + 1 == poison:
            next(trainer.model.parameters()).grad.fill_(float("inf"))  # type: ignore[union-attr]
        return losses

    trainer.backward = backward  # type: ignore[method-assign]
    return trainer, (bench.batch, heard)


def weights(trainer: Trainer) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in trainer.model.parameters()]


def test_looking_later_changes_nothing() -> None:
    ends = []
    for ahead in (False, True):
        trainer, (batch, _) = trainer_of(ahead, None)
        assert [trainer.step(batch) for _ in range(STEPS)] == [0] * STEPS
        assert trainer.settle() == 0
        ends.append(weights(trainer))
    assert all(torch.equal(one, two) for one, two in zip(*ends, strict=True))


@pytest.mark.parametrize("ahead", [False, True])
def test_stops_with_the_weights_before_the_step(ahead: bool) -> None:
    trainer, (batch, heard) = trainer_of(ahead, 4)
    for _ in range(3):
        assert trainer.step(batch) == 0
    before = weights(trainer)
    codes = [trainer.step(batch)]
    if ahead:
        assert codes == [0]
        codes.append(trainer.step(batch))
    assert codes[-1] == EXIT_NON_FINITE
    assert all(torch.equal(one, two) for one, two in zip(before, weights(trainer), strict=True))
    assert (trainer.progress.step, trainer.progress.cursor) == (3, 3 * trainer.config.batch)
    (name, facts), sentence = heard
    assert (name, facts["step"], facts["module"]) == ("non_finite", 4, None)
    assert facts["gradients"] == [next(name for name, _ in trainer.model.named_parameters())]
    assert sentence.startswith("stopped before step 4: not finite, in the gradient of ")


@pytest.mark.parametrize("ahead", [False, True])
def test_skips_one_step_and_counts_it(ahead: bool) -> None:
    trainer, (batch, heard) = trainer_of(ahead, 4, "train.on_non_finite=skip")
    for step in range(STEPS):
        if step == 3:
            before = weights(trainer)
        assert trainer.step(batch) == 0
        if step == 3:
            assert all(torch.equal(one, two) for one, two in zip(before, weights(trainer), strict=True))
    assert trainer.settle() == 0 and trainer.progress.skipped == 1 and trainer.progress.step == STEPS
    assert [name for name, _ in heard] == ["skipped_step"]
    assert not all(torch.equal(one, two) for one, two in zip(before, weights(trainer), strict=True))


def test_any_loss_or_the_norm_makes_an_outcome_lost() -> None:
    one, bad = torch.tensor(1.0), torch.tensor(float("nan"))
    batch: Any = None
    for losses, norm, finite in (
        ({"lm": one}, one, True),
        ({"lm": one, "nsp": bad}, one, False),
        ({"lm": one}, bad, False),
        ({"lm": one}, None, True),
    ):
        assert Outcome.of(1, batch, losses, norm).finite() is finite
