"""Recorded passes: what a replay reads and leaves, with a stand-in for the graph that runs the pass again."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from xtcli.data.batch import Batch
from xtcli.train.captured import USUAL, Captured, Recorded, first_of

CPU = torch.device("cpu")


class Replayed(Captured):
    """Replays by running the pass over the recorded tensors, into the recorded losses."""

    def __init__(self, refusal: str | None = None) -> None:
        self.calls: list[str] = []
        self.said: list[str] = []
        self.refusal = refusal
        change: Any = SimpleNamespace(clear=lambda: None, take=self.calls.append, held=lambda: "held")
        super().__init__(self.pass_once, change, CPU, self.said.append)

    def pass_once(self, parts: Any, counts: Any) -> tuple[dict[str, Tensor], Tensor]:
        self.calls.append("pass")
        total = sum((part.inputs["input_ids"] * part.targets["lm"]).sum() for part in parts)
        return {"lm": total / counts["lm"]}, torch.as_tensor(float(total))

    def obstacle(self, parts: Any, counts: Any) -> str | None:
        return self.refusal

    def recorded(self, parts: list[Batch], counts: dict[str, Tensor]) -> Recorded:
        losses, norm = self.pass_once(parts, counts)

        def replay() -> None:
            again, length = self.pass_once(parts, counts)
            losses["lm"].copy_(again["lm"])
            norm.copy_(length)

        return Recorded(SimpleNamespace(replay=replay), parts, counts, losses, norm, "held")


def batch(rows: int, seed: int) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    ids, aims = (torch.randint(1, 9, (rows, 4), generator=generator) for _ in range(2))
    return Batch({"input_ids": ids}, {"lm": aims}, 4 * rows, 0, list(range(rows)), (4,) * rows)


def exact(parts: list[Batch], count: int) -> float:
    return sum(float((part.inputs["input_ids"] * part.targets["lm"]).sum()) for part in parts) / count


def test_replays_read_each_batch_and_leave_values_of_their_own() -> None:
    passes = Replayed()
    found = []
    for step in range(USUAL + 4):
        parts = [batch(2, step), batch(1, 100 + step)]
        losses, norm = passes(parts, {"lm": step + 1})
        found.append((losses["lm"], exact(parts, step + 1), norm, exact(parts, 1)))
    for loss, wanted, norm, whole in found:
        assert float(loss) == pytest.approx(wanted) and float(norm) == pytest.approx(whole)
    assert passes.calls.count("held") == 4 and not passes.said


def test_other_shapes_are_counted_apart() -> None:
    passes = Replayed()
    for step in range(USUAL):
        passes([batch(2, step)], {"lm": 1})
        passes([batch(3, step)], {"lm": 1})
    assert not passes.graphs
    passes([batch(3, 9)], {"lm": 1})
    assert len(passes.graphs) == 1


def test_what_cannot_be_recorded_is_said_once_and_runs_on() -> None:
    passes = Replayed("a pass waits for the GPU")
    for step in range(USUAL + 3):
        parts = [batch(2, step)]
        assert float(passes(parts, {"lm": 2})[0]["lm"]) == pytest.approx(exact(parts, 2))
    (sentence,) = passes.said
    assert sentence.endswith("a pass waits for the GPU") and not passes.graphs


def test_what_went_wrong_first_is_said() -> None:
    """And not what the end of a broken recording says."""

    def broken() -> None:
        try:
            raise RuntimeError("the compiler was called\nat length")
        finally:
            raise RuntimeError("operation failed due to a previous error")

    with pytest.raises(RuntimeError, match="previous") as caught:
        broken()
    assert str(first_of(caught.value)).startswith("the compiler was called")
    alone = RuntimeError("out of memory")
    assert first_of(alone) is alone


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_recording_that_breaks_off_harms_nothing() -> None:
    """What was recorded before is replayed, random numbers are drawn on, and as without it."""
    device = torch.device("cuda", torch.cuda.current_device())
    said: list[str] = []
    stream = torch.cuda.current_stream()

    def work(parts: Any, counts: Any) -> tuple[dict[str, Tensor], Tensor]:
        drawn = torch.nn.functional.dropout(torch.ones(64, device=device))
        if breaks and len(parts[0].ids) == 3 and torch.cuda.is_current_stream_capturing():
            drawn.sum().item()
        return {"lm": drawn.sum() / counts["lm"]}, drawn[0]

    found = []
    for breaks in (False, True):
        torch.cuda.manual_seed(0)
        change: Any = SimpleNamespace(clear=lambda: None, take=lambda held: None, held=lambda: None)
        passes = Captured(work, change, device, said.append)
        rows = [2] * (USUAL + 2) + [3] * (USUAL + 2) + [2] * 3
        found.append([float(passes([batch(count, 0)], {"lm": 1})[0]["lm"]) for count in rows])
        assert len(passes.graphs) == 2 - breaks and passes.off == breaks
    assert found[0] == found[1] and len(said) == 1
    assert torch.cuda.current_stream() == stream
