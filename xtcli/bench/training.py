"""`xt bench train PRESET...`: tokens per second, share of the peak rate, memory, loss, of steps on random tokens."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from xtcli.bench import results
from xtcli.bench.asked import Asked, labels, one_place
from xtcli.bench.reference import Trained, Unmatched, agree
from xtcli.bench.stepping import Bench, prepare, start
from xtcli.bench.timing import Times, clocked, matmul_rate, peak_bytes, release
from xtcli.train.transforms import compiles

Talk = Callable[[str], None]
WARM = 3
"""Steps before timing starts, the first apart."""


@dataclass(frozen=True, kw_only=True)
class Config(Asked):
    """What is asked for."""

    steps: int = 20
    batch: int | None = None
    length: int | None = None
    against: str | None = None
    seed: int = 0


def run(config: Config, talk: Talk) -> dict[str, Any]:
    """Measure; the result as results.py keeps it."""
    presets = config.resolve()
    place = one_place(presets)
    ready = [prepare(p, place, rows=config.batch, length=config.length, seed=config.seed) for p in presets]
    product = matmul_rate(place.device, place.dtype, budget=2.0)
    release(place.device)
    rows: list[dict[str, Any]] = []
    names = labels(config.presets)
    for name, resolved, (skeleton, plan, batch) in zip(names, presets, ready, strict=True):
        talk(f"{name}: {plan.parameters:,} parameters, {len(batch)} x {batch.lengths[0]:,} tokens a step")
        began = time.perf_counter()
        bench = start(name, resolved, place, plan, batch, skeleton, config.seed)
        rows += measure(bench, config, product["flop_per_s"], time.perf_counter() - began, talk)
        del bench
        release(place.device)
    tokens = sorted({batch.tokens for _, _, batch in ready})
    return results.result(
        "train",
        asdict(config),
        {"device": place.name, "dtype": place.precision, "tokens_per_step": tokens},
        {
            "resolved": {name: resolved.to_tree() for name, resolved in zip(names, presets, strict=True)},
            "matmul": product,
            "rows": rows,
        },
    )


def measure(bench: Bench, config: Config, product: float, build: float, talk: Talk) -> list[dict[str, Any]]:
    """The rows of one preset: ours, and the reference's where it is asked for and there is one."""
    device, compiled = bench.place.device, compiles(bench.resolved.preset.train, bench.place.device)
    sides: dict[str, Any] = {"xt": bench}
    missing = None
    if config.against is not None:
        # Made before the first step, while the weights are those that both start from.
        try:
            sides[config.against] = Trained(bench, compiled)
        except Unmatched as reason:
            missing = str(reason)
    checks = [side.check() for side in sides.values()] if len(sides) > 1 else []
    first: dict[str, float] = {}
    raw: dict[str, list[float]] = {name: [] for name in sides}
    for name, side in sides.items():
        first[name] = clocked(side.step, device)
        talk(f"{bench.name}, {name}: first step {first[name]:.3g} s, loss {side.losses[-1]:.4f}")
        for _ in range(WARM - 1):
            clocked(side.step, device)
    for _ in range(config.steps):
        for name, side in sides.items():
            raw[name].append(clocked(side.step, device))
    rows = [_row(bench, name, sides[name], Times(tuple(raw[name]), first[name], WARM), product) for name in sides]
    rows[0]["build_s"] = build
    rows[0]["peak_bytes"] = peak_bytes(bench.step, device, bench.held) if len(sides) == 1 else _apart(sides, "xt")
    if len(sides) > 1:
        other = rows[1]
        other["peak_bytes"] = _apart(sides, other["side"])
        rows[0]["ratio"] = other["step"]["median_ms"] / rows[0]["step"]["median_ms"]
        rows[0]["losses_without_dropout"] = checks
        rows[0]["same_loss"] = agree(checks[0], checks[1], bench.place.precision)
        other["architecture"] = sides[other["side"]].architecture
    elif missing is not None:
        rows[0]["no_reference"] = missing
        talk(f"{bench.name}: {config.against} has no such model: {missing}")
    return rows


def _apart(sides: Mapping[str, Any], name: str) -> int | None:
    """Peak bytes of one side's step, what the other side holds at rest taken off; known on CUDA only."""
    import torch

    side = sides[name]
    device = side.place.device
    if device.type != "cuda":
        return None
    whole = peak_bytes(side.step, device, [])
    resting = torch.cuda.memory_allocated(device)
    own = sum(tensor.nbytes for tensor in _held(side))
    return None if whole is None else whole - resting + own


def _held(side: Any) -> list[Any]:
    if isinstance(side, Bench):
        return side.held
    state = side.optimizer.state.values()
    return [*side.model.parameters(), *(value for entry in state for value in entry.values())]


def _row(bench: Bench, name: str, side: Any, times: Times, product: float) -> dict[str, Any]:
    plan, batch, place = bench.plan, bench.batch, bench.place
    rate = plan.flops / times.median
    supervised = sum(batch.supervised().values())
    mfu = None if place.peak is None else rate / place.peak
    row: dict[str, Any] = {
        "name": f"{bench.name} {name}",
        "preset": bench.name,
        "side": name,
        "parameters": plan.parameters,
        "rows": len(batch),
        "length": batch.lengths[0],
        "micro_batch": plan.micro_batch,
        "step": times.facts(),
        "tok_s": batch.tokens / times.median,
        "targets_s": supervised / times.median,
        "padded_tok_s": batch.padded / times.median,
        "flop_per_step": plan.flops,
        "flop_per_s": rate,
        "share_of_matmul": rate / product,
        "mfu": mfu if mfu is None or mfu <= 1 else None,
        "first_loss": side.losses[0],
        "final_loss": side.losses[-1],
        "losses": list(side.losses),
    }
    if mfu is not None and mfu > 1:
        row["mfu_refused"] = f"{mfu * 100:.0f} % of the peak is impossible: the peak or the FLOPs are wrong"
    return row
