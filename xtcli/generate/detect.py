"""What a discriminator says of a text: for each of its tokens whether it looks replaced, and how surely."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from xtcli.data.tokenizers import Tokenizer
from xtcli.errors import Problem, UserError, refuse
from xtcli.generate.engine import ROWS, limit_of, undisturbed
from xtcli.generate.fill import MASK
from xtcli.generate.label import Label, Said, Words
from xtcli.generate.prompts import (
    Prompt,
    Reach,
    check_ids,
    encode_marked,
    frame_of,
    named,
    padded_right,
    role,
    too_long,
)
from xtcli.parts.graphs import Graph

HEAD = "replaced"


def detects(model: Graph, tokenizer: Tokenizer, prompts: Sequence[str]) -> bool:
    """Whether prompts are to be looked through for replaced tokens: the model can, and has no mask to fill."""
    masks = [mark for mark in (tokenizer.mask_text, MASK) if mark]
    masked = any(mark in prompt for prompt in prompts for mark in masks)
    return HEAD in model.heads and ("mlm" not in model.heads or not masked)


def detect(model: Graph, tokenizer: Tokenizer, prompts: Sequence[str]) -> Said:
    """The tokens of each prompt with `replaced` or `original`; raises UserError for prompts that do not fit."""
    head: Any = model.heads[HEAD]
    reach = Reach(limit_of(model), model.context)
    front, back = frame_of(tokenizer, ["cls"], ["sep"])
    mask = role(tokenizer, "mask")
    marks = {} if mask is None else dict.fromkeys((tokenizer.mask_text or MASK, MASK), mask)
    framed, wrong = [], []
    for number, text in enumerate(prompts):
        inner = encode_marked(tokenizer, text, marks)
        if not inner:
            wrong.append(Problem("is empty", named(number, prompts), remedy="give some text"))
        ids = [*front, *inner, *back]
        if reach.tokens is not None and len(ids) > reach.tokens:
            wrong.append(too_long(number, prompts, len(ids), reach))
        framed.append(Prompt(number, text, ids))
    if wrong:
        raise UserError(*wrong)
    check_ids(framed, model.vocab)
    said = Said()
    with undisturbed(model):
        for at in range(0, len(framed), ROWS):
            rows = [prompt.ids for prompt in framed[at : at + ROWS]]
            fed, real = padded_right(rows, model.device)
            hidden = model.read_by(HEAD, model.hidden(input_ids=fed, attention_mask=real))
            logits = head.outputs(hidden)["logits"].float()
            for row, chances in zip(rows, logits.sigmoid().tolist(), strict=True):
                inside = slice(len(front), len(row) - len(back))
                said.results.append(_words(tokenizer, row[inside], chances[inside]))
    return said


def _words(tokenizer: Tokenizer, ids: Sequence[int], chances: Sequence[float]) -> Words:
    found: list[tuple[str, Label | None]] = []
    for id, chance in zip(ids, chances, strict=True):
        if chance != chance:
            raise refuse("the model's logits are not numbers", "its weights are damaged, or try --dtype fp32")
        label = Label("replaced", chance) if chance >= 0.5 else Label("original", 1 - chance)
        found.append((tokenizer.decode([id]).strip() or repr(tokenizer.decode([id])), label))
    return Words(found)
