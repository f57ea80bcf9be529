"""What a person sees of a training run, on stderr: a live panel on a terminal, plain lines anywhere else.

Both show the same measures, each under its key in the line of metrics:

    loss, val_loss   nats per target      lr          learning rate       tok_s     tokens per second
    grad_norm        before clipping      mfu         share of peak       memory    bytes, peak
    losses           by head              eta         seconds left        best      lowest val_loss so far
    unit             of the losses, where it is not nats

Nothing runs between calls: no thread, no timer. A reader that goes away (a closed pipe) ends the view,
not the run.
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from xtcli.train.curve import curve

MIN_WIDTH, MIN_HEIGHT = 50, 20
CURVE_HEIGHT, SAMPLE_LINES = 8, 4
SCORES: Mapping[str, str] = {
    "val_accuracy": "accuracy {:.1%}",
    "val_exact_match": "exact match {:.1%}",
    "val_f1": "F1 {:.1%}",
    "val_micro_f1": "micro-F1 {:.1%}",
    "val_mse": "mean squared error {:.4g}",
    "val_pearson": "Pearson's correlation {:.3f}",
}
HISTORY = 2000
"""Points of the curve that are kept; beyond it, neighbours are averaged."""


class View(Protocol):
    """The calls that training makes."""

    def start(self, plan: str) -> None: ...

    def step(self, metrics: Mapping[str, Any]) -> None: ...

    def validation(self, metrics: Mapping[str, Any]) -> None: ...

    def sample(self, text: str) -> None: ...

    def message(self, text: str) -> None: ...

    def close(self) -> None: ...


class Talk(Console):
    """A console on stderr for which a closed pipe is the end of talking, not of the program."""

    def __init__(self) -> None:
        super().__init__(stderr=True, highlight=False)

    def on_broken_pipe(self) -> None:
        self.quiet = True


def make_view(steps: int, console: Console | None = None) -> View:
    """The live view if the console is a terminal that can show it, else plain lines; `steps` is the run's length."""
    console = console or Talk()
    able = console.is_terminal and not console.is_dumb_terminal and not console.legacy_windows
    roomy = console.width >= MIN_WIDTH and console.height >= MIN_HEIGHT
    return (
        LiveView(console, steps) if able and roomy and console.encoding.startswith("utf") else PlainView(console, steps)
    )


class PlainView:
    """One line per event, in a fixed format."""

    def __init__(self, console: Console, steps: int) -> None:
        self.console, self.steps = console, steps

    def start(self, plan: str) -> None:
        self.message(plan)

    def step(self, metrics: Mapping[str, Any]) -> None:
        place = f"{metrics['step']:,}/{self.steps:,}"
        self.message("  ".join([f"step {place:>{2 * len(f'{self.steps:,}') + 1}}", *measures(metrics).values()]))

    def validation(self, metrics: Mapping[str, Any]) -> None:
        self.message(f"step {metrics['step']:,}: {validation_text(metrics)}")

    def sample(self, text: str) -> None:
        self.message("sample:\n" + "\n".join(f"  | {line}" for line in printable(text).split("\n")))

    def message(self, text: str) -> None:
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def close(self) -> None:
        pass


