"""Figures with their units, tables of them, and the width they are printed at."""

from __future__ import annotations

import itertools
import math
import shutil
from collections.abc import Iterable, Sequence

from xtcli.runs.run import gib

DEFAULT_TERMINAL = (100, 40)
"""Columns and lines where stdout is no terminal and COLUMNS and LINES are not set."""


def flop(amount: float) -> str:
    """Floating-point operations in the unit that reads best."""
    units = ["FLOP", "kFLOP", "MFLOP", "GFLOP", "TFLOP", "PFLOP", "EFLOP", "ZFLOP"]
    while amount >= 999.95 and len(units) > 1:
        amount, units = amount / 1000, units[1:]
    return f"{amount:.4g} {units[0]}"


def size(count: float) -> str:
    """Bytes, exactly and in the unit that reads best; a share of a byte is rounded."""
    whole = round(count)
    return f"{whole:,} B" if whole < 1024 else f"{whole:,} B ({gib(whole)})"


def plural(number: int, noun: str) -> str:
    """A number with thousands separated, and its noun."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def figure(value: float) -> str:
    """A number of about four digits."""
    if not math.isfinite(value):
        return str(value)
    return f"{value:.4g}"


def terminal() -> tuple[int, int]:
    """Columns and lines to print on."""
    found = shutil.get_terminal_size(DEFAULT_TERMINAL)
    return max(found.columns, 20), max(found.lines, 10)


def table(rows: Iterable[Sequence[str]], right: Sequence[int] = (), gap: int = 2, indent: int = 0) -> list[str]:
    """Rows of cells as lines, columns aligned; the columns numbered in `right` are set flush right.

    Rows may have different lengths; the last cell of a row takes no part in the width of its column unless it is
    set flush right.
    """
    cells = [list(row) for row in rows]
    widths: dict[int, int] = {}
    for row in cells:
        for column, cell in enumerate(row):
            if column < len(row) - 1 or column in right:
                widths[column] = max(widths.get(column, 0), len(cell))
    lines = []
    for row in cells:
        set_out = [
            cell.rjust(widths.get(column, 0)) if column in right else cell.ljust(widths.get(column, 0))
            for column, cell in enumerate(row)
        ]
        lines.append((" " * indent + (" " * gap).join(set_out)).rstrip())
    return lines


def spans(numbers: Sequence[int]) -> str:
    """Sorted numbers in short: `0-11`, `0-2, 4-6`, `1, 3 .. 23`."""
    steps = {b - a for a, b in itertools.pairwise(numbers)}
    if len(numbers) > 3 and len(steps) == 1 and steps != {1}:
        return f"{numbers[0]}, {numbers[1]} .. {numbers[-1]}"
    pieces: list[list[int]] = []
    for number in numbers:
        if pieces and number == pieces[-1][-1] + 1:
            pieces[-1].append(number)
        else:
            pieces.append([number])
    return ", ".join(str(piece[0]) if len(piece) == 1 else f"{piece[0]}-{piece[-1]}" for piece in pieces)
