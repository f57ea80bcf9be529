"""Arguments and options that several commands share, with their completion, and the word that ends a command."""

from __future__ import annotations

import shlex
import sys
from typing import Annotated

import typer

from xtcli.config.complete import complete_override, complete_preset, complete_size

PresetRef = Annotated[
    str,
    typer.Argument(
        metavar="PRESET", help="Preset: a name, a file, or a run or checkpoint folder.", autocompletion=complete_preset
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="KEY=VALUE",
        help="Settings over the preset: a.b=value, with the paths of the YAML.",
        autocompletion=complete_override,
        show_default=False,
    ),
]
Size = Annotated[
    str | None, typer.Option(help="One of the preset's sizes.", autocompletion=complete_size, show_default=False)
]
Tiny = Annotated[bool, typer.Option("--tiny", help="Shrink to a laptop-size model of the same structure.")]
Json = Annotated[bool, typer.Option("--json", help="Print the answer as JSON.")]


def again(preset: str, overrides: list[str] | None, size: str | None, tiny: bool) -> str:
    """The same preset, size and overrides as words of a command line."""
    words = [preset, *(["--size", size] if size else []), *(["--tiny"] if tiny else []), *(overrides or ())]
    return shlex.join(words)


def next_command(text: str) -> None:
    """The last line of a command, on stderr: what is useful next."""
    print(f"next: {text}", file=sys.stderr)
