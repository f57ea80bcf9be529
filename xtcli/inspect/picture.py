"""Grids of numbers as block characters: masks two cells to a character, values as shades.

A mask's cell is drawn where at least half of its pairs are seen, dotted where fewer are. Where the encoding of the
output has no block characters, ASCII stands in, a line for each row of cells.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from xtcli.inspect import units
from xtcli.inspect.grids import BiasView, MaskView, TurnView
from xtcli.inspect.sight import Views

BOTH, UPPER, LOWER, FEW = "\u2588", "\u2580", "\u2584", "\u2591"
SHADES = " \u2591\u2592\u2593\u2588"
ASCII_SHADES = " .:*#"
MAX_CELLS = 64
"""Cells along an axis of a picture, at most."""
MAX_ROWS = 16
"""Rows of a shaded picture, at most."""


def cells(columns: int, lines: int) -> int:
    """How many cells a square picture has on a terminal of this size."""
    return max(8, min(columns - 4, 2 * (lines - 6), MAX_CELLS) // 2 * 2)


def can_draw(encoding: str | None) -> bool:
    """Whether an output of this encoding has the block characters."""
    try:
        (BOTH + UPPER + LOWER + SHADES).encode(encoding or "ascii")
    except (UnicodeEncodeError, LookupError):
        return False
    return True


def mask_lines(grid: Tensor, blocks: bool = True) -> list[str]:
    """A mask's grid of shares as text."""
    rows: list[list[float]] = grid.tolist()
    if not blocks:
        return ["".join("#" if share >= 0.5 else "." if share > 0 else " " for share in row).rstrip() for row in rows]
    if len(rows) % 2:
        rows.append([0.0] * len(rows[0]))
    lines = []
    for above, below in zip(rows[::2], rows[1::2], strict=True):
        line = ""
        for a, b in zip(above, below, strict=True):
            full = {(True, True): BOTH, (True, False): UPPER, (False, True): LOWER}
            line += full.get((a >= 0.5, b >= 0.5), FEW if a > 0 or b > 0 else " ")
        lines.append(line.rstrip())
    return lines


def shade_lines(grid: Tensor, labels: Sequence[str] = (), blocks: bool = True) -> list[str]:
    """A grid of values as shades from its smallest to its largest, a line for each row."""
    low, high = float(grid.min()), float(grid.max())
    shades = SHADES if blocks else ASCII_SHADES
    steps = ((grid - low) / ((high - low) or 1.0) * (len(shades) - 1)).round().int().tolist()
    margin = max((len(label) for label in labels), default=0)
    text = ["".join(shades[step] for step in row) for row in steps]
    names = [*labels, *[""] * (len(text) - len(labels))]
    return [f"{name:>{margin}} {row}".rstrip() for name, row in zip(names, text, strict=True)]


def thin(grid: Tensor, rows: int) -> tuple[Tensor, list[int]]:
    """At most `rows` rows of a grid, evenly spread, and their numbers."""
    count = grid.shape[0]
    if count <= rows:
        return grid, list(range(count))
    picked = [round(i * (count - 1) / (rows - 1)) for i in range(rows)]
    return grid[picked], picked


def _framed(lines: list[str]) -> list[str]:
    return [f"  {line}".rstrip() for line in lines]


def mask_caption(view: MaskView) -> str:
    """What a mask's picture shows."""
    pairs = f"{view.seen:.1%} of {view.length:,} x {view.length:,} pairs seen"
    return f"{view.stack}: mask {view.rule} ({view.users}): {pairs}, queries down, keys across"


def bias_caption(view: BiasView) -> str:
    """What a bias's picture shows."""
    span = f"{units.figure(view.low)} to {units.figure(view.high)}"
    how = {
        "": f"added to the scores, {span}",
        "trained": f"trained, added to the scores, {span}",
        "rows numbered": "learned; without weights, the shade is the row of the table that a key's distance reads",
    }[view.learned]
    where = f"heads down, {view.length:,} keys across, for the query at {view.query:,}"
    return f"{view.stack}: bias {view.kind} ({view.users}): {how}; {where}"


def turn_caption(view: TurnView) -> str:
    """What a rotation's picture shows."""
    waves = f"wavelengths of {units.figure(view.shortest)} to {units.figure(view.longest)} tokens"
    turned = f"{units.plural(view.pairs, 'pair')} of dimensions turn"
    axes = f"cosines, pairs down, {view.length:,} places across"
    return f"{view.stack}: {view.kind} ({view.users}): {turned}, {waves}; {axes}"


def lines(views: Views, blocks: bool = True) -> list[str]:
    """Every picture with its caption."""
    text: list[str] = []
    for mask in views.masks:
        # A mask that hides nothing has nothing to show.
        drawn = [] if mask.seen == 1.0 else _framed(mask_lines(mask.grid, blocks))
        text += [mask_caption(mask), *drawn, ""]
    for bias in views.biases:
        grid, heads = thin(bias.keys, MAX_ROWS)
        names = [f"head {head}" for head in heads]
        if bool((bias.keys == bias.keys[0]).all()):
            grid, names = grid[:1], ["each head"]
        text += [bias_caption(bias), *_framed(shade_lines(grid, names, blocks)), ""]
    for turn in views.turns:
        grid, pairs = thin(turn.grid, MAX_ROWS)
        text += [turn_caption(turn), *_framed(shade_lines(grid, [f"pair {pair}" for pair in pairs], blocks)), ""]
    text += views.words
    return text[:-1] if text and not text[-1] else text


def facts(views: Views) -> dict[str, object]:
    """The views as plain data, without the grids."""
    return {
        "masks": [
            {"stack": v.stack, "users": v.users, "rule": v.rule, "length": v.length, "seen": v.seen}
            for v in views.masks
        ],
        "biases": [
            {
                "stack": v.stack,
                "users": v.users,
                "kind": v.kind,
                "length": v.length,
                "query": v.query,
                "values": v.learned or "computed",
                "low": v.low,
                "high": v.high,
                "heads": v.keys.tolist(),
            }
            for v in views.biases
        ],
        "rotations": [
            {
                "stack": v.stack,
                "users": v.users,
                "kind": v.kind,
                "pairs": v.pairs,
                "shortest_wavelength_tokens": v.shortest,
                "longest_wavelength_tokens": v.longest,
            }
            for v in views.turns
        ],
        "other": list(views.words),
    }
