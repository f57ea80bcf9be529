"""The view of a training run: the text itself, at a fixed width."""

from __future__ import annotations

import io
import math
import os
import subprocess
import sys
from typing import Any

import pytest
from rich.console import Console

from xtcli.train.curve import curve
from xtcli.train.view import LiveView, PlainView, duration, make_view, printable

LINE: dict[str, Any] = {
    "step": 40, "loss": 2.5, "lr": 3e-4, "grad_norm": 1.25, "tok_s": 51234.4, "mfu": 0.412, "memory": 3 * 2**30,
    "eta": 3723.0,
}  # fmt: skip


class Terminal(io.TextIOWrapper):
    """A file that says that it is a terminal, in the encoding given."""

    def __init__(self, encoding: str = "utf-8") -> None:
        super().__init__(io.BytesIO(), encoding=encoding, errors="replace")

    def isatty(self) -> bool:
        return True

    @property
    def text(self) -> str:
        self.flush()
        buffer = self.buffer
        assert isinstance(buffer, io.BytesIO)
        return buffer.getvalue().decode(self.encoding)


def console(file: Any, **options: Any) -> Console:
    return Console(**({"file": file, "width": 70, "height": 40, "color_system": None, "_environ": {}} | options))


def test_plain_lines() -> None:
    file = io.StringIO()
    view = make_view(2000, console(file))
    assert isinstance(view, PlainView)
    view.start("parameters  1,234 [all]")
    view.step(LINE)
    view.step({"step": 2000, "loss": math.nan, "losses": {"mlm": 1.5, "nsp": 0.25}, "lr": 0.0, "mfu": None})
    view.validation({"step": 40, "val_loss": 2.0, "best": 2.0})
    view.validation({"step": 40, "val_loss": 2.0, "best": 1.5})
    view.validation({"step": 40, "val_loss": 40.0})
    view.sample("def f():\n\treturn \x1b[31m1\r\n")
    view.message("saved [bold]runs/a")
    view.close()
    assert file.getvalue().splitlines() == [
        "parameters  1,234 [all]",
        "step    40/2,000  loss 2.5000 nats  lr 3.00e-04  gradient norm 1.250  51,234 tok/s  MFU 41.2 %  "
        "memory 3.00 GiB  ETA 1 h 2 min",
        "step 2,000/2,000  loss nan nats (mlm 1.5000, nsp 0.2500)  lr 0.00e+00",
        "step 40: validation loss 2.0000 nats (perplexity 7.39), the best so far",
        "step 40: validation loss 2.0000 nats (perplexity 7.39), best 1.5000 nats",
        "step 40: validation loss 40.0000 nats",
        "sample:",
        "  | def f():",
        "  |     return \\x1b[31m1",
        "  | ",
        "saved [bold]runs/a",
    ]


def test_live_panel() -> None:
    file = Terminal()
    view = make_view(100, console(file, width=60))
    assert isinstance(view, LiveView)
    view.start("the plan")
    for step in (10, 20, 30, 40):
        view.step(LINE | {"step": step, "loss": 5 - step / 20})
    view.validation({"step": 40, "val_loss": 3.25})
    view.sample("def f(x):\n\n    return x\n" + "more\n" * 9)
    view.message("a message [not markup]")
    view.close()
    assert "the plan\n" in file.text and "a message [not markup]\n" in file.text
    shown = io.StringIO()
    console(shown, width=60).print(view.render())
    lines = [line.rstrip() for line in shown.getvalue().splitlines()]
    assert lines[0] == "\u256d\u2500 training " + "\u2500" * 47 + "\u256e"
    bare = [line.strip("\u2502 ") for line in lines[1:-1]]
    assert bare[0].startswith("step 40 of 100 \u2501")
    assert bare[1].startswith("4.5 nats ") and bare[8].startswith("3 nats ")
    assert bare[9] == "step 10" + " " * 33 + "step 40"
    assert bare[10:] == [
        "loss 3.0000 nats  lr 3.00e-04  gradient norm 1.250",
        "51,234 tok/s  MFU 41.2 %  memory 3.00 GiB  ETA 1 h 2 min",
        "step 40: validation loss 3.2500 nats (perplexity 25.79)",
        "sample",
        "def f(x):",
        "return x",
        "more",
        "more",
    ]
    assert max(map(len, lines)) == 60


