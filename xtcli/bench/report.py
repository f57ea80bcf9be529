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
from xtcli.train.curve import curve

WIDE = 200
"""Columns where stdout is no terminal: a table in a file must not be cut."""


def show(columns: Sequence[str], rows: Iterable[Sequence[str]], title: str = "") -> None:
    """Print a table on stdout; the first column flush left, the others flush right."""
    if title:
        print(title)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
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
    return f"{short(times['median_ms'])} ({short(times['p5_ms'])}-{short(times['p95_ms'])})"


def short(value: float) -> str:
    """Three digits, or all of a longer whole part."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def attention_table(found: Mapping[str, Any]) -> None:
    """All that ran, then all that did not and why."""
    config, product = found["config"], found["matmul"]
    both = not config["forward_only"]
    title = (
        f"{config['batch']} x {config['heads']} heads ({config['kv_heads']} key/value) x {config['head_dim']}, "
        f"{config['dtype']}, {found['conditions']['device']}; "
        f"matrix product {product['flop_per_s'] / 1e12:.3g} TFLOP/s ({product['size']}^3, same run)"
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


def training_table(found: Mapping[str, Any]) -> None:
    """One row for each preset and side."""
    columns = [
        "preset",
        "side",
        "parameters",
        "tokens a step",
        "step ms (p5-p95)",
        "first step s",
        "tok/s",
        "targets/s",
    ]
    columns += ["MFU", "of product", "peak memory", "loss first", "loss last"]
    rows = []
    for row in found["rows"]:
        first = (row["step"]["first_call_extra_ms"] + row["step"]["median_ms"]) / 1e3
        rows.append(
            (
                row["preset"],
                row["side"],
                f"{row['parameters']:,}",
                f"{row['rows']} x {row['length']:,}",
                spread(row["step"]),
                f"{first:.2f}",
                f"{row['tok_s']:,.0f}",
                f"{row['targets_s']:,.0f}",
                percent(row["mfu"]),
                percent(row["share_of_matmul"]),
                _memory(row["peak_bytes"]),
                f"{row['first_loss']:.4f}",
                f"{row['final_loss']:.4f}",
            )
        )
    product = found["matmul"]
    show(columns, rows, _where(found) + f"; matrix product {product['flop_per_s'] / 1e12:.3g} TFLOP/s")
    for row in found["rows"]:
        if "ratio" in row:
            same = "the same loss on the same weights" if row["same_loss"] else "ANOTHER loss: not the same network"
            print(f"{row['preset']}: {row['ratio']:.2f} x {found['config']['against']} (medians), {same}")
        if "no_reference" in row:
            print(f"{row['preset']}: not compared: {row['no_reference']}")
        if "mfu_refused" in row:
            print(f"{row['name']}: MFU {row['mfu_refused']}")


def generation_table(found: Mapping[str, Any]) -> None:
    """One row for each preset and side."""
    config = found["config"]
    columns = ["preset", "side", "parameters", "first token ms (p5-p95)", "ms a token (p5-p95)", "tok/s", "peak memory"]
    columns += ["of xt's time", "same tokens"]
    rows = []
    for row in found["rows"]:
        rows.append(
            (
                row["preset"],
                row["side"],
                f"{row['parameters']:,}",
                spread(row["first_token"]),
                spread(row["per_token"]),
                "n/a" if row["tok_s"] is None else f"{row['tok_s']:,.1f}",
                _memory(row["peak_bytes"]),
                f"{row['ratio_of_xt']:.2f} x" if "ratio_of_xt" in row else "-",
                percent(row["same_tokens"]) if "same_tokens" in row else "-",
            )
        )
    show(columns, rows, f"{config['batch']} x {config['prompt']:,} + {config['new']:,} tokens, {_where(found)}")
    for row in found["rows"]:
        if "no_reference" in row:
            print(f"{row['preset']}: not compared: {row['no_reference']}")


def race_table(found: Mapping[str, Any]) -> None:
    """Where each ended, best first, and the losses over the tokens in the terminal."""
    rows = sorted(found["rows"], key=lambda row: row["validation_loss"] or row["final_loss"])
    columns = ["preset", "parameters", "FLOP/token", "steps", "tokens", "time s", "tok/s", "loss", "validation loss"]
    cells = [
        (
            row["name"],
            f"{row['parameters']:,}",
            units.flop(row["flop_per_token"]),
            f"{row['steps']:,}",
            f"{row['tokens']:,}",
            f"{row['seconds']:.1f}",
            "n/a" if row["tok_s"] is None else f"{row['tok_s']:,.0f}",
            f"{row['final_loss']:.4f}",
            "n/a" if row["validation_loss"] is None else f"{row['validation_loss']:.4f}",
        )
        for row in rows
    ]
    config = found["config"]
    budget = f"{config['seconds']:g} s of training each" if config["seconds"] else f"{config['tokens']:,} tokens each"
    show(columns, cells, f"{budget}, {_where(found)}; losses in nats per target, of the last tenth of the steps")
    width, height = units.terminal()
    every = [point[3] for row in rows for point in row["training"]]
    last = max(row["tokens"] for row in rows)
    for row in rows:
        points = [(point[0], point[3]) for point in row["training"]]
        room = max(3, min(8, height // len(rows) - 4))
        scale: dict[str, Any] = {"low": min(every), "high": max(every), "first": 0, "last": last}
        text = curve(points, min(width, 100), room, **scale)
        print("\n".join([f"{row['name']}: loss over tokens", *(line.replace("step ", "token ") for line in text)]))


def race_plot(found: Mapping[str, Any], path: Path) -> None:
    """Loss over tokens, over time and over FLOPs."""
    drawn, axes = figure.panels(3)
    for axis, column, label in zip(axes, range(3), ("tokens", "training time (s)", "FLOPs"), strict=True):
        for number, row in enumerate(found["rows"]):
            colour = f"C{number % 10}"
            for points, style in ((row["training"], {"alpha": 0.4}), (row["validation"], {"marker": "o"})):
                label_of = f"{row['name']}{', validation' if 'marker' in style else ''}"
                xs, ys = [point[column] for point in points], [point[3] for point in points]
                axis.plot(xs, ys, color=colour, linewidth=1, markersize=3, label=label_of, **style)
        axis.set_xlabel(label)
        axis.set_ylabel("loss (nats per target)")
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=7)
    figure.save(drawn, path)


def loss_plot(found: Mapping[str, Any], path: Path) -> None:
    """Tokens per second as bars, and the losses of the steps."""
    drawn, (bars, losses) = figure.panels(2)
    names = [row["name"] for row in found["rows"]]
    bars.barh(range(len(names)), [row["tok_s"] for row in found["rows"]])
    bars.set_yticks(range(len(names)), names, fontsize=7)
    bars.invert_yaxis()
    bars.set_xlabel("tok/s")
    for row in found["rows"]:
        losses.plot(range(1, len(row["losses"]) + 1), row["losses"], label=row["name"])
    losses.set_xlabel("step on the same random tokens")
    losses.set_ylabel("loss (nats per target)")
    losses.legend(fontsize=7)
    figure.save(drawn, path)


def _memory(count: int | None) -> str:
    return "n/a" if count is None else gib(count)


def _where(found: Mapping[str, Any]) -> str:
    return f"{found['conditions']['device']}, {found['conditions']['dtype']}"
