"""A preset: what an architecture is, how it learns, on what; and how each value of it came about.

    version   about   model   objective   tokenizer   data   train   expect     a resolved preset
    extends   size    sizes                                                     only in a file

`load_preset` lays the layers over each other, validates the whole in one pass and refuses with every
mistake at once. Order: default < preset (what it extends first) < size < --tiny < override.

`sizes`, `size` and `expect` belong to the file that states them; a file that extends another starts
from that one's own size, or from the one it names: `extends: {preset: gpt2, size: medium}`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from dataclasses import field as member
from pathlib import Path as File
from typing import Annotated, Any

from pydantic import Field, ValidationError

from xtcli.config import library
from xtcli.config.compose import FILE_KEYS, Base, Delta, apply, compose, unknown_size
from xtcli.config.data import DataConfig
from xtcli.config.document import Path
from xtcli.config.emit import dump
from xtcli.config.layers import Layers, Origin, Override, parse_override, split
from xtcli.config.problems import in_order, problems
from xtcli.config.tiny import tiny as shrink
from xtcli.config.train import TrainConfig
from xtcli.errors import Problem, UserError
from xtcli.registry import Config, Slot, field, tree

Count = Annotated[int, Field(gt=0)]


class About(Config):
    """What the architecture is and where it was published."""

    title: str = field("name of the architecture, as people know it", min_length=1)
    paper: str | None = field("authors and title of the paper", None)
    year: int | None = field("year of publication", None, ge=1900, le=2100)
    url: str | None = field("where the paper or the reference code is", None)
    new: str | None = field("what it changes against what came before", None)


class Expect(Config):
    """Published facts that a build must meet."""

    parameters: Count | Mapping[str, Count] | None = field("published parameter count, or one per size", None)


class Preset(Config):
    """A whole preset, resolved."""

    version: int = field("version of the preset format", ge=1)
    about: About = field("what this is")
    model: Annotated[Config, Slot("graph")] = field("the architecture")
    objective: Annotated[Config, Slot("objective")] = field("what the model learns to predict")
    tokenizer: Annotated[Config, Slot("tokenizer")] = field("how text becomes numbers")
    data: DataConfig = field("what it learns from", DataConfig())
    train: TrainConfig = field("how it is trained", TrainConfig())
    expect: Expect = field("published facts, checked", Expect())


class PresetFile(Preset):
    """A preset as a file has it, with what resolving takes away."""

    extends: str | Base | None = field("preset to start from: a name, a relative path, or {preset, size}", None)
    size: str | None = field("which of `sizes` applies when --size is absent", None)
    sizes: Mapping[str, Mapping[str, Any]] = field("named deltas: dotted paths and their values", {})


@dataclass(frozen=True)
class Resolved:
    """A validated preset with the origin of every value. `size` is the size that applied, `sizes` all there are."""

    preset: Preset
    file: File
    origins: Mapping[str, Origin]
    size: str | None = None
    sizes: tuple[str, ...] = ()
    tiny: bool = False
    overrides: tuple[str, ...] = ()
    _layers: Layers = member(default_factory=lambda: Layers(PresetFile), repr=False, compare=False)

    @property
    def name(self) -> str:
        """The preset's name: its file without the suffix, or the folder that holds a recorded preset."""
        return self.file.parent.name if self.file.name == library.RECORDED else self.file.stem

    def place(self, path: str | Path) -> str:
        """Where the value of a dotted path was stated (file:line:col or the override), else its nearest ancestor."""
        origin = self._layers.origin(split(path) if isinstance(path, str) else path)
        return (origin.place if origin else "") or self._layers.name

    def to_tree(self) -> dict[str, Any]:
        """The resolved preset as plain data."""
        return tree(self.preset)  # type: ignore[no-any-return]

    def to_yaml(self) -> str:
        """The resolved preset as YAML; loading it gives an equal preset."""
        return dump(self.to_tree())


def load_preset(
    ref: str | File, overrides: Sequence[str] = (), *, size: str | None = None, tiny: bool = False
) -> Resolved:
    """The preset that `ref` means (a file, a name, a run or checkpoint folder), with everything applied.

    Raises UserError with all mistakes of the file, its sizes and the overrides.
    """
    file = library.find(ref)
    base, sizes, own_size, found = compose(file, PresetFile)
    chosen = size if size is not None else own_size
    if chosen is not None and chosen not in sizes:
        found.append(unknown_size(chosen, sizes, library.shown(file) if size is None else "--size"))
    found += _check_sizes(base, sizes)
    layers = base.copy()
    found += apply(layers, sizes.get(chosen or "", []))
    parsed = _parse(overrides, found)
    found += apply(layers, [(item.path, item.value, item.origins) for item in parsed])
    preset, mistakes = _validate(layers)
    found += mistakes
    if preset is None or found:
        raise UserError(*in_order(found))
    if tiny:
        _shrink(layers, preset, parsed)
        preset, found = _validate(layers)
        if preset is None:
            raise UserError(*in_order(found))
    preset = _located(_expected(preset, layers, chosen, exact=not tiny), layers, file)
    return Resolved(preset, file, _origins(preset, layers), chosen, tuple(sizes), tiny, tuple(overrides), layers)


