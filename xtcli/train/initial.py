"""Training that starts from a checkpoint's weights (`train.init`), and the words in which that is told.

    body             every tensor must be there, in its shape; none of the checkpoint may be left over
    heads, pooler    what fits is loaded; what the checkpoint lacks, or has in another shape, starts fresh
    tokenizer        the checkpoint's, unless an override or a tokenizer file of the preset names another with its ids

Adapters of a checkpoint (xtcli.train.lora) are added to its weights first.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from xtcli.config.library import RECORDED
from xtcli.config.preset import Resolved, load_preset
from xtcli.convert.same import difference
from xtcli.data.roles import FILE
from xtcli.data.tokenizers import File, Tokenizer
from xtcli.errors import Problem, UserError, nearest, refuse
from xtcli.model import find_checkpoint
from xtcli.registry import Config, part_of, tree
from xtcli.runs.folder import MANIFEST
from xtcli.runs.tensors import load_weights
from xtcli.train.lora import plain

OUTER = ("heads", "pooler", "generator")
"""What stands on the body of a model or beside it: a checkpoint made for another task lacks it or has another."""
MOST = 20
"""Problems that are told at most."""


@dataclass(frozen=True)
class Fit:
    """How a checkpoint fits a model: tensors by name, and sentences about what is not as it was."""

    folder: Path
    loaded: tuple[str, ...]
    fresh: tuple[str, ...]
    unused: tuple[str, ...]
    notes: tuple[str, ...]

    def modules(self) -> tuple[str, ...]:
        """The paths of the modules that start fresh: whole heads where nothing of them was loaded."""
        return tuple(_groups(self.fresh, self.loaded))

    def report(self) -> list[str]:
        """What was loaded and what was not, in sentences."""
        lines = [f"starting from {self.folder}: {_tensors(len(self.loaded))} loaded"]
        if self.fresh:
            lines.append(f"fresh, for want of weights: {_listed(self.fresh, self.loaded)}")
        if self.unused:
            lines.append(f"left out, for want of a place: {_listed(self.unused, self.loaded)}")
        return lines + list(self.notes)


def settle(resolved: Resolved) -> Resolved:
    """The preset with `train.init` as the folder of a checkpoint and with the tokenizer that goes with it."""
    preset = resolved.preset
    path = Path(preset.train.init or "")
    if (path / "config.json").is_file() and not (path / MANIFEST).exists():
        remedy = f"convert it first: xt convert auto {path} FOLDER"
        raise refuse(f"'{path}' is a checkpoint of transformers", remedy, place=resolved.place("train.init"))
    folder = find_checkpoint(path).resolve()
    tokenizer = _tokenizer(resolved, folder)
    train = preset.train.model_copy(update={"init": str(folder)})
    return replace(resolved, preset=preset.model_copy(update={"train": train, "tokenizer": tokenizer}))


def with_tokenizer(resolved: Resolved, resumed: Path | None) -> Resolved:
    """The preset as it is read now: a tokenizer file is that of the checkpoint that a run goes on from, if any."""
    if resumed is None or not isinstance(resolved.preset.tokenizer, File.Config):
        return resolved
    tokenizer = resolved.preset.tokenizer.model_copy(update={"path": str(resumed / FILE)})
    return replace(resolved, preset=resolved.preset.model_copy(update={"tokenizer": tokenizer}))


def compare(model: nn.Module, resolved: Resolved) -> Fit:
    """How the checkpoint of `train.init` fits `model`, which may be a skeleton; raises UserError where it does not."""
    folder = Path(resolved.preset.train.init or "")
    have = _weights(folder)
    want: dict[str, Tensor] = model.state_dict()
    place = resolved.place("train.init")
    problems, loaded, fresh, notes = [], [], [], []
    for name in want:
        shapes = [tuple(state[name].shape) if name in state else None for state in (have, want)]
        if shapes[0] == shapes[1]:
            loaded.append(name)
        elif _outer(name):
            fresh.append(name)
            if shapes[0] is not None:
                notes.append(f"{name} has shape {shapes[0]} in the checkpoint and {shapes[1]} here")
        else:
            cause = f"tensor '{name}' is missing in the checkpoint"
            if shapes[0] is not None:
                cause = f"tensor '{name}' has shape {shapes[0]} in the checkpoint, the preset wants {shapes[1]}"
            near = nearest(name, set(have) - set(want)) if shapes[0] is None else None
            remedy = f"is it '{near}'?" if near else "train the preset that the checkpoint was made with"
            problems.append(Problem(cause, place, "train.init", remedy))
    unused = [name for name in have if name not in want]
    for name in unused:
        if not _outer(name):
            cause = f"tensor '{name}' of the checkpoint has no place in the preset's model"
            problems.append(Problem(cause, place, "train.init", "train the preset that the checkpoint was made with"))
    if problems:
        more = [Problem(f"{len(problems) - MOST} more tensors do not fit", place, "train.init")]
        raise UserError(*problems[:MOST], *(more if len(problems) > MOST else []))
    before, after = load_preset(folder / RECORDED).preset, resolved.preset
    if other := difference(_bare(before.model), _bare(after.model)):
        notes.append(f"the checkpoint was made with another network: {other} as in this preset")
    theirs, ours = (getattr(preset.objective, "labels", None) for preset in (before, after))
    if theirs and ours and theirs != ours and any(name.startswith("heads.") for name in loaded):
        notes.append(f"the labels of its head were {_few(theirs)}; they are to become {_few(ours)}")
    return Fit(folder, tuple(loaded), tuple(fresh), tuple(unused), tuple(notes))


def fill(model: nn.Module, fit: Fit) -> None:
    """Copy what fits into `model`, in place."""
    have, own = _weights(fit.folder), model.state_dict()
    with torch.no_grad():
        for name in fit.loaded:
            own[name].copy_(have[name])


def _weights(folder: Path) -> dict[str, Tensor]:
    return plain(load_weights(folder), load_preset(folder / RECORDED).preset.train.lora)


def _outer(name: str) -> bool:
    return name.split(".")[0] in OUTER


def _bare(config: Config) -> Config:
    """The body of a model: no heads, no pooler, and dropout, which is no part of the weights, everywhere the same.

    Of several models in one graph it is the one whose tensors have names without a prefix.
    """
    config = next((one for one, prefix in part_of(config).members(config).values() if not prefix), config)

    def visit(node: Any) -> Any:
        if isinstance(node, dict):
            return {key: 0.0 if "dropout" in key else visit(value) for key, value in node.items()}
        return [visit(item) for item in node] if isinstance(node, list) else node

    bare = visit(tree(config)) | {"heads": {}}
    if "pooler" in bare:
        bare["pooler"] = None
    bare.pop("kind")
    return type(config).model_validate(bare)


def _tokenizer(resolved: Resolved, folder: Path) -> Config:
    """The config of the tokenizer to use; raises UserError where its ids are not the checkpoint's."""
    named = resolved.preset.tokenizer
    file = Path(named.path) if isinstance(named, File.Config) else None
    overridden = any(
        path.split(".")[0] == "tokenizer" and origin.source == "override" for path, origin in resolved.origins.items()
    )
    have = (folder / FILE).is_file()
    place = resolved.place("tokenizer")
    if file is None and (overridden or not have):
        cause = "the weights need a tokenizer with the same ids, and a new one would have others"
        remedy = "leave it out: the checkpoint has one" if have else "set tokenizer='{kind: file, path: FILE}'"
        raise UserError(Problem(cause, place, "tokenizer", remedy))
    if file is None or file.resolve() in ((folder / FILE).resolve(), folder.resolve()):
        return File.Config(path=str(folder / FILE))
    if not have:
        return named
    theirs = Tokenizer.load(folder).library.get_vocab(with_added_tokens=True)
    ours = {id: token for token, id in Tokenizer.load(file).library.get_vocab(with_added_tokens=True).items()}
    for token, id in sorted(theirs.items(), key=lambda item: item[1]):
        if ours.get(id) != token:
            other = f"{ours[id]!r}" if id in ours else "nothing"
            cause = f"id {id:,} is {token!r} in the checkpoint and {other} in {file}"
            raise UserError(Problem(cause, place, "tokenizer", "leave it out: the checkpoint has one"))
    return named


def _groups(names: Iterable[str], loaded: Iterable[str]) -> dict[str, int]:
    """Tensors by module: by a whole head or pooler where none of it was loaded, else by the tensor's own module."""
    partly = {_group(name) for name in loaded}
    found: dict[str, int] = {}
    for name in names:
        group = name.rpartition(".")[0] if _group(name) in partly else _group(name)
        found[group] = found.get(group, 0) + 1
    return found


def _group(name: str) -> str:
    return ".".join(name.split(".")[: 2 if name.startswith("heads.") else 1])


def _listed(names: Iterable[str], loaded: Iterable[str]) -> str:
    return ", ".join(f"{group} ({_tensors(count)})" for group, count in _groups(names, loaded).items())


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:MOST]) + (", ..." if len(names) > MOST else "")


def _tensors(count: int) -> str:
    return f"{count:,} tensor" + ("" if count == 1 else "s")
