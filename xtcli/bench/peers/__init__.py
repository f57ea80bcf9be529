"""What `xt` is measured against: networks of other projects with the weights of ours, run as their users run them.

    transformers       the package
    litgpt             the package
    nanogpt=PATH       a clone of the project, or its model.py
    gpt-fast=PATH      a clone of the project, or its model.py

Each stands in a file of its own with `train(ours, ...)`, `write(...)`, or both. What a peer cannot express, it says
by raising Unmatched; nothing is measured on another network in its place.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

from xtcli.errors import did_you_mean, refuse

Use = Literal["train", "write"]


class Unmatched(Exception):
    """The peer cannot express this model."""


@dataclass(frozen=True)
class Known:
    """A peer: the module of this package that runs it, what it can do, the package or the file that it is."""

    module: str
    uses: tuple[Use, ...]
    package: str | None = None
    remedy: str = ""


KNOWN = {
    "transformers": Known("hf", ("train", "write"), "transformers", "pip install transformers==4.57.6"),
    "nanogpt": Known("nanogpt", ("train",)),
    "litgpt": Known("litgpt", ("train",), "litgpt", "pip install litgpt"),
    "gpt-fast": Known("gptfast", ("write",)),
}


@dataclass(frozen=True)
class Peer:
    """One that was named on the command line, with the path of its copy where it is no package."""

    name: str
    path: Path | None = None

    @property
    def adapter(self) -> Any:
        """The module that runs it."""
        return importlib.import_module(f"{__name__}.{KNOWN[self.name].module}")

    @property
    def version(self) -> str | None:
        """That of the package as it was installed; None for a copy, which has none."""
        package = KNOWN[self.name].package
        try:
            return None if package is None else importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return None


def chosen(words: Sequence[str], use: Use) -> list[Peer]:
    """The peers that the words of `--against` name; raises UserError for what is unknown, missing or of no use here."""
    found = []
    for word in words:
        name, _, path = word.partition("=")
        known = KNOWN.get(name)
        if known is None:
            raise refuse(f"there is no peer '{name}'", did_you_mean(name, KNOWN), place="--against")
        if use not in known.uses:
            other = "writes texts" if use == "train" else "is compared in training"
            raise refuse(f"{name} only {other}", "leave it out", place="--against")
        if known.package is None:
            found.append(Peer(name, _file(name, path)))
            continue
        if path:
            raise refuse(f"{name} is a package and takes no path", f"write --against {name}", place="--against")
        if importlib.util.find_spec(known.package) is None:
            raise refuse(f"{name} is not installed", known.remedy, place="--against")
        found.append(Peer(name))
    return found


def versions(peers: Sequence[Peer]) -> dict[str, str]:
    """The versions of those that are packages, for a result file."""
    return {peer.name: peer.version for peer in peers if peer.version is not None}


def _file(name: str, text: str) -> Path:
    """The model.py of a copy."""
    if not text:
        raise refuse(f"{name} is no package", f"write {name}=PATH, the folder of a copy", place="--against")
    path = Path(text).expanduser()
    path = path / "model.py" if path.is_dir() else path
    if not path.is_file():
        raise refuse(f"there is no file '{path}'", f"give {name}=PATH, the folder of a copy", place="--against")
    if path.suffix != ".py":
        raise refuse(f"'{path}' is no Python file", f"give {name}=PATH, the folder of a copy", place="--against")
    return path


def load(path: Path, *needed: str) -> ModuleType:
    """The module in a file of the user's; raises UserError where it lacks a name that is needed."""
    name = f"{path.parent.name}_{path.stem}".replace("-", "_")
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None, "the name of a peer's file ends in .py"
    module = importlib.util.module_from_spec(spec)
    # Dataclasses look their own module up.
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except ImportError as error:
        raise refuse(f"'{path}' cannot be imported: {error}", "give the folder of the copy, or its model.py") from None
    missing = [word for word in needed if not hasattr(module, word)]
    if missing:
        raise refuse(f"'{path}' defines no {' and no '.join(missing)}", "is it the model.py of the project?")
    return module
