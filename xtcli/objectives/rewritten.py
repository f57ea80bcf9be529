"""What objectives share whose decoder says what the encoder's row hides: rows of text, their frame, how they are told.

pack: stream   documents laid end to end, in blocks of `block` tokens
pack: none     a row is one document or a piece of it
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from xtcli import registry
from xtcli.data.order import Ints
from xtcli.errors import refuse
from xtcli.objectives.base import Documents, Objective, Split
from xtcli.objectives.cuts import Cuts
from xtcli.objectives.joined import Joined
from xtcli.objectives.words import SHARED, count, repeated, too_little, too_short
from xtcli.registry import field


class Rewritten(Objective):
    """`text(index)` are the tokens of a row before anything is done to them."""

    class Config(registry.Config):
        """How text becomes rows."""

        pack: Literal["stream", "none"] = field(
            "stream: documents are joined with nothing between them and see each other; none: a row is one document "
            "or a piece of it",
            "stream",
        )
        multiple: int = field("pack none: rows are padded to the longest of a batch, rounded up to this many", 64, gt=0)

    config: Any

    def refuse_short(self, least: int, what: str) -> None:
        """Raises UserError for a context of fewer than `least` tokens; `what` it is too short to do."""
        if self.context < least:
            cause = f"a context of {self.context} tokens is too short to {what}"
            raise refuse(cause, f"set train.context to {least} or more")

    def first(self, start: int | None) -> int:
        """The token that a decoder's row begins with: `start`, or else pad."""
        return self.need("pad", why="the decoder's first input")[0] if start is None else start

    def last(self) -> int:
        """The token that ends a target."""
        end = self.special.get("eos", self.special.get("sep"))
        if end is None:
            cause = "a decoder learns where to stop from an eos token, and the tokenizer has none"
            raise refuse(cause, "set tokenizer.special.eos")
        return end

    def lay(
        self, split: Split, block: int, validation: bool, fits: Callable[[int], int], least: int = 2, row: str = "a row"
    ) -> None:
        """Lay out the text in rows of at most `block` tokens; documents of fewer than `least` are left out.

        `fits(total)` is the context in which a text of `total` tokens fills a block. Raises UserError for a text of
        fewer than 2 tokens, which `row` takes, or one that fills no block.
        """
        self.block, self.least = block, least
        self.documents = Documents.of(split.streams["text"], least)
        total = self.documents.total
        if total < 2:
            raise too_little(f"{count(total, 'token')}, and {row} takes 2", validation)
        if self.config.pack == "none":
            self.cuts = Cuts(self.documents, block)
            self.samples = len(self.cuts)
            return
        self.joined = Joined(self.documents)
        self.samples = -(-total // block)
        if total < block and not validation:
            remedy = f"give more text, or set objective.pack=none or train.context to {fits(total)} or less"
            raise too_short(total, block, remedy)

    def __len__(self) -> int:
        return self.samples

    def text(self, index: int) -> Ints:
        """The tokens of row `index`."""
        if self.config.pack == "none":
            return self.documents.read(*self.cuts.at(index))
        tokens: Ints = self.joined.tokens(*self.joined.block(index, self.block))[0]
        return tokens

    def told(self) -> list[str]:
        """The rows, in phrases."""
        documents = count(len(self.documents), "document")
        if self.config.pack == "none":
            return [f"{documents} in {count(self.samples, 'row')}, padded", "no row has text of two documents"]
        rows = f"{documents} end to end, nothing between them, in {count(self.samples, 'block')}"
        return [rows, SHARED, repeated(self.samples, self.block, self.joined.total)]
