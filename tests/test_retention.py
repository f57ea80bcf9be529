"""Retention: whatever happened before, the newest whole checkpoint is never deleted."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small import small

from xtcli.runs.folder import Damaged
from xtcli.runs.retention import prune, to_delete


@pytest.mark.parametrize(
    ("steps", "keep", "best", "pinned", "damaged", "deleted"),
    [
        ([], 1, None, [], [], []),
        ([10], 1, None, [], [], []),
        ([10, 20], 1, None, [], [], [10]),
        ([100, 20, 9], 2, None, [], [], [9]),
        ([10, 20, 30], 1, 10, [], [], [20]),
        ([10, 20, 30], 1, None, [20], [], [10]),
        ([10, 20, 30], 1, None, [], [30], [10]),
        ([10, 20, 30], 2, None, [], [20], []),
        ([10, 20, 30, 40], 2, None, [], [20], [10, 20]),
        ([10, 20], 1, None, [], [10, 20], []),
        ([10, 20, 30], 5, None, [], [], []),
    ],
)
def test_the_rule(
    steps: list[int], keep: int, best: int | None, pinned: list[int], damaged: list[int], deleted: list[int]
) -> None:
    assert to_delete(steps, keep, best, pinned, set(steps) - set(damaged)) == deleted


EVENTS = ("save", "save and crash before pruning", "damage", "pin", "best", "resume")


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 4), st.lists(st.tuples(st.sampled_from(EVENTS), st.integers(0, 10**6)), max_size=40))
def test_the_newest_whole_checkpoint_survives_any_history(keep: int, events: list[tuple[str, int]]) -> None:
    live_through(keep, events)


def test_and_ten_thousand_histories_at_random() -> None:
    dice = random.Random(0)
    for _ in range(10_000):
        length = dice.randrange(20)
        live_through(1 + dice.randrange(4), [(dice.choice(EVENTS), dice.randrange(1000)) for _ in range(length)])


def live_through(keep: int, events: list[tuple[str, int]]) -> None:
    """Play a history on a run's steps and check every pruning in it."""
    whole: dict[int, bool] = {}
    pinned: set[int] = set()
    best: int | None = None
    step = 0
    for event, number in events:
        some = sorted(whole)[number % len(whole)] if whole else None
        if event.startswith("save"):
            step += 1 + number % 50
            whole[step] = True
        elif event == "damage" and some is not None:
            whole[some] = False
        elif event == "pin" and some is not None:
            pinned.add(some)
        elif event == "best" and some is not None:
            best = some
        elif event == "resume" and any(whole.values()):
            step = max(found for found, good in whole.items() if good)
            whole = {found: good for found, good in whole.items() if found <= step}
        if event != "save":
            continue
        before = dict(whole)
        complete = {found for found, good in whole.items() if good}
        for gone in to_delete(whole, keep, best, pinned, complete):
            del whole[gone]
        kept = {found for found, good in whole.items() if good}
        assert max(complete) in kept
        assert sorted(complete)[-keep:] == sorted(kept)[-keep:]
        assert len(kept - pinned - {best}) <= keep
        assert (pinned | {best}) & set(before) <= set(whole)


def test_nothing_but_a_positive_number_is_kept() -> None:
    with pytest.raises(ValueError, match="at least one"):
        to_delete([1, 2], 0, None, [], [1, 2])


def test_pruning_goes_by_step_and_only_in_this_run(tmp_path: Path) -> None:
    for step in (9, 10, 100):
        path = small(tmp_path / "run", step, 1.0)
        small(tmp_path / "other", step, 1.0)
        # A clock that runs backwards, and a folder copied later, mean nothing.
        os.utime(path, (2e9 - step, 2e9 - step))
    small(tmp_path / "run", 4, 1.0)
    (tmp_path / "run/checkpoints/step-4/keep").touch()
    aside = tmp_path / "run/checkpoints/step-5.aside-0123abcd"
    aside.mkdir()
    assert prune(tmp_path / "run", path, keep=1, best=9) == [10]
    left = ["step-100", "step-4", "step-5.aside-0123abcd", "step-9"]
    assert sorted(os.listdir(tmp_path / "run/checkpoints")) == left
    assert len(os.listdir(tmp_path / "other/checkpoints")) == 3


def test_nothing_is_pruned_for_a_new_checkpoint_that_is_damaged(tmp_path: Path) -> None:
    old, path = small(tmp_path, 1, 1.0), small(tmp_path, 2, 1.0)
    (path / "tokenizer.json").write_text("")
    with pytest.raises(Damaged):
        prune(tmp_path, path, keep=1, best=None)
    assert old.exists()
