"""Safetensors files, read and written one tensor at a time.

    8 bytes: length of the header   header: JSON, name -> {dtype, shape, data_offsets}   the data, end to end

The format is small enough to read by hand, and only so can every fault be named (which shard is short, which
tensors overlap) and a checkpoint be rewritten without ever being in memory. Files are STEM.safetensors, or
numbered shards with an index STEM.safetensors.index.json, as runs/tensors.py writes them and transformers too.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any, BinaryIO

import safetensors
import torch
from torch import Tensor

from xtcli.convert.reading import read_json
from xtcli.errors import Problem, UserError, refuse

HEADER_LIMIT = 10**8
SHARD_BYTES = 5 * 10**9
DTYPES = {
    "C64": torch.complex64,
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
CODES = {dtype: code for code, dtype in DTYPES.items()}

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Entry:
    """One tensor of a file: its type and shape, and where its bytes are."""

    dtype: torch.dtype
    shape: Shape
    file: Path
    start: int

    @property
    def nbytes(self) -> int:
        """Its size in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize

    def read(self) -> Tensor:
        """The tensor, in memory of its own."""
        data = torch.empty(self.nbytes, dtype=torch.uint8)
        with open(self.file, "rb") as file:
            file.seek(self.start)
            if file.readinto(data.numpy().data) != self.nbytes:
                raise refuse("was cut short while it was read", place=str(self.file))
        return data.view(self.dtype).reshape(self.shape)


@dataclass(frozen=True)
class Source:
    """The tensors of a folder by name; `ties` are names that stand for a stored one."""

    entries: Mapping[str, Entry]
    ties: Mapping[str, str]
    files: tuple[Path, ...]

    def read(self, name: str) -> Tensor:
        """One tensor."""
        return self.entries[self.ties.get(name, name)].read()

    def map(self) -> dict[str, Tensor]:
        """All tensors, as views of the files where they are stored as they are."""
        found = {name: entry.read() for name, entry in self.entries.items() if type(entry) is not Entry}
        for path in self.files:
            with safetensors.safe_open(path, framework="pt") as file:
                stored = [name for name in file.keys() if name in self.entries and name not in found]  # noqa: SIM118
                found |= {name: file.get_tensor(name) for name in stored}
        return found | {name: found[stored] for name, stored in self.ties.items()}

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(entry.nbytes for entry in self.entries.values())


def open_source(folder: Path, stem: str = "model") -> Source | None:
    """The tensors of STEM.safetensors or of the shards that STEM's index lists; None where there is neither.

    Raises UserError for a file that is not whole, and for shards that do not agree with their index.
    """
    single, index = folder / f"{stem}.safetensors", folder / f"{stem}.safetensors.index.json"
    if single.exists() and index.exists():
        raise refuse(
            f"holds both {single.name} and {index.name}", "remove the one that is not meant", place=str(folder)
        )
    if single.exists():
        entries, metadata = read_header(single)
        return Source(entries, _ties(metadata.get("ties"), single), (single,))
    if not index.exists():
        return None
    document = read_json(index)
    listed, about = document.get("weight_map"), document.get("metadata") or {}
    if not isinstance(listed, dict) or not isinstance(about, dict):
        raise refuse("has no weight_map", place=str(index))
    found = _shards(folder, index, listed)
    total, stated = sum(entry.nbytes for entry in found.values()), about.get("total_size")
    if stated is not None and stated != total:
        raise refuse(f"says that the tensors have {stated} bytes, they have {total}", "copy it anew", place=str(index))
    return Source(found, _ties(about.get("ties"), index), tuple(folder / name for name in sorted(set(listed.values()))))


def _shards(folder: Path, index: Path, listed: Mapping[str, Any]) -> dict[str, Entry]:
    """The tensors of the shards that an index lists; every disagreement is a problem."""
    found: dict[str, Entry] = {}
    problems: list[Problem] = []
    for name in sorted(set(map(str, listed.values()))):
        # A shard is a plain name beside the index: a path could lead anywhere on the machine.
        if PurePath(name).name != name or name in ("", ".."):
            raise refuse(f"names a shard outside its folder, '{name}'", place=str(index))
        wanted = {tensor for tensor, shard in listed.items() if shard == name}
        if not (folder / name).exists():
            cause = f"shard '{name}' with {len(wanted)} tensors is missing"
            problems.append(Problem(cause, str(folder), remedy="copy it anew"))
            continue
        entries = read_header(folder / name)[0]
        for tensor in sorted(set(entries) - wanted):
            cause = f"tensor '{tensor}' is also in '{found[tensor].file.name}'" if tensor in found else ""
            where = f"listed in '{listed[tensor]}'" if tensor in listed else "not in the index"
            problems.append(Problem(cause or f"tensor '{tensor}' is {where}", str(folder / name)))
        for tensor in sorted(wanted - set(entries)):
            problems.append(Problem(f"tensor '{tensor}' is not in its shard '{name}'", str(index)))
        found |= {tensor: entry for tensor, entry in entries.items() if tensor in wanted}
    if problems:
        raise UserError(*problems[:20])
    return found


