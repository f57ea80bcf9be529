"""Ctrl-C and SIGTERM ask to stop; a second Ctrl-C insists."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator

import pytest

from xtcli.train import signals
from xtcli.train.signals import Stopper

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX signals")


@pytest.fixture(autouse=True)
def heard() -> Iterator[None]:
    """Ctrl-C is heard, also where the tests run in the background of a shell, which lets them ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def send(number: int) -> None:
    os.kill(os.getpid(), number)
    time.sleep(0.01)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_is_a_request(number: signal.Signals, code: int) -> None:
    before = signal.getsignal(number)
    with Stopper() as stopper:
        assert stopper.requested is None and stopper.exit_code == 0
        send(number)
        assert stopper.requested == number and stopper.exit_code == code
    assert signal.getsignal(number) is before


def test_a_second_ctrl_c_stops_at_once_but_not_its_echo(monkeypatch: pytest.MonkeyPatch) -> None:
    with Stopper() as stopper:
        send(signal.SIGINT)
        send(signal.SIGINT)
        assert stopper.exit_code == 130
        monkeypatch.setattr(signals, "ECHO", 0.0)
        with pytest.raises(KeyboardInterrupt):
            send(signal.SIGINT)


def test_a_repeated_sigterm_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signals, "ECHO", 0.0)
    with Stopper() as stopper:
        send(signal.SIGTERM)
        send(signal.SIGTERM)
        assert stopper.exit_code == 143
        with pytest.raises(KeyboardInterrupt):
            send(signal.SIGINT)
        assert stopper.exit_code == 143


def test_a_forked_worker_ignores_ctrl_c_and_dies_of_sigterm() -> None:
    with Stopper() as stopper:
        ready, go = os.pipe()
        child = os.fork()
        if child == 0:
            os.kill(os.getpid(), signal.SIGINT)
            os.write(go, b"!")
            time.sleep(30)
            os._exit(0)
        os.read(ready, 1)
        os.kill(child, signal.SIGTERM)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 143
        assert stopper.requested is None


def test_an_ignored_signal_stays_ignored() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with Stopper() as stopper:
            send(signal.SIGINT)
            assert stopper.requested is None
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_outside_the_main_thread_nothing_is_caught() -> None:
    seen: list[int | None] = []

    def work() -> None:
        with Stopper() as stopper:
            seen.append(stopper.requested)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [None]
