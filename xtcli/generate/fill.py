"""Filling masks: what a model that reads both ways expects in each hidden place.

    p(token | everything else), one softmax for each mask; several masks are filled independently

A mask is written as the tokenizer's own mask token or as [MASK].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from xtcli.data.tokenizers import Tokenizer
from xtcli.errors import Problem, UserError, refuse
from xtcli.generate.prompts import Prompt, Reach, encode_marked, frame_of, named, padded_right, role, too_long
from xtcli.parts.chance import settled
from xtcli.parts.graphs import Graph

MASK = "[MASK]"


@dataclass(frozen=True)
class Guess:
    """A token for a mask."""

    token: int
    text: str
    probability: float


@dataclass(frozen=True)
class Filled:
    """A prompt with its best guesses in place, and all guesses of each mask, the likeliest first."""

    prompt: str
    text: str
    masks: list[list[Guess]]


def to_fill(tokenizer: Tokenizer, texts: Sequence[str], reach: Reach) -> list[Prompt]:
    """Prompts with masks; raises UserError for those without one or too long."""
    mask, written = role(tokenizer, "mask"), tokenizer.mask_text or MASK
    if mask is None:
        raise refuse("the tokenizer has no mask token, so there is nothing to fill", "use a model trained with one")
    front, back = frame_of(tokenizer, ["cls"], ["sep"])
    prompts, wrong = [], []
    for number, text in enumerate(texts):
        ids = [*front, *encode_marked(tokenizer, text, {written: mask, MASK: mask}), *back]
        if mask not in ids:
            wrong.append(
                Problem("has no mask", named(number, texts), remedy=f"write {written} for what is to be filled")
            )
        if reach.tokens is not None and len(ids) > reach.tokens:
            wrong.append(too_long(number, texts, len(ids), reach))
        prompts.append(Prompt(number, text, ids))
    if wrong:
        raise UserError(*wrong)
    return prompts


def fill(model: Graph, name: str, tokenizer: Tokenizer, prompts: Sequence[Prompt], top: int) -> list[Filled]:
    """The `top` likeliest tokens for every mask of every prompt, by the head of that name."""
    if len(prompts) > 1 and any(getattr(module, "by_width", False) for module in model.modules()):
        # Beside a longer one a prompt would be read in another way than alone.
        return [answer for prompt in prompts for answer in fill(model, name, tokenizer, [prompt], top)]
    head: Any = model.heads[name]
    mask_id = tokenizer.special["mask"]
    ids, real = padded_right([prompt.ids for prompt in prompts], model.device)
    with settled(model):
        hidden = model.read_by(name, model.hidden(input_ids=ids, attention_mask=real))
    places = (ids == mask_id) if real is None else (ids == mask_id) & real
    logits = head.logits(hidden.states[places], hidden.table).float()[:, : tokenizer.vocab]
    if not bool(logits.isfinite().all()):
        raise refuse("the model's logits are not numbers", "its weights are damaged, or try --dtype fp32")
    best = logits.softmax(-1).topk(min(top, logits.shape[-1]))
    rows = iter(zip(best.indices.tolist(), best.values.tolist(), strict=True))
    counts = places.sum(1).tolist()
    answers = []
    for prompt, count in zip(prompts, counts, strict=True):
        masks = []
        for tokens, values in (next(rows) for _ in range(count)):
            masks.append([Guess(t, tokenizer.decode([t]), p) for t, p in zip(tokens, values, strict=True)])
        written = iter(masks)
        whole = [next(written)[0].token if id == mask_id else id for id in prompt.ids]
        answers.append(Filled(prompt.text, tokenizer.decode(whole, special=False), masks))
    return answers