def test_a_long_run_keeps_a_bounded_curve(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("xtcli.train.view.HISTORY", 100)
    live = LiveView(console(io.StringIO()), 1000)
    for step in range(1000):
        live.step({"step": step, "loss": float(step)})
    assert len(live.losses) <= 100 and live.losses[0][0] == 0
    assert live.losses == sorted(live.losses)


@pytest.mark.parametrize(
    ("options", "encoding"),
    [
        ({"_environ": {"TERM": "dumb"}}, "utf-8"),
        ({"width": 40}, "utf-8"),
        ({"height": 10}, "utf-8"),
        ({"force_terminal": False}, "utf-8"),
        ({}, "ascii"),
    ],
)
def test_a_lesser_terminal_gets_plain_lines(options: dict[str, Any], encoding: str) -> None:
    file = Terminal(encoding)
    view = make_view(10, console(file, **options))
    assert isinstance(view, PlainView)
    view.sample("\u65e5\u672c \U0001f600")
    view.step(LINE)
    assert "\x1b" not in file.text


def test_stdout_stays_empty_and_a_closed_pipe_does_not_end_the_run() -> None:
    code = (
        "from xtcli.train.view import make_view\n"
        "view = make_view(9)\n"
        "for step in range(9): view.step({'step': step, 'loss': 1.0}); view.message('x' * 10000)\n"
        "view.close(); print('end')"
    )
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=write, check=False)
    os.close(write)
    assert done.stdout.split() == [b"end"]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    assert done.stdout.split() == [b"end"] and done.stderr.startswith(b"step 0/9  loss 1.0000 nats\n")


@pytest.mark.parametrize(
    ("values", "width", "expected"),
    [
        ([], 20, []),
        ([math.nan], 20, []),
        ([1.0, 2.0], 2, []),
        ([1.0], 12, ["1 " + "\u2801" + "\u2800" * 9, "1 " + "\u2800" * 10, "  step 0 step 0"]),
        ([2.0, 1.0], 6, ["2 \u2811\u2884\u2800\u2800", "1 \u2800\u2800\u2811\u2884", "  step 0 step 1"]),
    ],
)
def test_curve(values: list[float], width: int, expected: list[str]) -> None:
    found = curve(list(enumerate(values)), width, 2)
    assert [line.rstrip() for line in found] == expected, found


def test_curve_falls_where_the_loss_falls() -> None:
    """Decoded back into dots, the curve of a falling loss goes down and has no hole."""
    lines = curve([(step, 3.0 - step / 50) for step in range(0, 100, 7)], 46, 5)[:-1]
    margin = lines[-1].index(" ") + 1
    dots = set()
    for row, line in enumerate(lines):
        for column, cell in enumerate(line[margin:]):
            for x, bits in enumerate(((1, 2, 4, 64), (8, 16, 32, 128))):
                dots |= {(2 * column + x, 4 * row + y) for y, bit in enumerate(bits) if (ord(cell) - 0x2800) & bit}
    tops = [min(y for x, y in dots if x == column) for column in range(2 * (46 - margin))]
    assert tops == sorted(tops) and tops[0] == 0 and tops[-1] == 19


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"),
        (59.6, "1 min 0 s"),
        (61, "1 min 1 s"),
        (3600, "1 h 0 min"),
        (90000, "1 d 1 h"),
        (math.inf, "unknown"),
    ],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_samples_cannot_steer_the_terminal() -> None:
    assert printable("a\x1b]0;t\x07\x00\u202e\x9b\tb\u00e9") == "a\\x1b]0;t\\x07\\x00\\x202e\\x9b b\u00e9"
