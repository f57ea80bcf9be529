"""`xt build`: a preset's model with fresh weights, as a checkpoint folder."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Annotated

import typer

from xtcli.commands.options import Json, Overrides, PresetRef, Size, Tiny, again, next_command
from xtcli.config import library
from xtcli.errors import refuse


def command(
    preset: PresetRef,
    overrides: Overrides = None,
    out: Annotated[
        Path | None, typer.Option(help="Checkpoint folder to write; must not exist.", show_default=False)
    ] = None,
    size: Size = None,
    tiny: Tiny = False,
    seed: Annotated[int, typer.Option(min=0, help="Start of the random weights.")] = 0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check and count; write nothing.")] = False,
    as_json: Json = False,
) -> None:
    """Build a preset's model with fresh weights and write it as a checkpoint folder."""
    if out is None and not dry_run:
        raise refuse("no folder was named to write to", "add --out FOLDER, or --dry-run to write nothing")
    if out is not None and out.exists():
        raise refuse(f"'{out}' exists", "choose another folder; nothing is overwritten", place="--out")

    library.find(preset)  # a wrong name is said before torch is imported
    from xtcli.config.preset import load_preset
    from xtcli.model import build, count, save_model

    found = load_preset(preset, overrides or (), size=size, tiny=tiny)
    skeleton = build(found, device="meta")
    parameters, bytes_needed = count(skeleton), sum(p.numel() * p.element_size() for p in skeleton.parameters())
    published = found.preset.expect.parameters
    written = None
    if out is not None and not dry_run:
        _refuse_too_large(bytes_needed, out)
        written = save_model(build(found, seed=seed), out, found.to_yaml())
    if as_json:
        facts = {
            "parameters": parameters,
            "bytes": bytes_needed,
            "published": published,
            "folder": written and str(written),
        }
        print(json.dumps(facts, indent=1))
    else:
        note = ", as published" if published == parameters else f"; {published:,} were published" if published else ""
        print(f"{found.preset.about.title}: {parameters:,} parameters{note}, {_size(bytes_needed)} of weights")
        if written:
            print(written)
    next_command(
        f"xt inspect {written}" if written else f"xt build {again(preset, overrides, size, tiny)} --out FOLDER"
    )


def _size(count: int) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.2f} MiB"


def _refuse_too_large(needed: int, out: Path) -> None:
    """Refuse weights that fit neither in memory nor on the disk, before any is made."""
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        if needed > memory:
            raise refuse(
                f"the weights take {_size(needed)} and this machine has {_size(memory)} of memory",
                "add --dry-run to count without building, or --tiny",
            )
    folder = out.absolute().parent
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise refuse(f"the weights take {_size(needed)} and {folder} has {_size(free)} free", "free some space")
