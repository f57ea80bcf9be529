"""xt convert: a transformers checkpoint to ours, or ours back."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer


def command(
    family: Annotated[
        str, typer.Argument(metavar="FAMILY", help="gpt2, llama, bert, t5 ..., or auto: as the checkpoint says.")
    ],
    src: Annotated[Path, typer.Argument(metavar="SRC", help="Folder of the checkpoint.")],
    dst: Annotated[Path, typer.Argument(metavar="DST", help="Folder to make.")],
    to: Annotated[str, typer.Option("--to", help="xt, or hf for the way back.")] = "xt",
    verify: Annotated[
        bool, typer.Option("--verify", help="Compare outputs and modules with transformers before DST is made.")
    ] = False,
    dtype: Annotated[
        str | None, typer.Option("--dtype", help="Change the type: float32, bfloat16, float16; default as it is.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Read and check everything, write nothing.")] = False,
    allow_pickle: Annotated[
        bool, typer.Option("--allow-pickle", help="Read .bin and .pt too, in a process without network.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace DST if it is a checkpoint.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report on stdout as JSON.")] = False,
) -> None:
    """Convert the checkpoint SRC into the folder DST, every tensor bit for bit.

    A source that does not fit is refused with the names of the tensors and options at fault.
    """
    from xtcli.convert import convert

    report = convert(
        src,
        dst,
        family,
        to,  # type: ignore[arg-type]
        verify=verify,
        dtype=dtype,
        dry_run=dry_run,
        allow_pickle=allow_pickle,
        force=force,
    )
    if as_json:
        print(json.dumps(report.to_json()))
    else:
        for subject, text in report.lines():
            print(f"{subject:>9}  {text}")
    if report.missing:
        print(f"warning: {report.missing}", file=sys.stderr)
    if dry_run:
        print("nothing was written", file=sys.stderr)
    elif report.to == "xt":
        print(f"next: {_next(str(dst), bool(report.heads), bool(report.missing))}", file=sys.stderr)
    else:
        for name, architecture in (report.members or {"": report.architecture}).items():
            print(f"next: transformers.{architecture}.from_pretrained({str(Path(dst) / name)!r})", file=sys.stderr)


def _next(folder: str, answers: bool, unread: bool) -> str:
    """What can be done with a converted model: without heads it gives states, without a tokenizer it reads no text."""
    if not answers:
        task = "'model.heads={sequence: {}}' objective=classify data=FILE"
        return f"xtcli.load({folder!r}) gives its states; or xt train {folder} --init {folder} {task}"
    return f"xt generate --ckpt {folder}" + (" --tokenizer FOLDER" if unread else "")
