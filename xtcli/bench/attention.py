"""`xt bench attention`: every kind of attention on every kernel, forward and backward, at one or several lengths.

The time that the whole may take is shared out: each case gets an equal part of what is left, the kernels that are used
in earnest first. A case that a short probe predicts to need more than its part is left out with that reason, so that
the end is known beforehand.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from xtcli.bench import cases, kernels, results
from xtcli.bench.cases import Case, Shape
from xtcli.bench.kernels import Cannot, Kernel
from xtcli.bench.timing import Times, clocked, matmul_rate, measure, peak_bytes, release
from xtcli.errors import refuse
from xtcli.train.device import DTYPES, Place

Talk = Callable[[str], None]
PROBE = 512
"""Tokens of the probe that predicts the time of longer texts."""

WRONG = {"fp32": 1e-3, "bf16": 6e-2, "fp16": 2e-2}
"""Largest difference between two kernels' outputs that rounding explains."""


ONCE = "1 repeat, the first call: its share of the time has room for no other"


@dataclass(frozen=True)
class Config:
    """What is asked for. `masks` names cases; none is all. Times in seconds."""

    seq: tuple[int, ...]
    batch: int
    heads: int
    kv_heads: int
    head_dim: int
    dtype: str
    device: str
    masks: tuple[str, ...] = ()
    kernels: tuple[str, ...] = kernels.NAMES
    forward_only: bool = False
    limit: float = 90.0
    seed: int = 0

    @classmethod
    def read(cls, facts: Mapping[str, Any]) -> Config:
        """The configuration of a result file."""
        read: dict[str, Any] = {n: tuple(value) if isinstance(value, list) else value for n, value in facts.items()}
        return cls(**read)

    def shape(self, seq: int) -> Shape:
        """Sizes at one length."""
        return Shape(self.batch, self.heads, self.kv_heads, seq, self.head_dim)


def settle(
    seq: Sequence[int],
    place: Place,
    *,
    batch: int | None,
    heads: int | None,
    kv_heads: int | None,
    head_dim: int,
    **more: Any,
) -> Config:
    """The configuration with its defaults: 4 texts of 16 heads on a GPU, and on the CPU one text of one head where
    it is long, of two where it is short. Raises UserError."""
    long = max(seq) > 2048
    gpu = place.device.type == "cuda"
    heads = heads or (kv_heads if kv_heads else 16 if gpu else 1 if long else 2)
    groups = kv_heads or heads
    if heads % groups:
        raise refuse(f"{groups} key/value heads do not divide {heads} heads", "change --heads or --kv-heads")
    return Config(
        seq=tuple(sorted(set(seq))),
        batch=batch or (4 if gpu else 1),
        heads=heads,
        kv_heads=groups,
        head_dim=head_dim,
        dtype=place.precision,
        device=place.device.type,
        **more,
    )


def run(config: Config, place: Place, talk: Talk) -> dict[str, Any]:
    """Measure; the result as results.py keeps it."""
    began = time.perf_counter()
    dtype = DTYPES[config.dtype]
    wanted = cases.chosen_cases(config.masks)
    talk(
        f"{config.batch} x {config.heads} heads ({config.kv_heads} key/value) x {config.head_dim}, {config.dtype}, "
        f"on {place.name}; ends within about {config.limit:.0f} s"
    )
    product = matmul_rate(place.device, dtype, budget=min(3.0, config.limit / 20))
    # What follows memory loads parts of PyTorch at its first use, which no case should pay for.
    peak_bytes(lambda: torch.ones(2, device=place.device) @ torch.ones(2, device=place.device), place.device, ())
    release(place.device)
    rows: list[dict[str, Any]] = []
    # Kernels of one case follow one another, so that its mask is made once.
    order = [(seq, case, name) for seq in config.seq for case in wanted for name in config.kernels]
    if config.kernels == kernels.NAMES:
        # What has one kernel of its own, and that kernel, need no word about the others.
        order = [(seq, case, name) for seq, case, name in order if (case.mixer is not None) == (name == "own")]
    waiting = sum(kernels.never(name, case, place.device) is None for _, case, name in order)
    outputs: dict[tuple[int, str], Tensor] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for seq, case, name in order:
            row = _row(case, name, config.shape(seq))
            rows.append(row)
            row["skipped"] = kernels.never(name, case, place.device)
            if row["skipped"] is not None:
                continue
            left = config.limit - (time.perf_counter() - began)
            try:
                found, out = _measure(case, name, config, seq, place, left / waiting, left)
                row["route"] = found.pop("route", None)
                row |= _rated(found, row, product["flop_per_s"])
                # Kept in main memory, so that it does not count in the peak of the next.
                out = out.cpu()
                _check(row, out, outputs.setdefault((seq, case.name), out), config.dtype)
                del out, row["skipped"]
            except Cannot as cannot:
                row["skipped"] = str(cannot)
            except torch.OutOfMemoryError:
                row["skipped"] = "out of memory"
            waiting -= 1
            talk(_said(row))
    names = [case.name for case in wanted]
    rows.sort(key=lambda row: (row["seq"], names.index(row["case"])))
    return results.result(
        "attention",
        asdict(config),
        {"device": place.name, "dtype": config.dtype, "tokens_per_step": None},
        {
            "convention": "FLOPs of visible pairs only: 4 D forward, 10 D backward, for each pair and head",
            "matmul": product,
            "cases": {case.name: case.facts() for case in wanted},
            "growth": growth(rows),
            "behind": behind(rows),
            "gains": gains(rows, {case.name: case.dense for case in wanted if case.dense is not None}),
            "seconds": time.perf_counter() - began,
            "rows": rows,
        },
    )


