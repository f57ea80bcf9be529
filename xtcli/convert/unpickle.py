"""Reads pickled weights in a process of its own and rewrites them as safetensors: unpickle.py OUT FILE...

A script, not a module: the parent (pickles.py) runs it by its path. PyTorch's restricted reader builds tensors
and nothing else; should it ever be fooled, the hook below still forbids the network and other programs. What
goes wrong is said in one line on stderr, exit code 2.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

FORBIDDEN = ("socket.", "subprocess.", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "ctypes.dlopen")


def forbid(event: str, arguments: Any) -> None:
    """An audit hook: it cannot be taken away again."""
    if event.startswith(FORBIDDEN):
        raise PermissionError(f"a file of weights tried {event}")


def load(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of one file by name."""
    try:
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except RuntimeError as error:
        if "mmap" not in str(error):
            raise
        # The format before PyTorch 1.6 cannot be mapped; it is read by the same restricted reader.
        found = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(found, dict) or not all(isinstance(value, torch.Tensor) for value in found.values()):
        raise ValueError("it holds more than a map from names to tensors")
    return found


def main(out: Path, files: list[Path]) -> None:
    """One safetensors file for each pickle, and an index where there are several."""
    index: dict[str, str] = {}
    size = 0
    for number, path in enumerate(files, 1):
        name = "model.safetensors" if len(files) == 1 else f"model-{number:05}-of-{len(files):05}.safetensors"
        tensors = {key: value.detach().contiguous().clone() for key, value in load(path).items()}
        double = [key for key in tensors if key in index]
        if double:
            raise ValueError(f"tensor '{double[0]}' is also in another file")
        save_file(tensors, out / name, {"format": "pt"})
        size += sum(tensor.nbytes for tensor in tensors.values())
        index |= dict.fromkeys(tensors, name)
    if len(files) > 1:
        document = {"metadata": {"total_size": size}, "weight_map": index}
        (out / "model.safetensors.index.json").write_text(json.dumps(document), encoding="utf-8")


if __name__ == "__main__":
    sys.addaudithook(forbid)
    try:
        main(Path(sys.argv[1]), [Path(name) for name in sys.argv[2:]])
    except Exception as error:
        print(f"{type(error).__name__}: {' '.join(str(error).split())[:500]}", file=sys.stderr)
        sys.exit(2)
