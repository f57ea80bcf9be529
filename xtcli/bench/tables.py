"""Tables of results: for a terminal, and as Markdown for a page that is made from a result file."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table as Drawn

from xtcli.inspect import units

WIDE = 200
"""Columns where stdout is no terminal: a table in a file must not be cut."""


@dataclass
class Table:
    """Rows of cells under a title, the first column flush left; then sentences. Without rows there are only those."""

    title: str = ""
    columns: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()
    notes: list[str] = field(default_factory=list)

    def show(self) -> None:
        """Print on stdout."""
        if self.title:
            print(self.title)
        if self.rows:
            drawn = Drawn(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
            for number, column in enumerate(self.columns):
                drawn.add_column(column, justify="left" if number == 0 else "right", overflow="fold")
            for row in self.rows:
                drawn.add_row(*row)
            width = units.terminal()[0] if sys.stdout.isatty() else WIDE
            Console(file=sys.stdout, width=width, highlight=False, markup=False).print(drawn)
        for note in self.notes:
            print(note)

    def markdown(self) -> str:
        """As Markdown, with a blank line between its parts."""
        parts = [_plain(self.title)] if self.title else []
        if self.rows:
            rule = [":--", *["--:"] * (len(self.columns) - 1)]
            parts.append("\n".join(f"| {' | '.join(map(_plain, row))} |" for row in (self.columns, rule, *self.rows)))
        parts += [f"- {_plain(note)}" if len(self.notes) > 1 else _plain(note) for note in self.notes]
        text = "\n\n".join(parts)
        return text.replace("\n\n- ", "\n- ").replace("\n- ", "\n\n- ", 1)


def _plain(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def percent(share: float | None) -> str:
    """A share in per cent, n/a for None."""
    return "n/a" if share is None else f"{share * 100:.1f} %"


def spread(times: Mapping[str, Any]) -> str:
    """Median, 5th and 95th percentile."""
    return f"{short(times['median_ms'])} ({short(times['p5_ms'])}-{short(times['p95_ms'])})"


def short(value: float) -> str:
    """Three digits, or all of a longer whole part."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def where(found: Mapping[str, Any]) -> str:
    """The device and the number format of a result."""
    return f"{found['conditions']['device']}, {found['conditions']['dtype']}"
