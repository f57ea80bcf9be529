"""`xt bench train PRESET...`: tokens per second, share of the peak rate, memory, loss, of steps on random tokens.

Steps are timed in blocks between two waits for the device, since the loop itself waits only where it logs: a wait at
each step would hold back whoever has queued the next one. The sides of a comparison take turns, block by block, and
the median block counts. On the CPU a block is one step.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch

from xtcli.bench import results
from xtcli.bench.asked import Asked, labels, one_place
from xtcli.bench.peers import Peer, Unmatched, chosen, versions
from xtcli.bench.peers.exported import Exported, export
from xtcli.bench.peers.stepped import Setting
from xtcli.bench.share import Share
from xtcli.bench.stepping import Bench, prepare, start
from xtcli.bench.timing import Clock, Times, clocked, matmul_rate, release
from xtcli.train.transforms import compiles

Talk = Callable[[str], None]
WARM = 3
"""Steps before timing starts, the first apart; on a GPU they fill a block."""

BLOCK = {"cuda": 5}
"""Steps of a block by type of device; one elsewhere."""

FEWEST = 3
"""Blocks that are timed at least."""


@dataclass(frozen=True, kw_only=True)
class Config(Asked):
    """What is asked for. `against` are peers, in words of the command line; `loop`: the loop's own share too."""

    steps: int = 20
    batch: int | None = None
    length: int | None = None
    loop: bool = False
    seed: int = 0


def run(config: Config, talk: Talk) -> dict[str, Any]:
    """Measure; the result as results.py keeps it."""
    peers = chosen(config.against, "train")
    presets = config.resolve()
    place = one_place(presets)
    ready = [prepare(p, place, rows=config.batch, length=config.length, seed=config.seed) for p in presets]
    product = matmul_rate(place.device, place.dtype, budget=2.0)
    release(place.device)
    rows: list[dict[str, Any]] = []
    names = labels(config.presets)
    block = BLOCK.get(place.device.type, 1)
    for name, resolved, (skeleton, plan, batch) in zip(names, presets, ready, strict=True):
        talk(f"{name}: {plan.parameters:,} parameters, {len(batch)} x {batch.lengths[0]:,} tokens a step")
        began = time.perf_counter()
        own = Share(place.device)
        with own.grows():
            bench = start(name, resolved, place, plan, batch, skeleton, config.seed, block)
        rows += Measured(bench, own, config, peers, product["flop_per_s"], talk).rows(time.perf_counter() - began)
        del bench, own
        release(place.device)
    tokens = sorted({batch.tokens for _, _, batch in ready})
    return results.result(
        "train",
        asdict(config),
        {"device": place.name, "dtype": place.precision, "tokens_per_step": tokens},
        {
            "resolved": {name: resolved.to_tree() for name, resolved in zip(names, presets, strict=True)},
            "peers": versions(peers),
            "matmul": product,
            "block": block,
            "rows": rows,
        },
    )


