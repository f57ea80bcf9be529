"""The text of one row as it grows: whole characters only, and cut before a stop string.

    push(token) -> what may be printed now

What might still become a stop string is held back. The text ends before the stop string that is
complete first, counted in characters, so the cut does not depend on where tokens begin or end; of two
that are complete at the same character the longer one counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol


class Decoder(Protocol):
    """Turns tokens into text, piece by piece."""

    def push(self, token: int) -> str:
        """The text that this token completes; '' inside a character."""

    def finish(self) -> str:
        """What is left: the replacement character for bytes that are no text."""


class Text:
    """What one row has said so far."""

    def __init__(self, decoder: Decoder, stops: Sequence[str] = ()) -> None:
        self.decoder = decoder
        self.stops = tuple(stops)
        self.pieces: list[str] = []
        self.held = ""
        self.stopped = False

    def __str__(self) -> str:
        return "".join(self.pieces)

    def push(self, token: int) -> str:
        """Add a token; the text that is new and safe to print."""
        return self._add(self.decoder.push(token))

    def finish(self) -> str:
        """No token follows: all that was held back, unless it holds a stop string."""
        if self.stopped:
            return ""
        said = self._add(self.decoder.finish())
        if not self.stopped:
            said += self._say(self.held)
            self.held = ""
        return said

    def _add(self, more: str) -> str:
        if self.stopped or not more:
            return ""
        text = self.held + more
        ends = [(at + len(stop), at) for stop in self.stops if (at := text.find(stop)) >= 0]
        if ends:
            self.stopped, self.held = True, ""
            return self._say(text[: min(ends)[1]])
        keep = len(text) - max((_begun(text, stop) for stop in self.stops), default=0)
        self.held = text[keep:]
        return self._say(text[:keep])

    def _say(self, text: str) -> str:
        if text:
            self.pieces.append(text)
        return text


def _begun(text: str, stop: str) -> int:
    """Characters at the end of `text` that `stop` begins with; fewer than all of them."""
    for size in range(min(len(stop) - 1, len(text)), 0, -1):
        if text.endswith(stop[:size]):
            return size
    return 0
