"""`preprocessor_config.json`: how files become the numbers that a model reads, theirs and ours (data/images.py).

Theirs: the image is brought to `size` by `resample`, multiplied by `rescale_factor`, then (x - image_mean) / image_std,
each step only where its `do_` says so. A size is not ours to choose: the model reads one.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from xtcli.convert.reading import read_json
from xtcli.data.images import RESAMPLING, ImageConfig
from xtcli.errors import Problem, UserError, did_you_mean

FILE = "preprocessor_config.json"
KIND = "ViTImageProcessor"
KINDS = (KIND, "ViTImageProcessorFast", "ViTFeatureExtractor")
STEPS = ("do_center_crop", "do_pad")
"""Steps of other classes, which a file of these may state as well and must not ask for."""
BRIGHTEST = 255


def sight(config: Any) -> tuple[tuple[int, int], int] | None:
    """The (height, width) and the channels of the images that a graph's config reads; None where it reads none."""
    embed = getattr(config, "encoder", config).embed
    if not hasattr(embed, "image"):
        return None
    size = embed.image
    return (size, size) if isinstance(size, int) else tuple(size), embed.channels


def read_images(folder: Path, config: Any) -> ImageConfig | None:
    """What a folder's file means for a model; None without one, or for a model of text.

    Raises UserError where it asks for what we do not do, or for another size than the model's.
    """
    seen, place = sight(config), folder / FILE
    if seen is None or not place.is_file():
        return None
    values, ((height, width), channels) = read_json(place), seen
    problems: list[Problem] = []

    def refuse(key: str, cause: str, remedy: str = "correct it, or remove the file") -> None:
        problems.append(Problem(cause, str(place), key, remedy))

    kind = values.get("image_processor_type", values.get("feature_extractor_type", KIND))
    if kind not in KINDS:
        refuse("image_processor_type", f"is {kind!r}, which xt does not express", did_you_mean(str(kind), KINDS))
    for step in STEPS:
        if values.get(step):
            refuse(step, f"is {values[step]!r}, which xt does not express", "set it to false, or remove the file")
    size = values.get("size") or {"height": 224, "width": 224}
    asked = (size, size) if isinstance(size, int) else _pair(size)
    if asked is None:
        refuse("size", f"is {size!r}, not a height and a width")
    elif values.get("do_resize", True) and asked != (height, width):
        refuse("size", f"is {asked[0]} x {asked[1]} pixels, and the model reads {height} x {width}")
    names = {number: name for name, number in RESAMPLING.items()}
    resample = values.get("resample", RESAMPLING["bilinear"])
    if resample not in names:
        refuse("resample", f"is {resample!r}", f"there are {', '.join(map(str, names))}")
    factor = values.get("rescale_factor", 1 / BRIGHTEST) if values.get("do_rescale", True) else 1.0
    if not isinstance(factor, float | int) or factor <= 0:
        refuse("rescale_factor", f"is {factor!r}, not a number above 0")
    mean, std = (_numbers(values, name, channels, refuse) for name in ("image_mean", "image_std"))
    if problems:
        raise UserError(*problems)
    if not values.get("do_normalize", True):
        mean, std = [0.0], [1.0]
    # Ours begins with numbers of 0 ... 1.
    unit = BRIGHTEST * factor
    try:
        return ImageConfig.model_validate(
            {
                "mean": [value / unit for value in mean],
                "std": [value / unit for value in std],
                "resample": names[resample],
            }
        )
    except ValidationError as error:
        raise UserError(
            *(Problem(item["msg"].lower(), str(place), str(item["loc"][0])) for item in error.errors())
        ) from None


def _pair(size: Any) -> tuple[int, int] | None:
    if not isinstance(size, dict) or set(size) != {"height", "width"}:
        return None
    return (size["height"], size["width"])


def _numbers(values: Any, name: str, channels: int, refuse: Any) -> list[float]:
    """One number for all channels, or one for each."""
    found = values.get(name)
    found = 0.5 if found is None else found
    numbers = found if isinstance(found, list) else [found]
    usable = all(isinstance(value, float | int) and (value > 0 or name == "image_mean") for value in numbers)
    if len(numbers) not in (1, channels) or not usable:
        refuse(name, f"is {found!r}, not a number for each of {channels} channels")
        return [0.5]
    return [float(value) for value in numbers]


def write_images(images: ImageConfig | None, config: Any, folder: Path) -> str:
    """Make a folder's file say how the model's images are prepared; returns why it has none, else nothing.

    A file that says so already stays as it is.
    """
    seen, place = sight(config), folder / FILE
    if seen is None or images is None:
        return ""
    if images.fit != "stretch":
        place.unlink(missing_ok=True)
        return f"no {FILE} can say that images are fitted by '{images.fit}' (objective.images.fit)"
    (height, width), channels = seen
    try:
        if _spread(read_images(folder, config), channels) == _spread(images, channels):
            return ""
    except UserError:
        pass  # it was made for another model
    values = {
        "image_processor_type": KIND,
        "do_resize": True,
        "size": {"height": height, "width": width},
        "resample": RESAMPLING[images.resample],
        "do_rescale": True,
        "rescale_factor": 1 / BRIGHTEST,
        "do_normalize": True,
        "image_mean": _each(images.mean, channels),
        "image_std": _each(images.std, channels),
        "do_convert_rgb": channels == 3 or None,
    }
    place.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    return ""


def _each(numbers: tuple[float, ...], channels: int) -> list[float]:
    return list(numbers) if len(numbers) > 1 else list(numbers) * channels


def _spread(images: ImageConfig | None, channels: int) -> Any:
    """What a config does, however it is said."""
    return images and (images.fit, images.resample, _each(images.mean, channels), _each(images.std, channels))
