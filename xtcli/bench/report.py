"""Results in words: the tables of each kind of result."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from xtcli.bench.tables import Table, percent, short, spread, where
from xtcli.inspect import units
from xtcli.runs.run import gib
from xtcli.train.curve import curve


def tables(found: Mapping[str, Any]) -> list[Table]:
    """The tables of a result of any kind."""
    from xtcli.bench.performance import performance_tables

    kinds: dict[str, Callable[[Mapping[str, Any]], list[Table]]] = {
        "attention": attention_tables,
        "train": training_tables,
        "generate": generation_tables,
        "race": race_tables,
        "all": performance_tables,
    }
    return kinds[found["kind"]](found)


def attention_tables(found: Mapping[str, Any]) -> list[Table]:
    """All that ran, then all that did not and why."""
    config, product = found["config"], found["matmul"]
    both = not config["forward_only"]
    title = (
        f"{config['batch']} x {config['heads']} heads ({config['kv_heads']} key/value) x {config['head_dim']}, "
        f"{config['dtype']}, {found['conditions']['device']}; "
        f"matrix product {product['flop_per_s'] / 1e12:.3g} TFLOP/s ({product['size']}^3, same run)"
    )
    sides = ["forward", *(["backward"] if both else [])]
    columns = ["attention", "kernel", "tokens"]
    for side in sides:
        columns += [f"{side} ms (p5-p95)", "TFLOP/s", "of product"]
    columns += ["peak memory", "difference"]
    rows = []
    for row in found["rows"]:
        if "skipped" in row:
            continue
        route = row.get("route")
        cells = [row["case"], row["kernel"] + (f" ({route})" if route else ""), f"{row['seq']:,}"]
        for side in sides:
            times = row[side]
            cells += [spread(times), f"{times['tflop_per_s']:.3g}", percent(times["share_of_matmul"])]
        cells.append("n/a" if row["peak_bytes"] is None else gib(row["peak_bytes"]))
        off = row.get("difference")
        cells.append("-" if off is None else f"{off:.1e}" + (" WRONG" if row["wrong"] else ""))
        rows.append(cells)
    made = [Table(title, columns, rows), *_beside(found)]
    if found["growth"]:
        slopes = [
            (name, f"{slopes['time']:.2f}", f"{slopes['memory']:.2f}" if "memory" in slopes else "n/a")
            for name, slopes in found["growth"].items()
        ]
        made.append(Table("", ("growth with the length", "time exponent", "memory exponent"), slopes))
    notes = [f"{found['convention']}. Difference: largest, from the first kernel of the same attention."]
    few = sum("note" in row.get(side, {}) for row in found["rows"] for side in sides)
    if few:
        notes.append(f"{units.plural(few, 'time')} of fewer than 20 steady repeats: the JSON says which (note).")
    made[-1].notes = notes
    return [*made, *_skipped(found["rows"])]


def _beside(found: Mapping[str, Any]) -> list[Table]:
    """Ours beside the fastest other kernel, and few keys beside all; result files of old have neither."""
    behind = [
        (each["case"], f"{each['seq']:,}", each["best"], f"{each['times_best']:.3f}")
        for each in found.get("behind", ())
    ]
    gains = [
        (each["case"], f"{each['seq']:,}", f"{each['dense']}, {each['kernel']}", f"{each['times_faster']:.2f}")
        for each in found.get("gains", ())
    ]
    first = ("xt's choice", "tokens", "fastest other", "time / its time")
    second = ("few keys", "tokens", "fastest on all keys", "times faster")
    return [Table("", names, lines) for names, lines in ((first, behind), (second, gains)) if lines]


def _skipped(rows: Iterable[Mapping[str, Any]]) -> list[Table]:
    """What did not run, by kernel and reason."""
    why: dict[tuple[str, str, int], list[str]] = {}
    for row in rows:
        if "skipped" in row:
            why.setdefault((row["kernel"], row["skipped"], row["seq"]), []).append(row["case"])
    lines = [(kernel, f"{seq:,}", ", ".join(names), text) for (kernel, text, seq), names in why.items()]
    return [Table("", ("not run", "tokens", "attention", "why"), lines)] if lines else []


def training_tables(found: Mapping[str, Any]) -> list[Table]:
    """One row for each preset and side, then what the loop adds."""
    on_cpu = any("processor" in row for row in found["rows"])
    columns = ["preset", "side", "parameters", "tokens a step", "step ms (p5-p95)"]
    columns += ["processor ms"] if on_cpu else []
    columns += ["first step s", "tok/s", "targets/s", "MFU", "of product", "peak memory", "loss first", "loss last"]
    columns += ["of xt's time"]
    rows = []
    for row in found["rows"]:
        first = (row["step"]["first_call_extra_ms"] + row["step"]["median_ms"]) / 1e3
        cells = [row["preset"], row["side"], f"{row['parameters']:,}", f"{row['rows']} x {row['length']:,}"]
        cells.append(spread(row["step"]))
        cells += [short(row["processor"]["median_ms"])] if on_cpu else []
        cells += [
            f"{first:.2f}",
            f"{row['tok_s']:,.0f}",
            f"{row['targets_s']:,.0f}",
            percent(row["mfu"]),
            percent(row["share_of_matmul"]),
            _memory(row["peak_bytes"]),
            f"{row['first_loss']:.4f}",
            f"{row['final_loss']:.4f}",
            times(row),
        ]
        rows.append(cells)
    notes = []
    for row in found["rows"]:
        notes.append(f"{row['preset']}, {row['side']}: {row['note']}" + _same(row))
        if "mfu_refused" in row:
            notes.append(f"{row['name']}: MFU {row['mfu_refused']}")
        notes += _without(row)
    steps = found["block"]
    each = "each step between two waits for the device" if steps == 1 else f"blocks of {steps} steps between two waits"
    notes.append(f"Timed: {each}, the sides in turn; median. Peak memory is that of the side alone.")
    product = found["matmul"]
    title = f"{where(found)}; matrix product {product['flop_per_s'] / 1e12:.3g} TFLOP/s"
    return [Table(title, columns, rows, notes), *_loops(found["rows"])]


def times(row: Mapping[str, Any]) -> str:
    """How much longer a side takes than xt beside it; by the processor too, where that was measured."""
    if "ratio" not in row:
        return "-"
    processor = f" ({row['processor_ratio']:.2f} of processor)" if "processor_ratio" in row else ""
    return f"{row['ratio']:.2f} x{processor}"


def _same(row: Mapping[str, Any]) -> str:
    if "same_loss" not in row:
        return ""
    ours, theirs = row["losses_without_dropout"]
    same = "they agree" if row["same_loss"] else "they DO NOT AGREE: these are two networks"
    return f"; loss before the first step {theirs:.4f}, of xt {ours:.4f}: {same}"


def _without(row: Mapping[str, Any]) -> list[str]:
    return [f"{row['preset']}: not compared with {name}: {why}" for name, why in row.get("no_peer", {}).items()]


def _loops(rows: Iterable[Mapping[str, Any]]) -> list[Table]:
    """What the loop adds to bare steps."""
    cells = [
        (
            row["preset"],
            short(row["loop"]["bare"]["median_ms"]),
            short(row["loop"]["loop"]["median_ms"]),
            f"{row['loop']['share'] * 100:+.2f} %",
            f"{row['loop']['processor_share'] * 100:+.2f} %",
        )
        for row in rows
        if "loop" in row
    ]
    columns = ("loop", "bare steps ms", "with data, log and view ms", "adds", "of processor")
    return [Table("", columns, cells)] if cells else []


def generation_tables(found: Mapping[str, Any]) -> list[Table]:
    """One row for each preset and side."""
    config = found["config"]
    on_cpu = any("processor" in row for row in found["rows"])
    columns = ["preset", "side", "parameters", "first token ms (p5-p95)", "ms a token (p5-p95)"]
    columns += ["processor ms"] if on_cpu else []
    columns += ["tok/s", "first text s", "peak memory", "same tokens", "of xt's time"]
    rows = []
    for row in found["rows"]:
        cells = [row["preset"], row["side"], f"{row['parameters']:,}", spread(row["first_token"])]
        cells.append(spread(row["per_token"]))
        cells += [short(row["processor"]["median_ms"])] if on_cpu else []
        cells += [
            "n/a" if row["tok_s"] is None else f"{row['tok_s']:,.1f}",
            f"{row['first_text_s']:.1f}",
            _memory(row["peak_bytes"]),
            percent(row["same_tokens"]) if "same_tokens" in row else "-",
            times(row),
        ]
        rows.append(cells)
    notes = [f"{row['preset']}, {row['side']}: {row['note']}" for row in found["rows"] if "note" in row]
    notes += [note for row in found["rows"] for note in _without(row)]
    title = f"{config['batch']} x {config['prompt']:,} + {config['new']:,} tokens, {where(found)}"
    return [Table(title, columns, rows, notes)]


def race_tables(found: Mapping[str, Any]) -> list[Table]:
    """Where each ended, best first, and the losses over the tokens in the terminal."""
    rows = sorted(found["rows"], key=lambda row: row["validation_loss"] or row["final_loss"])
    columns = ["preset", "parameters", "FLOP/token", "steps", "tokens", "time s", "tok/s", "loss", "validation loss"]
    cells = [
        (
            row["name"],
            f"{row['parameters']:,}",
            units.flop(row["flop_per_token"]),
            f"{row['steps']:,}",
            f"{row['tokens']:,}",
            f"{row['seconds']:.1f}",
            "n/a" if row["tok_s"] is None else f"{row['tok_s']:,.0f}",
            f"{row['final_loss']:.4f}",
            "n/a" if row["validation_loss"] is None else f"{row['validation_loss']:.4f}",
        )
        for row in rows
    ]
    config = found["config"]
    budget = f"{config['seconds']:g} s of training each" if config["seconds"] else f"{config['tokens']:,} tokens each"
    title = f"{budget}, {where(found)}; losses in nats per target, of the last tenth of the steps"
    return [Table(title, columns, cells)]


def race_curves(found: Mapping[str, Any]) -> None:
    """Print the losses over the tokens, one picture for each."""
    rows = sorted(found["rows"], key=lambda row: row["validation_loss"] or row["final_loss"])
    width, height = units.terminal()
    every = [point[3] for row in rows for point in row["training"]]
    last = max(row["tokens"] for row in rows)
    for row in rows:
        points = [(point[0], point[3]) for point in row["training"]]
        room = max(3, min(8, height // len(rows) - 4))
        scale: dict[str, Any] = {"low": min(every), "high": max(every), "first": 0, "last": last}
        text = curve(points, min(width, 100), room, **scale)
        print("\n".join([f"{row['name']}: loss over tokens", *(line.replace("step ", "token ") for line in text)]))


def _memory(count: int | None) -> str:
    return "n/a" if count is None else gib(count)
