"""One call for every model: continue a text, map one text to another, or fill masks.

    causal graph with an lm head        the prompt is continued
    encoder-decoder with an lm head     the prompt is read, an answer is written
    graph that reads both ways, mlm     masks in the prompt are filled

Structure alone decides. The model is left as it was found, in training or not, and no global random
state is read or moved, so a training run may ask for samples at any step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Literal

import torch

from xtcli.data.tokenizers import StreamDecoder, Tokenizer
from xtcli.errors import refuse
from xtcli.generate import beams as beam_search
from xtcli.generate import prompts as texts
from xtcli.generate.decode import Choice, Finish, Row, Rules, Timing, decode
from xtcli.generate.feed import Feed
from xtcli.generate.fill import MASK, Filled, fill, to_fill
from xtcli.generate.prompts import Prompt, Reach
from xtcli.generate.sampling import Sampling, draw_seed
from xtcli.generate.stops import Text, check_stops
from xtcli.parts.graphs import Graph
from xtcli.parts.seq2seq import EncoderDecoder

Task = Literal["continue", "map", "fill"]
ROWS = 64
"""Rows of one batch, at most."""


@dataclass(frozen=True)
class Written:
    """A text that was generated. `tokens` are all new ids, an end token and a cut stop string included."""

    prompt: str
    sample: int
    text: str
    tokens: list[int]
    finish: Finish
    prompt_tokens: int
    score: float | None = None
    choices: list[Choice] = field(default_factory=list)


@dataclass
class Answer:
    """All that one call made. `seed` is None where nothing was drawn; `notes` are for the reader."""

    task: Task
    seed: int | None = None
    written: list[Written] = field(default_factory=list)
    filled: list[Filled] = field(default_factory=list)
    timing: Timing = field(default_factory=Timing)
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Options:
    """What to write: `max_tokens` new tokens at most, `samples` texts a prompt, beams instead of draws when > 1.

    `sampling` None is the default of the task: draws for a continuation, greedy for a map. `lens` notes that
    many alternatives for each token. `past_context` lets texts grow beyond the length that the preset plans for.
    """

    max_tokens: int = 200
    sampling: Sampling | None = None
    samples: int = 1
    beams: int = 1
    length_penalty: float = 1.0
    stop: tuple[str, ...] = ()
    seed: int | None = None
    fill_top: int = 5
    lens: int = 0
    past_context: bool = False

    def __post_init__(self) -> None:
        for name in ("max_tokens", "samples", "beams", "fill_top"):
            if getattr(self, name) < 1:
                option = "--" + name.replace("_", "-")
                raise refuse(f"{getattr(self, name)} is not possible", "give 1 or more", place=option)
        if self.seed is not None and not 0 <= self.seed < 2**63:
            raise refuse(f"{self.seed} is not possible", "give a number from 0 to 2^63 - 1", place="--seed")
        check_stops(self.stop)
        if self.beams > 1:
            if self.sampling is not None and not self.sampling.greedy:
                raise refuse("beams do not draw", "leave out the options of sampling, or --beams", place="--beams")
            if self.samples > self.beams:
                raise refuse(f"{self.beams} beams cannot give {self.samples} texts", "use more beams", place="--beams")
            if self.lens:
                raise refuse("--lens follows one text at a time", "leave out --beams", place="--beams")
        elif self.samples > 1 and self.sampling is not None and self.sampling.greedy:
            raise refuse("greedy texts of one prompt are all alike", "set --temperature above 0", place="--samples")


def task_of(model: Graph) -> Task:
    """What a model can do with a prompt; raises UserError when no head of it makes text."""
    have = ", ".join(sorted(model.heads)) or "none"
    if isinstance(model, EncoderDecoder) or model.causal:
        if "lm" not in model.heads:
            raise refuse(f"the model has no language-model head (heads: {have})", "only heads lm and mlm make text")
        return "map" if isinstance(model, EncoderDecoder) else "continue"
    if not {"mlm", "lm"} & set(model.heads):
        cause = f"the model reads both ways and has no head that fills masks (heads: {have})"
        raise refuse(cause, "only heads lm and mlm make text")
    return "fill"


def generate(
    model: Graph,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    options: Options | None = None,
    on_text: Callable[[int, str], None] | None = None,
) -> Answer:
    """What the model makes of the prompts; `on_text(row, piece)` hears each piece of text as it is written.

    Rows are numbered prompt x samples + sample. Each row equals what it would be alone. Raises UserError
    for prompts that do not fit, and for options that are impossible.
    """
    options, answer = options or Options(), Answer(task_of(model))
    if not prompts:
        return answer
    with _undisturbed(model):
        if answer.task == "fill":
            answer.filled = _fill(model, tokenizer, prompts, options)
            return answer
        for row, piece in _write(model, tokenizer, prompts, options, answer):
            if on_text is not None:
                on_text(row, piece)
    return answer


def _settled(options: Options, answer: Answer) -> Options:
    """The options with the task's defaults, and a seed where draws need one."""
    greedy = Sampling(temperature=0)
    default = greedy if answer.task == "map" or options.beams > 1 else Sampling()
    options = replace(options, sampling=options.sampling or default)
    if options.beams == 1 and options.sampling is not None and not options.sampling.greedy:
        answer.seed = draw_seed() if options.seed is None else options.seed
    return replace(options, seed=answer.seed)


def _ends(tokenizer: Tokenizer, task: Task) -> frozenset[int]:
    """The ids that end a text: what training put behind one, or before the next."""
    roles = ("eos", "bos") if task == "continue" else ("eos", "sep")
    end = texts.role(tokenizer, *roles)
    return frozenset(() if end is None else (end,))


