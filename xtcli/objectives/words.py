"""The phrases in which objectives describe themselves and refuse."""

from __future__ import annotations

import numpy as np

from xtcli.data.order import Ints
from xtcli.errors import UserError, refuse
from xtcli.objectives.base import Documents

SHARED = "documents in one block see each other"
LANES = "each row of a batch goes on where it ended in the batch before, and what was read there is remembered"


def count(number: int, noun: str) -> str:
    """`number` with thousands separated, and its noun, plural where it is."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def clauses(*parts: str) -> str:
    """The parts that say something, as one line."""
    return "; ".join(part for part in parts if part)


def left_out(documents: Documents, least: int = 1) -> str:
    """The documents that were too short to use, empty when none was."""
    if not documents.dropped:
        return ""
    if least == 1:
        return f"{count(documents.dropped, 'empty document')} left out"
    return f"{count(documents.dropped, 'document')} of fewer than {least} tokens left out"


def truncated(lengths: Ints, room: int, noun: str = "document") -> str:
    """How many texts are longer than `room` tokens, and what that loses; empty when none is."""
    cut = int((lengths > room).sum())
    lost = int(np.maximum(lengths - room, 0).sum())
    return f"{count(cut, noun)} cut at {count(room, 'token')} ({count(lost, 'token')} never seen)" if cut else ""


def repeated(blocks: int, width: int, total: int) -> str:
    """What the last block does where `total` tokens do not fill it."""
    missing = blocks * width - total
    if not missing:
        return ""
    if blocks == 1:
        return f"the block has {count(total, 'token')} and is padded"
    return f"the last block repeats {count(missing, 'token')} of the one before"


def too_little(what: str, validation: bool) -> UserError:
    """The refusal of a text of which nothing can be made; `what` follows "the text has"."""
    if validation:
        return refuse(f"the validation text has {what}", "set data.validation to a larger share, or to 0")
    return refuse(f"the text has {what}", "give more text in data.source")


def too_short(have: int, need: int, remedy: str) -> UserError:
    """The refusal of a text that does not fill one block."""
    return refuse(f"the text has {count(have, 'token')}, and one block takes {need:,}", remedy)
