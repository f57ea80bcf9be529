"""Checkpoints whose weights are pickles (.bin, .pt), which are read only when the user allows it.

A pickle is a program. With permission it is read by PyTorch's restricted reader (`weights_only=True`), in a
child process that may neither reach the network nor start programs, and rewritten as safetensors, which is
what the conversion then reads. When that fails there is no second, laxer try.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePath

from xtcli.convert import unpickle
from xtcli.convert.reading import read_json
from xtcli.errors import refuse

SINGLE = "pytorch_model.bin"
INDEX = "pytorch_model.bin.index.json"


@contextmanager
def unpickled(folder: Path, scratch: Path) -> Iterator[Path]:
    """A folder with the weights as safetensors: `folder` itself where it has some, else one inside `scratch`."""
    if any(folder.glob("model*.safetensors*")):
        yield folder
        return
    files = pickles(folder)
    if not files:
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="weights-", dir=scratch) as name:
        command = [sys.executable, "-P", str(Path(unpickle.__file__)), name, *map(str, files)]
        child = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
        if child.returncode:
            said = child.stderr.strip().splitlines()[-1:] or [f"the reader ended with {child.returncode}"]
            raise refuse(f"the pickle cannot be read safely ({said[0]})", "find a safetensors file", place=str(folder))
        yield Path(name)


def pickles(folder: Path) -> list[Path]:
    """The files that hold the weights: those of the index, pytorch_model.bin, or the only .bin, .pt or .pth."""
    if (folder / INDEX).exists():
        listed = read_json(folder / INDEX).get("weight_map")
        if not isinstance(listed, dict):
            raise refuse("has no weight_map", place=str(folder / INDEX))
        names = sorted(set(map(str, listed.values())))
        for name in names:
            if PurePath(name).name != name or not (folder / name).is_file():
                raise refuse(f"shard '{name}' is missing", "copy it anew", place=str(folder))
        return [folder / name for name in names]
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    found = [path for path in sorted(folder.iterdir()) if path.suffix in (".bin", ".pt", ".pth")]
    return found if len(found) == 1 else []
