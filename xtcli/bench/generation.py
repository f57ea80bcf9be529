"""`xt bench generate PRESET...`: time to the first token and for each further one, on random weights and prompts.

The steps are those of `xt generate`: its feed of prompts, its state, its greedy choice with one look of the host at
the device for each token. No text ends before `new` tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from xtcli.bench import results
from xtcli.bench.asked import Asked, labels
from xtcli.bench.reference import Unmatched, reference
from xtcli.bench.timing import Times, clocked, measure, peak_bytes, release
from xtcli.config.preset import Resolved
from xtcli.errors import refuse
from xtcli.generate.decode import choose
from xtcli.generate.engine import limit_of, task_of, undisturbed
from xtcli.generate.sampling import Sampling
from xtcli.generate.streams import feed_for
from xtcli.model import Model, build, count, skeleton
from xtcli.parts.seq2seq import EncoderDecoder
from xtcli.train.device import DTYPES, Place

Talk = Callable[[str], None]
GREEDY = Sampling(temperature=0)


@dataclass(frozen=True, kw_only=True)
class Config(Asked):
    """What is asked for."""

    device: str
    dtype: str
    batch: int = 1
    prompt: int = 128
    new: int = 128
    repeats: int = 5
    against: str | None = None
    seed: int = 0


def run(config: Config, place: Place, talk: Talk) -> dict[str, Any]:
    """Measure; the result as results.py keeps it."""
    presets = config.resolve()
    for resolved in presets:
        _check(resolved, config)
    rows: list[dict[str, Any]] = []
    names = labels(config.presets)
    for name, resolved in zip(names, presets, strict=True):
        talk(f"{name}: {config.batch} x {config.prompt} + {config.new} tokens, {config.dtype}, {place.name}")
        model = build(resolved, seed=config.seed, device=place.device, dtype=DTYPES[config.dtype])
        with undisturbed(model):
            rows += _measure(name, model, resolved, config, place, talk)
        del model
        release(place.device)
    return results.result(
        "generate",
        asdict(config),
        {"device": place.name, "dtype": config.dtype, "tokens_per_step": config.batch},
        {
            "resolved": {name: resolved.to_tree() for name, resolved in zip(names, presets, strict=True)},
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


class Ours:
    """`xt generate` without text: `write` makes `new` tokens of each row."""

    def __init__(self, model: Model, prompts: list[list[int]]) -> None:
        self.model, self.prompts, self.start = model, prompts, start_of(model)

    def write(self, new: int) -> list[list[int]]:
        """The new tokens of each row."""
        rows = self.prompts if self.start is None else [[self.start]] * len(self.prompts)
        feed = feed_for(self.model)(self.model, rows, new, None if self.start is None else self.prompts)
        logits = feed.start()
        columns = []
        for step in range(new):
            chosen, host = choose(logits, GREEDY, None, None)
            columns.append(host)
            if step + 1 < new:
                logits = feed.step(chosen)
        return [list(row) for row in zip(*columns, strict=True)]


class Theirs:
    """transformers' `generate`, greedy; `cache` is static or dynamic."""

    def __init__(self, model: Any, prompts: list[list[int]], start: int | None, cache: str | None) -> None:
        self.model, self.both = model.eval(), start is not None
        self.ids = torch.tensor(prompts, device=model.device)
        self.extra: dict[str, Any] = {} if cache is None else {"cache_implementation": cache}
        self.extra |= {} if start is None else {"decoder_start_token_id": start}

    def write(self, new: int) -> list[list[int]]:
        """The new tokens of each row."""
        made: Tensor = self.model.generate(
            self.ids,
            attention_mask=torch.ones_like(self.ids),
            do_sample=False,
            max_new_tokens=new,
            min_new_tokens=new,
            eos_token_id=None,
            pad_token_id=0,
            **self.extra,
        )
        before = 1 if self.both else self.ids.shape[1]
        return made[:, before:].tolist()


def _measure(
    preset: str, model: Model, resolved: Resolved, config: Config, place: Place, talk: Talk
) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(config.seed)
    prompts = torch.randint(model.vocab, (config.batch, config.prompt), generator=generator).tolist()
    sides: dict[str, Any] = {"xt": Ours(model, prompts)}
    missing = None
    if config.against is not None:
        try:
            other, _ = reference(model, resolved, place.device, DTYPES[config.dtype])
            start = start_of(model)
            sides[f"{config.against}, dynamic cache"] = Theirs(other, prompts, start, None)
            if place.device.type == "cuda":
                sides[f"{config.against}, static cache"] = Theirs(other, prompts, start, "static")
        except Unmatched as reason:
            missing = str(reason)
    rows = [_side(preset, name, side, model, config, place, talk) for name, side in sides.items()]
    for row in rows[1:]:
        pairs = [
            a == b
            for one, other in zip(rows[0]["tokens"], row["tokens"], strict=True)
            for a, b in zip(one, other, strict=True)
        ]
        row["same_tokens"] = sum(pairs) / len(pairs)
        row["ratio_of_xt"] = row["per_token"]["median_ms"] / rows[0]["per_token"]["median_ms"]
    if missing is not None:
        rows[0]["no_reference"] = missing
        talk(f"{preset}: {config.against} has no such model: {missing}")
    return rows


def _side(preset: str, name: str, side: Any, model: Model, config: Config, place: Place, talk: Talk) -> dict[str, Any]:
    """Whole texts and first tokens are timed; the rest of a text, divided, is the time of a further token."""
    device = place.device
    tokens = side.write(config.new)
    first = measure(lambda: side.write(1), device, repeats=max(config.repeats, 5), budget=20.0)
    whole = [clocked(lambda: side.write(config.new), device) for _ in range(config.repeats)]
    steps = max(config.new - 1, 1)
    each = [max(seconds - first.median, 0.0) / steps for seconds in whole]
    per = Times(tuple(each), each[0], 1)
    talk(f"{preset}, {name}: first {first.median * 1e3:.3g} ms, then {per.median * 1e3:.3g} ms a token")
    return {
        "name": f"{preset} {name}",
        "preset": preset,
        "side": name,
        "parameters": count(model),
        "first_token": first.facts(),
        "per_token": per.facts(),
        "tok_s": config.batch / per.median if per.median else None,
        "whole_s": whole,
        "peak_bytes": peak_bytes(lambda: side.write(min(config.new, 16)), device, model.parameters()),
        "tokens": tokens,
    }
