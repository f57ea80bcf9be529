"""The state of a training run beside its weights: what must come back for the next step to be the same step.

`stateful(...)` is the one list of it. Each entry has a name, `get` (a tree of maps, lists, numbers,
strings and tensors) and `set`. `collect` and `restore` walk the list, so a part that is declared is
saved, and a part that is not saved cannot be restored by accident. What follows from the step number
and the preset (learning rate, epoch, order of the data) is not state and is not in the list.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Protocol

import numpy
import torch
from torch import Tensor, nn

from xtcli.errors import UserError, refuse
from xtcli.runs.tensors import load_tensors, save_tensors

FILE = "state.json"
STEM = "optimizer"
_TENSOR = "$tensor"

Tree = Any
"""Nested dict[str, Tree], list[Tree], None, bool, int, float, str and Tensor."""


@dataclass(frozen=True)
class Stateful:
    """One part of the state: how it is read and how it is put back."""

    name: str
    get: Callable[[], Tree]
    set: Callable[[Tree], None]


@dataclass
class TrainerState:
    """The collected state: tensors by path, and JSON values in which `{"$tensor": path}` stands for each."""

    tensors: dict[str, Tensor]
    values: dict[str, Any]


@dataclass
class Progress:
    """Where a run is. `step`: optimizer steps done; `cursor`: samples taken; `tokens`: supervised targets seen."""

    step: int = 0
    cursor: int = 0
    tokens: int = 0
    skipped: int = 0
    best: float | None = None
    best_step: int | None = None
    seconds: float = 0.0


class Keeper(Protocol):
    """Anything with torch's two methods, such as a gradient scaler."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: dict[str, Any]) -> None: ...


def stateful(
    model: nn.Module, optimizer: torch.optim.Optimizer, progress: Progress, scaler: Keeper | None = None
) -> tuple[Stateful, ...]:
    """Every stateful part of a training run on this machine, weights and buffers of the model aside."""
    parts = [
        Stateful("progress", lambda: asdict(progress), lambda tree: _set_progress(progress, tree)),
        Stateful(
            "optimizer", lambda: optimizer_state(model, optimizer), lambda tree: set_optimizer(model, optimizer, tree)
        ),
        Stateful("rng.python", _get_python, _set_python),
        Stateful("rng.numpy", _get_numpy, _set_numpy),
        Stateful("rng.torch", torch.get_rng_state, torch.set_rng_state),
    ]
    parts.extend(_cuda(index) for index in range(torch.cuda.device_count()))
    if torch.backends.mps.is_available():
        parts.append(Stateful("rng.mps", torch.mps.get_rng_state, torch.mps.set_rng_state))
    if scaler is not None:
        parts.append(Stateful("scaler", scaler.state_dict, scaler.load_state_dict))
    return tuple(parts)


def collect(parts: Iterable[Stateful]) -> TrainerState:
    """The state of all parts now. Tensors are not copied: save it before the next step."""
    tensors: dict[str, Tensor] = {}
    return TrainerState(tensors, {part.name: _split(part.get(), part.name, tensors) for part in parts})


def restore(parts: Iterable[Stateful], state: TrainerState) -> list[str]:
    """Put every part back; returns one sentence for each that this machine has and the state lacks, or the reverse.

    Raises UserError when something is missing that does not depend on the machine.
    """
    notes = []
    known = {part.name: part for part in parts}
    for name in sorted(set(known) ^ set(state.values)):
        if name.startswith("rng.") and name not in ("rng.python", "rng.numpy", "rng.torch"):
            where = "this machine" if name in known else "the machine that saved it"
            notes.append(f"{name} exists only on {where}: random numbers will differ from the saved run's")
        else:
            raise refuse(
                f"trainer state '{name}' is only {'in the run' if name in known else 'in the checkpoint'}",
                "resume with the settings that the run was started with",
            )
    for name, part in known.items():
        if name not in state.values:
            continue
        try:
            part.set(_join(state.values[name], state.tensors))
        except UserError:
            raise
        except Exception as error:
            raise refuse(f"trainer state '{name}' does not fit this run ({error})", "use another checkpoint") from error
    return notes


