"""Objectives on images: their labels, or the pixels of patches that are hidden.

    image-labels     an image, one of the labels                          head `sequence`
    masked-patches   an image of which some patches are replaced by one   head `pixels`
                     vector; their pixels (Xie et al. 2021, SimMIM, arXiv:2111.09886)

Images come from a folder (xtcli.data.images) and are brought to the size that the model reads.
"""

from __future__ import annotations

from abc import abstractmethod
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import numpy as np
from pydantic import Strict

from xtcli import registry
from xtcli.data.batch import IGNORE, Batch
from xtcli.data.images import FILE, Array, ImageConfig, Reader, embed_of, read_images
from xtcli.data.readers import Row
from xtcli.errors import Problem, UserError, refuse
from xtcli.objectives.base import Objective, Sample, generator
from xtcli.objectives.labelled import nothing_left, settled_head
from xtcli.objectives.labels import name_of, names_in, number_of
from xtcli.objectives.words import clauses, count
from xtcli.registry import field, part

if TYPE_CHECKING:
    from xtcli.config.preset import Preset, Resolved
    from xtcli.data.records import Records, Side

SHOWN = 8
"""Labels that are named in one line."""
GUESSES = 3
"""Images that a sample of a run says something of."""


class Images(Objective):
    """Samples made of files; `used` are the rows (path, value) that were not left out."""

    streams: ClassVar[tuple[str, ...]] = ()
    data: ClassVar[str] = "images"
    used: list[Row]

    class Config(registry.Config):
        """Images of a folder."""

        images: ImageConfig = field("how files become numbers", ImageConfig())

    def __init__(
        self,
        config: Any,
        tokenizer: Any,
        *,
        context: int,
        seed: int,
        size: tuple[int, int],
        channels: int,
        places: int,
        start: int | None = None,
        multiple: int = 0,
    ) -> None:
        super().__init__(tokenizer, context=context, seed=seed, multiple=multiple)
        self.config, self.start, self.places = config, start, places
        self.reader = Reader(config.images, size, channels)

    @classmethod
    def facts(cls, model: Any) -> dict[str, Any]:
        """What images the model reads; raises UserError for a model that reads none."""
        embed = embed_of(model)
        if embed is None:
            cause = f"the objective '{cls.Config.kind}' gives images, and the model reads none"
            raise refuse(cause, "use embed: {kind: patches, image: 224, patch: 16}", path="model.embed")
        return {"size": embed.image, "channels": embed.channels, "places": embed.places}

    @classmethod
    @abstractmethod
    def read(cls, resolved: Resolved) -> Records:
        """The rows of the data."""

    @classmethod
    def settle(cls, resolved: Resolved, records: Records) -> Preset:
        """The preset with what the rows tell settled."""
        return resolved.preset

    @classmethod
    def texts(cls, row: Row) -> Sequence[str]:
        """The texts of a row, for a tokenizer to learn from."""
        return ()

    @classmethod
    def prepare(cls, resolved: Resolved, model: Any) -> tuple[Resolved, Any, Any]:
        from xtcli.data.tokenizers import Bytes
        from xtcli.data.train_tokenizer import train

        cls.facts(model)
        records = cls.read(resolved)
        # Nothing is written or read as text, so whatever the preset names is not looked for.
        tokenizer = train(Bytes.Config(), [])
        return replace(resolved, preset=cls.settle(resolved, records)), tokenizer, records

    def __len__(self) -> int:
        return len(self.used)

    def image(self, index: int) -> Array:
        """The image of row `index` of `used`."""
        return self.reader.read(self.used[index][1][0])

    def collate(self, samples: Sequence[Sample]) -> Batch:
        """One batch; a row counts as many tokens as the model makes of its image."""
        names = [name for name in samples[0] if name != "id"]
        rows = {name: np.stack([sample[name] for sample in samples]) for name in names}
        targets = {name.removeprefix("targets."): rows.pop(name) for name in names if name.startswith("targets.")}
        return Batch.of(rows, targets, [int(sample["id"]) for sample in samples], [self.places] * len(samples))


