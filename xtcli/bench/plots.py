"""Results as pictures: PNG files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from xtcli.bench.attention import total_ms
from xtcli.inspect import figure


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
