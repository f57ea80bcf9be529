"""The command `xt`: a table of commands, imported when they are called, and the boundary where errors become words.

A command is one line of COMMANDS and one module with `command`, a function annotated for Typer or a Typer app. Only the
command that runs, or whose own --help is asked for, is imported; so `xt --help` and completion cost no torch.
"""

from __future__ import annotations

import importlib
import os
import sys
from typing import Annotated, Any, NamedTuple, NoReturn

import typer
from typer.core import TyperCommand, TyperGroup

from xtcli.errors import EXIT_FAILURE, EXIT_INTERRUPTED, UserError
from xtcli.pages import keep_pages

SPINS = "2000"
"""Turns of a thread's wait before it sleeps, as GNU's OpenMP counts them."""

MAX_SHOWN = 50
"""Mistakes printed at most; the rest is counted."""


class Entry(NamedTuple):
    """Where a command's function `command` is, what `xt --help` says of it, and whether it runs models: one that does
    makes large tensors over and over, and keeps their memory."""

    module: str
    help: str
    runs: bool = False


COMMANDS = {
    "train": Entry("xtcli.commands.train", "Train a preset, or go on with a run.", True),
    "generate": Entry("xtcli.commands.generate", "Continue, fill or map a text with a trained model.", True),
    "build": Entry("xtcli.commands.build", "Write a preset's model with fresh weights."),
    "convert": Entry("xtcli.commands.convert", "Bring a transformers checkpoint in, or give one back."),
    "inspect": Entry("xtcli.commands.inspect", "List presets; show what one is and where each value comes from."),
    "bench": Entry("xtcli.commands.bench", "Measure attention, training and generation; race architectures.", True),
}

SETTINGS = {"help_option_names": ["-h", "--help"]}


class LazyCommand(TyperCommand):
    """Stands for a command in listings; becomes the real one when its arguments are parsed."""

    def __init__(self, name: str, entry: Entry) -> None:
        super().__init__(name, help=entry.help)
        self.entry = entry

    def load(self) -> Any:
        """The real command."""
        if self.entry.runs:
            keep_pages()
        command = importlib.import_module(self.entry.module).command
        if isinstance(command, typer.Typer):
            return typer.main.get_command(command)
        app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, context_settings=SETTINGS)
        app.command(self.name)(command)
        return typer.main.get_command(app)

    def make_context(self, info_name: Any, args: Any, parent: Any = None, **extra: Any) -> Any:
        """Parse the arguments with the real command."""
        return self.load().make_context(info_name, args, parent=parent, **extra)


class LazyGroup(TyperGroup):
    """The commands of COMMANDS."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.commands = {name: LazyCommand(name, entry) for name, entry in COMMANDS.items()}


app = typer.Typer(
    name="xt",
    cls=LazyGroup,
    help="Describe, train, generate from, convert and measure any documented transformer.",
    epilog="A first run: xt train gpt2-nano",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings=SETTINGS,
)


def _version(wanted: bool) -> None:
    if wanted:
        from xtcli import __version__

        print(f"xt {__version__}")
        raise typer.Exit


@app.callback()
def _xt(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    pass


def report(error: UserError) -> None:
    """Print each mistake as one line on stderr."""
    for problem in error.problems[:MAX_SHOWN]:
        text = str(problem) if problem.place else f"xt: {problem}"
        print("".join(c if c.isprintable() else repr(c)[1:-1] for c in text), file=sys.stderr)
    if len(error.problems) > MAX_SHOWN:
        print(f"xt: {len(error.problems) - MAX_SHOWN} more mistakes", file=sys.stderr)


def main() -> NoReturn:
    """Run `xt` and leave with its exit code: 2 for the user's mistakes, 130 for Ctrl-C, 1 with a traceback for ours."""
    # Threads that spin while they wait for each other take the core from the one they wait for, as soon as
    # another program runs; those that sleep at once are woken for each operator. So they spin for about a tenth of a
    # millisecond. OpenMP reads this when torch is loaded, and the user's own choice stays.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
        os.environ.setdefault("GOMP_SPINCOUNT", SPINS)
    try:
        app()
    except UserError as error:
        report(error)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(EXIT_INTERRUPTED)
    except BrokenPipeError:
        # The reader of our output has gone, as `| head` does; there is nobody left to tell.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(EXIT_FAILURE)
    sys.exit(0)
