"""Small folders of coloured squares, with labels and texts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

COLOURS = {"red": (200, 40, 40), "green": (40, 180, 40), "blue": (40, 40, 200), "white": (250, 250, 250)}
TEXTS = {"red": "a red square", "green": "one green box here", "blue": "the sky is blue", "white": "snow"}


def square(colour: str, seed: int, size: tuple[int, int] = (16, 12)) -> Image.Image:
    """A square of a colour at a random place on noise; `size` is (width, height)."""
    draw = np.random.default_rng(seed)
    pixels = draw.integers(90, 130, (size[1], size[0], 3), dtype=np.uint8)
    top, left = draw.integers(0, size[1] // 3), draw.integers(0, size[0] // 3)
    pixels[top : top + size[1] // 2, left : left + size[0] // 2] = COLOURS[colour]
    return Image.fromarray(pixels)


def in_folders(folder: Path, each: int = 12, colours: Sequence[str] = tuple(COLOURS)) -> Path:
    """FOLDER/COLOUR/N.png."""
    for number, colour in enumerate(colours):
        (folder / colour).mkdir(parents=True)
        for at in range(each):
            square(colour, 100 * number + at).save(folder / colour / f"{at}.png")
    return folder


def listed(folder: Path, each: int = 12, colours: Sequence[str] = tuple(COLOURS)) -> Path:
    """FOLDER/N.png and metadata.jsonl with labels and texts."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for at in range(each * len(colours)):
        colour = colours[at % len(colours)]
        square(colour, at).save(folder / f"{at}.png")
        rows.append({"file_name": f"{at}.png", "label": colour, "text": TEXTS[colour]})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder
