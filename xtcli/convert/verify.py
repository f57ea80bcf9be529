"""Converted weights against the reference: outputs, and the output of every module that both sides have.

Ours runs first and is let go before the reference is made, so that only one of them is in memory; both map
their files instead of copying them. The pairs of modules come from the name rules: where a rule moves the
weight of one module to another, their outputs must be equal (end to end where one of theirs is several of
ours). Everything is float32 on the CPU.
"""

from __future__ import annotations

import importlib.util
import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from xtcli.convert.plan import Plan
from xtcli.convert.rules import SAME, Chain, Operation, Transpose
from xtcli.errors import EXIT_FAILURE, Problem, UserError, refuse
from xtcli.model import construct

TOLERANCE = 1e-4
ROWS, LENGTH = 2, 17
TEXTS = ("input_ids", "decoder_input_ids")

Outputs = dict[str, Tensor]


class Diverged(UserError):
    """The converted model does not compute what the reference computes: our failure."""

    exit_code = EXIT_FAILURE


@dataclass(frozen=True)
class Pair:
    """One module of theirs, and the modules of ours that do the same."""

    theirs: str
    ours: tuple[str, ...]
    operation: Operation = SAME

    def joined(self, outputs: list[Tensor]) -> Tensor:
        """What several modules of ours put out, in the order of their one."""
        if len(outputs) == 1:
            return outputs[0]
        rows = [output.movedim(-1, 0).flatten(1) for output in outputs]
        whole: Tensor = self.operation.backward(rows)[0].t().unflatten(0, outputs[0].shape[:-1])
        return whole


@dataclass(frozen=True)
class Sides:
    """What is compared: a plan, the config.json, and the tensors of ours and of theirs, mapped when they are needed."""

    plan: Plan
    values: Mapping[str, Any]
    ours: Callable[[], Mapping[str, Tensor]]
    theirs: Callable[[], Mapping[str, Tensor]]


def compare(sides: Sides, place: str) -> dict[str, Any]:
    """What there is to report; raises Diverged naming the first module that differs."""
    if importlib.util.find_spec("transformers") is None:
        raise refuse("--verify compares with transformers, which is not installed", "pip install transformers==4.57.6")
    import transformers

    cls = getattr(transformers, sides.plan.form.name)
    pairs = _pairs(sides.plan)
    accepted = inspect.signature(cls.forward).parameters
    inputs = {name: value for name, value in _inputs(sides.plan.config, accepted).items() if name in accepted}
    mine, traced = _run_ours(sides, inputs, pairs)
    expected, reference = _run_theirs(sides, cls, inputs, pairs, place)
    recalled = _recalled(sides.plan.config)
    # A classifier may run on every state there and on the picked one here: then its output alone is compared.
    alike = [pair for pair in traced if pair in reference and traced[pair].numel() == reference[pair].numel()]
    modules = {
        " + ".join(pair.ours): _worst(traced[pair], reference[pair], _real(pair.ours[0], inputs, recalled))
        for pair in alike
    }
    outputs = {
        f"output {name}": _worst(mine[name], value, _real(name, inputs, ()))
        for name, value in expected.items()
        if name in mine
    }
    off = [(name, worst) for name, worst in (modules | outputs).items() if not worst <= TOLERANCE]
    if off or not outputs:
        name, worst = off[0] if off else ("output", float("nan"))
        cause = f"'{name}' is the first that differs from the reference, by {worst:.3g} (absolute, float32)"
        raise Diverged(Problem(cause, place, remedy="nothing was written; please report it with the config.json"))
    return {
        "transformers": transformers.__version__,
        "rows": next(iter(inputs.values())).shape[0],
        "tokens": next((inputs[name].shape[-1] for name in TEXTS if name in inputs), 0),
        "outputs": len(outputs),
        "modules": len(modules),
        "worst": max((*outputs.values(), *modules.values())),
        "differences": modules | outputs,
    }


