"""What every objective has: samples, their randomness, and how rows become a batch.

A sample is a map of one-dimensional arrays without padding: names of model inputs, `targets.<head>`, and `id`, the
sample's index. `collate` pads rows to one width and adds the masks that the padding calls for.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

import numpy as np

from xtcli import registry
from xtcli.data.batch import IGNORE, Batch, round_up
from xtcli.data.order import Ints
from xtcli.errors import refuse

if TYPE_CHECKING:
    from xtcli.config.preset import Resolved

Array = np.ndarray[Any, Any]
Sample = dict[str, Array]
Packing = Literal["stream", "documents", "none"]


class Tokenizer(Protocol):
    """What an objective needs of a tokenizer; `special` maps roles (pad, bos, mask ...) to ids."""

    @property
    def vocab(self) -> int: ...
    @property
    def special(self) -> Mapping[str, int]: ...
    @property
    def sentinels(self) -> Sequence[int]: ...
    def encode(self, text: str) -> list[int]: ...
    def decode(self, ids: list[int]) -> str: ...


class Stream(Protocol):
    """The tokens of one column: document i is tokens[starts[i] : starts[i] + lengths[i]]."""

    @property
    def tokens(self) -> Array: ...
    @property
    def starts(self) -> Ints: ...
    @property
    def lengths(self) -> Ints: ...


class Split(Protocol):
    """One side of the train / validation split."""

    @property
    def streams(self) -> Mapping[str, Stream]: ...


def generator(seed: int, epoch: int, index: int, use: int = 0) -> np.random.Generator:
    """The random numbers of one sample in one epoch; `use` tells apart independent uses."""
    key = np.array([seed % 2**64, (epoch << 40) + index], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=np.array([0, 0, 0, use], dtype=np.uint64)))


@dataclass(frozen=True)
class Documents:
    """Some documents of a stream, all with at least `least` tokens; `dropped` counts those that were shorter."""

    stream: Stream
    starts: Ints
    lengths: Ints
    dropped: int

    @classmethod
    def of(cls, stream: Stream, least: int = 1) -> Documents:
        """The documents of `stream` that have at least `least` tokens."""
        lengths = np.asarray(stream.lengths, dtype=np.int64)
        starts = np.asarray(stream.starts, dtype=np.int64)
        keep = lengths >= least
        return cls(stream, starts[keep], lengths[keep], int((~keep).sum()))

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def total(self) -> int:
        """Tokens of all documents."""
        return int(self.lengths.sum())

    def read(self, document: int, start: int, stop: int) -> Ints:
        """Tokens [start, stop) of a document."""
        at = int(self.starts[document])
        return np.asarray(self.stream.tokens[at + start : at + stop]).astype(np.int64)


class Objective(ABC):
    """A way to cut a split into samples; see the module's docstring for what a sample is.

    `streams` names the columns it reads, `textual` says whether what it trains answers prompts with text, `data`
    what it reads, text or images. `width` caps the padded width of each side; `multiple` = 0 pads to the cap, any
    other value to the longest row of the batch, rounded up to it. `masks` says when masks are made: never (causal:
    what comes later cannot disturb), when a row is padded, or always.
    """

    streams: ClassVar[tuple[str, ...]] = ("text",)
    longest_first: ClassVar[bool] = False
    textual: ClassVar[bool] = True
    data: ClassVar[str] = "text"

    class Config(registry.Config):
        """No fields."""

    def __init__(self, tokenizer: Tokenizer, *, context: int, seed: int, multiple: int = 0) -> None:
        special = dict(tokenizer.special)
        self.special = special
        self.context = context
        self.seed = seed
        self.multiple = multiple
        self.pad = special.get("pad", special.get("eos", 0))
        self.width: dict[str, int] = {"": context}
        self.masks: Literal["never", "needed", "always"] = "always"
        self.carry = False  # whether sample i + 1 goes on where sample i ended, and models remember that

    @classmethod
    def prepare(cls, resolved: Resolved, model: Any) -> tuple[Resolved, Any, Any]:
        """The data of a preset as this objective reads it: (preset, tokenizer, store).

        The preset is the one given, with what only the data can tell settled in it. `model` is a skeleton.
        """
        from xtcli.data.prepare import prepare

        preset = resolved.preset
        return resolved, *prepare(preset.data, preset.tokenizer, seed=preset.train.seed, columns=cls.streams)

    @classmethod
    def facts(cls, model: Any) -> dict[str, Any]:
        """What the constructor must know of the model, as keyword arguments."""
        return {}

    def scorer(self) -> Any:
        """A fresh `xtcli.train.scores.Scorer` for one validation, None where the loss is all that is measured."""
        return None

    def drawn(self, model: Any, tokenizer: Any, tokens: int) -> str | None:
        """A sample of what the model makes, where that is no text that `generate` writes; None where it is."""
        return None

    @abstractmethod
    def __len__(self) -> int:
        """Samples of an epoch, at least 1."""

    @abstractmethod
    def sample(self, index: int, epoch: int) -> Sample:
        """Sample `index` as it is in `epoch`."""

    @abstractmethod
    def describe(self) -> str:
        """What is done to the text, in words, with counts."""

    def batch(self, indices: Ints, epochs: Ints) -> Batch:
        """The samples `indices`, each as it is in its epoch, as one batch."""
        return self.collate([self.sample(int(i), int(e)) for i, e in zip(indices, epochs, strict=True)])

    def collate(self, samples: Sequence[Sample]) -> Batch:
        """One batch of at least one sample: rows padded, masks made, lengths counted."""
        if self.longest_first:
            samples = sorted(samples, key=lambda s: -s["input_ids"].size)
        inputs: dict[str, Array] = {}
        targets: dict[str, Array] = {}
        lengths = np.zeros(len(samples), dtype=np.int64)
        widths: dict[str, int] = {}
        for side in ("", "decoder_"):
            if side + "input_ids" not in samples[0]:
                continue
            sizes = np.array([s[side + "input_ids"].size for s in samples])
            cap = self.width[side]
            widths[side] = width = min(round_up(int(sizes.max()), self.multiple), cap) if self.multiple else cap
            lengths += sizes
            if self.masks == "always" or (self.masks == "needed" and sizes.min() < width):
                inputs[side + "attention_mask"] = np.arange(width) < sizes[:, None]
        answer = "decoder_" if "decoder_" in widths else ""
        for name in samples[0]:
            if name == "id":
                continue
            head = name.removeprefix("targets.")
            into, fill = (inputs, self._fill(name)) if head == name else (targets, IGNORE)
            side = answer if head != name else "decoder_" if name.startswith("decoder_") else ""
            into[head] = _stack([s[name] for s in samples], widths[side], fill)
        ids = [int(s["id"]) for s in samples]
        return Batch.of(inputs, targets, ids, lengths.tolist(), self.multiple)

    def _fill(self, name: str) -> int:
        """What stands behind the end of a row of this input."""
        if name.endswith("input_ids"):
            return self.pad
        return -1 if name == "document_ids" else 0

    def need(self, *roles: str, why: str) -> list[int]:
        """The ids of special tokens; raises UserError for those that the tokenizer lacks."""
        missing = [role for role in roles if role not in self.special]
        if missing:
            names = " and ".join(missing)
            raise refuse(
                f"{why} needs a {names} token and the tokenizer has none", f"set tokenizer.special.{missing[0]}"
            )
        return [self.special[role] for role in roles]


def _stack(rows: Sequence[Array], width: int, fill: int) -> Array:
    if rows[0].dtype.kind == "f":
        return np.stack(rows)  # values that are no ids: every row has as many
    if rows[0].ndim == 0:
        return np.array([int(row) for row in rows], dtype=np.int64)
    out = np.full((len(rows), width), fill, dtype=np.int64)
    for into, row in zip(out, rows, strict=True):
        into[: row.size] = row
    return out
