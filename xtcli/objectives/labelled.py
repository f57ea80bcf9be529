"""What the objectives on labelled rows share: columns, the settling of what the data tells, frames, samples.

Rows are read into memory (xtcli.data.records). What a model must be told once and for all, such as the names of the
labels, is found in the data and written into the preset, so that it travels with every checkpoint.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from xtcli.data.order import Ints
from xtcli.data.readers import Row, shown
from xtcli.errors import Problem, UserError, refuse
from xtcli.objectives.base import Objective, Sample
from xtcli.objectives.frame import Frame
from xtcli.objectives.words import count

if TYPE_CHECKING:
    from xtcli.config.preset import Preset, Resolved
    from xtcli.data.records import Records


PIECE = 4096
"""Texts that are turned into tokens at once."""


class Labelled(Objective):
    """Samples made of rows; see `Objective`.

    With `predict` rows have no labels and samples no targets: the same rows, for a trained model to label.
    `pad`, `segments` and `decoder` are what `facts` says of the model. `used` are the rows that were not left out;
    `cut_short` says whether some are longer than the context.
    """

    streams: ClassVar[tuple[str, ...]] = ()
    used: list[Row]
    cut_short: bool

    def __init__(
        self,
        config: Any,
        tokenizer: Any,
        *,
        context: int,
        seed: int,
        start: int | None = None,
        pad: int | None = None,
        segments: bool = False,
        decoder: bool = False,
        predict: bool = False,
    ) -> None:
        super().__init__(tokenizer, context=context, seed=seed, multiple=min(config.multiple, context))
        self.config = config
        self.frame = Frame(tokenizer, context)
        self.pad = self.pad if pad is None else pad
        self.segments, self.predict = segments, predict
        self.start = self.need("pad", why="the decoder's first input")[0] if decoder and start is None else start
        self.decoder = decoder
        self.width = {"": context, "decoder_": context}

    @classmethod
    @abstractmethod
    def fields(cls, config: Any) -> tuple[tuple[str, str], ...]:
        """The columns that rows are read from, each with the field of the config that names it."""

    @classmethod
    def columns(cls, config: Any) -> tuple[str, ...]:
        """The columns that rows are read from; values stand in this order."""
        return tuple(column for column, _ in cls.fields(config))

    @classmethod
    @abstractmethod
    def texts(cls, config: Any, row: Row) -> Sequence[str]:
        """The texts of a row, for a tokenizer to learn from."""

    @classmethod
    def begin(cls, resolved: Resolved, model: Any) -> Any:
        """The config with what the model tells settled."""
        return resolved.preset.objective

    @classmethod
    @abstractmethod
    def settle(cls, resolved: Resolved, config: Any, records: Records) -> tuple[Preset, Any]:
        """The preset and the config with what the rows tell settled."""

    @abstractmethod
    def expected(self, index: int) -> str:
        """The answer that the data gives to row `index` of `used`, in words."""

    @classmethod
    def prepare(cls, resolved: Resolved, model: Any) -> tuple[Resolved, Any, Any]:
        from xtcli.data.prepare import folder_of, make_tokenizer
        from xtcli.data.records import Texts, read_records

        config = cls.begin(resolved, model)
        data = resolved.preset.data
        paths = {column: f"objective.{name}" for column, name in cls.fields(config)}
        records = read_records(data, cls.columns(config), resolved.preset.train.seed, paths)
        preset, config = cls.settle(resolved, config, records)
        source = Texts(records, lambda row: cls.texts(config, row))
        tokenizer, note = make_tokenizer(preset.tokenizer, source, folder_of(data))
        records.notes = (*records.notes, note)
        return replace(resolved, preset=preset.model_copy(update={"objective": config})), tokenizer, records

    @classmethod
    def facts(cls, model: Any) -> dict[str, Any]:
        embed = getattr(model, "embed", None)
        segments = getattr(embed, "segments", None)
        return {
            "pad": model.config.pad,
            "segments": getattr(segments, "num_embeddings", 0) > 1 or getattr(embed, "segments_pass", False),
            "decoder": hasattr(model, "decoder") and hasattr(model, "encoder"),
        }

    def made(self, index: int, ids: Ints, types: Ints) -> Sample:
        """A sample without its targets."""
        sample: Sample = {"input_ids": ids, "id": np.array(index)}
        if self.segments:
            sample["token_type_ids"] = types
        if self.decoder:
            sample["decoder_input_ids"] = np.concatenate([[self.start], ids[:-1]])
        return sample


def in_pieces(encode: Callable[[list[str]], list[Any]], texts: list[str]) -> list[Any]:
    """What a tokenizer makes of many texts, some at a time: what the library makes on the way takes much memory."""
    from xtcli.data.tokenizers import threads

    with threads():
        return [one for at in range(0, len(texts), PIECE) for one in encode(texts[at : at + PIECE])]


def nothing_left(rows: Sequence[Row], columns: Sequence[str], why: str, validation: bool) -> UserError:
    """What to tell where no row can be used."""
    side = "data.validation" if validation else "data.source"
    first = shown(dict(zip(columns, rows[0][1], strict=True))) if rows else "none"
    return refuse(f"none of {count(len(rows), 'row')} {why}; the first is {first}", "check its columns", path=side)


def is_stated(resolved: Resolved, path: str) -> bool:
    """Whether the user or the preset says this value, and not only a default."""
    origin = resolved.origins.get(path)
    return origin is not None and origin.source not in ("default", "tiny")


def settled_head(resolved: Resolved, head: str, labels: Sequence[str], **more: Any) -> Any:
    """The preset with as many outputs of a head as there are labels, and `more` of its fields settled.

    A head that states another number is refused.
    """
    preset = resolved.preset
    model: Any = preset.model
    if head not in model.heads:
        return preset  # what the objective needs is told by the caller, who knows all its heads
    path = f"model.heads.{head}.labels"
    stated = model.heads[head].labels
    settled = {"labels": len(labels), **more}
    if all(getattr(model.heads[head], name) == value for name, value in settled.items()):
        return preset
    if stated != len(labels) and is_stated(resolved, path):
        names = ", ".join(labels[:8]) + (", ..." if len(labels) > 8 else "")
        cause = f"is {stated}, and there are {len(labels)} labels ({names})"
        remedy = f"set {path}={len(labels)}, or check objective.label"
        raise UserError(Problem(cause, resolved.place(path), path, remedy))
    config = model.heads[head].model_copy(update=settled)
    changed = model.model_copy(update={"heads": {**model.heads, head: config}})
    return preset.model_copy(update={"model": changed, "expect": type(preset.expect)()})
