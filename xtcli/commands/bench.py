"""`xt bench`: attention kernels, training, generation, and races of architectures, measured."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from xtcli.commands import amounts
from xtcli.commands.options import Json, Size, Tiny, next_command
from xtcli.config.complete import complete_override_or_preset
from xtcli.errors import refuse

command = typer.Typer(
    help="Measure attention kernels, training and generation; race architectures.",
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Out = Annotated[
    Path | None, typer.Option(help="Write the result, raw times included, as FILE.json.", show_default=False)
]
Plot = Annotated[Path | None, typer.Option(help="Draw the result as FILE.png.", show_default=False)]
Precision = Annotated[
    str, typer.Option("--dtype", help="fp32, bf16, fp16, or auto: bf16 where a GPU has it, else fp32.")
]
Words = Annotated[
    list[str],
    typer.Argument(
        metavar="PRESET [KEY=VALUE]...",
        help="Presets, each followed by settings over it.",
        autocompletion=complete_override_or_preset,
    ),
]
Against = Annotated[
    list[str] | None,
    typer.Option(
        metavar="PEER",
        help="The same weights there, in the same process: transformers, litgpt, nanogpt=PATH or gpt-fast=PATH "
        "(a copy of the project); may be repeated.",
        show_default=False,
    ),
]
Device = Annotated[str, typer.Option(help="auto, cuda, mps or cpu.")]


@command.callback(invoke_without_command=True)
def bench(
    context: typer.Context,
    rerun: Annotated[
        Path | None, typer.Option(help="Measure anew what a result file holds, and print both.", show_default=False)
    ] = None,
    show: Annotated[Path | None, typer.Option(help="Print the tables of a result file.", show_default=False)] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="With --show: as a page of Markdown.")] = False,
    out: Out = None,
    as_json: Json = False,
) -> None:
    """Measure attention kernels, training and generation; race architectures at equal budget."""
    if context.invoked_subcommand is not None:
        if rerun is not None or show is not None:
            raise refuse("--rerun and --show take a whole result file", "write xt bench --rerun FILE alone")
        return
    if show is not None:
        _show(show, markdown)
    elif rerun is not None:
        _rerun(rerun, out, as_json)
    else:
        print(context.get_help())


@command.command()
def attention(
    seq: Annotated[str, typer.Option(help="Length in tokens, or several: 1024,2048,4096.")] = "2048",
    batch: Annotated[int | None, typer.Option(min=1, help="Texts (4 on a GPU, 1 on the CPU).")] = None,
    heads: Annotated[int | None, typer.Option(min=1, help="Query heads (16 on a GPU, 1 or 2 on the CPU).")] = None,
    kv_heads: Annotated[int | None, typer.Option(min=1, help="Key/value heads (as many as query heads).")] = None,
    head_dim: Annotated[int, typer.Option(min=8, help="Width of a head.")] = 64,
    dtype: Precision = "auto",
    device: Device = "auto",
    mask: Annotated[
        list[str] | None,
        typer.Option(
            help="Only this attention, by name or as YAML ({kind: window, left: 1023}); may be repeated.",
            show_default=False,
        ),
    ] = None,
    kernel: Annotated[
        list[str] | None, typer.Option(help="Only this kernel; may be repeated.", show_default=False)
    ] = None,
    forward_only: Annotated[bool, typer.Option("--forward-only", help="Leave the backward pass out.")] = False,
    limit: Annotated[float, typer.Option(min=1, help="Seconds that the whole may take, about.")] = 90.0,
    as_json: Json = False,
    out: Out = None,
    plot: Plot = None,
) -> None:
    """Every attention kind on every kernel: ms, TFLOP/s, share of the matrix-product rate, memory, growth."""
    from xtcli.bench import attention, kernels, plots
    from xtcli.errors import did_you_mean

    _check_files(out, plot)
    for name in kernel or ():
        if name not in kernels.NAMES:
            raise refuse(f"there is no kernel '{name}'", did_you_mean(name, kernels.NAMES), place="--kernel")
    place = _place(device, dtype)
    config = attention.settle(
        amounts.lengths(seq),
        place,
        batch=batch,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        masks=tuple(mask or ()),
        kernels=tuple(name for name in kernels.NAMES if not kernel or name in kernel),
        forward_only=forward_only,
        limit=limit,
    )
    found = attention.run(config, place, _talk)
    _keep(found, out, as_json)
    if plot is not None:
        plots.attention_plot(found, plot)
        _talk(f"drawn: {plot}")
    next_command(f"xt bench --rerun {out}" if out else f"xt bench attention --seq {seq} --out attention.json")


@command.command()
def train(
    words: Words,
    steps: Annotated[int, typer.Option(min=2, help="Steps that are timed.")] = 20,
    batch: Annotated[
        int | None, typer.Option(min=1, help="Sequences of a step (as many as fit at once).", show_default=False)
    ] = None,
    length: Annotated[int | None, typer.Option(min=2, help="Tokens of a sequence.", show_default=False)] = None,
    against: Against = None,
    loop: Annotated[
        bool, typer.Option("--loop", help="Measure too what the loop adds to bare steps: data, log, view.")
    ] = False,
    budget: Annotated[
        str | None,
        typer.Option(help="Race on real text: training time of each preset, as 30s, 5m, 1h.", show_default=False),
    ] = None,
    tokens: Annotated[
        str | None, typer.Option(help="Race on real text: tokens of each preset, as 500k, 10M.", show_default=False)
    ] = None,
    size: Size = None,
    tiny: Tiny = False,
    dtype: Precision = "auto",
    device: Device = "auto",
    as_json: Json = False,
    out: Out = None,
    plot: Plot = None,
) -> None:
    """Training steps on random tokens: tok/s, MFU, memory, loss. With --budget or --tokens: a race on real text."""
    from xtcli.bench import plots, race, report, training

    _check_files(out, plot)
    found = _targets(words, dtype, device)
    common: dict[str, Any] = {"size": size, "tiny": tiny, "batch": batch, "length": length}
    if budget is not None or tokens is not None:
        if budget is not None and tokens is not None:
            raise refuse("--budget and --tokens are two budgets", "give one of them")
        if against or loop:
            raise refuse("a race is among presets", "leave out --against and --loop")
        limits = {"seconds": amounts.seconds(budget), "tokens": amounts.count(tokens)}
        result = race.run(race.Config.of(found, **limits, **common), _talk)
        _keep(result, out, as_json)
        if not as_json:
            report.race_curves(result)
        if plot is not None:
            plots.race_plot(result, plot)
    else:
        asked = training.Config.of(found, steps=steps, against=tuple(against or ()), loop=loop, **common)
        result = training.run(asked, _talk)
        _keep(result, out, as_json)
        if plot is not None:
            plots.loss_plot(result, plot)
    if plot is not None:
        _talk(f"drawn: {plot}")
    next_command(f"xt bench --rerun {out}" if out else f"xt train {found[0].ref}")


@command.command()
def generate(
    words: Words,
    batch: Annotated[int, typer.Option(min=1, help="Texts at once.")] = 1,
    prompt: Annotated[int, typer.Option(min=1, help="Tokens of a prompt.")] = 128,
    new: Annotated[int, typer.Option(min=2, help="Tokens to write.")] = 128,
    repeats: Annotated[int, typer.Option(min=1, help="Texts that are timed.")] = 5,
    int8: Annotated[bool, typer.Option("--int8", help="Beside it, with the linear layers in 8 bits.")] = False,
    against: Against = None,
    size: Size = None,
    tiny: Tiny = False,
    dtype: Precision = "auto",
    device: Device = "auto",
    as_json: Json = False,
    out: Out = None,
) -> None:
    """Random weights write: time to the first token, time of each further one, tok/s, memory."""
    from xtcli.bench import generation

    _check_files(out, None)
    place = _place(device, dtype)
    config = generation.Config.of(
        _targets(words, "auto", "auto"),
        device=place.device.type,
        dtype=place.precision,
        size=size,
        tiny=tiny,
        batch=batch,
        prompt=prompt,
        new=new,
        repeats=repeats,
        int8=int8,
        against=tuple(against or ()),
    )
    result = generation.run(config, place, _talk)
    _keep(result, out, as_json)
    next_command(f"xt bench --rerun {out}" if out else f"xt bench train {config.presets[0][0]}")


@command.command("all")
def everything(
    out: Annotated[Path, typer.Option(help="The result file, FILE.json; what it holds already is kept.")],
    peers: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PEER",
            help="transformers, litgpt, nanogpt=PATH, gpt-fast=PATH; may be repeated. Each case uses those it names.",
            show_default=False,
        ),
    ] = None,
    case: Annotated[
        list[str] | None, typer.Option(help="Only this case, measured again; may be repeated.", show_default=False)
    ] = None,
    as_json: Json = False,
) -> None:
    """The cases of docs/performance.md that this machine can run, one after the other, into one file."""
    from xtcli.bench import performance, results

    results.check_file(out, ".json", "--out")
    found = performance.run(case or (), peers or (), out, _talk)
    _keep(found, None, as_json)
    next_command(f"xt bench --show {out} --markdown")


def _show(path: Path, markdown: bool) -> None:
    """Print a result file that was written before."""
    from xtcli.bench import performance, report, results

    found = results.read(path)
    if markdown and found["kind"] == "all":
        print(performance.page(found), end="")
        return
    for table in report.tables(found):
        if markdown:
            print(table.markdown() + "\n")
        else:
            table.show()


def _targets(words: list[str], dtype: str, device: str) -> Any:
    """The presets with their overrides, and what the options of device and format add to each."""
    from dataclasses import replace

    from xtcli.inspect.targets import targets

    more = [f"train.precision={dtype}"] if dtype != "auto" else []
    more += [f"train.device={device}"] if device != "auto" else []
    found = targets(words)
    if not found:
        raise refuse("no preset was named", "write xt bench train PRESET")
    return [replace(target, overrides=(*target.overrides, *more)) for target in found]


def _rerun(path: Path, out: Path | None, as_json: bool) -> None:
    from xtcli.bench import again, results, tables

    results.check_file(out, ".json", "--out")
    before = results.read(path)
    now = again.repeat(before, str(path), _talk)
    rows = results.beside(before, now)
    if out is not None:
        results.write(out, now)
    if as_json:
        print(json.dumps({"before": before, "now": now}, indent=1))
    else:
        tables.Table("", ("measured", "then", "now", "change"), rows).show()
    next_command("xt bench --help")


def _place(device: str, dtype: str) -> Any:
    from xtcli.config.train import TrainConfig
    from xtcli.errors import did_you_mean
    from xtcli.train.device import DTYPES, choose

    for option, value, known in (
        ("--device", device, ("auto", "cuda", "mps", "cpu")),
        ("--dtype", dtype, ("auto", *DTYPES)),
    ):
        if value not in known:
            raise refuse(f"there is no '{value}'", did_you_mean(value, known), place=option)
    return choose(TrainConfig.model_validate({"device": device, "precision": dtype}))


def _check_files(out: Path | None, plot: Path | None) -> None:
    from xtcli.bench import results

    results.check_file(out, ".json", "--out")
    results.check_file(plot, ".png", "--plot")


def _keep(found: dict[str, Any], out: Path | None, as_json: bool) -> None:
    """Write the result file, then print the tables or the JSON."""
    from xtcli.bench import report, results

    if out is not None:
        results.write(out, found)
        _talk(f"written: {out}")
    if as_json:
        print(json.dumps(found, indent=1))
    else:
        for table in report.tables(found):
            table.show()


def _talk(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