def _write(
    model: Graph, tokenizer: Tokenizer, prompts: Sequence[str], options: Options, answer: Answer
) -> Iterator[tuple[int, str]]:
    options = _settled(options, answer)
    assert options.sampling is not None
    ends = _ends(tokenizer, answer.task)
    rules = Rules(options.sampling, ends, min(tokenizer.vocab, model.vocab), options.seed or 0, options.lens)
    if isinstance(model, EncoderDecoder):
        rows, hard = _read_prompts(model, tokenizer, prompts, options)
    else:
        reach = Reach(model.limit, None if options.past_context else model.context)  # type: ignore[arg-type]
        rows, hard = texts.to_continue(tokenizer, prompts, reach, options.max_tokens), reach.hard
    texts.check_ids(rows, model.vocab)
    repeats = options.beams if options.beams > 1 else options.samples
    made: dict[int, list[Written]] = {}
    for group in texts.grouped(rows, hard, ROWS // repeats):
        feed = _feed(model, group, tokenizer)
        answer.timing.prefill_tokens += sum(len(prompt.ids) for prompt in group)
        if options.beams > 1:
            yield from _search(feed, group, tokenizer, options, rules, answer, made)
        else:
            yield from _draw(feed, group, tokenizer, options, rules, answer, made)
        if feed.uncached is not None:
            answer.notes.append(
                f"from {feed.uncached:,} tokens on the rotations change with the length: each step reads the whole text"
            )
    answer.notes = list(dict.fromkeys(answer.notes))
    answer.written = [written for number in range(len(prompts)) for written in made[number]]


def _read_prompts(
    model: EncoderDecoder, tokenizer: Tokenizer, prompts: Sequence[str], options: Options
) -> tuple[list[Prompt], int | None]:
    soft = None if options.past_context else model.context
    front, back = texts.role(tokenizer, "bos", "cls"), texts.role(tokenizer, "eos", "sep")
    frame = [] if front is None or front == back else [front], [] if back is None else [back]
    rows = texts.to_read(tokenizer, prompts, Reach(model.encoder.limit, soft), *frame)
    target = Reach(model.decoder.limit, soft).tokens
    budget = options.max_tokens if target is None else min(options.max_tokens, target - 1)
    return [replace(row, budget=budget, bounded=budget < options.max_tokens) for row in rows], None


def _feed(model: Graph, group: Sequence[Prompt], tokenizer: Tokenizer) -> Feed:
    room = max(prompt.budget for prompt in group)
    ids = [prompt.ids for prompt in group]
    if not isinstance(model, EncoderDecoder):
        return Feed(model, ids, room)
    start = texts.role(tokenizer, "bos", "pad") if model.start is None else model.start
    if start is None:
        raise refuse("no token is known that a written text starts with", "set model.start in the preset")
    return Feed(model, [[start]] * len(ids), room, ids)


def _draw(
    feed: Feed,
    group: Sequence[Prompt],
    tokenizer: Tokenizer,
    options: Options,
    rules: Rules,
    answer: Answer,
    made: dict[int, list[Written]],
) -> Iterator[tuple[int, str]]:
    rows = [
        Row(
            prompt.number * options.samples + sample,
            _text(tokenizer, prompt, answer, options),
            prompt.budget,
            prompt.bounded,
        )
        for prompt in group
        for sample in range(options.samples)
    ]
    for piece in decode(feed, rows, count, rules, answer.timing):
        yield piece.row, piece.text
    for number, row in enumerate(rows):
        prompt = group[number // count]
        assert row.finish is not None
        written = Written(
            prompt.text,
            number % count,
            str(row.text),
            row.tokens,
            row.finish,
            len(prompt.ids),
            choices=row.choices,
        )
        made.setdefault(prompt.number, []).append(written)


def _search(
    feed: Feed,
    group: Sequence[Prompt],
    tokenizer: Tokenizer,
    options: Options,
    rules: Rules,
    answer: Answer,
    made: dict[int, list[Written]],
) -> Iterator[tuple[int, str]]:
    budgets = [(prompt.budget, prompt.bounded) for prompt in group]
    found = beam_search.search(feed, budgets, options.beams, options.length_penalty, rules, answer.timing)
    for prompt, finished in zip(group, found, strict=True):
        for sample, best in enumerate(finished[: options.samples]):
            text = _text(tokenizer, prompt, answer, options)
            said = "".join(text.push(token) for token in best.tokens if token not in rules.ends) + text.finish()
            finish: Finish = "stop" if text.stopped else best.finish
            written = Written(prompt.text, sample, said, list(best.tokens), finish, len(prompt.ids), best.score)
            made.setdefault(prompt.number, []).append(written)
            yield prompt.number * options.samples + sample, said


def _text(tokenizer: Tokenizer, prompt: Prompt, answer: Answer, options: Options) -> Text:
    """An empty text; a continuation's first word keeps the space that parts it from the prompt."""
    return Text(StreamDecoder(tokenizer, prompt.ids if answer.task == "continue" else ()), options.stop)


def _fill(model: Graph, tokenizer: Tokenizer, prompts: Sequence[str], options: Options) -> list[Filled]:
    head = model.heads["mlm"] if "mlm" in model.heads else model.heads["lm"]
    reach = Reach(model.limit, None if options.past_context else model.context)  # type: ignore[arg-type]
    mask_text = tokenizer.mask_text or MASK
    rows = to_fill(tokenizer, prompts, reach, mask_text)
    texts.check_ids(rows, model.vocab)
    filled = []
    for begin in range(0, len(rows), ROWS):
        filled += fill(model, head, tokenizer, rows[begin : begin + ROWS], options.fill_top)
    return filled


@contextmanager
def _undisturbed(model: Graph) -> Iterator[None]:
    """Evaluation without gradients; afterwards every module is in the mode it was in."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True
