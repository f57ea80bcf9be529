"""One call for every model: continue a text, map one text to another, or fill masks.

    decoder with an lm head            the prompt is continued
    encoder-decoder with an lm head    the prompt is read, an answer is written
    encoder with an mlm (or lm) head   masks in the prompt are filled
    heads that write no text           labels and answers in a text: xtcli.generate.label

Structure alone decides. The model is left as it was found, in training or not, and no global random
state is read or moved, so a training run may ask for samples at any step.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from xtcli.data.tokenizers import StreamDecoder, Tokenizer
from xtcli.errors import refuse
from xtcli.generate.beams import search
from xtcli.generate.decode import Finish, Piece, Row, Rules, decode
from xtcli.generate.feed import Feed, aligned
from xtcli.generate.fill import fill, to_fill
from xtcli.generate.options import Answer, Options, Task, Written
from xtcli.generate.prompts import Prompt, Reach, check_ids, grouped, role, to_continue, to_read
from xtcli.generate.sampling import Sampling, draw_seed
from xtcli.generate.stops import Text
from xtcli.generate.streams import feed_for
from xtcli.parts.graphs import Graph
from xtcli.parts.heads import SPEAKING, speaker
from xtcli.parts.seq2seq import EncoderDecoder
from xtcli.parts.twostream import in_streams

ROWS = 64
"""Rows of one batch, at most."""
WRITING = {*SPEAKING, "mlm"}
LABELLING = {"sequence", "token", "choice", "span", "replaced"}


def task_of(model: Graph) -> Task:
    """What a model can do with a prompt; raises UserError when no head of it makes text or labels one."""
    have = ", ".join(sorted(model.heads)) or "none"
    if LABELLING & set(model.heads) and not WRITING & set(model.heads):
        return "label"
    if isinstance(model, EncoderDecoder) or model.causal or (in_streams(model) and "lm" in model.heads):
        if speaker(model.heads) is None:
            raise refuse(f"the model has no language-model head (heads: {have})", "text comes from a head lm or mlm")
        return "map" if isinstance(model, EncoderDecoder) else "continue"
    if not {"mlm", "lm"} & set(model.heads):
        cause = f"the model reads both ways and has no head that fills masks (heads: {have})"
        raise refuse(cause, "text comes from a head lm or mlm")
    return "fill"


def generate(
    model: Graph,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    options: Options | None = None,
    on_text: Callable[[Piece], None] | None = None,
    images: Tensor | None = None,
) -> Answer:
    """What the model makes of the prompts; `on_text` hears each piece of text as it is written.

    images (prompts, C, H, W) are what an encoder reads that reads no text; then prompts are names alone.

    Rows are numbered prompt x samples + sample. Each row equals what it would be alone. Raises UserError
    for prompts that do not fit.
    """
    options, answer = options or Options(), Answer(task_of(model))
    if answer.task == "label":
        raise refuse("the model labels texts and writes none", "ask xtcli.generate.label, or xt generate")
    if not prompts:
        return answer
    with undisturbed(model):
        if answer.task == "fill":
            _fill(model, tokenizer, prompts, options, answer)
            return answer
        job = _job(model, tokenizer, prompts, options, answer, images)
        for piece in _write(job):
            if on_text is not None:
                on_text(piece)
    answer.notes = list(dict.fromkeys(answer.notes))
    answer.written = [written for prompt in job.prompts for written in job.made[prompt.number]]
    return answer


@dataclass
class _Job:
    """All that the parts of one generation share."""

    model: Graph
    tokenizer: Tokenizer
    options: Options
    rules: Rules
    answer: Answer
    prompts: list[Prompt]
    slots: int | None  # the longest row that the model can hold, padding included
    images: Tensor | None = None  # (prompts, C, H, W)
    made: dict[int, list[Written]] = field(default_factory=dict)

    def text(self, prompt: Prompt) -> Text:
        """An empty text; a continuation's first word keeps the space that parts it from the prompt."""
        before = prompt.ids if self.answer.task == "continue" else []
        return Text(StreamDecoder(self.tokenizer, before), self.options.stop)


def _job(
    model: Graph,
    tokenizer: Tokenizer,
    texts: Sequence[str],
    options: Options,
    answer: Answer,
    images: Tensor | None = None,
) -> _Job:
    """Settle defaults and the seed, frame the prompts."""
    default = Sampling(temperature=0) if answer.task == "map" or options.beams > 1 else Sampling()
    sampling = options.sampling or default
    if not sampling.greedy:
        answer.seed = draw_seed() if options.seed is None else options.seed
    # What ends a text is what training put behind one, or else in front of the next.
    end = role(tokenizer, *(("eos", "sep") if answer.task == "map" else ("eos", "bos")))
    ends = frozenset(() if end is None else (end,))
    known = min(tokenizer.vocab, model.vocab)
    first, last = (forced(model, name, known) for name in ("first", "last"))
    rules = Rules(sampling, ends, known, answer.seed or 0, options.lens, first, last)
    soft = None if options.past_context else model.context
    slots = None
    if isinstance(model, EncoderDecoder):
        if (images is None) == ("pixel_values" in model.accepts):
            reads = "images" if images is None else "text"
            raise refuse(f"the model reads {reads}", "give it with --image" if images is None else "give a --prompt")
        read = [Prompt(number, text, []) for number, text in enumerate(texts)] if images is not None else None
        prompts = _sources(model, tokenizer, texts, soft, options.max_tokens, read)
    else:
        slots = limit_of(model)
        prompts = to_continue(tokenizer, texts, Reach(slots, soft), options.max_tokens)
    if images is None:
        check_ids(prompts, model.vocab)
    return _Job(model, tokenizer, options, rules, answer, prompts, slots, images)


