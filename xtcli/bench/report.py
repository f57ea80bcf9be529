"""Results in words: tables on stdout, plots as PNG."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from xtcli.bench.attention import total_ms
from xtcli.inspect import figure, units
from xtcli.runs.run import gib

WIDE = 200
"""Columns where stdout is no terminal: a table in a file must not be cut."""


def show(columns: Sequence[str], rows: Iterable[Sequence[str]], title: str = "") -> None:
    """Print a table on stdout; the first column flush left, the others flush right."""
    table = Table(box=box.SIMPLE_HEAD, title=title or None, title_justify="left", pad_edge=False)
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number == 0 else "right", overflow="fold")
    for row in rows:
        table.add_row(*row)
    width = units.terminal()[0] if sys.stdout.isatty() else WIDE
    Console(file=sys.stdout, width=width, highlight=False, markup=False).print(table)


def percent(share: float | None) -> str:
    """A share in per cent, n/a for None."""
    return "n/a" if share is None else f"{share * 100:.1f} %"


def spread(times: Mapping[str, Any]) -> str:
    """Median, 5th and 95th percentile."""
    return f"{times['median_ms']:.3g} ({times['p5_ms']:.3g}-{times['p95_ms']:.3g})"


def attention_table(found: Mapping[str, Any]) -> None:
    """All that ran, then all that did not and why."""
    config, product = found["config"], found["matmul"]
    both = not config["forward_only"]
    title = (
        f"{config['batch']} x {config['heads']} heads ({config['kv_heads']} key/value) x {config['head_dim']}, "
        f"{config['dtype']}, {found['conditions']['device']}; matrix product {product['flop_per_s'] / 1e12:.3g} TFLOP/s "
        f"({product['size']}^3, same run)"
    )
    sides = ["forward", *(["backward"] if both else [])]
    columns = ["attention", "kernel", "tokens"]
    for side in sides:
        columns += [f"{side} ms (p5-p95)", "TFLOP/s", "of product"]
    columns += ["peak memory", "difference"]
    rows = []
    for row in found["rows"]:
        if "skipped" in row:
            continue
        cells = [row["case"], row["kernel"], f"{row['seq']:,}"]
        for side in sides:
            times = row[side]
            cells += [spread(times), f"{times['tflop_per_s']:.3g}", percent(times["share_of_matmul"])]
        cells.append("n/a" if row["peak_bytes"] is None else gib(row["peak_bytes"]))
        off = row.get("difference")
        cells.append("-" if off is None else f"{off:.1e}" + (" WRONG" if row["wrong"] else ""))
        rows.append(cells)
    show(columns, rows, title)
    _growth_table(found["growth"])
    print(f"{found['convention']}. Difference: largest, from the first kernel of the same attention.")
    few = sum("note" in row.get(side, {}) for row in found["rows"] for side in sides)
    if few:
        print(f"{units.plural(few, 'time')} of fewer than 20 steady repeats: the JSON says which (note).")
    _skipped(found["rows"])


def _skipped(rows: Iterable[Mapping[str, Any]]) -> None:
    """What did not run, by kernel and reason."""
    why: dict[tuple[str, str, int], list[str]] = {}
    for row in rows:
        if "skipped" in row:
            why.setdefault((row["kernel"], row["skipped"], row["seq"]), []).append(row["case"])
    if why:
        print("not run:")
        lines = [(kernel, f"{seq:,}", ", ".join(names), text) for (kernel, text, seq), names in why.items()]
        print("\n".join(units.table(lines, indent=2, right=(1,))))


def _growth_table(found: Mapping[str, Mapping[str, float]]) -> None:
    if found:
        rows = [
            (name, f"{slopes['time']:.2f}", f"{slopes['memory']:.2f}" if "memory" in slopes else "n/a")
            for name, slopes in found.items()
        ]
        show(("growth with the length", "time exponent", "memory exponent"), rows)


def attention_plot(found: Mapping[str, Any], path: Path) -> None:
    """One length: a bar for each attention and kernel. Several: time over length, both axes logarithmic."""
    rows = [row for row in found["rows"] if "forward" in row]
    drawn, (axis,) = figure.panels(1)
    lengths = sorted({row["seq"] for row in rows})
    names = list(dict.fromkeys((row["case"], row["kernel"]) for row in rows))
    what = "forward" if found["config"]["forward_only"] else "forward + backward"
    if len(lengths) > 1:
        for number, (case, kernel) in enumerate(names):
            points = [(r["seq"], total_ms(r)) for r in rows if (r["case"], r["kernel"]) == (case, kernel)]
            line = ("-", "--", ":", "-.")[number // 10 % 4]
            axis.plot(*zip(*points, strict=True), line, marker="o", markersize=3, label=f"{case}, {kernel}")
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.set_xlabel("tokens")
        axis.set_ylabel(f"{what} (ms)")
        axis.legend(fontsize=6, ncols=2)
        drawn.set_size_inches(9, 6)
    else:
        drawn.set_size_inches(9, max(3.0, 0.22 * len(rows) + 1.5))
        left = [0.0] * len(rows)
        labels = [f"{row['case']}, {row['kernel']}" for row in rows]
        for side in ("forward", "backward"):
            if rows and side in rows[0]:
                widths = [row[side]["median_ms"] for row in rows]
                axis.barh(range(len(rows)), widths, left=left, label=side)
                left = [a + b for a, b in zip(left, widths, strict=True)]
        axis.set_yticks(range(len(rows)), labels, fontsize=7)
        axis.invert_yaxis()
        axis.set_xlabel(f"ms at {lengths[0]:,} tokens" if lengths else "ms")
        axis.legend()
    config = found["config"]
    axis.set_title(
        f"{found['conditions']['device']}, {config['dtype']}, {config['batch']} x {config['heads']} heads x "
        f"{config['head_dim']}",
        fontsize=9,
    )
    axis.grid(alpha=0.3)
    figure.save(drawn, path)
