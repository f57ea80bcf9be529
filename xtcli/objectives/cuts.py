"""Pieces of documents, never across two: a document longer than `width` is cut into equal pieces."""

from __future__ import annotations

import numpy as np

from xtcli.objectives.base import Documents


class Cuts:
    """A document of L tokens gives ceil(L / width) pieces, whose sizes differ by one at most."""

    def __init__(self, documents: Documents, width: int) -> None:
        self.lengths = documents.lengths
        self.pieces = -(-documents.lengths // width)
        self.bounds = np.concatenate([np.zeros(1, np.int64), np.cumsum(self.pieces)])

    def __len__(self) -> int:
        return int(self.bounds[-1])

    def at(self, index: int) -> tuple[int, int, int]:
        """(document, first token, end) of piece `index`."""
        document = int(np.searchsorted(self.bounds, index, side="right")) - 1
        length, pieces = int(self.lengths[document]), int(self.pieces[document])
        number = index - int(self.bounds[document])
        return document, number * length // pieces, (number + 1) * length // pieces