def _check_sizes(base: Layers, sizes: Mapping[str, Sequence[Delta]]) -> list[Problem]:
    """The mistakes that each size makes by itself, also those of sizes that are not chosen."""
    found: list[Problem] = []
    for name, deltas in sizes.items():
        layers = base.copy()
        mistakes = [*apply(layers, deltas), *_validate(layers)[1]]
        places = {
            place for _, _, origins in deltas for origin in origins.values() for place in (origin.place, origin.key)
        }
        found += [Problem(p.cause, p.place, f"sizes.{name}.{p.path}", p.remedy) for p in mistakes if p.place in places]
    return found


def _parse(overrides: Sequence[str], found: list[Problem]) -> list[Override]:
    parsed = []
    for text in overrides:
        try:
            override = parse_override(text)
            key = str(override.path[0])
            if key in FILE_KEYS:
                remedy = f"use --size {override.value}" if key == "size" else "write a preset file of your own"
                raise UserError(Problem("is set by the preset file alone", override.place, key, remedy))
            parsed.append(override)
        except UserError as error:
            found += error.problems
    return parsed


def _validate(layers: Layers) -> tuple[Preset | None, list[Problem]]:
    try:
        return Preset.model_validate(layers.tree), []
    except ValidationError as error:
        return None, problems(error, layers)


def _shrink(layers: Layers, preset: Preset, overrides: Sequence[Override]) -> None:
    """Write what --tiny changes; what an override states stays."""

    def compare(before: Any, after: Any, path: Path) -> None:
        if before == after:
            return
        same = isinstance(before, dict) and isinstance(after, dict) and before.keys() == after.keys()
        if same and before.get("kind") == after.get("kind"):
            for key in before:
                compare(before[key], after[key], (*path, key))
            return
        held = layers.origins.get(path)
        if held is None or held.source != "override":
            layers.put(path, after, {(): Origin("tiny", "--tiny", "--tiny")})
            below = [item for item in overrides if item.path[: len(path)] == path and len(item.path) > len(path)]
            apply(layers, [(item.path, item.value, item.origins) for item in below])

    after = tree(shrink(preset))
    if "vocab" not in type(preset.tokenizer).model_fields:
        after["model"]["vocab"] = tree(preset.model)["vocab"]  # a tokenizer of a given size does not shrink
    compare(tree(preset), after, ())


def _located(preset: Preset, layers: Layers, file: File) -> Preset:
    """A tokenizer's path made absolute: a file that states it means one beside itself, an override one from here."""
    path = getattr(preset.tokenizer, "path", None)
    if path is None:
        return preset
    origin = layers.origin(("tokenizer", "path"))
    beside = file.parent / path
    here = (origin is not None and origin.source == "override") or not beside.exists()
    found = str((File(path) if here else beside).absolute())
    return preset.model_copy(update={"tokenizer": preset.tokenizer.model_copy(update={"path": found})})


def _expected(preset: Preset, layers: Layers, size: str | None, exact: bool) -> Preset:
    """`expect` of the size that applies; nothing once --tiny or an override has changed the model."""
    count = preset.expect.parameters
    changed = any(path[0] == "model" and origin.source == "override" for path, origin in layers.origins.items())
    if isinstance(count, Mapping):
        count = count.get(size or "")
    return preset.model_copy(update={"expect": Expect(parameters=count if exact and not changed else None)})


def _origins(preset: Preset, layers: Layers) -> dict[str, Origin]:
    """The origin of every value of the resolved preset; what no layer states is a default."""
    result: dict[str, Origin] = {}

    def visit(value: Any, path: Path) -> None:
        if isinstance(value, dict) and value:
            for key, item in value.items():
                visit(item, (*path, key))
        elif isinstance(value, list) and any(isinstance(item, dict) for item in value):
            for index, item in enumerate(value):
                visit(item, (*path, index))
        else:
            held = layers.origins.get(path)
            if held is None and path[-1] == "kind":
                held = layers.origins.get(path[:-1])
            if held is None and isinstance(path[-1], int):
                held = layers.origin(path)
            result[".".join(map(str, path))] = held or Origin("default")

    visit(tree(preset), ())
    return result
