"""`xt inspect`: the presets, one of them (or a run, or a checkpoint) in figures and pictures, or two side by side."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from xtcli.commands.options import Json, Size, Tiny, again, next_command
from xtcli.config import library
from xtcli.config.complete import complete_inspected, complete_override_or_preset
from xtcli.errors import refuse
from xtcli.inspect.targets import Target, applicable, exactly, one_view, targets

if TYPE_CHECKING:
    from xtcli.config.preset import Resolved

MASK_LENGTH = 4096
"""Tokens of a mask's picture at most, unless the user says more."""


def command(
    preset: Annotated[
        str | None,
        typer.Argument(
            metavar="[TARGET]",
            help="Preset: a name, a file, or a run or checkpoint folder. None lists the presets.",
            autocompletion=complete_inspected,
            show_default=False,
        ),
    ] = None,
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[OTHER|KEY=VALUE]...",
            help="A second target to compare with; settings over the target that they follow.",
            autocompletion=complete_override_or_preset,
            show_default=False,
        ),
    ] = None,
    size: Size = None,
    tiny: Tiny = False,
    batch: Annotated[
        int | None, typer.Option(min=1, help="Texts at once, for the costs (1).", show_default=False)
    ] = None,
    length: Annotated[
        int | None,
        typer.Option(min=2, help="Tokens of a text, for costs and masks (the context).", show_default=False),
    ] = None,
    tree: Annotated[bool, typer.Option("--tree", help="Print the modules with shapes and counts.")] = False,
    masks: Annotated[bool, typer.Option("--masks", help="Draw attention masks, position biases, rotations.")] = False,
    tensors: Annotated[bool, typer.Option("--tensors", help="Print statistics of a checkpoint's tensors.")] = False,
    curves: Annotated[bool, typer.Option("--curves", help="Draw the losses of one or several runs.")] = False,
    png: Annotated[
        Path | None, typer.Option(help="Draw --masks or --curves as a PNG, too.", show_default=False)
    ] = None,
    parts: Annotated[
        bool, typer.Option("--parts", help="List slots and kinds; with SLOT or SLOT.KIND as TARGET, their fields.")
    ] = False,
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
    """List the presets; show what a preset, run or checkpoint is and costs; or compare two."""
    asked = {
        "--tree": tree,
        "--masks": masks,
        "--tensors": tensors,
        "--curves": curves,
        "--parts": parts,
        "--resolved": resolved,
        "--explain": explain,
        "--schema": schema,
        "--copy": copy is not None,
    }
    view = one_view([name for name, wanted in asked.items() if wanted]) or ("--masks" if png else "")
    given = {"--batch": batch, "--length": length, "--png": png, "--size": size, "--tiny": tiny or None}
    applicable(view, [name for name, value in given.items() if value is not None])
    if view == "--schema":
        from xtcli.config.schema import preset_schema_text

        sys.stdout.write(preset_schema_text())
        return
    if view == "--parts":
        _parts([*([preset] if preset else []), *(words or ())], as_json)
        return
    if preset is None:
        if view:
            raise refuse(f"{view} is about a preset, a run or a checkpoint", f"write xt inspect PRESET {view}")
        _list(as_json)
        return
    found = targets([preset, *(words or ())])
    if view == "--tensors":
        _tensors(found, as_json)
    elif view == "--curves":
        _curves(found, png, as_json)
    elif len(found) > 1 and not view:
        _compare(found, size, tiny, batch or 1, length, as_json)
    else:
        exactly(found, 1, view)
        _one(found[0], view, size, tiny, batch or 1, length, png, copy, as_json)


def _one(
    target: Target,
    view: str,
    size: str | None,
    tiny: bool,
    batch: int,
    length: int | None,
    png: Path | None,
    copy: Path | None,
    as_json: bool,
) -> None:
    """The answers about one preset."""
    library.find(target.ref)  # a wrong name is said before torch is imported
    from xtcli.config.preset import load_preset
    from xtcli.config.show import explained, resolved_yaml
    from xtcli.inspect import summary

    found = load_preset(target.ref, target.overrides, size=size, tiny=tiny)
    same = again(target.ref, list(target.overrides), size, tiny)
    if copy is not None:
        _copy(found, copy, changed=bool(target.overrides) or size is not None or tiny)
    elif view == "--tree":
        _tree(found, same, as_json)
    elif view == "--masks":
        _masks(found, target.ref, same, length, png, as_json)
    elif as_json:
        print(json.dumps(summary.facts(found, target.ref, batch, length), indent=1))
        next_command(f"xt inspect {same}")
    elif view == "--resolved":
        sys.stdout.write(resolved_yaml(found))
        next_command(f"xt inspect {same} --explain")
    elif view == "--explain":
        sys.stdout.write(explained(found))
        next_command(f"xt train {same} --dry-run")
    else:
        print("\n".join(summary.lines(found, target.ref, batch, length)))
        recorded = found.file.name == library.RECORDED
        next_command(f"xt generate --ckpt {target.ref} --prompt TEXT" if recorded else f"xt train {same} --dry-run")


