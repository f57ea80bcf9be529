"""What a trained model says of a text: its labels with probabilities, or where in a context an answer stands.

    head `sequence`   the labels of a text or of a pair, the likeliest first
    head `token`      the label of each word
    head `choice`     the texts to choose from, the likeliest first
    head `span`       the answer to a question, out of its context

A prompt is a text, with `second` for the second text of a pair or for the context; or a JSON object with the columns
of the objective, {"question": ..., "context": ...} for instance, or lines of such. Rows are made as in training.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from xtcli.config.preset import Preset
from xtcli.data.readers import Row
from xtcli.data.records import Side
from xtcli.data.tokenizers import Tokenizer
from xtcli.errors import refuse
from xtcli.generate.engine import ROWS, undisturbed
from xtcli.generate.feed import aligned
from xtcli.objectives.classify import TASKS, Classify
from xtcli.objectives.extract import Extract
from xtcli.objectives.labelled import Labelled
from xtcli.objectives.labels import item_of
from xtcli.parts.chance import settled
from xtcli.parts.graphs import Graph
from xtcli.parts.heads import SPEAKING
from xtcli.train.scores import SpanScores

CONTEXT = 512
"""Tokens of a row where neither the preset nor the model bounds it, as in training."""


@dataclass(frozen=True)
class Label:
    """A label, or a text to choose, and its probability; None where the head gives a number without bounds."""

    label: str
    probability: float | None
    value: float | None = None


@dataclass(frozen=True)
class Labels:
    """All labels of a text, the likeliest first; `many`: any number of them holds, each by its own probability."""

    texts: tuple[str, ...]
    labels: list[Label]
    many: bool = False


@dataclass(frozen=True)
class Words:
    """The words of a text with their labels; None for a word behind the context's end."""

    words: list[tuple[str, Label | None]]


@dataclass(frozen=True)
class Found:
    """An answer: characters [start, end) of the context; empty where there is none."""

    question: str
    answer: str
    start: int
    end: int
    probability: float


@dataclass
class Said:
    """One result for each prompt; `notes` are sentences for the reader."""

    results: list[Labels | Words | Found] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def labels_texts(model: Graph, preset: Preset) -> bool:
    """Whether a checkpoint is there to label texts: by its objective, or because its heads do nothing else."""
    if preset.objective.kind in (Classify.Config.kind, Extract.Config.kind):
        return True
    return bool({*TASKS, "span"} & set(model.heads)) and not {*SPEAKING, "mlm"} & set(model.heads)


def label(
    model: Graph, tokenizer: Tokenizer, preset: Preset, prompts: Sequence[str], second: str | None = None
) -> Said:
    """What the model says of each prompt, or of each line of one that is JSON lines.

    Raises UserError for prompts that lack what the model needs.
    """
    kind, config = _objective(model, preset, second)
    columns = kind.columns(config)
    single = [one for prompt in prompts for one in _lines(prompt)]
    places = [f"prompt {number + 1}" for number in range(len(single))] if len(single) > 1 else ["the prompt"]
    rows = [_row(place, prompt, second, columns, config) for place, prompt in zip(places, single, strict=True)]
    return say(model, tokenizer, kind, config, rows, preset.train.context)


def say(
    model: Graph, tokenizer: Tokenizer, kind: type[Labelled], config: Any, rows: Sequence[Row], context: int | None
) -> Said:
    """What the model says of rows, in the columns of an objective's config; the last value of a row is not read."""
    length = context or model.context or CONTEXT
    asked = needed(kind.columns(config), config)
    for place, values in rows:
        empty = next((column for column, value in zip(asked, values, strict=False) if _empty(value)), None)
        if empty is not None:
            raise refuse(f"{empty!r} is empty", "give some text", place=place)
        if isinstance(config, Classify.Config) and item_of(config, 0, (place, list(values)), labelled=False) is None:
            raise refuse("has no two texts to choose from", f"list them in {asked[-1]!r}", place=place)
    start = getattr(model, "start", None)
    special = tokenizer.special
    build: Any = kind
    made = build(
        config,
        Side("prompts", rows),
        tokenizer,
        context=length,
        seed=0,
        start=special.get("bos", special.get("pad")) if start is None else start,
        predict=True,
        **kind.facts(model),
    )
    cut = "a question is cut at half a row" if isinstance(made, Extract) else f"texts are cut at {length:,} tokens"
    said = Said(notes=[f"{cut}, as in training"] if made.cut_short else [])
    with undisturbed(model):
        said.results = list(_answers(model, made) if isinstance(made, Extract) else _labels(model, made))
    return said


def _objective(model: Graph, preset: Preset, second: str | None) -> tuple[type[Labelled], Any]:
    """The objective that reads prompts as the training did; its own defaults where there was none."""
    config: Any = preset.objective
    if "span" in model.heads and not isinstance(config, Classify.Config):
        return Extract, config if isinstance(config, Extract.Config) else Extract.Config()
    if not isinstance(config, Classify.Config):
        config = Classify.Config()
    task = config.of or next(task for task in TASKS if task in model.heads)
    unknown = config.labels is None and task == "sequence"  # such as a checkpoint that was converted
    pair = config.pair or ("pair" if second is not None and unknown else None)
    return Classify, config.model_copy(update={"of": task, "pair": pair})


