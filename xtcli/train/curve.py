"""A curve in text: braille characters, each 2 dots wide and 4 high, with the range of both axes beside it."""

from __future__ import annotations

import math
from collections.abc import Sequence

BRAILLE = 0x2800
DOTS = ((0x01, 0x02, 0x04, 0x40), (0x08, 0x10, 0x20, 0x80))
"""Bit of the dot in column x, row y of a braille character."""


def curve(
    points: Sequence[tuple[int, float]],
    width: int,
    height: int,
    unit: str = "",
    *,
    low: float | None = None,
    high: float | None = None,
    first: int | None = None,
    last: int | None = None,
) -> list[str]:
    """Draw (step, value) points in step order as `height` lines and a last one with the steps, `width` cells wide.

    The axes span the points, or what `low` to `high` and `first` to `last` say, which must hold every point.

    Points of one column of dots are averaged, columns without any are crossed in a straight line,
    values that are not finite are left out. Empty when there is nothing to draw or no room.
    """
    finite = [(step, value) for step, value in points if math.isfinite(value)]
    if not finite or height < 1:
        return []
    low = min(value for _, value in finite) if low is None else low
    high = max(value for _, value in finite) if high is None else high
    labels = [f"{high:.3g}{unit}", f"{low:.3g}{unit}"]
    margin = max(map(len, labels)) + 1
    columns, rows = 2 * (width - margin), 4 * height
    if columns < 2:
        return []
    first = points[0][0] if first is None else first
    last = points[-1][0] if last is None else last
    bins: list[list[float]] = [[] for _ in range(columns)]
    for step, value in finite:
        bins[(step - first) * (columns - 1) // max(1, last - first)].append(value)
    heights = [(x, (high - sum(v) / len(v)) / ((high - low) or 1.0) * (rows - 1)) for x, v in enumerate(bins) if v]
    cells = [[0] * (columns // 2) for _ in range(height)]
    before = round(heights[0][1])
    for (x0, y0), (x1, y1) in zip([heights[0], *heights], heights, strict=False):
        for x in range(x0 + (x1 > x0), x1 + 1):
            y = round(y1 - (y1 - y0) * (x1 - x) / max(1, x1 - x0))
            # A jump is drawn as a vertical stroke, so that the curve hangs together.
            reach = before + (y > before) - (y < before)
            for dot in range(min(y, reach), max(y, reach) + 1):
                cells[dot // 4][x // 2] |= DOTS[x % 2][dot % 4]
            before = y
    lines = []
    for row, line in enumerate(cells):
        label = labels[0] if row == 0 else labels[1] if row == height - 1 else ""
        lines.append(f"{label:>{margin - 1}} " + "".join(chr(BRAILLE + bits) for bits in line))
    left, right = f"step {first:,}", f"step {last:,}"
    gap = max(1, columns // 2 - len(left) - len(right))
    lines.append(" " * margin + left + " " * gap + right)
    return lines
