"""What a trained model says of images: their labels with probabilities, or a text for each.

Files are read as in training, to the size that the model reads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from xtcli.config.preset import Preset
from xtcli.data.images import ImageConfig, Reader, embed_of
from xtcli.data.tokenizers import Tokenizer
from xtcli.errors import refuse
from xtcli.generate.decode import Piece
from xtcli.generate.engine import ROWS, generate, undisturbed
from xtcli.generate.label import Said, check, ordered
from xtcli.generate.options import Answer, Options
from xtcli.parts.graphs import Graph


def sees(model: Graph) -> bool:
    """Whether a model reads images."""
    return embed_of(model) is not None


def reader_of(model: Graph, preset: Preset) -> Reader:
    """What reads files as the training did, with its own defaults where there was none."""
    embed: Any = embed_of(model)
    config = getattr(preset.objective, "images", None) or ImageConfig()
    return Reader(config, embed.image, embed.channels)


def read(reader: Reader, files: Sequence[str]) -> Tensor:
    """The files as one tensor (B, C, H, W); raises UserError for what is no image."""
    for file in files:
        if not Path(file).is_file():
            raise refuse("is a folder" if Path(file).is_dir() else "no such file", "give an image", place=file)
    return torch.stack([torch.from_numpy(reader.read(file)) for file in files])


def label_images(model: Graph, reader: Reader, names: Sequence[str] | None, files: Sequence[str]) -> Said:
    """The labels of each image, the likeliest first."""
    if "sequence" not in model.heads:
        have = ", ".join(model.heads) or "none"
        raise refuse(f"the model has no head that labels images (heads: {have})", "labels come from a head sequence")
    head: Any = model.heads["sequence"]
    said = Said()
    with undisturbed(model):
        for at in range(0, len(files), ROWS):
            some = files[at : at + ROWS]
            pixels = read(reader, some).to(model.device)
            logits = head.outputs(model.hidden(pixel_values=pixels))["logits"]
            check(logits)
            labels = names or [str(number) for number in range(logits.shape[-1])]
            said.results += [
                ordered((file,), labels, row, head.problem) for file, row in zip(some, logits, strict=True)
            ]
    return said


def caption(
    model: Graph,
    tokenizer: Tokenizer,
    reader: Reader,
    files: Sequence[str],
    options: Options,
    on_text: Callable[[Piece], None] | None = None,
) -> Answer:
    """A text for each image."""
    return generate(model, tokenizer, list(files), options, on_text, read(reader, files))
