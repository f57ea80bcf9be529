"""Documents laid end to end, each in its frame, read in windows.

    [prefix] document 0 [suffix] [prefix] document 1 [suffix] ...

The sequence is never built: bounds[i] is where document i begins in it, and a batch of windows is one gather from
the token file.
"""

from __future__ import annotations

import numpy as np

from xtcli.data.order import Ints
from xtcli.objectives.base import Documents


class Joined:
    """The framed documents of a split as one addressable sequence of `total` places.

    prefix, suffix: a token in front of and behind every document, None for none.
    ahead: 1 when a place needs the token after it in the same document, so a document has one place less.
    closed: one more prefix at the very end, so that the last document is ended by what ends the others.
    """

    def __init__(
        self,
        documents: Documents,
        prefix: int | None = None,
        suffix: int | None = None,
        *,
        ahead: int = 0,
        closed: bool = False,
    ) -> None:
        self.stream = documents.stream
        self.starts, self.lengths = documents.starts, documents.lengths
        if closed:
            self.starts, self.lengths = np.append(self.starts, 0), np.append(self.lengths, 0)
        self.prefix, self.suffix = prefix, suffix
        framed = self.lengths + (prefix is not None) + (suffix is not None)
        self.places = np.maximum(framed - ahead, 0)
        self.bounds = np.concatenate([np.zeros(1, np.int64), np.cumsum(self.places)])

    @property
    def total(self) -> int:
        """Places in the sequence."""
        return int(self.bounds[-1])

    def locate(self, begins: Ints, width: int) -> tuple[Ints, Ints]:
        """(document, offset in its frame), each (B, width), of the windows that begin at `begins`.

        Behind the end of the sequence the document is -1.
        """
        ends = np.minimum(begins + width, self.total)
        first = np.searchsorted(self.bounds, begins, side="right") - 1
        last = np.searchsorted(self.bounds, ends - 1, side="right") - 1
        pieces = last - first + 1
        row = np.repeat(np.arange(begins.size), pieces)
        piece = np.arange(row.size) - np.repeat(np.cumsum(pieces) - pieces - first, pieces)
        left = np.maximum(self.bounds[piece], begins[row])
        runs = np.minimum(self.bounds[piece + 1], ends[row]) - left
        there = np.arange(width) < (ends - begins)[:, None]
        documents = np.full(there.shape, -1, dtype=np.int64)
        documents[there] = np.repeat(piece, runs)
        offsets = np.zeros(there.shape, dtype=np.int64)
        offsets[there] = np.arange(int(runs.sum())) + np.repeat(
            left - self.bounds[piece] - (np.cumsum(runs) - runs), runs
        )
        return documents, offsets

    def block(self, index: int, width: int) -> tuple[Ints, Ints]:
        """`locate` for one of the blocks that begin every `width` places; the last is moved back so that it is full.

        A sequence shorter than `width` is one block.
        """
        begin = max(min(index * width, self.total - width), 0)
        return self.locate(np.array([begin], dtype=np.int64), min(width, self.total))

    def tokens(self, documents: Ints, offsets: Ints) -> Ints:
        """The token at each (document, offset); what stands at document -1 means nothing."""
        inside = offsets - (self.prefix is not None)
        source = np.asarray(self.stream.tokens)
        index = np.clip(self.starts[documents] + inside, 0, source.size - 1)
        out: Ints = source[index].astype(np.int64)
        if self.prefix is not None:
            out[inside < 0] = self.prefix
        if self.suffix is not None:
            out[inside >= self.lengths[documents]] = self.suffix
        return out


def isolate(documents: Ints, offsets: Ints) -> dict[str, Ints]:
    """`document_ids` and `position_ids` (B, T) under which no document of a window sees another.

    A document that the window cuts starts at position 0, as if the rest had never been; padding has document -1.
    """
    first, begin = documents[:, :1], offsets[:, :1]
    text = documents >= 0
    positions = np.where(documents == first, offsets - begin, offsets) * text
    return {"position_ids": positions, "document_ids": np.where(text, documents - first, -1)}
