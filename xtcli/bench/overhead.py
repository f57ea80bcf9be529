"""What the training loop adds to bare steps: data from the loader, the log, the view, looking at losses.

    bare    forward, backward, clip, optimizer step, by the same kernels, over one batch that is on the device already
    loop    `Trainer.step` and what surrounds it, over batches that the loader makes and that travel to the device

Both work on the same model, optimizer and kernels, and take turns in blocks; the loop writes one line of its log and of
the plain view for each block.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from typing import Any

import numpy as np
from rich.console import Console

from xtcli.bench.stepping import ENDLESS, Bench, random_batch
from xtcli.bench.timing import Clock
from xtcli.data.batch import Batch
from xtcli.data.loader import batches
from xtcli.data.order import Ints
from xtcli.errors import refuse
from xtcli.train.signals import Stopper
from xtcli.train.view import PlainView

BLOCK = 10
"""Steps of a block, and from one line of the log to the next."""

BLOCKS = 5

SAMPLES = 2**20
"""Samples of the random text that the loader reads: more than are ever taken."""


class RandomText:
    """Random tokens as the loader asks an objective for them; the same sample has the same tokens."""

    carry = False

    def __init__(self, bench: Bench) -> None:
        self.model, self.length = bench.trainer.job.skeleton, bench.batch.lengths[0] // len(bench.batch.inputs)

    def __len__(self) -> int:
        return SAMPLES

    def batch(self, indices: Ints, epochs: Ints) -> Batch:
        """The samples `indices`."""
        return random_batch(self.model, len(np.asarray(indices)), self.length, int(indices[0]))


def overhead(bench: Bench, talk: Callable[[str], None]) -> dict[str, Any]:
    """Medians of both, ms a step, and the share by which the loop is longer; by the clock and by the processor."""
    trainer, place = bench.trainer, bench.place
    log, screen = io.StringIO(), Console(file=io.StringIO(), width=200)
    before = trainer.view, trainer.record, trainer.config
    clocks = {"bare": Clock(place.device), "loop": Clock(place.device)}
    options: dict[str, Any] = {"workers": trainer.config.workers, "pin": place.device.type == "cuda", "seed": 0}
    stream = batches(RandomText(bench), batch=len(bench.batch), **options)
    silent = {"validate_every": 0, "sample_every": 0, "save_every": 0}
    try:
        with Stopper() as stopper:
            trainer.config = trainer.config.model_copy(update={"log_every": BLOCK, **silent})
            trainer.done.validated = trainer.done.sampled = trainer.progress.step
            while trainer.progress.step % BLOCK:
                bench.step()
            trainer.view = PlainView(screen, ENDLESS)
            trainer.record = lambda line: print(json.dumps(line), file=log)
            for _ in range(BLOCKS):
                with clocks["bare"].block(BLOCK):
                    for _ in range(BLOCK):
                        bare(bench)
                with clocks["loop"].block(BLOCK):
                    for _ in range(BLOCK):
                        trainer.attend_to_step(stopper)
                        if trainer.step(next(stream)):
                            raise refuse(f"the loss of {bench.name} is not finite", "lower train.lr")
    finally:
        stream.close()
        trainer.view, trainer.record, trainer.config = before
    found: dict[str, Any] = {"block": BLOCK, "lines": log.getvalue().count("\n")}
    for name, clock in clocks.items():
        found[name] = clock.times().facts() | {"processor_ms": clock.processor_times().median * 1e3}
    found["share"] = found["loop"]["median_ms"] / found["bare"]["median_ms"] - 1
    found["processor_share"] = found["loop"]["processor_ms"] / found["bare"]["processor_ms"] - 1
    talk(f"{bench.name}: the loop adds {found['share'] * 100:.2f} % to bare steps")
    return found


def bare(bench: Bench) -> None:
    """One step with nothing around it; the loop's step counter stays."""
    trainer = bench.trainer
    trainer.passes(*trainer.shared(bench.batch))
    trainer.change.apply()
    trainer.change.clear()
