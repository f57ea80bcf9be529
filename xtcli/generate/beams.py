"""Beam search: the likeliest whole texts that K parallel beams find.

    score(y) = log p(y | x) / |y|^a        |y| new tokens, eos included; a = length penalty

At each step every open beam is followed by every token; of the best 2 K candidates (more with several
end tokens) those that end and rank among the first K become finished texts, and the best K of the
others stay open. A prompt is done when K texts are finished and the best open beam, were it to end
now, scores no better than the worst of them, or when no token may follow. This is the rule of
transformers' `early_stopping=False`.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from xtcli.errors import refuse
from xtcli.generate.decode import Finish, Rules, Timing
from xtcli.generate.feed import Feed
from xtcli.generate.sampling import penalise


@dataclass(frozen=True)
class Beam:
    """A text that is still open: its log-probability and its new tokens."""

    log: float
    tokens: tuple[int, ...] = ()


@dataclass(frozen=True)
class Finished:
    """A whole text."""

    score: float
    tokens: tuple[int, ...]
    finish: Finish


@dataclass
class Search:
    """The beams of one prompt."""

    budget: int
    bounded: bool
    beams: list[Beam]
    finished: list[Finished] = field(default_factory=list)
    done: bool = False


def search(
    feed: Feed,
    budgets: Sequence[tuple[int, bool]],
    width: int,
    length_penalty: float,
    rules: Rules,
    timing: Timing,
) -> list[list[Finished]]:
    """The `width` best texts of each of the feed's prompts, best first; `budgets` as in `Prompt`."""
    began = time.perf_counter()
    logits = feed.start()
    device = logits.device
    if device.type == "cuda" and not feed.eager:
        feed.slow = "beams change places at each of them"
    feed.select(torch.arange(len(budgets), device=device).repeat_interleave(width))
    logits = logits.repeat_interleave(width, dim=0)
    penalty = rules.sampling.repetition_penalty
    seen = feed.seen(rules.vocab) if penalty != 1 else None
    # All beams of a prompt begin alike, so only the first may be followed.
    start = [Beam(0.0)] + [Beam(float("-inf"))] * (width - 1)
    every = [Search(budget, bounded, start) for budget, bounded in budgets]
    active, step = every, 0
    while active:
        logs = logits[:, : rules.vocab].log_softmax(-1)
        if seen is not None:
            logs = penalise(logs, seen, penalty)
        logs = rules.force(logs, step, [prompt.budget for prompt in active for _ in range(width)])
        held = torch.tensor([beam.log for prompt in active for beam in prompt.beams], device=device)
        totals = (logs + held[:, None]).reshape(len(active), width * rules.vocab)
        count = min(max(2, 1 + len(rules.ends)) * width, totals.shape[1])
        best = totals.topk(count)
        values, places = best.values.tolist(), best.indices.tolist()
        if step == 0:
            timing.prefill_seconds += time.perf_counter() - began
            began = time.perf_counter()
        else:
            timing.decode_tokens += width * len(active)
        step += 1
        rows, tokens = [], []
        for number, prompt in enumerate(active):
            parents = _advance(prompt, values[number], places[number], rules, width, length_penalty, step)
            if not prompt.done:
                rows += [number * width + parent for parent in parents]
                tokens += [beam.tokens[-1] for beam in prompt.beams]
        active = [prompt for prompt in active if not prompt.done]
        if active:
            keep, fed = torch.tensor(rows, device=device), torch.tensor(tokens, device=device)
            feed.select(keep)
            if seen is not None:
                seen = seen[keep].scatter_(1, fed[:, None], True)
            logits = feed.step(fed)
    timing.decode_seconds += time.perf_counter() - began
    return [prompt.finished for prompt in every]


def _advance(
    prompt: Search,
    values: Sequence[float],
    places: Sequence[int],
    rules: Rules,
    width: int,
    length_penalty: float,
    length: int,
) -> list[int]:
    """Sort one prompt's candidates into finished and open ones; the parents of the open ones."""
    if values[0] != values[0]:
        raise refuse("the model's logits are not numbers", "its weights are damaged, or try --dtype fp32")
    last = length >= prompt.budget
    beams: list[Beam] = []
    parents: list[int] = []
    for rank, (log, place) in enumerate(zip(values, places, strict=True)):
        parent, token = divmod(place, rules.vocab)
        tokens = (*prompt.beams[parent].tokens, token)
        ended = token in rules.ends
        if ended or last:
            if rank < width and log > float("-inf"):
                own = ended and not (last and rules.last is not None)
                finish: Finish = "eos" if own else "context" if prompt.bounded else "length"
                prompt.finished.append(Finished(log / length**length_penalty, tokens, finish))
        elif len(beams) < width:
            beams.append(Beam(log, tokens))
            parents.append(parent)
    prompt.finished = sorted(prompt.finished, key=lambda text: -text.score)[:width]
    prompt.beams = beams
    full = len(prompt.finished) == width
    prompt.done = last or (full and beams[0].log / length**length_penalty <= prompt.finished[-1].score)
    return parents
