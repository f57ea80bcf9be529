"""From texts to rows of tokens: what frames them, how long they may become, which go together.

A text is framed by the tokenizer's template or, where that adds nothing, as training framed it:

    decoder           bos in front, where the tokenizer has one that is not its eos too
    encoder-decoder   bos (or cls) in front, eos (or sep) behind; <extra_id_0> ... and the mask are read as such
    encoder           cls in front, sep behind

A decoder's text is to go on, so nothing is put behind it. Rows of one batch are padded on the left, so
that every row's next token falls into the same slot.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from xtcli.data.special import sentinel_name
from xtcli.data.tokenizers import Tokenizer
from xtcli.errors import Problem, UserError


@dataclass(frozen=True)
class Prompt:
    """One prompt in tokens. `budget` new tokens at most; `bounded` where the context allows no more."""

    number: int
    text: str
    ids: list[int]
    budget: int = 0
    bounded: bool = False


@dataclass(frozen=True)
class Reach:
    """The longest text: `hard` tokens have positions, `soft` were planned for; None is no limit."""

    hard: int | None
    soft: int | None

    @property
    def tokens(self) -> int | None:
        """The nearer of the two."""
        return min((limit for limit in (self.hard, self.soft) if limit is not None), default=None)

    def remedy(self, shorten: str) -> str:
        """What can be done about a text that is longer."""
        if self.soft is not None and (self.hard is None or self.hard > self.soft):
            return f"{shorten}, or allow more with --past-context"
        return shorten


def role(tokenizer: Tokenizer, *roles: str) -> int | None:
    """The id of the first of these roles that the tokenizer has."""
    return next((tokenizer.special[name] for name in roles if name in tokenizer.special), None)


def frame_of(tokenizer: Tokenizer, front: Sequence[str], back: Sequence[str]) -> tuple[list[int], list[int]]:
    """The ids around a text: the template's, or else the first of the roles `front` and of the roles `back`."""
    whole = tokenizer.encode("a", special=True)
    plain = [place for place, id in enumerate(whole) if id not in tokenizer.control]
    if plain and len(plain) < len(whole):
        return whole[: plain[0]], whole[plain[-1] + 1 :]
    before, after = role(tokenizer, *front), role(tokenizer, *back)
    return [] if before is None or before == after else [before], [] if after is None else [after]


def encode_marked(tokenizer: Tokenizer, text: str, marks: Mapping[str, int]) -> list[int]:
    """The ids of a text in which some strings (masks, sentinels) stand for ids of their own.

    Where the tokenizer makes a space part of the word behind it, the space before a mark is left out: in
    training a mark stands for a word with its space.
    """
    if not marks:
        return tokenizer.encode(text)
    space = " ?" if len(tokenizer.encode(" a")) == 1 else ""
    longest_first = sorted(marks, key=len, reverse=True)
    pieces = re.split(f"{space}({'|'.join(map(re.escape, longest_first))})", text)
    ids = tokenizer.encode(pieces[0])
    for mark, piece in zip(pieces[1::2], pieces[2::2], strict=True):
        ids += [marks[mark], *tokenizer.encode(piece)]
    return ids


def to_continue(tokenizer: Tokenizer, texts: Sequence[str], reach: Reach, most: int) -> list[Prompt]:
    """Prompts of a decoder; raises UserError for those that leave no room or nothing to go on from."""
    front, _ = frame_of(tokenizer, ["bos"], ["eos"])
    opening = role(tokenizer, "bos", "eos")
    prompts, wrong = [], []
    for number, text in enumerate(texts):
        ids = front + tokenizer.encode(text) or ([] if opening is None else [opening])
        if not ids:
            cause = "is empty, and the tokenizer has no token that begins a text"
            wrong.append(Problem(cause, named(number, texts), remedy="give some text"))
            continue
        room = most if reach.tokens is None else reach.tokens - len(ids)
        if room < 1:
            wrong.append(too_long(number, texts, len(ids), reach, "which leaves no room for a new one: "))
        prompts.append(Prompt(number, text, ids, min(room, most), room < most))
    if wrong:
        raise UserError(*wrong)
    return prompts


