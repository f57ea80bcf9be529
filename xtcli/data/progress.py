"""How far a long piece of work is: silent at first, then a bar with the time left, or plain lines in a pipe."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

PATIENCE = 2.0
"""Seconds without a word."""
EVERY = 15.0
"""Seconds between lines in a pipe."""


class Meter:
    """Progress of `label` over `total` bytes (None: not known), written to stderr when `on`."""

    def __init__(self, label: str, total: int | None, on: bool = True, console: Console | None = None) -> None:
        self.label, self.total, self.on = label, total, on
        self.console = console or Console(stderr=True)
        self.done = 0
        self.begin = self.spoke = time.monotonic()
        self.bar: Progress | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.bar is not None:
            self.bar.stop()

    def add(self, size: int) -> None:
        """`size` more bytes are done."""
        self.done += size
        now = time.monotonic()
        if not self.on or now - self.begin < PATIENCE:
            return
        if self.console.is_terminal:
            self._draw()
        elif now - self.spoke >= EVERY:
            self.spoke = now
            self.console.print(self._line(now - self.begin), highlight=False, markup=False, soft_wrap=True)

    def _draw(self) -> None:
        if self.bar is None:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("{task.fields[said]}"),
                TimeRemainingColumn(),
            )
            self.bar = Progress(*columns, console=self.console, transient=True)
            self.bar.add_task(self.label, total=self.total, said="")
            self.bar.start()
        self.bar.update(self.bar.task_ids[0], completed=self.done, said=self._amount())

    def _amount(self) -> str:
        of = f" of {self.total / 2**20:,.1f}" if self.total else ""
        return f"{self.done / 2**20:,.1f}{of} MiB"

    def _line(self, seconds: float) -> str:
        left = f", {seconds * (self.total - self.done) / max(self.done, 1):,.0f} s left" if self.total else ""
        return f"{self.label}: {self._amount()}{left}"