@part("objective", "image-labels")
class ImageLabels(Images):
    """One label for an image; `targets.sequence` is ()."""

    class Config(Images.Config):
        """Image classification."""

        label: str = field("column of the label, where a table lists the images; else folders are labels", "label")
        labels: Annotated[tuple[str, ...], Strict(False)] | None = field(
            "names of the labels in the order of the outputs; null: collected from the data", None
        )

    def __init__(self, config: Any, split: Side, tokenizer: Any, *, validation: bool = False, **options: Any) -> None:
        super().__init__(config, tokenizer, **options)
        self.used, self.numbers = [], []
        for place, values in split.rows:
            name = name_of(values[1], place, config.label)
            if name is not None:
                self.used.append((place, values))
                self.numbers.append(number_of(name, config.labels, place, config.label))
        self.left_out = len(split.rows) - len(self.used)
        if not self.used:
            raise nothing_left(split.rows, (FILE, config.label), "has a label", validation)

    @classmethod
    def read(cls, resolved: Resolved) -> Records:
        preset, config = resolved.preset, _config(resolved)
        head = preset.model.heads.get("sequence")  # type: ignore[attr-defined]
        if head is not None and getattr(head, "problem", None) not in (None, "one"):
            path = "model.heads.sequence.problem"
            cause = f"is '{head.problem}', and an image of this objective has one label"
            raise UserError(Problem(cause, resolved.place(path), path, f"set {path}=one"))
        return read_images(preset.data, config.label, "objective.label", preset.train.seed, folders=True)

    @classmethod
    def settle(cls, resolved: Resolved, records: Records) -> Preset:
        config = _config(resolved)
        names = config.labels or names_in(records.rows, "sequence", config.label)
        preset: Preset = settled_head(resolved, "sequence", names)
        return preset.model_copy(update={"objective": config.model_copy(update={"labels": names})})

    def sample(self, index: int, epoch: int) -> Sample:
        return {
            "pixel_values": self.image(index),
            "targets.sequence": np.array(self.numbers[index]),
            "id": np.array(index),
        }

    def expected(self, index: int) -> str:
        """The label of row `index` of `used`."""
        return str(self.config.labels[self.numbers[index]])

    def scorer(self) -> Any:
        from xtcli.train.scores import LabelScores

        return LabelScores("sequence", self.config.labels)

    def drawn(self, model: Any, tokenizer: Any, tokens: int) -> str:
        """What the model says of the first images."""
        from xtcli.generate.pictures import label_images
        from xtcli.generate.said import brief

        files = [values[0] for _, values in self.used[:GUESSES]]
        said = label_images(model, self.reader, self.config.labels, files)
        return "\n".join(f"{brief(one)} (expected: {self.expected(at)})" for at, one in enumerate(said.results))

    def describe(self) -> str:
        found = Counter(self.numbers)
        shares = [f"{name} {found[number]:,}" for number, name in enumerate(self.config.labels[:SHOWN])]
        told = ", ".join(shares) + (", ..." if len(self.config.labels) > SHOWN else "")
        return clauses(
            f"image classification: {count(len(self.used), 'image')}",
            f"{count(len(self.config.labels), 'label')} ({told})",
            _sized(self.reader),
            f"{count(self.left_out, 'image')} without label left out" if self.left_out else "",
        )


@part("objective", "masked-patches")
class MaskedPatches(Images):
    """`bool_masked_pos` (N,) is 1 where a patch is hidden; `targets.pixels` (N,) is IGNORE elsewhere."""

    textual = False

    class Config(Images.Config):
        """Masked image modelling."""

        share: float = field("share of the patches that are hidden", 0.6, gt=0, lt=1)

    def __init__(self, config: Any, split: Side, tokenizer: Any, *, validation: bool = False, **options: Any) -> None:
        super().__init__(config, tokenizer, **options)
        self.used = list(split.rows)

    @classmethod
    def facts(cls, model: Any) -> dict[str, Any]:
        found, embed = super().facts(model), embed_of(model)
        if embed.mask_vector is None:
            cause = "hidden patches are replaced by a learned vector, and the model has none"
            raise refuse(cause, "set model.embed.mask_vector=true", path="model.embed.mask_vector")
        return found | {"places": embed.places - embed.front}

    @classmethod
    def read(cls, resolved: Resolved) -> Records:
        return read_images(resolved.preset.data, None, "", resolved.preset.train.seed, folders=False)

    def sample(self, index: int, epoch: int) -> Sample:
        hidden = np.zeros(self.places, dtype=np.int64)
        some = max(1, round(self.config.share * self.places))
        hidden[generator(self.seed, epoch, index).permutation(self.places)[:some]] = 1
        return {
            "pixel_values": self.image(index),
            "bool_masked_pos": hidden,
            "targets.pixels": np.where(hidden == 1, 0, IGNORE),
            "id": np.array(index),
        }

    def drawn(self, model: Any, tokenizer: Any, tokens: int) -> str:
        """The mean error over all pixels of the first image, hidden patch by hidden patch."""
        import torch

        batch = self.batch(np.zeros(1, dtype=np.int64), np.zeros(1, dtype=np.int64)).to(model.device)
        with torch.no_grad():
            term = model.losses(batch.inputs, batch.targets)["pixels"]
        hidden = f"{count(int(term.count), 'hidden patch')} of {self.places:,}".replace("patchs", "patches")
        return f"{self.used[0][1][0]}: {hidden}, their pixels {float(term.mean()):.4g} off in the mean"

    def describe(self) -> str:
        return clauses(
            f"masked patches: {count(len(self.used), 'image')}",
            f"{self.config.share:.0%} of {self.places:,} patches hidden",
            _sized(self.reader),
        )


def _config(resolved: Resolved) -> Any:
    return resolved.preset.objective


def _sized(reader: Reader) -> str:
    how = "stretched" if reader.config.fit == "stretch" else "cut"
    return f"images {how} to {reader.size[0]} x {reader.size[1]} pixels of {count(reader.channels, 'channel')}"
