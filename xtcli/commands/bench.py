"""`xt bench`: attention kernels, training, generation, and races of architectures, measured."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from xtcli.commands.options import Json, next_command
from xtcli.errors import refuse

command = typer.Typer(
    help="Measure attention kernels, training and generation; race architectures.",
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Out = Annotated[Path | None, typer.Option(help="Write the result, raw times included, as FILE.json.", show_default=False)]
Plot = Annotated[Path | None, typer.Option(help="Draw the result as FILE.png.", show_default=False)]
Precision = Annotated[
    str, typer.Option("--dtype", help="fp32, bf16, fp16, or auto: bf16 where a GPU has it, else fp32.")
]
Device = Annotated[str, typer.Option(help="auto, cuda, mps or cpu.")]


@command.callback(invoke_without_command=True)
def bench(
    context: typer.Context,
    rerun: Annotated[
        Path | None, typer.Option(help="Measure anew what a result file holds, and print both.", show_default=False)
    ] = None,
    out: Out = None,
    as_json: Json = False,
) -> None:
    """Measure attention kernels, training and generation; race architectures at equal budget."""
    if context.invoked_subcommand is not None:
        if rerun is not None:
            raise refuse("--rerun repeats a whole result file", "write xt bench --rerun FILE alone")
        return
    if rerun is None:
        print(context.get_help())
        return
    _rerun(rerun, out, as_json)


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
    from xtcli.bench import attention, kernels, report
    from xtcli.errors import did_you_mean

    _check_files(out, plot)
    for name in kernel or ():
        if name not in kernels.NAMES:
            raise refuse(f"there is no kernel '{name}'", did_you_mean(name, kernels.NAMES), place="--kernel")
    place = _place(device, dtype)
    config = attention.settle(
        _lengths(seq),
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
    _keep(found, out, as_json, lambda: report.attention_table(found))
    if plot is not None:
        report.attention_plot(found, plot)
        _talk(f"drawn: {plot}")
    next_command(f"xt bench --rerun {out}" if out else f"xt bench attention --seq {seq} --out attention.json")


def _rerun(path: Path, out: Path | None, as_json: bool) -> None:
    from xtcli.bench import again, report, results

    results.check_file(out, ".json", "--out")
    before = results.read(path)
    now = again.repeat(before, str(path), _talk)
    rows = results.beside(before, now)
    if out is not None:
        results.write(out, now)
    if as_json:
        print(json.dumps({"before": before, "now": now}, indent=1))
    else:
        report.show(("measured", "then", "now", "change"), rows)
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


def _lengths(text: str) -> list[int]:
    try:
        found = [int(word) for word in text.replace("_", "").split(",")]
    except ValueError:
        found = []
    if not found or min(found) < 2:
        raise refuse(f"'{text}' is not a length", "write --seq 8192 or --seq 1024,2048", place="--seq")
    return found


def _check_files(out: Path | None, plot: Path | None) -> None:
    from xtcli.bench import results

    results.check_file(out, ".json", "--out")
    results.check_file(plot, ".png", "--plot")


def _keep(found: dict[str, Any], out: Path | None, as_json: bool, show: Any) -> None:
    """Write the result file, then print the table or the JSON."""
    from xtcli.bench import results

    if out is not None:
        results.write(out, found)
        _talk(f"written: {out}")
    if as_json:
        print(json.dumps(found, indent=1))
    else:
        show()


def _talk(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
