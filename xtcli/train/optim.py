"""The optimizer and what is done to gradients before its step.

AdamW (https://arxiv.org/abs/1711.05101) with two groups: matrices and tables (two or more dimensions)
decay; gains, biases and other vectors do not, nor does what a module lists by name in a class
attribute `undecayed`. A tied tensor is one parameter, under its first name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from xtcli.config.train import TrainConfig

FUSED = ("cuda", "cpu", "mps", "xpu")
"""Device types for which PyTorch has a fused AdamW."""

ADAMW_COPIES = 2
"""Running values per parameter: the means of the gradient and of its square."""


def decay_groups(model: nn.Module) -> tuple[dict[str, nn.Parameter], dict[str, nn.Parameter]]:
    """The trained parameters by name: those that decay, those that do not."""
    exempt = {
        f"{path}.{name}" if path else name
        for path, module in model.named_modules()
        for name in getattr(module, "undecayed", ())
    }
    decayed: dict[str, nn.Parameter] = {}
    plain: dict[str, nn.Parameter] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            vector = parameter.ndim < 2 or name.rpartition(".")[2] == "bias"
            (plain if vector or name in exempt else decayed)[name] = parameter
    return decayed, plain


def build_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW over the trained parameters of `model`, fused where every one is on a device that has it.

    Its learning rate is the peak until `set_rate` gives it the schedule's.
    """
    decayed, plain = decay_groups(model)
    groups: list[dict[str, Any]] = [
        {"params": list(decayed.values()), "weight_decay": config.weight_decay},
        {"params": list(plain.values()), "weight_decay": 0.0},
    ]
    parameters = [*decayed.values(), *plain.values()]
    fused = all(parameter.device.type in FUSED and parameter.is_floating_point() for parameter in parameters)
    return torch.optim.AdamW(
        [group for group in groups if group["params"]], lr=config.lr, betas=config.betas, eps=config.eps, fused=fused
    )


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Give every group the learning rate of the coming step."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            # A compiled or captured step reads the rate from a tensor; a new number would compile it anew.
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


def optimizer_bytes(model: nn.Module, stored: torch.dtype = torch.float32) -> int:
    """Bytes that AdamW's running values will take, in memory and in a checkpoint; they have the weights' type."""
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return ADAMW_COPIES * stored.itemsize * trained


def clip(model: nn.Module, limit: float | None) -> Tensor:
    """Scale all gradients so that their common norm is at most `limit`; returns the norm before, a scalar tensor.

    With None nothing is scaled. A norm that is not finite leaves NaN gradients: look before the step.
    """
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    if limit is not None:
        parameters = [parameter for parameter in model.parameters() if parameter.grad is not None]
        torch.nn.utils.clip_grads_with_norm_(parameters, limit, norm)
    return norm


def non_finite_gradients(model: nn.Module, of: Callable[[Tensor], Tensor | None]) -> list[str]:
    """Names of the parameters whose gradient, which `of` finds, has a NaN or infinity."""
    found = ((name, of(parameter)) for name, parameter in model.named_parameters())
    return [name for name, gradient in found if gradient is not None and not bool(torch.isfinite(gradient).all())]


def first_non_finite(model: nn.Module, forward: Callable[[], Any]) -> str | None:
    """Run `forward` again and name the first module whose output has a NaN or infinity that its input had not.

    The name is the module's path in `model` ("" is the model itself); None when all is finite this time.
    """
    found: list[str] = []

    def hook(path: str) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
        def look(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            if not found and any(not bool(torch.isfinite(tensor).all()) for tensor in _tensors(output)):
                found.append(path)

        return look

    # A module's hook runs after those of the modules inside it, so the first to report is the innermost.
    handles = [module.register_forward_hook(hook(path)) for path, module in model.named_modules()]
    try:
        with torch.no_grad():
            forward()
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else None


def _tensors(value: Any) -> Iterable[Tensor]:
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)