def _row(case: Case, name: str, shape: Shape) -> dict[str, Any]:
    forward, backward = cases.flops(case, shape)
    return {
        "name": f"{case.name} {name} {shape.seq}",
        "case": case.name,
        "subject": case.subject,
        "kernel": name,
        "seq": shape.seq,
        "pairs": cases.pairs_of(case, shape),
        "flop": {"forward": forward, "backward": backward},
    }


def _measure(
    case: Case, name: str, config: Config, seq: int, place: Place, share: float, left: float
) -> tuple[dict[str, Any], Tensor]:
    """The times and peak memory of one case on one kernel, and its output; raises Cannot."""
    device, dtype, shape = place.device, DTYPES[config.dtype], config.shape(seq)
    if left <= 0:
        raise Cannot("no time left; raise --limit, or name fewer with --mask")
    release(device)
    ready = kernels.make(name, case, shape, device, dtype, int(place.free() * 0.85))
    if device.type == "cpu" and seq > PROBE:
        _affordable(case, name, replace(shape, seq=PROBE), seq, place, dtype, max(share, 1.0))
    given = cases.inputs(shape, device, dtype, config.seed)
    while True:
        with warnings.catch_warnings(record=True) as heard, ready.context():
            warnings.simplefilter("always")
            try:
                return _timed(ready, given, config, device, share)
            except torch.OutOfMemoryError:
                raise
            except (RuntimeError, NotImplementedError, ValueError) as error:
                # By which kernels say what they cannot do; the table prints it.
                if ready.smaller is None:
                    raise Cannot(kernels.reason(name, error, list(heard))) from None
        ready = ready.smaller()


def _timed(
    ready: Kernel, given: tuple[Tensor, ...], config: Config, device: torch.device, share: float
) -> tuple[dict[str, Any], Tensor]:
    """The times and peak memory of a kernel that is ready, and its output."""
    q, k, v, dy = given
    parts = 1 if config.forward_only else 2
    # A GPU may still compile or choose a kernel in the second call.
    on_cpu = device.type == "cpu"
    found: dict[str, Any] = {}
    # The call that shows memory and output is also the one that compiles.
    began = time.perf_counter()
    found["route"] = ready.route
    found["peak_bytes"], out, once = _peak(ready, given, device, config.forward_only)
    spent = time.perf_counter() - began
    found["start_ms"] = spent * 1e3
    if on_cpu and spent > share / 2:
        # No time for a second call; nothing compiles on a CPU, so the first is as good.
        return found | {part: Times((seconds,), seconds, 0, ONCE) for part, seconds in once.items()}, out
    # What the first call left of this case's share; the backward pass needs a forward pass before it.
    budget = min(max(share - (spent if on_cpu else 0.0), 0.0) / (parts + 1), 2.0)
    # With gradients, as in training: without, a compiled kernel would be compiled once more.
    with torch.set_grad_enabled(not config.forward_only):
        found["forward"] = measure(lambda: ready.attend(q, k, v), device, budget=budget, called=on_cpu)
    if not config.forward_only:
        found["backward"] = _backward(ready, (q, k, v), dy, device, budget)
    return found, out


def _backward(ready: Kernel, given: tuple[Tensor, ...], dy: Tensor, device: torch.device, budget: float) -> Times:
    out = ready.attend(*given)
    on_cpu = device.type == "cpu"
    return measure(lambda: torch.autograd.grad(out, given, dy, retain_graph=True), device, budget=budget, called=on_cpu)


def _peak(
    ready: Kernel, given: tuple[Tensor, ...], device: torch.device, forward_only: bool
) -> tuple[int | None, Tensor, dict[str, float]]:
    """Peak bytes of forward and backward together, the output, and the seconds of each."""
    q, k, v, dy = given
    made: list[Tensor] = []
    seconds: dict[str, float] = {}

    def once() -> None:
        seconds["forward"] = clocked(lambda: made.append(ready.attend(q, k, v)), device)
        if not forward_only:
            seconds["backward"] = clocked(lambda: torch.autograd.grad(made[0], (q, k, v), dy), device)

    with torch.set_grad_enabled(not forward_only):
        found = peak_bytes(once, device, given)
    if found is not None and device.type == "cpu":
        found += ready.masks
    return found, made[0].detach(), seconds


