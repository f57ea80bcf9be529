"""What a model writes while it trains: a continuation, a filled mask, or an answer.

Prompts are the preset's, else the beginnings of held-out texts; the seed is that of the run, so that two
samples of one prompt differ only by what the model has learned.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from xtcli.generate.engine import generate, task_of
from xtcli.generate.fill import MASK
from xtcli.generate.label import label, labels_texts, say
from xtcli.generate.options import Answer, Options
from xtcli.generate.said import brief
from xtcli.parts.graphs import Graph

PROMPT_TOKENS = 16
LABELLED = 3


def draw(model: Graph, job: Any) -> str:
    """The sample as text: what the model writes, or what it says of the first labelled rows."""
    own = (job.objective if job.validation is None else job.validation).drawn(
        model, job.tokenizer, job.config.sample_tokens
    )
    if own is not None:
        return str(own)
    if labels_texts(model, job.resolved.preset):
        return _labelled(model, job)
    prompts = list(job.config.sample_prompts) or [found for found in [_prompt(model, job)] if found]
    if not prompts:
        return ""
    room = model.context or PROMPT_TOKENS + job.config.sample_tokens
    most = max(1, min(job.config.sample_tokens, room - PROMPT_TOKENS))
    options = Options(max_tokens=most, seed=job.config.seed, eager=True)
    return shown(generate(model, job.tokenizer, prompts, options))


def shown(answer: Answer) -> str:
    """An answer as text: prompt and continuation, prompt => answer, or the filled text."""
    rows = [f"{row.prompt} => {row.text}" if answer.task == "map" else row.prompt + row.text for row in answer.written]
    for filled in answer.filled:
        guesses = "; ".join(
            ", ".join(f"{guess.text.strip()} {guess.probability:.0%}" for guess in mask[:3]) for mask in filled.masks
        )
        rows.append(f"{filled.prompt} => {filled.text} [{guesses}]")
    return "\n\n".join(rows)


def _labelled(model: Graph, job: Any) -> str:
    """What the model says of the prompts, or of rows that are held out (else trained on) beside what the data says."""
    if job.config.sample_prompts:
        said = label(model, job.tokenizer, job.resolved.preset, job.config.sample_prompts)
        return "\n".join(map(brief, said.results))
    objective = job.validation if job.validation is not None else job.objective
    rows, config = objective.used[:LABELLED], objective.config
    said = say(model, job.tokenizer, type(objective), config, rows, objective.context)
    return "\n".join(f"{brief(one)} (expected: {objective.expected(at)})" for at, one in enumerate(said.results))


def _prompt(model: Graph, job: Any) -> str:
    """The beginning of a held-out (or else a training) text, with a gap where the task wants one."""
    split = job.validation if job.validation is not None else job.objective
    inputs = split.batch(np.zeros(1, dtype=np.int64), np.zeros(1, dtype=np.int64)).inputs
    row = (inputs["input_ids"] if "input_ids" in inputs else next(iter(inputs.values())))[0].tolist()
    special = set(job.tokenizer.special.values()) | set(job.tokenizer.sentinels)
    ids = [token for token in row if token not in special][:PROMPT_TOKENS]
    if task_of(model) != "fill":
        return str(job.tokenizer.decode(ids))
    middle = len(ids) // 2
    return f"{job.tokenizer.decode(ids[:middle])} {MASK} {job.tokenizer.decode(ids[middle + 1 :])}"
