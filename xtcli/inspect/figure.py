"""Pictures as PNG files, drawn without a display."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from xtcli.errors import refuse
from xtcli.inspect import picture
from xtcli.inspect.curves import UNIT, RunCurves
from xtcli.inspect.sight import Views

WIDTH, HEIGHT = 6.0, 5.0
"""Inches of one panel."""
COLUMNS = 3
MEANS = {"Greys": "share of the pairs that are seen", "viridis": "added to the score", "coolwarm": "cosine"}
"""What a colour stands for, by colour map."""
CELLS = 256
"""Cells along an axis of a drawn grid, at most."""


def check(path: Path) -> None:
    """Refuse a file that cannot become a picture, before any work is done."""
    if path.suffix.lower() != ".png":
        raise refuse(f"the file '{path}' does not end in .png", f"write --png {path}.png")
    if not path.parent.is_dir():
        raise refuse(f"there is no folder '{path.parent}'", "make it first", place="--png")


def save(figure: Any, path: Path) -> None:
    """Write a figure; one that is there already is replaced."""
    check(path)
    try:
        figure.savefig(path, format="png", dpi=120)
    except OSError as error:
        raise refuse(f"'{path}' cannot be written: {error.strerror}") from None


def panels(count: int) -> tuple[Any, list[Any]]:
    """A figure with room for `count` panels, and their axes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = min(COLUMNS, max(count, 1))
    rows = -(-max(count, 1) // columns)
    figure = Figure(figsize=(WIDTH * columns, HEIGHT * rows), layout="constrained")
    FigureCanvasAgg(figure)
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for unused in axes[count:]:
        unused.set_axis_off()
    return figure, axes[:count]


def draw_views(views: Views, title: str) -> Any:
    """Masks, biases and rotations side by side."""
    drawn: list[tuple[str, Any, str, str, str, tuple[float, float, float, float]]] = []
    for m in views.masks:
        square = (0.0, float(m.length), float(m.length), 0.0)
        drawn.append((picture.mask_caption(m), m.grid, "Greys", "key", "query", square))
    for b in views.biases:
        rows = (0.0, float(b.length), float(b.keys.shape[0]), 0.0)
        drawn.append((picture.bias_caption(b), b.keys, "viridis", "key", "head", rows))
        square = (0.0, float(b.length), float(b.length), 0.0)
        drawn.append((f"{b.stack}: bias {b.kind}, head 0", b.grid, "viridis", "key", "query", square))
    for t in views.turns:
        rows = (0.0, float(t.length), float(t.pairs), 0.0)
        drawn.append((picture.turn_caption(t), t.grid, "coolwarm", "place", "pair of dimensions", rows))
    figure, axes = panels(len(drawn))
    figure.suptitle(title)
    for axis, (caption, grid, colours, across, down, extent) in zip(axes, drawn, strict=True):
        limits = {"vmin": 0.0, "vmax": 1.0} if colours == "Greys" else {}
        image = axis.imshow(grid.numpy(), cmap=colours, aspect="auto", interpolation="nearest", extent=extent, **limits)
        axis.set_title(_wrapped(caption), fontsize=8)
        axis.set_xlabel(f"{across} (place in the text)")
        axis.set_ylabel(down)
        figure.colorbar(image, ax=axis, label=MEANS[colours])
    return figure


def _wrapped(text: str, width: int = 60) -> str:
    return "\n".join(textwrap.wrap(text, width))


def draw_curves(runs: Sequence[RunCurves]) -> Any:
    """The losses of all runs in one panel, a colour for each run."""
    figure, (axis,) = panels(1)
    for number, run in enumerate(runs):
        colour = f"C{number % 10}"
        if run.training:
            axis.plot(
                *zip(*run.training, strict=True), color=colour, linewidth=0.8, alpha=0.6, label=f"{run.run}, training"
            )
        if run.validation:
            points = zip(*run.validation, strict=True)
            axis.plot(*points, color=colour, marker="o", markersize=3, label=f"{run.run}, validation")
    axis.set_xlabel("step")
    axis.set_ylabel(f"loss ({UNIT})")
    axis.grid(alpha=0.3)
    axis.legend()
    return figure