def save_state(state: TrainerState, folder: Path) -> None:
    """Write the state into an existing folder: state.json and optimizer.safetensors (or shards)."""
    text = json.dumps(state.values, indent=1, allow_nan=False)
    (folder / FILE).write_text(text + "\n", encoding="utf-8")
    save_tensors(state.tensors, folder, STEM)


def load_state(folder: Path) -> TrainerState:
    """What `save_state` wrote, in memory of its own."""
    try:
        values = json.loads((folder / FILE).read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise refuse(f"the trainer's state cannot be read ({error})", place=str(folder / FILE)) from None
    # A mapped tensor is aligned as the file has it, and kernels may sum in another order there: copy.
    return TrainerState({name: tensor.clone() for name, tensor in load_tensors(folder, STEM).items()}, values)


def optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, dict[str, Tree]]:
    """The optimizer's running values by parameter name, not by its order in the groups."""
    names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    return {names[parameter]: dict(values) for parameter, values in optimizer.state.items()}


def set_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, tree: Mapping[str, Mapping[str, Tree]]) -> None:
    """Put back what `optimizer_state` gave; rates and decays stay as the optimizer was built with."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    order = [names[parameter] for group in optimizer.param_groups for parameter in group["params"]]
    # A parameter without an entry is one that had no gradient so far, such as an expert that was never chosen.
    unknown = sorted(set(tree) - set(order))
    if unknown:
        raise refuse(
            f"the optimizer's state is for other parameters: this model trains no '{unknown[0]}'",
            "resume with the model that the run was started with",
        )
    groups = optimizer.state_dict()["param_groups"]
    state = {index: dict(tree[name]) for index, name in enumerate(order) if name in tree}
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def _split(tree: Tree, path: str, tensors: dict[str, Tensor]) -> Any:
    if isinstance(tree, Tensor):
        tensors[path] = tree
        return {_TENSOR: path}
    if isinstance(tree, Mapping):
        return {key: _split(value, f"{path}/{key}", tensors) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [_split(value, f"{path}/{index}", tensors) for index, value in enumerate(tree)]
    return tree


def _join(tree: Any, tensors: Mapping[str, Tensor]) -> Tree:
    if isinstance(tree, dict):
        if tree.keys() == {_TENSOR}:
            return tensors[tree[_TENSOR]]
        return {key: _join(value, tensors) for key, value in tree.items()}
    if isinstance(tree, list):
        return [_join(value, tensors) for value in tree]
    return tree


def _set_progress(progress: Progress, tree: Tree) -> None:
    for entry in fields(progress):
        setattr(progress, entry.name, tree[entry.name])


def _cuda(index: int) -> Stateful:
    return Stateful(
        f"rng.cuda.{index}",
        lambda: torch.cuda.get_rng_state(index),
        lambda tree: torch.cuda.set_rng_state(tree, index),
    )


def _get_python() -> Tree:
    version, words, gauss = random.getstate()
    return {"version": version, "words": list(words), "gauss": gauss}


def _set_python(tree: Tree) -> None:
    random.setstate((tree["version"], tuple(tree["words"]), tree["gauss"]))


def _get_numpy() -> Tree:
    state = numpy.random.get_state(legacy=False)
    assert isinstance(state, dict)
    words = state["state"]
    return {
        "generator": state["bit_generator"],
        "words": words["key"].tolist(),
        "position": int(words["pos"]),
        "has_gauss": int(state["has_gauss"]),
        "gauss": float(state["gauss"]),
    }


def _set_numpy(tree: Tree) -> None:
    numpy.random.set_state(
        {
            "bit_generator": tree["generator"],
            "state": {"key": numpy.array(tree["words"], dtype=numpy.uint32), "pos": tree["position"]},
            "has_gauss": tree["has_gauss"],
            "gauss": tree["gauss"],
        }
    )
