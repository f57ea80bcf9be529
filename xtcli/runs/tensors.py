"""Named tensors on disk: safetensors, one file or numbered shards with an index, ties stored once.

    STEM.safetensors                                   when everything fits in `shard_bytes`
    STEM-00001-of-00003.safetensors ... and STEM.safetensors.index.json   otherwise

Tensors that are one and the same memory (a tied head) are stored under the first name; the others are
listed as `ties: {name: stored name}` in the metadata, which gives them back as one tensor. Writing
holds at most one shard in host memory beyond the tensors themselves.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePath
from typing import Any

import safetensors
import torch
from safetensors.torch import save_file
from torch import Tensor

from xtcli.errors import refuse

SHARD_BYTES = 5 * 10**9
WEIGHTS = "model"
INDEX_LIMIT = 256 * 2**20


def save_weights(state: Mapping[str, Tensor], folder: Path, shard_bytes: int = SHARD_BYTES) -> None:
    """Write a state dict as model.safetensors, or its shards, into `folder`, with every dtype as it is.

    `folder` must hold none of these files: nothing is ever written over a file that may be mapped.
    """
    save_tensors(state, folder, WEIGHTS, shard_bytes)


def load_weights(folder: Path, device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """The tensors that `save_weights` wrote, ties being one tensor under several names.

    On the CPU they are views of the file, read when touched; copy what must outlive or outrun it.
    """
    return load_tensors(folder, WEIGHTS, device)


def save_tensors(state: Mapping[str, Tensor], folder: Path, stem: str, shard_bytes: int = SHARD_BYTES) -> None:
    """Write named tensors as STEM.safetensors, or as shards of at most `shard_bytes` (a larger tensor is one alone)."""
    ties = find_ties(state)
    shards = list(_shards([name for name in state if name not in ties], state, shard_bytes))
    metadata = {"format": "pt"} | ({"ties": json.dumps(ties)} if ties else {})
    if len(shards) == 1:
        _write(folder / f"{stem}.safetensors", shards[0], state, metadata)
        return
    index: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        file = f"{stem}-{number:05}-of-{len(shards):05}.safetensors"
        _write(folder / file, names, state, {"format": "pt"})
        index |= dict.fromkeys(names, file)
    size = sum(state[name].nbytes for name in index)
    document = {"metadata": {"total_size": size} | ({"ties": ties} if ties else {}), "weight_map": index}
    (folder / _index(stem)).write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def load_tensors(folder: Path, stem: str, device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """What `save_tensors` wrote; raises UserError for files that are missing or not what they should be."""
    single = folder / f"{stem}.safetensors"
    if single.exists():
        state, metadata = _read(single, device)
        ties = _read_ties(metadata, single)
    else:
        index, ties = _read_index(folder, stem)
        state = {}
        for file in sorted(set(index.values())):
            state |= _read(folder / file, device)[0]
        if set(state) != set(index):
            different = sorted(set(state) ^ set(index))[0]
            raise refuse(f"'{different}' is not both in the index and in its shard", place=str(folder / _index(stem)))
    for name, stored in ties.items():
        if stored not in state:
            raise refuse(f"'{name}' is tied to '{stored}', which is not there", place=str(folder))
        state[name] = state[stored]
    return state


def find_tensors(folder: Path, stem: str = WEIGHTS) -> tuple[dict[str, Path], dict[str, str]]:
    """The file of each tensor that `save_tensors` wrote, and the ties {name: stored name}; no tensor is read."""
    single = folder / f"{stem}.safetensors"
    if single.exists():
        with open_tensors(single) as file:
            return dict.fromkeys(file.keys(), single), _read_ties(file.metadata() or {}, single)
    index, ties = _read_index(folder, stem)
    return {name: folder / shard for name, shard in index.items()}, ties


@contextmanager
def open_tensors(path: Path, device: torch.device | str = "cpu") -> Iterator[Any]:
    """A safetensors file, open for reading tensor by tensor; raises UserError where it is missing or damaged."""
    try:
        with safetensors.safe_open(path, framework="pt", device=str(device)) as file:
            yield file
    except FileNotFoundError:
        raise refuse("the file is missing", place=str(path)) from None
    except safetensors.SafetensorError as error:
        raise refuse(f"not a whole safetensors file ({error})", "copy it anew", place=str(path)) from None


def find_ties(state: Mapping[str, Tensor]) -> dict[str, str]:
    """Each name whose tensor is, in every element, the same memory as that of an earlier name, with that name."""
    first: dict[tuple[Any, ...], str] = {}
    ties = {}
    for name, tensor in state.items():
        if tensor.numel() == 0 or tensor.is_meta:
            continue
        view = (tensor.device, tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride())
        if view in first:
            ties[name] = first[view]
        else:
            first[view] = name
    return ties


def stored_bytes(state: Mapping[str, Tensor]) -> int:
    """Bytes that `save_tensors` will write, headers aside."""
    ties = find_ties(state)
    return sum(tensor.nbytes for name, tensor in state.items() if name not in ties)


def _shards(names: Iterable[str], state: Mapping[str, Tensor], limit: int) -> Iterator[list[str]]:
    shard: list[str] = []
    size = 0
    for name in names:
        if shard and size + state[name].nbytes > limit:
            yield shard
            shard, size = [], 0
        shard.append(name)
        size += state[name].nbytes
    yield shard


def _write(path: Path, names: Iterable[str], state: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    if path.exists():
        raise FileExistsError(f"{path} exists and may be mapped into memory")
    save_file({name: _packed(state[name]) for name in names}, path, metadata)
    # safetensors makes its file readable by the owner alone; it should be as readable as its folder.
    path.chmod(path.parent.stat().st_mode & 0o666)


def _packed(tensor: Tensor) -> Tensor:
    """The tensor on the CPU in memory of its own, as the format demands: a slice would drag its whole base along."""
    tensor = tensor.detach().cpu().contiguous()
    return tensor.clone() if tensor.untyped_storage().nbytes() != tensor.nbytes else tensor


def _read(path: Path, device: torch.device | str) -> tuple[dict[str, Tensor], dict[str, str]]:
    with open_tensors(path, device) as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118


def _read_ties(metadata: Mapping[str, str], path: Path) -> dict[str, str]:
    try:
        return dict(json.loads(metadata.get("ties", "{}")))
    except (ValueError, TypeError, RecursionError):
        raise refuse("its list of ties cannot be read", place=str(path)) from None


def _read_index(folder: Path, stem: str) -> tuple[dict[str, str], dict[str, str]]:
    path = folder / _index(stem)
    try:
        if path.stat().st_size > INDEX_LIMIT:
            raise ValueError("it is too large")
        document = json.loads(path.read_bytes())
        index, ties = dict(document["weight_map"]), dict(document["metadata"].get("ties", {}))
        # A shard is a plain name beside the index: a path could lead anywhere on the machine.
        if any(PurePath(file).name != file or file in ("", "..") for file in index.values()):
            raise ValueError("it names a shard outside its folder")
    except FileNotFoundError:
        raise refuse(f"has neither {stem}.safetensors nor {path.name}", place=str(folder)) from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise refuse(f"not an index of shards ({error})", place=str(path)) from None
    return index, ties


def _index(stem: str) -> str:
    return f"{stem}.safetensors.index.json"