def _tree(found: Resolved, same: str, as_json: bool) -> None:
    from xtcli.inspect import modules
    from xtcli.model import skeleton

    root = modules.tree(skeleton(found))
    print(json.dumps(root.facts(), indent=1) if as_json else "\n".join(modules.lines(root)))
    next_command(f"xt inspect {same} --masks")


def _masks(found: Resolved, ref: str, same: str, length: int | None, png: Path | None, as_json: bool) -> None:
    from xtcli.inspect import figure, picture, sight, tensors, units
    from xtcli.inspect.cost import check_length, usual_length
    from xtcli.inspect.record import has_weights
    from xtcli.model import skeleton

    if png is not None:
        figure.check(png)
    model = skeleton(found)
    check_length(model, length)
    span = length or min(usual_length(found, model), MASK_LENGTH)
    weights = tensors.Reader(Path(ref)).tensor if has_weights(Path(ref)) else None
    views = sight.look(model, span, picture.cells(*units.terminal()), weights)
    if as_json:
        print(json.dumps(picture.facts(views), indent=1))
    else:
        print("\n".join(picture.lines(views, picture.can_draw(sys.stdout.encoding))))
    if png is not None:
        fine = sight.look(model, span, figure.CELLS, weights)
        figure.save(figure.draw_views(fine, found.name), png)
        print(f"wrote {png}", file=sys.stderr)
    next_command(f"xt inspect {same} --tree" if png else f"xt inspect {same} --png masks.png")


def _tensors(found: Sequence[Target], as_json: bool) -> None:
    from xtcli.inspect import tensors

    exactly(found, 1, "--tensors")
    _no_overrides(found, "--tensors")
    rows = tensors.statistics(Path(found[0].ref))
    print(json.dumps(tensors.facts(rows), indent=1) if as_json else "\n".join(tensors.lines(rows)))
    next_command(f"xt inspect {shlex.quote(found[0].ref)}")


def _curves(found: Sequence[Target], png: Path | None, as_json: bool) -> None:
    from xtcli.inspect import curves, figure, picture, units

    _no_overrides(found, "--curves")
    if png is not None:
        figure.check(png)
    runs = curves.read([Path(target.ref) for target in found])
    if as_json:
        print(json.dumps(curves.facts(runs), indent=1))
    else:
        print("\n".join(curves.lines(runs, *units.terminal(), picture.can_draw(sys.stdout.encoding))))
    if png is not None:
        figure.save(figure.draw_curves(runs), png)
        print(f"wrote {png}", file=sys.stderr)
    names = shlex.join(target.ref for target in found)
    next_command(f"xt inspect {names}" if png or len(found) > 2 else f"xt inspect {names} --curves --png curves.png")


def _compare(
    found: Sequence[Target], size: str | None, tiny: bool, batch: int, length: int | None, as_json: bool
) -> None:
    exactly(found, 2, "a comparison")
    for target in found:
        library.find(target.ref)  # a wrong name is said before torch is imported
    from xtcli.config.preset import load_preset
    from xtcli.inspect import compare

    a, b = (load_preset(target.ref, target.overrides, size=size, tiny=tiny) for target in found)
    changes, sides = compare.differences(a, b), compare.sides(a, b, batch=batch, length=length)
    if as_json:
        print(json.dumps(compare.facts(changes, sides), indent=1))
    else:
        print("\n".join([*(map(str, changes) if changes else ["the presets do not differ"]), ""]))
        print("\n".join(compare.side_lines(*sides)))
    next_command(f"xt inspect {again(found[1].ref, list(found[1].overrides), size, tiny)} --tree")


def _parts(words: Sequence[str], as_json: bool) -> None:
    from xtcli.inspect import catalogue, units

    if len(words) > 1:
        raise refuse(f"--parts takes one SLOT or SLOT.KIND, not {len(words)}", "ask for one at a time")
    path = words[0] if words else ""
    found = catalogue.catalogue(path)
    width, _ = units.terminal()
    print(
        json.dumps(catalogue.facts(found), indent=1)
        if as_json
        else "\n".join(catalogue.lines(found, width, bool(path)))
    )
    next_command("xt inspect --parts mixer.attention" if not path else "xt inspect --parts")


def _no_overrides(found: Sequence[Target], view: str) -> None:
    for target in found:
        if target.overrides:
            raise refuse(
                f"{view} reads what was written, and '{target.overrides[0]}' changes nothing there", "leave it out"
            )


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