def _lines(prompt: str) -> list[str]:
    """The prompts in a prompt: the lines where every one begins a JSON object, else the whole."""
    lines = [line for line in prompt.splitlines() if line.strip()]
    return lines if lines and all(line.lstrip().startswith("{") for line in lines) else [prompt]


def _row(place: str, prompt: str, second: str | None, columns: Sequence[str], config: Any) -> Row:
    """A prompt as a row; the last column, that of the answer, stays empty."""
    asked = needed(columns, config)
    rest: list[Any] = [None] * (len(columns) - len(asked))
    if prompt.lstrip().startswith("{"):
        try:
            found = json.loads(prompt)
        except ValueError as error:
            raise refuse(f"begins like a JSON object and is none ({error})", "repair it", place=place) from None
        found = found if second is None or len(asked) < 2 else {asked[1]: second} | found
        for column in asked:
            if column not in found:
                cause = f"has no key {column!r}, only {', '.join(map(repr, found)) or 'none'}"
                raise refuse(cause, "name the keys as the columns that the model was trained on", place=place)
        return place, [*(found[column] for column in asked), *rest]
    given: list[Any] = [prompt] if second is None else [prompt, second]
    if len(given) < len(asked):
        example = json.dumps(dict.fromkeys(asked, "..."))
        remedy = f"add --context TEXT, or write it as {example}" if len(asked) == 2 else f"write it as {example}"
        raise refuse(f"has no {asked[len(given)]!r}", remedy, place=place)
    if len(given) > len(asked):
        raise refuse("--context is for models that read a second text", "leave it out", place=place)
    return place, [*given, *rest]


def _empty(value: Any) -> bool:
    return not value.strip() if isinstance(value, str) else value in (None, [])


def needed(columns: Sequence[str], config: Any) -> Sequence[str]:
    """The columns that a prompt must have: all but those of the answer."""
    return columns[: 2 if isinstance(config, Extract.Config) else -1]


def _batches(model: Graph, made: Any) -> Any:
    """The rows in batches: their numbers, the batch, the outputs of its head."""
    head: Any = model.heads["span" if isinstance(made, Extract) else made.of]
    for at in range(0, len(made), ROWS):
        numbers = np.arange(at, min(at + ROWS, len(made)), dtype=np.int64)
        # Choices of several sizes do not make one tensor, and some models cannot bear padding.
        alone = getattr(made, "of", "") == "choice" or aligned(model)
        groups = np.split(numbers, len(numbers)) if alone else [numbers]
        for group in groups:
            batch = made.batch(group, np.zeros_like(group)).to(model.device)
            with settled(model):
                outputs = head.outputs(model.hidden(**batch.inputs))
            yield group.tolist(), batch, outputs


def _labels(model: Graph, made: Classify) -> Any:
    problem = getattr(model.heads[made.of], "problem", "one")
    for numbers, _, outputs in _batches(model, made):
        (logits,) = outputs.values()
        check(logits)
        for row, number in enumerate(numbers):
            item = made.items[number]
            if made.of == "token":
                yield _words(made, number, logits[row])
            elif made.of == "choice":
                yield ordered(item.texts[:1], item.texts[1:], logits[row], "one")
            else:
                names = made.config.labels or [str(place) for place in range(logits.shape[-1])]
                yield ordered(item.texts, names, logits[row], problem)


def ordered(texts: tuple[str, ...], names: Sequence[str], logits: Tensor, problem: str | None) -> Labels:
    """What the logits of one text's labels say, the likeliest first."""
    if problem == "number" or (problem is None and logits.shape[-1] == 1):
        return Labels(texts, [Label(name, None, value) for name, value in zip(names, logits.tolist(), strict=True)])
    chances = logits.float().sigmoid() if problem == "many" else logits.float().softmax(-1)
    found = [Label(name, chance) for name, chance in zip(names, chances.tolist(), strict=True)]
    return Labels(texts, sorted(found, key=lambda one: -(one.probability or 0.0)), problem == "many")


def _words(made: Classify, number: int, logits: Tensor) -> Words:
    names: Mapping[int, str] = dict(enumerate(made.config.labels or ()))
    best = logits.float().softmax(-1).max(-1)
    words: list[tuple[str, Label | None]] = []
    for word, place in zip(made.items[number].words, made.places(number).tolist(), strict=True):
        one = int(best.indices[place])
        words.append((word, None if place < 0 else Label(names.get(one, str(one)), float(best.values[place]))))
    return Words(words)


def _answers(model: Graph, made: Extract) -> Any:
    scores = SpanScores(made)
    for _, batch, outputs in _batches(model, made):
        check(outputs["start_logits"])
        scores.add(batch, {"span": outputs})
    for number, question in enumerate(made.questions):
        span = scores.answer(number)
        text = question.context[span.start : span.end]
        yield Found(question.question, text, span.start, span.end, span.probability)


def check(logits: Tensor) -> None:
    """Raise UserError for logits that are no numbers."""
    if not bool(torch.isfinite(logits).all()):
        raise refuse("the model's logits are not numbers", "its weights are damaged, or try --dtype fp32")