def to_read(tokenizer: Tokenizer, texts: Sequence[str], reach: Reach) -> list[Prompt]:
    """Prompts of an encoder; raises UserError for those that are empty or too long."""
    front, back = frame_of(tokenizer, ["bos", "cls"], ["eos", "sep"])
    marks = {sentinel_name(number): id for number, id in enumerate(tokenizer.sentinels)}
    mask = role(tokenizer, "mask")
    if mask is not None and tokenizer.mask_text:
        marks[tokenizer.mask_text] = mask
    prompts, wrong = [], []
    for number, text in enumerate(texts):
        inner = encode_marked(tokenizer, text, marks)
        if not inner:
            wrong.append(Problem("is empty", named(number, texts), remedy="give some text"))
        ids = [*front, *inner, *back]
        if reach.tokens is not None and len(ids) > reach.tokens:
            wrong.append(too_long(number, texts, len(ids), reach))
        prompts.append(Prompt(number, text, ids))
    if wrong:
        raise UserError(*wrong)
    return prompts


def named(number: int, texts: Sequence[str]) -> str:
    """How messages call a prompt."""
    return "the prompt" if len(texts) == 1 else f"prompt {number + 1}"


def too_long(number: int, texts: Sequence[str], size: int, reach: Reach, more: str = "") -> Problem:
    """A prompt that does not fit."""
    cause = f"has {size:,} tokens, {more}the model takes {reach.tokens:,}"
    return Problem(cause, named(number, texts), remedy=reach.remedy("shorten it"))


def check_ids(prompts: Sequence[Prompt], rows: int) -> None:
    """Raise UserError when a tokenizer gave ids that the token table of `rows` rows lacks."""
    largest = max(max(prompt.ids) for prompt in prompts)
    if largest >= rows:
        cause = f"the tokenizer gives id {largest:,}, the model knows ids below {rows:,}"
        raise UserError(Problem(cause, remedy="use the tokenizer that the model was trained with"))


def grouped(prompts: Sequence[Prompt], hard: int | None, most: int, alike: bool = False) -> Iterator[list[Prompt]]:
    """Batches of at most `most` prompts, in which padding costs no row a token that it would have alone.

    alike: no padding at all, so that every prompt of a batch has as many tokens.
    """
    waiting = sorted(prompts, key=lambda prompt: -len(prompt.ids))
    while waiting:
        width = len(waiting[0].ids)
        fits = [p for p in waiting if hard is None or width + p.budget <= hard]
        fits = [p for p in fits if not alike or len(p.ids) == width][: max(most, 1)]
        taken = {prompt.number for prompt in fits}
        waiting = [prompt for prompt in waiting if prompt.number not in taken]
        yield fits


def padded_left(rows: Sequence[Sequence[int]], capacity: int, device: torch.device) -> tuple[Tensor, Tensor | None]:
    """Ids (B, capacity), rows ending in the same slot, and the padding (B, 1) before each, None without any."""
    width = max(len(row) for row in rows)
    table = torch.zeros(len(rows), capacity, dtype=torch.long)
    for at, row in enumerate(rows):
        table[at, width - len(row) : width] = torch.tensor(row)
    pads = torch.tensor([[width - len(row)] for row in rows])
    return table.to(device), pads.to(device) if bool(pads.any()) else None


def padded_right(rows: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor | None]:
    """Ids (B, T), rows beginning in the same slot, and the mask of real tokens, None without padding."""
    width = max(len(row) for row in rows)
    table = torch.zeros(len(rows), width, dtype=torch.long)
    for at, row in enumerate(rows):
        table[at, : len(row)] = torch.tensor(row)
    sizes = torch.tensor([[len(row)] for row in rows])
    mask = torch.arange(width) < sizes
    return table.to(device), None if bool(mask.all()) else mask.to(device)