def read_header(path: Path) -> tuple[dict[str, Entry], dict[str, str]]:
    """The tensors and the metadata of one file; raises UserError unless it is whole and without overlap."""

    def bad(cause: str) -> UserError:
        return refuse(f"not a whole safetensors file: {cause}", "copy it anew", place=str(path))

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(dict(pairs)) != len(pairs):
            raise ValueError("a name stands twice in the header")
        return dict(pairs)

    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(HEADER_LIMIT, size - 8):
            raise bad(f"it has {size} bytes, its header alone would need {8 + length}")
        try:
            header = json.loads(file.read(length), object_pairs_hook=once)
            metadata = header.pop("__metadata__", None) or {}
            entries = {name: _entry(item, path, 8 + length) for name, item in header.items()}
            spans = sorted((*item["data_offsets"], name) for name, item in header.items())
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise bad(f"its header cannot be read ({error})") from None
    end = 0
    for start, stop, name in spans:
        if start != end:
            raise bad(f"tensor '{name}' {'overlaps the one before it' if start < end else 'leaves a hole before it'}")
        if stop - start != entries[name].nbytes:
            raise bad(f"tensor '{name}' has {stop - start} bytes, its shape needs {entries[name].nbytes}")
        end = stop
    if size != 8 + length + end:
        raise bad(f"it has {size} bytes where {8 + length + end} belong")
    return entries, metadata


def _entry(item: Mapping[str, Any], path: Path, data: int) -> Entry:
    """One entry of a header; raises ValueError, KeyError or TypeError for what is none."""
    start, stop = item["data_offsets"]
    if any(type(number) is not int or number < 0 for number in (*item["shape"], start, stop)):
        raise ValueError(f"negative or broken numbers in {item}")
    if item["dtype"] not in DTYPES:
        raise ValueError(f"type {item['dtype']!r} is unknown")
    return Entry(DTYPES[item["dtype"]], tuple(item["shape"]), path, data + start)


def _ties(stated: Any, path: Path) -> dict[str, str]:
    try:
        return dict(json.loads(stated) if isinstance(stated, str) else stated or {})
    except (ValueError, TypeError, RecursionError):
        raise refuse("its list of ties cannot be read", place=str(path)) from None


class Writer:
    """Files of known tensors, filled in any order; use it as a context."""

    def __init__(
        self,
        folder: Path,
        sizes: Mapping[str, tuple[torch.dtype, Shape]],
        stem: str = "model",
        limit: int = SHARD_BYTES,
    ) -> None:
        self.places: dict[str, tuple[BinaryIO, int, torch.dtype, Shape]] = {}
        self.stack = ExitStack()
        shards = list(_cut(sizes, limit))
        index: dict[str, str] = {}
        for number, names in enumerate(shards, 1):
            name = f"{stem}.safetensors" if len(shards) == 1 else f"{stem}-{number:05}-of-{len(shards):05}.safetensors"
            self._begin(folder / name, {tensor: sizes[tensor] for tensor in names})
            index |= dict.fromkeys(names, name)
        if len(shards) > 1:
            document = {"metadata": {"total_size": sum(map(_nbytes, sizes.values()))}, "weight_map": index}
            text = json.dumps(document, indent=1) + "\n"
            (folder / f"{stem}.safetensors.index.json").write_text(text, encoding="utf-8")

    def _begin(self, path: Path, sizes: Mapping[str, tuple[torch.dtype, Shape]]) -> None:
        """Write a header; wide types come first, so that all data is aligned."""
        offset = 0
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        for name, (dtype, shape) in sorted(sizes.items(), key=lambda item: (-item[1][0].itemsize, item[0])):
            end = offset + _nbytes((dtype, shape))
            header[name] = {"dtype": CODES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
            offset = end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        file = self.stack.enter_context(path.open("xb"))
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + offset)
        for name, (dtype, shape) in sizes.items():
            self.places[name] = (file, 8 + len(text) + header[name]["data_offsets"][0], dtype, shape)

    def put(self, name: str, tensor: Tensor) -> None:
        """Write one tensor, once."""
        file, start, dtype, shape = self.places.pop(name)
        if tensor.dtype != dtype or tuple(tensor.shape) != shape:
            raise AssertionError(f"{name} is {tensor.dtype} {tuple(tensor.shape)}, announced as {dtype} {shape}")
        file.seek(start)
        if tensor.numel():
            file.write(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        self.stack.close()
        if kind is None and self.places:
            raise AssertionError(f"never written: {sorted(self.places)}")


def _nbytes(size: tuple[torch.dtype, Shape]) -> int:
    return size[0].itemsize * math.prod(size[1])


def _cut(sizes: Mapping[str, tuple[torch.dtype, Shape]], limit: int) -> Iterable[list[str]]:
    shard: list[str] = []
    total = 0
    for name, size in sizes.items():
        if shard and total + _nbytes(size) > limit:
            yield shard
            shard, total = [], 0
        shard.append(name)
        total += _nbytes(size)
    yield shard
