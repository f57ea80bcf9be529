"""Statistics of the tensors of a checkpoint, read piece by piece: memory holds one piece, whatever the file's size.

Means and deviations are those of the finite elements, in float64, pieces joined by

    mean = mean_a + d n_b / n        M2 = M2_a + M2_b + d^2 n_a n_b / n,   d = mean_b - mean_a

(Chan, Golub, LeVeque 1983); the deviation is sqrt(M2 / n), that of the whole tensor and not of a sample.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from xtcli.errors import refuse
from xtcli.inspect import units
from xtcli.runs.checkpoint import locate
from xtcli.runs.folder import MANIFEST
from xtcli.runs.run import gib
from xtcli.runs.tensors import WEIGHTS, find_tensors, open_tensors

PIECE = 2**22
"""Elements that are held at once."""

SUFFIX = ".safetensors"


@dataclass(frozen=True)
class Statistics:
    """One tensor. `tied` is the name it is stored under, where it is another's; then the rest repeats that one's.

    mean, std, min and max are those of the finite elements, None where there is none.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    bytes: int
    mean: float | None
    std: float | None
    min: float | None
    max: float | None
    non_finite: int
    tied: str | None = None


@dataclass(frozen=True)
class Stored:
    """What a checkpoint holds, from the headers alone."""

    tensors: int
    ties: int
    bytes: int
    dtypes: tuple[str, ...]

    def __str__(self) -> str:
        ties = f", {units.plural(self.ties, 'tie')}" if self.ties else ""
        return f"{units.plural(self.tensors, 'tensor')}{ties}, {gib(self.bytes)}, {' and '.join(self.dtypes)}"


def find_files(path: Path) -> tuple[dict[str, Path], dict[str, str]]:
    """Tensor -> file, and the ties, of a checkpoint, a run (its newest whole checkpoint), or any safetensors file.

    A folder that xt wrote is verified first; raises UserError for what is damaged or holds no tensors.
    """
    if path.is_file() and path.suffix == SUFFIX:
        with open_tensors(path) as file:
            return dict.fromkeys(file.keys(), path), {}
    if path.is_dir() and not (path / MANIFEST).exists():
        whole = path / f"{WEIGHTS}{SUFFIX}"
        if whole.exists() or whole.with_name(f"{whole.name}.index.json").exists():
            return find_tensors(path)
    if path.is_file():
        raise refuse(f"'{path}' holds no tensors", "give a checkpoint, a run or a .safetensors file")
    return find_tensors(locate(path))


class Reader:
    """Single tensors of a checkpoint or run, by name; nothing is opened before the first is asked for."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.found: tuple[dict[str, Path], dict[str, str]] | None = None

    def tensor(self, name: str) -> Tensor:
        """The tensor of this name; raises UserError where there is none."""
        self.found = self.found or find_files(self.path)
        files, ties = self.found
        name = ties.get(name, name)
        if name not in files:
            raise refuse(f"tensor '{name}' is missing", place=str(self.path))
        with open_tensors(files[name]) as file:
            return file.get_tensor(name)  # type: ignore[no-any-return]


def stored(path: Path) -> Stored:
    """What the checkpoint folder at `path` holds, without reading a tensor."""
    files, ties = find_tensors(path)
    sizes = 0
    dtypes: dict[str, None] = {}
    for file in dict.fromkeys(files.values()):
        with open_tensors(file) as opened:
            for name in opened.keys():  # noqa: SIM118
                piece = opened.get_slice(name)
                sizes += math.prod(piece.get_shape()) * _bits(piece.get_dtype()) // 8
                dtypes[piece.get_dtype().lower()] = None
    return Stored(len(files), len(ties), sizes, tuple(sorted(dtypes)))


def _bits(dtype: str) -> int:
    """Bits of an element of a safetensors type: the first number of its name, BOOL aside."""
    numbers = "".join(c if c.isdigit() else " " for c in dtype).split()
    return int(numbers[0]) if numbers else 8


def statistics(path: Path) -> Iterator[Statistics]:
    """Each tensor's statistics, in the order of their names; a tie follows with the name it is stored under."""
    files, ties = find_files(path)
    by_stored: dict[str, list[str]] = {}
    for name, other in ties.items():
        by_stored.setdefault(other, []).append(name)
    for name in sorted(files):
        with open_tensors(files[name]) as file:
            found = _measure(name, file.get_slice(name))
        yield found
        for tied in by_stored.get(name, ()):
            yield Statistics(**(asdict(found) | {"name": tied, "tied": name}))


def _measure(name: str, stored: Any) -> Statistics:
    shape, dtype = tuple(stored.get_shape()), ""
    count, mean, square, bad, size = 0, 0.0, 0.0, 0, 0
    low, high = math.inf, -math.inf
    for piece in _pieces(stored, shape):
        dtype = str(piece.dtype).removeprefix("torch.")
        size += piece.nbytes
        values = piece.reshape(-1).double()
        finite = values[torch.isfinite(values)]
        bad += values.numel() - finite.numel()
        if not finite.numel():
            continue
        low, high = min(low, float(finite.min())), max(high, float(finite.max()))
        own, here = finite.numel(), float(finite.mean())
        distance, total = here - mean, count + own
        square += float((finite - here).square().sum()) + distance**2 * count * own / total
        mean += distance * own / total
        count = total
    if not count:
        return Statistics(name, shape, dtype, size, None, None, None, None, bad)
    return Statistics(name, shape, dtype, size, mean, math.sqrt(square / count), low, high, bad)


def _pieces(stored: Any, shape: tuple[int, ...]) -> Iterator[Tensor]:
    """The tensor in runs of rows of at most PIECE elements; a single row may be longer."""
    if not shape:
        yield stored[...]
        return
    rows = max(1, PIECE // max(1, math.prod(shape[1:])))
    for start in range(0, shape[0], rows) if shape[0] else (0,):
        yield stored[start : min(start + rows, shape[0])]


HEADINGS = ("tensor", "shape", "dtype", "mean", "std", "min", "max", "non-finite")


def lines(found: Iterable[Statistics]) -> list[str]:
    """The statistics as a table, and what they add up to."""
    rows: list[tuple[str, ...]] = [HEADINGS]
    count = elements = size = bad = ties = 0
    for one in found:
        shape = "(" + ", ".join(map(str, one.shape)) + ")"
        if one.tied is not None:
            ties += 1
            rows.append((one.name, shape, f"tied to {one.tied}"))
            continue
        count, size, bad, elements = count + 1, size + one.bytes, bad + one.non_finite, elements + math.prod(one.shape)
        figures = ("-" if v is None else units.figure(v) for v in (one.mean, one.std, one.min, one.max))
        rows.append((one.name, shape, one.dtype, *figures, f"{one.non_finite:,}"))
    summary = f"{units.plural(count, 'tensor')}, {elements:,} elements, {gib(size)}"
    summary += f", {units.plural(ties, 'tie')}" if ties else ""
    summary += f", {bad:,} elements not finite" if bad else ", all finite"
    return [*units.table(rows, right=(3, 4, 5, 6, 7)), summary]


def facts(found: Iterable[Statistics]) -> list[dict[str, Any]]:
    """The statistics as plain data."""
    return [asdict(one) | {"shape": list(one.shape)} for one in found]
