"""A local folder of images, each with a label or a text, and images as arrays of numbers.

    FOLDER/metadata.jsonl (or .csv, .tsv, .parquet)   rows with the column `file_name`, a path below FOLDER, and others
    FOLDER/NAME/*.png                                 images in folders that are the names of their labels

which are the conventions of `datasets`' imagefolder. The table itself may be named in the place of its folder. Folders
of labels are read in turn, one image of each, so that a limit takes as many of each label.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field, Strict

from xtcli.config.data import DataConfig
from xtcli.data.files import FORMATS, counted, missing_path, walk
from xtcli.data.readers import Row, rows, wrong_type
from xtcli.data.records import Records, named, split_rows
from xtcli.data.sources import STDLIB
from xtcli.data.text import Tally
from xtcli.errors import UserError, refuse
from xtcli.registry import Config, field

SUFFIXES = frozenset(".bmp .gif .jpeg .jpg .png .ppm .pgm .tif .tiff .webp".split())
TABLES = tuple(f"metadata{suffix}" for suffix in FORMATS)
FILE = "file_name"
MODES = {1: "L", 3: "RGB", 4: "RGBA"}
"""Numbers of a pixel, and what images of as many are called."""

Array = np.ndarray[Any, Any]
RESAMPLING = {"nearest": 0, "lanczos": 1, "bilinear": 2, "bicubic": 3, "box": 4, "hamming": 5}
"""Filters of resizing, by Pillow's numbers."""
PerChannel = Annotated[tuple[Annotated[float, Field(ge=0)], ...], Strict(False), Field(min_length=1)]


class ImageConfig(Config):
    """How a file becomes numbers: brought to the model's size, from 0 ... 255 to 0 ... 1, then (x - mean) / std."""

    fit: Literal["stretch", "crop"] = field(
        "an image of another shape is stretched, or scaled until it covers the model's and its middle taken", "stretch"
    )
    resample: Literal["nearest", "lanczos", "bilinear", "bicubic", "box", "hamming"] = field(
        "filter of the resizing", "bilinear"
    )
    mean: PerChannel = field("taken from each channel; one number for all, or one for each", (0.5,))
    std: PerChannel = field("what each channel is divided by", (0.5,))


@dataclass(frozen=True)
class Reader:
    """Reads files as images of one size; raises UserError for what is no image."""

    config: ImageConfig
    size: tuple[int, int]  # height, width
    channels: int

    def __post_init__(self) -> None:
        pillow()
        if self.channels not in MODES:
            cause = f"the model reads {self.channels} channels, and images have {', '.join(map(str, MODES))}"
            raise refuse(cause, "set model.embed.channels=3", path="objective")
        for name in ("mean", "std"):
            count = len(getattr(self.config, name))
            if count not in (1, self.channels):
                cause = f"has {counted(count, 'number')}, and the model reads {self.channels} channels"
                raise refuse(cause, "give one for all, or one for each", path=f"objective.images.{name}")
        if 0.0 in self.config.std:
            raise refuse("divides by 0", "give numbers above 0", path="objective.images.std")

    def read(self, file: str | Path) -> Array:
        """The file as float32 (C, H, W)."""
        image, ops = pillow()
        try:
            with image.open(file) as opened:
                upright = ops.exif_transpose(opened).convert(MODES[self.channels])
        except (OSError, ValueError, SyntaxError, image.DecompressionBombError) as error:
            what = error.strerror if isinstance(error, OSError) and error.strerror else error
            raise refuse(f"is no image that can be read ({what})", "repair or remove it", place=str(file)) from None
        height, width = self.size
        resample = image.Resampling(RESAMPLING[self.config.resample])
        if self.config.fit == "crop":
            sized = ops.fit(upright, (width, height), resample)
        else:
            sized = upright.resize((width, height), resample)
        numbers = np.asarray(sized, dtype=np.float32).reshape(height, width, self.channels) / 255.0
        scaled = (numbers - np.array(self.config.mean, np.float32)) / np.array(self.config.std, np.float32)
        return np.ascontiguousarray(scaled.transpose(2, 0, 1))


def pillow() -> tuple[Any, Any]:
    """Pillow's modules Image and ImageOps."""
    try:
        from PIL import Image, ImageOps
    except ImportError:
        raise refuse("reading images needs Pillow", "pip install 'xt-transformers[images]'") from None
    return Image, ImageOps


