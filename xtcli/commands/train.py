"""xt train: train a preset, or go on with a run."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from xtcli.commands.options import Overrides, Size, Tiny, again
from xtcli.config import library
from xtcli.config.complete import complete_preset


def command(
    target: Annotated[
        str,
        typer.Argument(
            metavar="PRESET|RUN",
            help="A preset (file or name), or a run to resume.",
            autocompletion=complete_preset,
        ),
    ],
    overrides: Overrides = None,
    size: Size = None,
    tiny: Tiny = False,
    init: Annotated[
        Path | None,
        typer.Option(
            help="Checkpoint or run whose weights and tokenizer to start from; short for train.init=...",
            show_default=False,
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the run; default runs/<preset>.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and stop.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print every line of metrics on stdout as JSON.")] = False,
) -> None:
    """Train PRESET from fresh weights or those of a checkpoint, or resume RUN from its newest checkpoint.

    Ctrl-C and SIGTERM save a checkpoint and print the command that resumes. The run's folder is printed last.
    """
    library.find(target)  # a wrong name is said before torch is imported
    from xtcli.errors import refuse
    from xtcli.runs.run import is_run
    from xtcli.train import start

    changes = list(overrides or [])
    resuming = is_run(Path(target))
    if resuming and (size or tiny or out or init):
        raise refuse("--size, --tiny, --init and --out belong to a new run", "leave them out to resume", place=target)
    if init is not None:
        changes.append(f"train.init={json.dumps(str(init))}")

    def record(line: dict[str, Any]) -> None:
        if as_json:
            print(json.dumps(line), flush=True)

    if dry_run:
        _plan(target, changes, size, tiny, as_json)
        return
    if resuming:
        code, path = start.resume(Path(target), changes, command=start.command_line(), record=record, talk=_talk)
    else:
        from xtcli.config.preset import load_preset

        resolved = load_preset(target, changes, size=size, tiny=tiny)
        code, path = start.new(resolved, out=out, command=start.command_line(), record=record, talk=_talk)
    if not as_json:
        print(path)
    _next(code, path)
    if code:
        raise typer.Exit(code)


def _plan(target: str, changes: list[str], size: str | None, tiny: bool, as_json: bool) -> None:
    from xtcli.config.preset import load_preset
    from xtcli.train.job import make_job
    from xtcli.train.start import describe, facts, table

    job = make_job(load_preset(target, changes, size=size, tiny=tiny), _talk)
    print(json.dumps(facts(job), indent=1) if as_json else table(describe(job)))
    _talk(f"next: xt train {again(target, changes, size, tiny)}")


def _next(code: int, path: Path) -> None:
    from xtcli.errors import EXIT_INTERRUPTED, EXIT_TERMINATED

    if code in (EXIT_INTERRUPTED, EXIT_TERMINATED):
        _talk(f"stopped and saved; resume with: xt train {path}")
    elif code == 0:
        from xtcli.config.preset import load_preset
        from xtcli.registry import find

        objective = load_preset(path).preset.objective
        kind = find("objective", objective.kind)
        if not kind.textual:
            _talk(f"next: xt inspect {path}")
            return
        if kind.data == "images":
            _talk(f"next: xt generate --ckpt {path} --image FILE")
            return
        second = ' --context "..."' if objective.kind == "extract" else ""
        _talk(f'next: xt generate --ckpt {path} --prompt "..."{second}')


def _talk(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
