"""`xt inspect`: the list of presets, or one preset: its tree, its size, and where each value comes from."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from xtcli.commands.options import Json, Overrides, Size, Tiny, again, next_command
from xtcli.config import library
from xtcli.config.complete import complete_preset
from xtcli.errors import refuse

if TYPE_CHECKING:
    from xtcli.config.preset import Resolved


def command(
    preset: Annotated[
        str | None,
        typer.Argument(
            help="Preset: a name, a file, or a run or checkpoint folder. None lists the presets.",
            autocompletion=complete_preset,
            show_default=False,
        ),
    ] = None,
    overrides: Overrides = None,
    size: Size = None,
    tiny: Tiny = False,
    resolved: Annotated[
        bool, typer.Option("--resolved", help="Print the whole YAML, each value with its origin.")
    ] = False,
    explain: Annotated[bool, typer.Option("--explain", help="Print each value, its origin and its meaning.")] = False,
    schema: Annotated[bool, typer.Option("--schema", help="Print the JSON Schema of presets, for editors.")] = False,
    copy: Annotated[
        Path | None,
        typer.Option(help="Copy the preset to a file of your own; never overwrites.", show_default=False),
    ] = None,
    as_json: Json = False,
) -> None:
    """List the presets, or show what one is: its tree, its parameters, where each value comes from."""
    if schema:
        from xtcli.config.schema import preset_schema_text

        sys.stdout.write(preset_schema_text())
        return
    if preset is None:
        _list(as_json)
        return
    if "=" in preset and not Path(preset).exists():
        raise refuse(f"'{preset}' is an override, and no preset was named", "write xt inspect PRESET " + preset)

    from xtcli.config.preset import load_preset
    from xtcli.config.show import explained, resolved_yaml

    found = load_preset(preset, overrides or (), size=size, tiny=tiny)
    same = again(preset, overrides, size, tiny)
    if copy is not None:
        _copy(found, copy, changed=bool(overrides) or size is not None or tiny)
    elif as_json:
        print(json.dumps(_facts(found), indent=1))
    elif resolved:
        sys.stdout.write(resolved_yaml(found))
        next_command(f"xt inspect {same} --explain")
    elif explain:
        sys.stdout.write(explained(found))
        next_command(f"xt train {same} --dry-run")
    else:
        _show(found)
        recorded = found.file.name == library.RECORDED
        next_command(f"xt generate --ckpt {preset} --prompt TEXT" if recorded else f"xt train {same} --dry-run")


def _list(as_json: bool) -> None:
    """Every shipped preset with what its `about` says."""
    entries = library.list_presets()
    if as_json:
        rows = [
            {
                "name": entry.name,
                "title": entry.title,
                "paper": entry.paper,
                "year": entry.year,
                "url": entry.url,
                "new": entry.new,
                "sizes": list(entry.sizes),
            }
            for entry in entries
        ]
        print(json.dumps(rows, indent=1))
        return
    width = max((len(entry.name) for entry in entries), default=0)
    for entry in entries:
        sizes = f"  [{', '.join(entry.sizes)}]" if entry.sizes else ""
        print(f"{entry.name:{width}}  {entry.year or '':4}  {entry.new or entry.title}{sizes}")
    next_command("xt inspect " + (entries[0].name if entries else "PRESET"))


def _parameters(found: Resolved) -> int:
    from xtcli.model import build, count

    return count(build(found, device="meta"))


def _facts(found: Resolved) -> dict[str, Any]:
    """What --json prints."""
    from xtcli.config.show import values

    return {
        "name": found.name,
        "file": str(found.file),
        "size": found.size,
        "sizes": list(found.sizes),
        "parameters": _parameters(found),
        "preset": found.to_tree(),
        "origins": {item.path: str(item.origin) for item in values(found)},
    }


def _show(found: Resolved) -> None:
    from xtcli.config.show import outline

    count, published = _parameters(found), found.preset.expect.parameters
    about = found.preset.about
    print(f"{about.title} ({found.name}{f', size {found.size}' if found.size else ''})")
    for text in (about.paper, about.url, about.new):
        if text:
            print(f"  {text}")
    others = [size for size in found.sizes if size != found.size]
    if others:
        print(f"  other sizes: {', '.join(others)}")
    print()
    for name in ("model", "objective", "tokenizer", "data", "train"):
        print("\n".join(outline(found, name)))
    print()
    note = (
        "" if published is None else ", as published" if published == count else f", but {published:,} were published"
    )
    print(f"{count:,} parameters{note}")


def _copy(found: Resolved, target: Path, changed: bool) -> None:
    """Write the preset to a new file: as it is, or resolved where the command line changed it."""
    text = found.to_yaml() if changed else found.file.read_text(encoding="utf-8")
    modeline = f"# yaml-language-server: $schema={(library.folder() / 'schema.json').as_uri()}\n"
    first, _, rest = text.partition("\n")
    text = modeline + (rest if first.startswith("# yaml-language-server:") else text)
    if target.suffix not in library.SUFFIXES:
        raise refuse(f"the file '{target}' does not end in .yaml", f"write --copy {target}.yaml")
    try:
        with target.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise refuse(f"the file '{target}' exists", "choose another name; nothing is overwritten") from None
    except OSError as error:
        raise refuse(f"'{target}' cannot be written: {error.strerror}") from None
    print(target)
    next_command(f"xt inspect {target}")
