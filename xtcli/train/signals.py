"""Stopping on request: Ctrl-C and SIGTERM set a flag that training polls between steps, so that it can save.

A second Ctrl-C stops at once, by KeyboardInterrupt; a checkpoint is committed by one rename, so nothing
whole is harmed at any moment. A repeated SIGTERM changes nothing: schedulers send it to a process and
then again to its group, and the save under way is what they wait for.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Any, Self

SIGNALS = (signal.SIGINT, signal.SIGTERM)

ECHO = 0.5
"""Seconds in which a second Ctrl-C is the first one, passed on by a launcher that also got it."""


class Stopper:
    """Catches SIGINT and SIGTERM while entered. Outside the main thread, which alone may, it catches nothing."""

    def __init__(self) -> None:
        self.requested: int | None = None
        """The signal that asked to stop, None as long as none did."""
        self._since = 0.0
        self._process = os.getpid()
        self._before: dict[signal.Signals, Any] = {}

    @property
    def exit_code(self) -> int:
        """0, or as a shell reports the signal: 130 for Ctrl-C, 143 for SIGTERM."""
        return 0 if self.requested is None else 128 + self.requested

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                # A shell that starts a background job has it ignore Ctrl-C; that stays so.
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:
            # A forked data worker inherits this handler. Ctrl-C reaches it too, but its parent decides
            # when it ends; SIGTERM is that decision.
            if number == signal.SIGTERM:
                os._exit(128 + number)
            return
        now = time.monotonic()
        if self.requested is None:
            self.requested, self._since = number, now
        elif number == signal.SIGINT and now - self._since > ECHO:
            raise KeyboardInterrupt
