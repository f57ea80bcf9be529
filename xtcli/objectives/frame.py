"""One text, or two, as a row: framed by what the tokenizer's template puts around them, cut to the context.

    [CLS] text [SEP]        [CLS] first [SEP] second [SEP]        with token types 0 and 1 where the model reads them

Where the template adds nothing, rows are framed as in training of a language model: cls or bos in front, sep or eos
behind each text. Of two texts that are too long together, tokens are taken from the end of the longer one.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from xtcli.data.order import Ints
from xtcli.errors import refuse

LEAST = 8
"""Tokens of the smallest context: a frame, and some text of both sides."""


class Frame:
    """The frame of rows with one text and with two; rows have at most `context` tokens."""

    def __init__(self, tokenizer: Any, context: int) -> None:
        if context < LEAST:
            raise refuse(
                f"a context of {context} tokens leaves no room for text", f"set model.context to {LEAST} or more"
            )
        self.context = context
        self.parts = {texts: _parts(tokenizer, texts) for texts in (1, 2)}

    def room(self, texts: int) -> int:
        """Tokens of text in a row."""
        return self.context - sum(len(ids) for ids in self.parts[texts][0])

    def row(self, *texts: Ints) -> tuple[Ints, Ints]:
        """The ids and the types of a row; its texts must fit."""
        around, types, inner = self.parts[len(texts)]
        ids, kinds = [around[0]], [types[0]]
        for text, kind, behind, behind_kinds in zip(texts, inner, around[1:], types[1:], strict=True):
            ids += [np.asarray(text, dtype=np.int64), behind]
            kinds += [np.full(len(text), kind, dtype=np.int64), behind_kinds]
        return np.concatenate(ids), np.concatenate(kinds)

    def before(self, texts: int, first: int = 0) -> int:
        """Where the last of the texts begins; `first` is the length of the first where there are two."""
        around = self.parts[texts][0]
        return len(around[0]) + (first + len(around[1]) if texts == 2 else 0)

    def cut(self, *texts: Ints) -> tuple[Ints, ...]:
        """The texts, shortened so that they fit."""
        sizes = lengths([len(text) for text in texts], self.room(len(texts)))
        return tuple(text[:size] for text, size in zip(texts, sizes, strict=True))


def lengths(sizes: list[int], room: int) -> list[int]:
    """What is left of texts of these sizes when the longest gives way token by token until all fit into `room`."""
    excess = sum(sizes) - room
    if excess <= 0:
        return sizes
    if len(sizes) == 1:
        return [room]
    short = min(sizes)
    if 2 * short <= room:
        return [
            size if size == short and number == sizes.index(short) else room - short
            for number, size in enumerate(sizes)
        ]
    return [room - room // 2, room // 2]


def _parts(tokenizer: Any, texts: int) -> tuple[list[Ints], list[Ints], list[int]]:
    ids, types, inner = tokenizer.frame(texts)
    if not any(ids):
        special = tokenizer.special
        end = special.get("sep", special.get("eos"))
        begin = special.get("cls", special.get("bos"))
        ids = [[] if begin is None or begin == end else [begin], *([] if end is None else [end] for _ in range(texts))]
        types = [[0] * len(ids[0]), *([number] * len(one) for number, one in enumerate(ids[1:]))]
        inner = list(range(texts))
    return [np.array(one, dtype=np.int64) for one in ids], [np.array(one, dtype=np.int64) for one in types], inner
