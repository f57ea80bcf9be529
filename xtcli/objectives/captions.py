"""Captions: the encoder sees an image, the decoder says its text.

The text gets what the tokenizer frames one with: bos (or cls) in front, eos (or sep) behind. The decoder reads it
shifted right behind `start`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from xtcli.data.batch import IGNORE, Batch, round_up
from xtcli.data.images import FILE, read_images
from xtcli.data.order import Ints
from xtcli.data.readers import Row
from xtcli.errors import refuse
from xtcli.objectives.base import Sample
from xtcli.objectives.images import GUESSES, Images
from xtcli.objectives.labelled import in_pieces, nothing_left
from xtcli.objectives.labels import text_of
from xtcli.objectives.pairs import ending
from xtcli.objectives.words import clauses, count, truncated
from xtcli.registry import field, part

if TYPE_CHECKING:
    from xtcli.config.preset import Resolved
    from xtcli.data.records import Records, Side


@part("objective", "captions")
class Captions(Images):
    """Image to text; `targets.lm` is aligned with `decoder_input_ids`, which begin with `start`."""

    class Config(Images.Config):
        """Texts of images."""

        text: str = field("column of the text in the table that lists the images", "text")
        length: int | None = field("longest text in tokens, framed; null = the context", None, ge=3, tiny=64)
        multiple: int = field("rows are padded to the longest of a batch, rounded up to this many", 8, gt=0)

    def __init__(self, config: Any, split: Side, tokenizer: Any, *, validation: bool = False, **options: Any) -> None:
        super().__init__(config, tokenizer, multiple=config.multiple, **options)
        if config.length is not None and config.length > self.context:
            cause = f"length is {config.length:,}, and the context has {self.context:,} tokens"
            raise refuse(cause, "raise train.context, or lower objective.length", path="objective.length")
        self.longest = config.length or self.context
        start = self.need("pad", why="the decoder's first input")[0] if self.start is None else self.start
        self.front, self.end = ending(self.special)
        if self.front == [start]:
            self.front = []  # the decoder has it already
        self.start = start
        columns = (FILE, config.text)
        self.used = [row for row in split.rows if text_of(row, 1, columns)]
        self.left_out = len(split.rows) - len(self.used)
        if not self.used:
            raise nothing_left(split.rows, columns, "has a text", validation)
        self.ids: list[Ints] = in_pieces(tokenizer.encode_batch, [values[1] for _, values in self.used])

    @classmethod
    def facts(cls, model: Any) -> dict[str, Any]:
        found = super().facts(model)
        if not hasattr(model, "encoder"):
            cause = "captions need a decoder that reads the image"
            raise refuse(cause, "use model.kind=encoder-decoder with embed: patches in its encoder", path="model.kind")
        return found

    @classmethod
    def read(cls, resolved: Resolved) -> Records:
        preset, config = resolved.preset, resolved.preset.objective
        column: str = config.text  # type: ignore[attr-defined]
        return read_images(preset.data, column, "objective.text", preset.train.seed, folders=False)

    @classmethod
    def texts(cls, row: Row) -> Sequence[str]:
        return [row[1][1]] if isinstance(row[1][1], str) else []

    @classmethod
    def prepare(cls, resolved: Resolved, model: Any) -> tuple[Resolved, Any, Any]:
        from xtcli.data.prepare import folder_of, make_tokenizer
        from xtcli.data.records import Texts

        cls.facts(model)
        preset, records = resolved.preset, cls.read(resolved)
        tokenizer, note = make_tokenizer(preset.tokenizer, Texts(records, cls.texts), folder_of(preset.data))
        records.notes = (*records.notes, note)
        return replace(resolved, preset=cls.settle(resolved, records)), tokenizer, records

    def sample(self, index: int, epoch: int) -> Sample:
        words = self.ids[index][: self.longest - len(self.front) - 1]
        targets = np.concatenate([np.array(self.front, dtype=np.int64), words, [self.end]])
        return {
            "pixel_values": self.image(index),
            "decoder_input_ids": np.concatenate([[self.start], targets[:-1]]),
            "targets.lm": targets,
            "id": np.array(index),
        }

    def collate(self, samples: Sequence[Sample]) -> Batch:
        """One batch; texts stand longest first and are padded to the longest."""
        samples = sorted(samples, key=lambda sample: -sample["targets.lm"].size)
        sizes = np.array([sample["targets.lm"].size for sample in samples])
        width = min(round_up(int(sizes.max()), self.multiple), self.longest)
        ids = np.full((len(samples), width), self.pad, dtype=np.int64)
        targets = np.full((len(samples), width), IGNORE, dtype=np.int64)
        for row, sample in enumerate(samples):
            ids[row, : sizes[row]], targets[row, : sizes[row]] = sample["decoder_input_ids"], sample["targets.lm"]
        inputs = {
            "pixel_values": np.stack([sample["pixel_values"] for sample in samples]),
            "decoder_input_ids": ids,
            "decoder_attention_mask": np.arange(width) < sizes[:, None],
        }
        numbers = [int(sample["id"]) for sample in samples]
        return Batch.of(inputs, {"lm": targets}, numbers, sizes.tolist(), self.multiple)

    def drawn(self, model: Any, tokenizer: Any, tokens: int) -> str:
        """What the model says of the first images."""
        from xtcli.generate.options import Options
        from xtcli.generate.pictures import caption

        rows = self.used[:GUESSES]
        options = Options(max_tokens=max(1, min(tokens, self.longest - 1)))
        answer = caption(model, tokenizer, self.reader, [values[0] for _, values in rows], options)
        return "\n".join(
            f"{one.prompt} => {one.text} (expected: {values[1]})"
            for one, (_, values) in zip(answer.written, rows, strict=True)
        )

    def describe(self) -> str:
        sizes = np.array([ids.size for ids in self.ids], dtype=np.int64)
        frame = f"id {self.front[0]} before and id {self.end} after" if self.front else f"id {self.end} after"
        height, width = self.reader.size
        return clauses(
            f"captions: {count(len(self.used), 'image')} of {height} x {width} pixels, {frame} each text",
            f"the decoder starts from id {self.start}",
            "rows padded to the longest of a batch",
            truncated(sizes, self.longest - len(self.front) - 1, "text"),
            f"{count(self.left_out, 'image')} without text left out" if self.left_out else "",
        )