def _pairs(plan: Plan) -> list[Pair]:
    """The modules that hold a weight, on both sides."""
    found: dict[tuple[str, ...], Pair] = {}
    for move in plan.moves:
        if len(move.theirs) == 1 and move.theirs[0].endswith(".weight"):
            ours = tuple(name.removesuffix(".weight") for name in move.ours)
            if any(name.endswith(plan.family.rescaled) for name in ours):
                continue
            found[ours] = Pair(move.theirs[0].removesuffix(".weight"), ours, _of_rows(move.operation))
    return list(found.values())


def _of_rows(operation: Operation) -> Operation:
    """An operation on the weights of layers as one on their outputs, which are in rows however weights are stored."""
    if isinstance(operation, Chain):
        return Chain(tuple(step for step in operation.steps if not isinstance(step, Transpose)))
    return operation


def _inputs(config: Any, accepted: Mapping[str, Any]) -> dict[str, Tensor]:
    """Ids and masks: one row without padding, one with some on the right."""
    generator = torch.Generator().manual_seed(0)
    head = config.heads.get("sequence")
    end = head.end if head is not None and head.pick == "end" else None
    special = {config.pad, config.start, end}
    plain = torch.tensor([number for number in range(config.vocab) if number not in special] or [0])
    # Without a padding token the reference labels one text at a time.
    rows = 1 if head is not None and config.pad is None else ROWS
    model = construct(config)
    # Some take whole chunks alone, some fill the last one up.
    chunks = [length for module in model.modules() for length in getattr(module, "chunks", ())]
    whole = math.lcm(*chunks, *(getattr(module, "multiple", 1) for module in model.modules()))
    length = -(-min(LENGTH, config.context or LENGTH) // whole) * whole

    def ids(width: int) -> Tensor:
        return plain[torch.randint(len(plain), (rows, width), generator=generator)]

    inputs = {"input_ids": ids(length), "attention_mask": torch.ones(rows, length, dtype=torch.long)}
    hidden = length // 3 if config.pad is not None and rows > 1 else 0
    if hidden:
        inputs["input_ids"][1, length - hidden :] = config.pad
        inputs["attention_mask"][1, length - hidden :] = 0
    if end is not None:
        inputs["input_ids"][0, -1] = end
        inputs["input_ids"][-1, length - hidden - 1] = end
    chooses = "choice" in config.heads or "summary" in config.heads
    if chooses:
        inputs = {name: value[:, None].expand(-1, 2, -1).contiguous() for name, value in inputs.items()}
    if config.kind == "encoder-decoder":
        inputs["decoder_input_ids"] = inputs["input_ids"] if end is not None else ids(length)
    elif config.memory is not None and "encoder_hidden_states" in accepted:
        inputs["encoder_hidden_states"] = torch.randn(rows, 5, config.memory, generator=generator)
    # What is no text, such as an image, or stands beside it.
    for name, blank in model.blank(rows, length, torch.device("cpu")).items():
        if blank.is_floating_point():
            inputs[name] = torch.randn(blank.shape, generator=generator)
        elif name not in inputs and name in accepted:
            inputs[name] = blank[:, None].expand(-1, 2, *blank.shape[1:]).contiguous() if chooses else blank
    return inputs


def _run_ours(sides: Sides, inputs: Mapping[str, Tensor], pairs: list[Pair]) -> tuple[Outputs, dict[Pair, Tensor]]:
    model = construct(sides.plan.config)
    model.load_state_dict(sides.ours(), assign=True)
    model = model.float().eval()
    calls: Outputs = {}
    with torch.no_grad(), _watched(model, calls), _dice():
        output = model(**inputs)
    # Modules run in the order in which they were first called, which is the order to look for a difference in.
    ran = {name: place for place, name in enumerate(calls)}
    whole = [pair for pair in pairs if all(name in calls for name in pair.ours)]
    # Queries alone may be fewer than the keys and values that one module of theirs makes beside them.
    whole = [pair for pair in whole if len({calls[name].shape[:-1] for name in pair.ours}) == 1]
    traced = {
        pair: pair.joined([calls[name] for name in pair.ours])
        for pair in sorted(whole, key=lambda pair: max(ran[name] for name in pair.ours))
    }
    return _tensors(output), traced


def _run_theirs(
    sides: Sides, cls: Any, inputs: Mapping[str, Tensor], pairs: list[Pair], place: str
) -> tuple[Outputs, dict[Pair, Tensor]]:
    from transformers.modeling_utils import no_init_weights

    config = cls.config_class(**{key: value for key, value in sides.values.items() if "dtype" not in key})
    # Some kernels ignore options, and a cache changes what relative positions are measured from.
    for one in (config, *(getattr(config, name) for name in config.sub_configs)):
        one._attn_implementation, one.use_cache = sides.plan.family.kernel, False
    with no_init_weights():
        model = cls(config)
    state = dict(sides.theirs())
    # Assigning tears ties apart, and some classes mend them from the name that the file leaves out.
    state |= {alias: state[main] for alias, main in sides.plan.ties.items() if main in state}
    missing, _ = model.load_state_dict(state, strict=False, assign=True)
    unfilled = set(missing) & set(sides.plan.shapes)
    if unfilled:
        raise refuse(f"the reference was not given '{min(unfilled)}'", place=place)
    model.tie_weights()
    model = model.float().eval()
    calls: Outputs = {}
    with torch.no_grad(), sides.plan.family.runnable(), _watched(model, calls), _dice():
        output = model(**inputs)
    if sides.plan.family.time_first:
        # The trunk's modules have the places in front, those of a head have the rows.
        trunk = [pair.theirs for pair in pairs if pair.theirs.startswith(sides.plan.form.prefix or "")]
        trunk = [name for name in trunk if not sides.plan.is_head(f"{name}.weight")]
        for name in trunk:
            made = calls.pop(name, None)
            if made is not None and made.dim() > 2:
                calls[name] = made.transpose(0, 1)
    return _tensors(output), {pair: calls[pair.theirs] for pair in pairs if pair.theirs in calls}


@contextmanager
def _dice() -> Iterator[None]:
    """The same random numbers for both sides: some draw hashes when they run."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


@contextmanager
def _watched(model: nn.Module, calls: dict[str, Tensor]) -> Iterator[None]:
    """Collect the output of every linear layer, norm and the like, by the name of its module."""

    def hook(name: str) -> Any:
        def keep(module: nn.Module, inputs: Any, output: Any) -> None:
            if isinstance(output, Tensor) and name not in calls:
                # What comes next may write into it.
                calls[name] = output.clone()

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


def _recalled(config: Any) -> tuple[str, ...]:
    """Where keys and values are made of an encoder's states, places as they are there."""
    readers = [name for name, module in construct(config).named_modules() if getattr(module, "reads_memory", False)]
    return tuple(f"{name}.{made}" for name in readers for made in ("k", "v"))


def _real(name: str, inputs: Mapping[str, Tensor], recalled: tuple[str, ...]) -> Tensor | None:
    """The mask (B, T) of the side that a module or an output belongs to; in a decoder's target nothing is padding."""
    written = "decoder_input_ids" in inputs and not name.startswith(("encoder", *recalled))
    return None if written else inputs.get("attention_mask")


def _worst(one: Tensor, other: Tensor, real: Tensor | None) -> float:
    """The largest difference, as a number that is never below TOLERANCE for a nan.

    A place that sees nothing but padding means nothing, and is left out where tensors have the mask's axes.
    """
    if one.numel() != other.numel():
        return float("inf")
    if one.dim() == 3 and other.shape == one.mT.shape != one.shape:
        # A convolution there has the channels in front of the places.
        other = other.mT
    off = (one - other.reshape(one.shape)).abs().nan_to_num(float("inf"))
    if real is not None and one.dim() > 2 and real.numel() in (one.shape[:2].numel(), one.shape[:-1].numel()):
        # Some cut a text into chunks, row after row.
        off = off.reshape(*real.shape, -1)[real.bool()]
    return float(off.max())