def _affordable(case: Case, name: str, shape: Shape, seq: int, place: Place, dtype: torch.dtype, share: float) -> None:
    """Raise Cannot where a short probe says that one forward pass takes longer than its share of the time."""
    ready = kernels.make(name, case, shape, place.device, dtype, place.free())
    q, k, v, _ = cases.inputs(shape, place.device, dtype, 0)
    with torch.no_grad(), ready.context():
        try:
            seconds = min(clocked(lambda: ready.attend(q, k, v), place.device) for _ in range(3))
        except RuntimeError as error:
            raise Cannot(kernels.reason(name, error, [])) from None
    predicted = seconds * (seq / shape.seq) ** case.power
    if predicted > share:
        raise Cannot(f"one forward pass would take about {predicted:.2g} s, {share:.2g} s are its share")


def _rated(found: Mapping[str, Any], row: Mapping[str, Any], product: float) -> dict[str, Any]:
    """Times as plain data with their rates."""
    rated: dict[str, Any] = {"peak_bytes": found["peak_bytes"], "first_call_ms": found["start_ms"]}
    for part in ("forward", "backward"):
        if part in found:
            times: Times = found[part]
            rate = row["flop"][part] / times.median
            rated[part] = times.facts() | {"tflop_per_s": rate / 1e12, "share_of_matmul": rate / product}
    return rated


def _check(row: dict[str, Any], out: Tensor, reference: Tensor, dtype: str) -> None:
    """Note how far the output is from that of the first kernel that ran this case."""
    if out is not reference:
        row["difference"] = float((out.float() - reference.float()).abs().max())
        # A nan is no agreement either.
        row["wrong"] = not row["difference"] <= WRONG[dtype]


def growth(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """For each case and kernel the exponents of time and memory in the length, where several lengths ran."""
    found: dict[str, dict[str, float]] = {}
    ran = [row for row in rows if "forward" in row]
    for key in dict.fromkeys((row["case"], row["kernel"]) for row in ran):
        same = [row for row in ran if (row["case"], row["kernel"]) == key]
        if len({row["seq"] for row in same}) < 2:
            continue
        slopes = {"time": slope([(row["seq"], total_ms(row)) for row in same])}
        if all(row["peak_bytes"] for row in same):
            slopes["memory"] = slope([(row["seq"], row["peak_bytes"]) for row in same])
        found[" ".join(key)] = slopes
    return found


def total_ms(row: Mapping[str, Any]) -> float:
    """Forward and backward together, median."""
    return sum(float(row[part]["median_ms"]) for part in ("forward", "backward") if part in row)


def behind(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """For each attention that ours and another kernel ran: the fastest other one, and our time over its time."""
    found = []
    measured = list(ran(rows))
    for ours in (row for row in measured if row["kernel"] == "xt"):
        others = [r for r in measured if (r["case"], r["seq"]) == (ours["case"], ours["seq"]) and r is not ours]
        if others:
            best = min(others, key=total_ms)
            over = total_ms(ours) / total_ms(best)
            found.append({"case": ours["case"], "seq": ours["seq"], "best": best["kernel"], "times_best": over})
    return found


def gains(rows: Sequence[Mapping[str, Any]], sparse: Mapping[str, str]) -> list[dict[str, Any]]:
    """How many times faster than the fastest dense attention ours is where few keys are seen. `sparse`: each such case
    and its dense one."""
    found = []
    measured = list(ran(rows))
    for ours in (row for row in measured if row["kernel"] in ("xt", "own") and row["case"] in sparse):
        dense = [r for r in measured if (r["case"], r["seq"]) == (sparse[ours["case"]], ours["seq"])]
        if dense:
            best = min(dense, key=total_ms)
            times = total_ms(best) / total_ms(ours)
            place = {"case": ours["case"], "seq": ours["seq"]}
            found.append(place | {"dense": best["case"], "kernel": best["kernel"], "times_faster": times})
    return found


def slope(points: Sequence[tuple[float, float]]) -> float:
    """The exponent p of the least-squares fit y = c x^p."""
    xs, ys = [math.log(x) for x, _ in points], [math.log(y) for _, y in points]
    x0, y0 = sum(xs) / len(xs), sum(ys) / len(ys)
    return sum((x - x0) * (y - y0) for x, y in zip(xs, ys, strict=True)) / sum((x - x0) ** 2 for x in xs)


def ran(rows: Sequence[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
    """The rows that were measured."""
    return (row for row in rows if "forward" in row)


def _said(row: Mapping[str, Any]) -> str:
    if "skipped" in row:
        return f"{row['name']}: {row['skipped']}"
    return f"{row['name']}: " + ", ".join(
        f"{part} {row[part]['median_ms']:.3g} ms" for part in ("forward", "backward") if part in row
    )
