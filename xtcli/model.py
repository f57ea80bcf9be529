"""From a preset to an `nn.Module`, to a checkpoint folder and back.

    build     preset -> fresh weights          save_model    module -> checkpoint folder
    load      checkpoint or run -> module      count         parameters, ties once

A build happens twice: on the meta device, where every mistake of the config is found at no cost, and
then in real memory. Weights depend on the seed, the config and the device type alone.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from xtcli.config.preset import Resolved, load_preset
from xtcli.errors import Problem, UserError, did_you_mean, meant, refuse
from xtcli.parts.graphs import Graph
from xtcli.parts.scope import Refused
from xtcli.registry import Config, part_of
from xtcli.runs.folder import commit_folder
from xtcli.runs.tensors import load_weights, save_weights

Model = Graph


def build(
    ref: str | Path | Resolved,
    *overrides: str,
    size: str | None = None,
    tiny: bool = False,
    seed: int = 0,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> Model:
    """A model with fresh weights from a preset; raises UserError with every mistake of the preset.

    On the meta device (`device="meta"` or inside `with torch.device("meta")`) it has shapes but no memory.
    """
    resolved = ref if isinstance(ref, Resolved) else load_preset(ref, overrides, size=size, tiny=tiny)
    model = skeleton(resolved, dtype)
    target = torch.device(device) if device is not None else torch.get_default_device()
    if target.type != "meta":
        model.to_empty(device=target)
        model.initialise(seed)
    return model


def skeleton(resolved: Resolved, dtype: torch.dtype | None = None) -> Model:
    """The module tree of a preset on the meta device."""
    try:
        model = construct(resolved.preset.model)
    except Refused as refused:
        raise UserError(*(_placed(problem, resolved) for problem in refused.problems)) from None
    return model.to(dtype or torch.float32)


def construct(config: Config) -> Model:
    """The module tree of a graph's config on the meta device; raises Refused with paths of the config."""
    with torch.device("meta"):
        graph: Model = part_of(config)(config)
    return graph


def _placed(problem: Problem, resolved: Resolved) -> Problem:
    return replace(problem, place=resolved.place(problem.path))


def load(
    path: str | Path,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    *,
    merge: bool = True,
) -> Model:
    """The model of a checkpoint folder, or of the newest whole checkpoint of a run, with its weights.

    Weights keep the type they were stored in unless `dtype` is given. Low-rank adapters are added to them, unless
    `merge` is false: then they stand beside the weights, as in training. Raises UserError for a folder that is no
    checkpoint, is damaged, or does not fit its own preset.
    """
    return load_folder(find_checkpoint(path), device, dtype, merge=merge)


def load_folder(
    folder: Path,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    *,
    merge: bool = True,
) -> Model:
    """`load` for a checkpoint folder that `find_checkpoint` gave, and so has verified."""
    from xtcli.train.lora import adapt, plain

    resolved = load_preset(folder / "preset.yaml")
    model = skeleton(resolved)
    lora = resolved.preset.train.lora
    if lora is not None and not merge:
        adapt(model, lora)
    target = torch.device(device) if device is not None else torch.get_default_device()
    if target.type == "meta":
        return model.to(dtype or torch.float32)
    state = load_weights(folder, target)
    if merge:
        state = plain(state, lora)
    _check(state, model, folder)
    owned = {name: (tensor.clone() if target.type == "cpu" else tensor) for name, tensor in state.items()}
    model.load_state_dict(owned, strict=True, assign=True)
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    return model.to(dtype) if dtype is not None else model


def find_checkpoint(path: str | Path) -> Path:
    """The checkpoint folder that `path` means, verified: itself, or the newest whole one of a run."""
    from xtcli.runs.checkpoint import locate

    folder = Path(path)
    if folder.exists():
        return locate(folder)
    beside = [entry for place in (folder.parent, Path("runs")) if place.is_dir() for entry in place.iterdir()]
    folders = (entry for entry in beside if entry.is_dir())
    remedy = meant(folder, folders, "name a folder that xt train or xt build made")
    raise refuse("no such run or checkpoint", remedy, place=str(path))


def _check(state: dict[str, torch.Tensor], model: nn.Module, folder: Path) -> None:
    wanted = model.state_dict()
    problems = []
    for name in sorted(set(wanted) - set(state)):
        problems.append(
            Problem(f"tensor '{name}' is missing", str(folder), remedy=did_you_mean(name, set(state) - set(wanted)))
        )
    for name in sorted(set(state) - set(wanted)):
        problems.append(Problem(f"tensor '{name}' has no place in the model", str(folder)))
    for name in sorted(set(state) & set(wanted)):
        if state[name].shape != wanted[name].shape:
            have, want = tuple(state[name].shape), tuple(wanted[name].shape)
            problems.append(Problem(f"tensor '{name}' has shape {have}, the preset wants {want}", str(folder)))
    if problems:
        raise UserError(*problems[:20])


def save_model(model: Model, folder: str | Path, preset_yaml: str, tokenizer: Any = None) -> Path:
    """Write a checkpoint folder (see design): preset, weights, tokenizer, manifest; never over an existing one."""
    final = Path(folder)
    if final.exists():
        raise refuse(f"'{folder}' exists", "choose another folder; nothing is overwritten")

    def write(inside: Path) -> None:
        (inside / "preset.yaml").write_text(preset_yaml, encoding="utf-8")
        save_weights(model.state_dict(), inside)
        if tokenizer is not None:
            tokenizer.save(inside)

    commit_folder(final, write)
    return final


def count(model: nn.Module) -> int:
    """Parameters, tied ones once."""
    return sum(parameter.numel() for parameter in model.parameters())


def count_active(model: nn.Module) -> int:
    """Parameters that one token passes through: all but the experts that are not chosen for it."""
    return count(model) - sum(getattr(module, "idle", 0) for module in model.modules())