@dataclass
class Measured:
    """One preset beside its peers."""

    bench: Bench
    own: Share
    config: Config
    peers: list[Peer]
    product: float
    talk: Talk

    @property
    def block(self) -> int:
        """Steps between two waits."""
        return BLOCK.get(self.bench.place.device.type, 1)

    def rows(self, build: float) -> list[dict[str, Any]]:
        """The rows of the preset: ours, then each peer's, or why it has none."""
        bench = self.bench
        missing: dict[str, str] = {}
        given = self._exported(missing)
        check = bench.check() if given is not None else None
        first = self._warm("xt", bench, self.own)
        found: list[dict[str, Any]] = []
        setting, apart = Setting.of(bench), []
        ours: dict[str, Any] | None = None
        for peer in self.peers if given is not None else ():
            assert given is not None and check is not None
            try:
                row, times = self._beside(peer, setting, given, check)
            except Unmatched as reason:
                missing[peer.name] = str(reason)
                continue
            except torch.OutOfMemoryError:
                self.talk(f"{bench.name}: no room for {peer.name} beside xt; it follows alone")
                apart.append(peer)
                continue
            found.append(row)
            assert times is not None
            ours = ours or self._row("xt", bench, times, first)
        if ours is None:
            ours = self._row("xt", bench, self._time({"xt": bench})["xt"], first)
        ours |= {"build_s": build, "peak_bytes": self.own.peak(bench.step, bench.held)}
        if self.config.loop:
            from xtcli.bench.overhead import overhead

            ours["loop"] = overhead(bench, self.talk)
        if apart:
            self._leave()
        for peer in apart:
            assert given is not None and check is not None
            try:
                row, _ = self._beside(peer, setting, given, check, ours)
            except torch.OutOfMemoryError:
                missing[peer.name] = "out of memory"
                continue
            found.append(row)
        if missing:
            ours["no_peer"] = missing
        for name, why in missing.items():
            self.talk(f"{bench.name}: {name} has no such model: {why}")
        return [ours, *found]

    def _leave(self) -> None:
        """Give back what ours holds: it runs no more."""
        nothing: Any = None
        self.bench.model = self.bench.trainer = nothing
        release(self.bench.place.device)

    def _exported(self, missing: dict[str, str]) -> Exported | None:
        """The weights before the first step, as peers take them; else `missing` says why none can."""
        if not self.peers:
            return None
        try:
            return export(self.bench.model)
        except Unmatched as reason:
            missing |= dict.fromkeys((peer.name for peer in self.peers), str(reason))
            return None

    def _beside(
        self, peer: Peer, setting: Setting, given: Exported, check: float, before: dict[str, Any] | None = None
    ) -> tuple[dict[str, Any], Timed | None]:
        """The row of one peer, and the times of ours in turn with it; raises Unmatched.

        before: the row of ours, where that has been measured and has gone.
        """
        bench, device = self.bench, setting.place.device
        compiled = compiles(bench.resolved.preset.train, device)
        share, side = Share(device), None
        try:
            with share.grows():
                side = peer.adapter.train(setting, given, compiled, peer.path)
            theirs = side.check()
            first = self._warm(peer.name, side, share)
            times = self._time({peer.name: side} if before else {"xt": bench, peer.name: side})
            row = self._row(peer.name, side, times[peer.name], first)
            row["peak_bytes"] = share.peak(side.step, side.held)
        finally:
            side = None
            release(device)
        if before is not None:
            row["note"] += "; after xt, since there was no room for both"
        row["xt_step"] = times["xt"].wall.facts() if before is None else before["step"]
        row["ratio"] = row["step"]["median_ms"] / row["xt_step"]["median_ms"]
        if "processor" in row:
            row["xt_processor"] = times["xt"].processor.facts() if before is None else before["processor"]
            row["processor_ratio"] = row["processor"]["median_ms"] / row["xt_processor"]["median_ms"]
        row["losses_without_dropout"] = [check, theirs]
        row["same_loss"] = agree(check, theirs, setting.place.precision)
        return row, times.get("xt")

    def _warm(self, name: str, side: Any, share: Share) -> float:
        """Seconds of the first step; warm-up steps follow it."""
        device = self.bench.place.device
        with share.grows():
            first = clocked(side.step, device)
            side.look()
            self.talk(f"{self.bench.name}, {name}: first step {first:.3g} s, loss {side.losses[-1]:.4f}")
        with share.grows(steps=True):
            for number in range(2, _warm_steps(self.block) + 1):
                side.step()
                if number % self.block == 0:
                    side.look()
        return first

    def _time(self, sides: dict[str, Any]) -> dict[str, Timed]:
        """Blocks of each side in turn."""
        clocks = {name: Clock(self.bench.place.device) for name in sides}
        for _ in range(max(self.config.steps // self.block, FEWEST)):
            for name, side in sides.items():
                with clocks[name].block(self.block):
                    for _ in range(self.block):
                        side.step()
                side.look()
        return {name: Timed(clock.times(), clock.processor_times()) for name, clock in clocks.items()}

    def _row(self, name: str, side: Any, times: Timed, first: float) -> dict[str, Any]:
        bench = self.bench
        plan, batch, place = bench.plan, bench.batch, bench.place
        wall = Times(times.wall.raw, first, _warm_steps(self.block), times.wall.note)
        rate = plan.flops / wall.median
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
            "step": wall.facts(),
            "tok_s": batch.tokens / wall.median,
            "targets_s": supervised / wall.median,
            "padded_tok_s": batch.padded / wall.median,
            "flop_per_step": plan.flops,
            "flop_per_s": rate,
            "share_of_matmul": rate / self.product,
            "mfu": mfu if mfu is None or mfu <= 1 else None,
            "first_loss": side.losses[0],
            "final_loss": side.losses[-1],
            "losses": list(side.losses),
        }
        if place.device.type == "cpu":
            row["processor"] = times.processor.facts()
        if isinstance(side, Bench):
            compiled = compiles(bench.trainer.config, place.device)
            row["note"] = f"{place.precision}, {'compiled by block' if compiled else 'not compiled'}"
        else:
            row |= {"note": side.note, "architecture": side.architecture}
        if mfu is not None and mfu > 1:
            row["mfu_refused"] = f"{mfu * 100:.0f} % of the peak is impossible: the peak or the FLOPs are wrong"
        return row


@dataclass(frozen=True)
class Timed:
    """Times of a step: by the clock, and of the processor, all threads together."""

    wall: Times
    processor: Times


def _warm_steps(block: int) -> int:
    """Steps before timing, whole blocks of them, so that the loop logs at the end of each block that is timed."""
    return -(-WARM // block) * block


def agree(ours: float, theirs: float, precision: str) -> bool:
    """Whether two first losses are those of the same network."""
    return abs(ours - theirs) <= (1e-3 if precision == "fp32" else 3e-2) * max(abs(theirs), 1.0)