def read_images(data: DataConfig, column: str | None, setting: str, seed: int, *, folders: bool) -> Records:
    """The images of a source, as rows of a path and the value of `column` (None where it is None).

    `setting` is the one that names the column; `folders`: whether folders may be labels. Raises UserError for what
    is missing.
    """
    tally: Tally = Tally()
    found = _read(data.source, "data.source", data, column, setting, folders, tally)
    if isinstance(data.validation, str):
        held = _read(data.validation, "data.validation", data, column, setting, folders, tally)
        sides, how = {"train": found, "validation": held}, "a source of their own"
    else:
        sides, how = split_rows(found, data.validation, seed)
    said = f"{data.source}: {counted(sum(map(len, sides.values())), 'image')}"
    records = Records((FILE, column or FILE), sides, said, how, tally)
    contents = [[_digest(values[0]), values[1]] for name in sides for _, values in sides[name]]
    records.digest = hashlib.sha256(repr(contents).encode("utf-8", "surrogatepass")).hexdigest()
    return records


def _read(
    source: str, key: str, data: DataConfig, column: str | None, setting: str, folders: bool, tally: Tally
) -> list[Row]:
    if source == STDLIB:
        raise refuse(
            "stdlib is plain text, and this objective reads images", "set data to a folder of images", path=key
        )
    path = Path(source).expanduser()
    if not path.exists():
        raise missing_path(source, key)
    table = path if path.is_file() else next((path / name for name in TABLES if (path / name).is_file()), None)
    if column is None:
        found: list[Row] = [(str(file), [str(file), None]) for file in _images(path, tally)]
    elif table is not None:
        found = _listed(table, column, setting, tally)
    elif folders:
        found = _labelled(path, tally)
    else:
        cause = f"has no {TABLES[0]}, {', '.join(TABLES[2:])}"
        raise refuse(cause, f'write lines such as {{"{FILE}": "a.png", "{column}": "..."}}', place=source, path=key)
    if not found:
        remedy = f"give each label a folder of images, or write {TABLES[0]}" if folders else "add images"
        raise refuse("holds no images" + (" in folders" if folders else ""), remedy, place=source, path=key)
    return found[: data.limit]


def _listed(table: Path, column: str, setting: str, tally: Tally) -> list[Row]:
    """The rows of a table; raises UserError for a file that is not there."""
    form = FORMATS.get(table.suffix.lower())
    if form is None:
        remedy = f"give a folder of images, or a table: {', '.join(FORMATS)}"
        raise refuse("is one file, and no table that lists images", remedy, place=str(table), path="data.source")
    found = []
    try:
        for place, (name, value) in rows(table, form, (FILE, column), tally):
            if not isinstance(name, str):
                raise wrong_type(place, FILE, name, "paths")
            file = table.parent / name
            if not file.is_file():
                raise refuse(f"names the image {name!r}, which is not there", "check the path", place=place)
            found.append((place, [str(file), value]))
    except UserError as error:
        raise UserError(*(named(problem, {column: setting}) for problem in error.problems)) from None
    return found


def _images(path: Path, tally: Tally) -> list[Path]:
    skipped: Counter[str] = Counter()
    files = [path] if path.is_file() else list(walk(path, skipped))
    found = [file for file in files if file.suffix.lower() in SUFFIXES]
    tally["file that is no image"] += len(files) - len(found)
    return found


def _labelled(path: Path, tally: Tally) -> list[Row]:
    """The images of each folder below `path`, in turn; what lies beside the folders has no label."""
    groups: dict[str, list[Row]] = {}
    for file in _images(path, tally):
        inside = file.relative_to(path).parts
        if len(inside) > 1:
            groups.setdefault(inside[0], []).append((str(file), [str(file), inside[0]]))
        else:
            tally["image outside the folders"] += 1
    return [row for turn in zip_longest(*groups.values()) for row in turn if row is not None]


def _digest(file: str) -> str:
    with open(file, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def embed_of(model: Any) -> Any:
    """The embedding of the images that a model reads, None where it reads none."""
    embed = model.encoder.embed if hasattr(model, "encoder") else getattr(model, "embed", None)
    return embed if "pixel_values" in getattr(embed, "reads", ()) else None