class LiveView:
    """A panel that is redrawn at each event; messages scroll above it."""

    def __init__(self, console: Console, steps: int) -> None:
        self.console, self.steps = console, steps
        self.metrics: Mapping[str, Any] = {}
        self.losses: list[tuple[int, float]] = []
        self.validated = self.sampled = ""
        self.live = Live(console=console, auto_refresh=False, vertical_overflow="crop")

    def start(self, plan: str) -> None:
        self.message(plan)
        self.live.start()

    def step(self, metrics: Mapping[str, Any]) -> None:
        self.metrics = metrics
        self.losses.append((metrics["step"], float(metrics["loss"])))
        if len(self.losses) > HISTORY:
            self.losses = [_mean(self.losses[i : i + 2]) for i in range(0, len(self.losses), 2)]
        self._draw()

    def validation(self, metrics: Mapping[str, Any]) -> None:
        self.validated = f"step {metrics['step']:,}: {validation_text(metrics)}"
        self._draw()

    def sample(self, text: str) -> None:
        self.sampled = printable(text)
        self._draw()

    def message(self, text: str) -> None:
        self.console.print(text, markup=False, highlight=False)

    def close(self) -> None:
        self.live.stop()

    def _draw(self) -> None:
        if not self.console.quiet:
            self.live.update(self.render(), refresh=True)

    def render(self) -> RenderableType:
        """The panel as it stands now."""
        width = max(MIN_WIDTH, self.console.width) - 4
        rows: list[RenderableType] = []
        if self.metrics:
            step = self.metrics["step"]
            head = Table.grid(expand=True, padding=(0, 1))
            head.add_column(no_wrap=True)
            head.add_column(ratio=1)
            head.add_row(f"step {step:,} of {self.steps:,}", ProgressBar(self.steps, step))
            rows.append(head)
            rows.extend(
                Text(line, no_wrap=True)
                for line in curve(self.losses, width, CURVE_HEIGHT, f" {unit_of(self.metrics)}")
            )
            rows.extend(Text(line) for line in _filled(measures(self.metrics).values(), width))
        if self.validated:
            rows.append(Text(self.validated, style="cyan"))
        if self.sampled:
            lines = Text(self.sampled).wrap(self.console, width - 2)
            shown = [line for line in lines if line.plain.strip()][:SAMPLE_LINES]
            rows.append(Text("sample", style="dim"))
            rows.extend(Text("  ") + line for line in shown)
        return Panel(Group(*rows), title="training", title_align="left")


def measures(metrics: Mapping[str, Any]) -> dict[str, str]:
    """The measures in a line of metrics as text with units, in the order they are shown; what is absent is left out."""
    heads = ", ".join(f"{head} {value:.4f}" for head, value in metrics.get("losses", {}).items())
    formats: dict[str, Callable[[Any], str]] = {
        "loss": lambda value: f"loss {value:.4f} {unit_of(metrics)}" + (f" ({heads})" if heads else ""),
        "lr": lambda value: f"lr {value:.2e}",
        "grad_norm": lambda value: f"gradient norm {value:.3f}",
        "tok_s": lambda value: f"{value:,.0f} tok/s",
        "mfu": lambda value: f"MFU {100 * value:.1f} %",
        "memory": lambda value: f"memory {value / 2**30:.2f} GiB",
        "eta": lambda value: f"ETA {duration(value)}",
    }
    return {key: write(metrics[key]) for key, write in formats.items() if metrics.get(key) is not None}


def validation_text(metrics: Mapping[str, Any]) -> str:
    """A validation in words: the loss, and whether it is the best; the scores, or else a readable perplexity."""
    loss = metrics["val_loss"]
    unit = unit_of(metrics)
    text = f"validation loss {loss:.4f} {unit}"
    scores = [words.format(metrics[key]).replace("%", " %") for key, words in SCORES.items() if key in metrics]
    if scores:
        text += f" ({', '.join(scores)})"
    elif unit == "nats" and math.isfinite(loss) and loss < 20:
        text += f" (perplexity {math.exp(loss):,.2f})"
    best = metrics.get("best")
    if best is not None:
        text += ", the best so far" if loss <= best else f", best {best:.4f} {unit}"
    return text


def unit_of(metrics: Mapping[str, Any]) -> str:
    """What the losses of a line of metrics are counted in."""
    return str(metrics.get("unit", "nats"))


def duration(seconds: float) -> str:
    """Seconds in the two units that read best."""
    if not math.isfinite(seconds):
        return "unknown"
    whole = max(0, round(seconds))
    days, hours, minutes = whole // 86400, whole // 3600 % 24, whole // 60 % 60
    if days:
        return f"{days} d {hours} h"
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {whole % 60} s" if minutes else f"{whole} s"


def printable(text: str) -> str:
    """Text that cannot steer a terminal: control characters, which a young model emits freely, are escaped."""
    return "".join(
        character if character in "\n\t" or unicodedata.category(character)[0] != "C" else f"\\x{ord(character):02x}"
        for character in text.replace("\r\n", "\n")
    ).expandtabs(4)


def _filled(words: Iterable[str], width: int) -> list[str]:
    """The words, two spaces apart, in as few lines as fit; a word with spaces in it is not broken."""
    lines = [""]
    for word in words:
        longer = f"{lines[-1]}  {word}" if lines[-1] else word
        if len(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines


def _mean(points: list[tuple[int, float]]) -> tuple[int, float]:
    return points[0][0], sum(value for _, value in points) / len(points)
