"""`xt bench generate PRESET...`: time to the first token and for each further one, on random weights and prompts.

The loop is that of `xt generate`, greedy, without text: every token reaches the host. No text ends before `new` tokens.
The sides of a comparison take turns, text by text; the rest of a text after its first token, divided, is the time of a
further token.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch

from xtcli.bench import results
from xtcli.bench.asked import Asked, labels
from xtcli.bench.peers import Peer, Unmatched, chosen, versions
from xtcli.bench.peers.exported import export
from xtcli.bench.share import Share
from xtcli.bench.timing import Clock, Times, clocked, release
from xtcli.config.preset import Resolved
from xtcli.errors import refuse
from xtcli.generate.decode import Row, Rules, Timing, decode
from xtcli.generate.engine import limit_of, task_of, undisturbed
from xtcli.generate.sampling import Sampling
from xtcli.generate.stops import Text
from xtcli.generate.streams import feed_for
from xtcli.model import Model, build, count, skeleton
from xtcli.parts.int8 import quantise
from xtcli.parts.seq2seq import EncoderDecoder
from xtcli.train.device import DTYPES, Place

Talk = Callable[[str], None]
GREEDY = Sampling(temperature=0)
EIGHT = "xt, 8-bit weights"
SHORT = 16
"""Tokens of the text whose memory is measured: more take no more, but for their slots in the caches."""


@dataclass(frozen=True, kw_only=True)
class Config(Asked):
    """What is asked for. `against` are peers, as words of the command line; `int8`: beside it, the same in 8 bits."""

    device: str
    dtype: str
    batch: int = 1
    prompt: int = 128
    new: int = 128
    repeats: int = 5
    int8: bool = False
    seed: int = 0


def run(config: Config, place: Place, talk: Talk) -> dict[str, Any]:
    """Measure; the result as results.py keeps it."""
    peers = chosen(config.against, "write")
    presets = config.resolve()
    for resolved in presets:
        _check(resolved, config)
    rows: list[dict[str, Any]] = []
    names = labels(config.presets)
    for name, resolved in zip(names, presets, strict=True):
        talk(f"{name}: {config.batch} x {config.prompt} + {config.new} tokens, {config.dtype}, {place.name}")
        own = Share(place.device)
        with own.grows():
            model = build(resolved, seed=config.seed, device=place.device, dtype=DTYPES[config.dtype])
        with undisturbed(model):
            rows += Measured(name, model, own, config, place, talk).rows(peers)
        del model
        release(place.device)
    return results.result(
        "generate",
        asdict(config),
        {"device": place.name, "dtype": config.dtype, "tokens_per_step": config.batch},
        {
            "resolved": {name: resolved.to_tree() for name, resolved in zip(names, presets, strict=True)},
            "peers": versions(peers),
            "rows": rows,
        },
    )


def _check(resolved: Resolved, config: Config) -> None:
    model = skeleton(resolved)
    task = task_of(model)
    if task not in ("continue", "map"):
        raise refuse(f"{resolved.name} writes no text token by token, it can {task}", "name a preset with a head lm")
    # A text and its answer share the positions of a decoder; an encoder has its own.
    tower = model.decoder if isinstance(model, EncoderDecoder) else model
    wanted = config.new + (1 if task == "map" else config.prompt)
    limit = limit_of(tower)
    if limit is not None and wanted > limit:
        raise refuse(
            f"{resolved.name} has {limit:,} positions, {wanted:,} tokens are asked for", "lower --prompt or --new"
        )


def start_of(model: Model) -> int | None:
    """The token that an answer starts with, None where the prompt itself is continued."""
    if not isinstance(model, EncoderDecoder):
        return None
    return model.config.start if model.config.start is not None else model.config.pad or 0


class Mute:
    """Turns tokens into no text."""

    def push(self, token: int) -> str:
        """Nothing."""
        return ""

    def finish(self) -> str:
        """Nothing."""
        return ""


class Ours:
    """`xt generate` without text: `write` makes `new` tokens of each row."""

    def __init__(self, model: Model, prompts: list[list[int]]) -> None:
        self.model, self.prompts, self.start = model, prompts, start_of(model)
        self.rules = Rules(GREEDY, frozenset(), model.vocab)
        self.slow: str | None = None

    def write(self, new: int) -> list[list[int]]:
        """The new tokens of each row."""
        begun = self.prompts if self.start is None else [[self.start]] * len(self.prompts)
        feed = feed_for(self.model)(self.model, begun, new, None if self.start is None else self.prompts)
        rows = [Row(number, Text(Mute()), new, False) for number in range(len(begun))]
        for _ in decode(feed, rows, 1, self.rules, Timing()):
            pass
        self.slow = feed.slow
        return [row.tokens for row in rows]


@dataclass
class Measured:
    """One preset beside its peers."""

    preset: str
    model: Model
    own: Share
    config: Config
    place: Place
    talk: Talk

    def rows(self, peers: list[Peer]) -> list[dict[str, Any]]:
        """The rows of the preset: ours, then each way in which a peer writes, or why there is none."""
        config, model = self.config, self.model
        generator = torch.Generator().manual_seed(config.seed)
        prompts = torch.randint(model.vocab, (config.batch, config.prompt), generator=generator).tolist()
        sides: dict[str, Any] = {"xt": Ours(model, prompts)}
        shares = {"xt": self.own}
        missing: dict[str, str] = {}
        if config.int8:
            share = Share(self.place.device)
            with share.grows():
                small = copy.deepcopy(model)
                quantise(small)
            sides[EIGHT], shares[EIGHT] = Ours(small, prompts), share
        for peer in peers:
            share = Share(self.place.device)
            try:
                with share.grows():
                    found = self._peer(peer, prompts)
            except Unmatched as reason:
                missing[peer.name] = str(reason)
                self.talk(f"{self.preset}: {peer.name} has no such model: {reason}")
                continue
            for way, side in found.items():
                sides[f"{peer.name}, {way}" if way else peer.name] = side
                shares[f"{peer.name}, {way}" if way else peer.name] = share
        rows = self._measured(sides, shares)
        for row in rows[1:]:
            pairs = [
                a == b
                for one, other in zip(rows[0]["tokens"], row["tokens"], strict=True)
                for a, b in zip(one, other, strict=True)
            ]
            row["same_tokens"] = sum(pairs) / len(pairs)
            row["ratio"] = row["per_token"]["median_ms"] / rows[0]["per_token"]["median_ms"]
            if "processor" in row:
                row["processor_ratio"] = row["processor"]["median_ms"] / rows[0]["processor"]["median_ms"]
        if missing:
            rows[0]["no_peer"] = missing
        return rows

    def _peer(self, peer: Peer, prompts: list[list[int]]) -> dict[str, Any]:
        config, device = self.config, self.place.device
        given = export(self.model)
        start = start_of(self.model)
        found: dict[str, Any] = peer.adapter.write(
            given, prompts, start, config.new, device, DTYPES[config.dtype], peer.path
        )
        return found

    def _measured(self, sides: dict[str, Any], shares: dict[str, Share]) -> list[dict[str, Any]]:
        """Every side warmed up, then whole texts and first tokens of each in turn."""
        config, device = self.config, self.place.device
        tokens: dict[str, Any] = {}
        opening: dict[str, float] = {}
        for name, side in sides.items():

            def text(name: str = name, side: Any = side) -> None:
                tokens[name] = side.write(config.new)

            opening[name] = clocked(text, device)
            self.talk(f"{self.preset}, {name}: first text {opening[name]:.3g} s")
            with shares[name].grows(steps=True):
                side.write(config.new)
        firsts = {name: Clock(device) for name in sides}
        wholes = {name: Clock(device) for name in sides}
        for _ in range(config.repeats):
            for name, side in sides.items():
                with firsts[name].block(1):
                    side.write(1)
                with wholes[name].block(1):
                    side.write(config.new)
        rows = []
        for name, side in sides.items():
            row = self._row(name, firsts[name], wholes[name], tokens[name], opening[name])
            short = partial(side.write, min(config.new, SHORT))
            if getattr(side, "slow", None):
                row["note"] = f"steps wait for one another and are not recorded: {side.slow}"
            rows.append(row | {"peak_bytes": shares[name].peak(short, side.model.parameters())})
        return rows

    def _row(self, name: str, first: Clock, whole: Clock, tokens: list[list[int]], opening: float) -> dict[str, Any]:
        steps = max(self.config.new - 1, 1)
        begun = first.times()

        def each(seconds: list[float], start: float) -> Times:
            return Times(tuple(max(second - start, 0.0) / steps for second in seconds), seconds[0] / steps, 2)

        per = each(whole.raw, begun.median)
        self.talk(f"{self.preset}, {name}: first {begun.median * 1e3:.3g} ms, then {per.median * 1e3:.3g} ms a token")
        row = {
            "name": f"{self.preset} {name}",
            "preset": self.preset,
            "side": name,
            "parameters": count(self.model),
            "first_token": begun.facts(),
            "per_token": per.facts(),
            "tok_s": self.config.batch / per.median if per.median else None,
            "whole_s": whole.raw,
            "first_text_s": opening,
            "tokens": tokens,
        }
        if self.place.device.type == "cpu":
            row["processor"] = each(whole.processor, first.processor_times().median).facts()
        return row