def forced(model: Graph, name: str, known: int) -> int | None:
    """The token of the model's config that its texts must begin (`first`) or end with (`last`), where it has one."""
    token: int | None = getattr(model.config, name, None)
    if token is not None and token >= known:
        raise refuse(f"model.{name} is {token:,}, and the tokenizer knows ids below {known:,}", f"set model.{name}")
    return token


def _sources(
    model: EncoderDecoder,
    tokenizer: Tokenizer,
    texts: Sequence[str],
    soft: int | None,
    most: int,
    read: list[Prompt] | None = None,
) -> list[Prompt]:
    """The prompts of an encoder, each with its budget; `read` are those that are no text."""
    prompts = read or to_read(tokenizer, texts, Reach(limit_of(model.encoder), soft))
    target = Reach(limit_of(model.decoder), soft).tokens
    budget = most if target is None else min(most, target - 1)
    return [replace(prompt, budget=budget, bounded=budget < most) for prompt in prompts]


def limit_of(tower: Any) -> int | None:
    """The most tokens that the positions of a stack can tell apart."""
    limit: int | None = tower.limit
    return limit


def _write(job: _Job) -> Iterator[Piece]:
    """Write all rows, group by group."""
    options, answer = job.options, job.answer
    repeats = max(options.beams, options.samples)
    for group in grouped(job.prompts, job.slots, ROWS // repeats, aligned(job.model)):
        feed = _feed(job, group)
        feed.eager = options.eager
        answer.timing.prefill_tokens += sum(len(prompt.ids) for prompt in group)
        yield from (_search if options.beams > 1 else _draw)(job, feed, group)
        if feed.uncached is not None:
            since = f"from {feed.uncached:,} tokens on"
            answer.notes.append(f"{since} earlier ones change whenever one follows, so each step reads the whole text")
        elif feed.slow is not None:
            answer.notes.append(f"steps wait for one another and are not recorded: {feed.slow}")


def _feed(job: _Job, group: Sequence[Prompt]) -> Feed:
    model, room = job.model, max(prompt.budget for prompt in group)
    ids = [prompt.ids for prompt in group]
    if not isinstance(model, EncoderDecoder):
        return feed_for(model)(model, ids, room)
    start = role(job.tokenizer, "bos", "pad") if model.start is None else model.start
    if start is None:
        raise refuse("no token is known that a written text starts with", "set model.start in the preset")
    if job.images is None:
        return Feed(model, [[start]] * len(ids), room, ids)
    seen = job.images[[prompt.number for prompt in group]].to(model.device)
    return Feed(model, [[start]] * len(ids), room, images=seen)


def _draw(job: _Job, feed: Feed, group: Sequence[Prompt]) -> Iterator[Piece]:
    count = job.options.samples
    order = [(prompt, sample) for prompt in group for sample in range(count)]
    rows = [Row(p.number * count + sample, job.text(p), p.budget, p.bounded) for p, sample in order]
    yield from decode(feed, rows, count, job.rules, job.answer.timing)
    for (prompt, sample), row in zip(order, rows, strict=True):
        assert row.finish is not None
        size, text = len(prompt.ids), str(row.text)
        written = Written(prompt.text, sample, text, row.tokens, row.finish, size, choices=row.choices)
        job.made.setdefault(prompt.number, []).append(written)


def _search(job: _Job, feed: Feed, group: Sequence[Prompt]) -> Iterator[Piece]:
    options, ends = job.options, job.rules.ends
    budgets = [(prompt.budget, prompt.bounded) for prompt in group]
    found = search(feed, budgets, options.beams, options.length_penalty, job.rules, job.answer.timing)
    for prompt, finished in zip(group, found, strict=True):
        for sample, best in enumerate(finished[: options.samples]):
            text = job.text(prompt)
            said = "".join(text.push(token) for token in best.tokens if token not in ends) + text.finish()
            finish: Finish = "stop" if text.stopped else best.finish
            written = Written(prompt.text, sample, said, list(best.tokens), finish, len(prompt.ids), best.score)
            job.made.setdefault(prompt.number, []).append(written)
            yield Piece(prompt.number * options.samples + sample, said, True)


def _fill(model: Graph, tokenizer: Tokenizer, texts: Sequence[str], options: Options, answer: Answer) -> None:
    head = "mlm" if "mlm" in model.heads else "lm"
    reach = Reach(limit_of(model), None if options.past_context else model.context)
    prompts = to_fill(tokenizer, texts, reach)
    check_ids(prompts, model.vocab)
    began = time.perf_counter()
    rows = 1 if aligned(model) else ROWS
    for at in range(0, len(prompts), rows):
        answer.filled += fill(model, head, tokenizer, prompts[at : at + rows], options.fill_top)
    answer.timing.prefill_seconds = time.perf_counter() - began
    answer.timing.prefill_tokens = sum(len(prompt.ids) for prompt in prompts)


@contextmanager
def undisturbed(model: Graph) -> Iterator[None]:
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
