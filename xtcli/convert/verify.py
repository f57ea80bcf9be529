"""Converted weights against the reference: outputs, and the output of every module that both sides have.

Ours runs first and is let go before the reference is made, so that only one of them is in memory; both map
their files instead of copying them. The pairs of modules come from the name rules: where a rule moves the
weight of one module to another, their outputs must be equal (end to end where one of theirs is several of
ours). Everything is float32 on the CPU.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor, nn

from xtcli.config.preset import load_preset
from xtcli.convert.families import by_name
from xtcli.convert.family import Form
from xtcli.convert.plan import Plan, make_plan
from xtcli.convert.reading import CONFIG, read_json
from xtcli.convert.report import Report
from xtcli.errors import EXIT_FAILURE, Problem, UserError, refuse
from xtcli.model import construct
from xtcli.runs.tensors import load_weights

TOLERANCE = 1e-4
ROWS, LENGTH = 2, 17

Outputs = dict[str, Tensor]


class Diverged(UserError):
    """The converted model does not compute what the reference computes: our failure."""

    exit_code = EXIT_FAILURE


@dataclass(frozen=True)
class Pair:
    """One module of theirs, and the modules of ours that do the same."""

    theirs: str
    ours: tuple[str, ...]


def compare(src: Path, made: Path, to: str, report: Report) -> dict[str, Any]:
    """What `verify` found, for the report; raises Diverged naming the first module that differs."""
    if importlib.util.find_spec("transformers") is None:
        raise refuse("--verify compares with transformers, which is not installed", "pip install transformers==4.57.6")
    ours, theirs = (made, src) if to == "xt" else (src, made)
    config = load_preset(ours).preset.model
    family = by_name()[report.family]
    plan = _plan(config, family.forms, report)
    pairs = _pairs(plan)
    inputs = _inputs(config)
    mine, traced = _run_ours(ours, config, inputs, pairs)
    expected, reference, version = _run_theirs(theirs, report.architecture, inputs, pairs)
    modules = {pair.ours: _worst(traced[pair], reference[pair]) for pair in traced if pair in reference}
    outputs = {name: _worst(mine[name], value) for name, value in expected.items() if name in mine}
    off = [(" + ".join(names), worst) for names, worst in modules.items() if not worst <= TOLERANCE]
    off = off or [(f"output {name}", worst) for name, worst in outputs.items() if not worst <= TOLERANCE]
    if off or not outputs:
        name, worst = off[0] if off else ("no output", float("nan"))
        cause = f"'{name}' is the first that differs from the reference, by {worst:.3g} (absolute, float32)"
        raise Diverged(Problem(cause, str(src), remedy="nothing was written; please report it with the config.json"))
    return {
        "transformers": version,
        "rows": ROWS,
        "tokens": LENGTH,
        "outputs": len(outputs),
        "modules": len(modules),
        "worst": max((*outputs.values(), *modules.values())),
        "differences": outputs | {" + ".join(names): worst for names, worst in modules.items()},
    }


def _plan(config: Any, forms: tuple[Form, ...], report: Report) -> Plan:
    family = by_name()[report.family]
    form = next(form for form in forms if form.name == report.architecture)
    return make_plan(family, form, config, construct(config).state_dict())


def _pairs(plan: Plan) -> list[Pair]:
    """The modules that hold a weight; tables are read without their module being called."""
    found = {}
    for move in plan.moves:
        if len(move.theirs) == 1 and move.theirs[0].endswith(".weight"):
            ours = tuple(name.removesuffix(".weight") for name in move.ours)
            found[ours] = Pair(move.theirs[0].removesuffix(".weight"), ours)
    return list(found.values())


def _inputs(config: Any) -> dict[str, Tensor]:
    """Ids and masks: one row without padding, one with some on the right."""
    generator = torch.Generator().manual_seed(0)
    special = {config.pad, config.start}
    head = config.heads.get("sequence")
    end = head.end if head is not None and head.pick == "end" else None
    plain = torch.tensor([i for i in range(config.vocab) if i not in special | {end}] or [0])
    length = min(LENGTH, config.context or LENGTH)

    def ids(width: int) -> Tensor:
        return plain[torch.randint(len(plain), (ROWS, width), generator=generator)]

    inputs = {"input_ids": ids(length), "attention_mask": torch.ones(ROWS, length, dtype=torch.long)}
    hidden = length // 3
    if config.pad is not None and hidden:
        inputs["input_ids"][1, length - hidden :] = config.pad
        inputs["attention_mask"][1, length - hidden :] = 0
    if end is not None:
        inputs["input_ids"][0, -1] = end
        inputs["input_ids"][1, length - hidden - 1] = end
    if "choice" in config.heads or "summary" in config.heads:
        inputs = {name: value[:, None].expand(-1, 2, -1).contiguous() for name, value in inputs.items()}
    if config.kind == "encoder-decoder":
        inputs["decoder_input_ids"] = inputs["input_ids"] if end is not None else ids(length)
    return inputs


def _run_ours(
    folder: Path, config: Any, inputs: Mapping[str, Tensor], pairs: list[Pair]
) -> tuple[Outputs, dict[Pair, Tensor]]:
    model = construct(config)
    model.load_state_dict(load_weights(folder), assign=True)
    model = model.float().eval()
    calls: dict[str, Tensor] = {}
    with torch.no_grad(), _watched(model, calls):
        output = model(**inputs)
    # Modules run in the order in which they were first called, which is the order to look for a difference in.
    ran = {name: place for place, name in enumerate(calls)}
    whole = [pair for pair in pairs if all(name in calls for name in pair.ours)]
    traced = {
        pair: torch.cat([calls[name] for name in pair.ours], -1)
        for pair in sorted(whole, key=lambda pair: max(ran[name] for name in pair.ours))
    }
    return _tensors(output), traced


def _run_theirs(
    folder: Path, architecture: str, inputs: Mapping[str, Tensor], pairs: list[Pair]
) -> tuple[Outputs, dict[Pair, Tensor], str]:
    import transformers
    from transformers.modeling_utils import no_init_weights

    cls = getattr(transformers, architecture)
    values = read_json(folder / CONFIG)
    config = cls.config_class(**{key: value for key, value in values.items() if key not in ("dtype", "torch_dtype")})
    config._attn_implementation = "eager"
    with no_init_weights():
        model = cls(config)
    state: dict[str, Tensor] = {}
    for path in sorted(folder.glob("model*.safetensors")):
        with safetensors.safe_open(path, framework="pt") as file:
            state |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    missing, unexpected = model.load_state_dict(state, strict=False, assign=True)
    model.tie_weights()
    del state, missing, unexpected
    model = model.float().eval()
    calls: dict[str, Tensor] = {}
    with torch.no_grad(), _watched(model, calls):
        output = model(**inputs)
    return (
        _tensors(output),
        {pair: calls[pair.theirs] for pair in pairs if pair.theirs in calls},
        transformers.__version__,
    )


@contextmanager
def _watched(model: nn.Module, calls: dict[str, Tensor]) -> Iterator[None]:
    """Collect the output of every linear layer, norm and the like, by the name of its module."""

    def hook(name: str) -> Any:
        def keep(module: nn.Module, inputs: Any, output: Any) -> None:
            if isinstance(output, Tensor) and name not in calls:
                calls[name] = output

        return keep

    hooks = [
        module.register_forward_hook(hook(name))
        for name, module in model.named_modules()
        if next(module.parameters(recurse=False), None) is not None
    ]
    try:
        yield
    finally:
        for handle in hooks:
            handle.remove()


def _tensors(output: Mapping[str, Any]) -> Outputs:
    return {name: value for name, value in output.items() if isinstance(value, Tensor)}


def _worst(one: Tensor, other: Tensor) -> float:
    """The largest difference, as a number that is never below TOLERANCE for a nan."""
    if one.numel() != other.numel():
        return float("inf")
    return float((one.reshape(-1) - other.reshape(-1)).abs().nan_to_num(float("inf")).max())
