"""Marks and checks that several families share: activations, labels, kinds of problem, old buffers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from xtcli.convert.options import OMIT, Code, Custom, Key, Options, table
from xtcli.registry import Config

_ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh",
    "gelu_accurate": "gelu_tanh",
    "gelu_fast": "gelu_fast",
    "gelu_10": "gelu_10",
    "quick_gelu": "quick_gelu",
    "relu": "relu",
    "relu2": "relu2",
    "relu6": "relu6",
    "silu": "silu",
    "swish": "silu",
    "tanh": "tanh",
    "sigmoid": "sigmoid",
    "mish": "mish",
    "leaky_relu": "leaky_relu",
    "laplace": "laplace",
    "linear": "identity",
}


def activation(first: str | None, *none: str) -> Code:
    """Activation names; `first` is the name that the family itself uses where several mean the same (None: no name),
    `none` are further words for no activation."""
    return table(
        {first: "identity" if first is None else _ACTIVATIONS[first]} | _ACTIVATIONS | dict.fromkeys(none, "identity")
    )


def labels(usual: int) -> Custom:
    """The number of labels: that of the names in `id2label`, `usual` without."""

    def load(options: Options) -> int:
        names = options.get("id2label", dict, None)
        count = options.get("num_labels", int, None)
        return len(names) if names is not None else usual if count is None else int(count)

    def dump(value: Any, found: dict[str, Any]) -> None:
        # Where no names mean another number than the base of all configs has, they are said anyway.
        if value != usual or usual != 2:
            found["id2label"] = {str(number): f"LABEL_{number}" for number in range(value)}
            found["label2id"] = {f"LABEL_{number}": number for number in range(value)}

    return Custom(load, dump)


LABELS = labels(2)


def _two(options: Options) -> Any:
    count = LABELS.load(options)
    if count != 2:
        options.refuse("id2label", f"names {count} labels, but question answering has two outputs", "name two, or none")
    return {}


TWO_OUTPUTS = Custom(_two, lambda value, found: None)
"""A span head whose two outputs are counted as labels."""

PROBLEM = Key(
    "problem_type",
    str,
    None,
    code=table(
        {None: None, "regression": "number", "single_label_classification": "one", "multi_label_classification": "many"}
    ),
)
"""How labels are to be read; null = by their number and type."""


def _dropout(options: Options) -> float:
    for key in ("classifier_dropout", "hidden_dropout"):
        rate = options.get(key, float, None)
        if rate is not None:
            return float(rate)
    return 0.1


LABEL_DROPOUT = Custom(_dropout, lambda value, found: found.update(classifier_dropout=value))
"""Dropout before the labels of tokens, of families that have two keys for it and else 0.1."""

PAD = Key(
    "pad_token_id", int, None, code=Code(lambda value: None if value is not None and value < 0 else value, lambda v: v)
)
START = Key("decoder_start_token_id", int, None)


def given(options: Options, name: str, kind: type, default: Any) -> Any:
    """The value of a key that may be null, which is not the same as leaving it out."""
    return options.get(name, kind, None) if name in options.values else default


def only(name: str, value: Any, cause: str) -> Custom:
    """A key that some classes read though others do not: in theirs it must be `value`, and nothing stands for it."""

    def load(options: Options) -> Any:
        stated = options.get(name, type(value), value)
        if stated != value:
            options.refuse(name, f"is {stated!r}: {cause}", f"only {value!r} converts")
        return OMIT

    return Custom(load, lambda value, found: None)


def token(name: str, usual: int) -> Custom:
    """The id of a special token, `usual` where it is left out; null, or a number below 0, is none."""

    def load(options: Options) -> int | None:
        value = given(options, name, int, usual)
        return None if value is None or value < 0 else int(value)

    return Custom(load, lambda value, found: found.update({name: value}))


def starts(usual: int) -> Custom:
    """The token that decoded texts start with, `usual` where it is left out; null is the one that texts begin with."""

    def load(options: Options) -> int | None:
        value = given(options, START.name, int, usual)
        return options.get("bos_token_id", int, None) if value is None else int(value)

    return Custom(load, lambda value, found: found.update({START.name: value}))


def pad(usual: int) -> Custom:
    """The padding token of families that have one where none is named."""
    return token(PAD.name, usual)


def is_lower_triangle(tensor: Tensor, config: Config) -> bool:
    """A causal mask, (1, 1, n, n) ones on and below the diagonal."""
    if tensor.dim() != 4 or tensor.shape[:2] != (1, 1) or tensor.shape[2] != tensor.shape[3]:
        return False
    mask = tensor[0, 0] != 0
    return bool((mask == torch.ones_like(mask).tril()).all()) and bool(((tensor == 0) | (tensor == 1)).all())


def is_large_negative(tensor: Tensor, config: Config) -> bool:
    """The number that hides a score: -1e4 or beyond."""
    return tensor.numel() == 1 and float(tensor.flatten()[0]) <= -1e4


def counts_up(tensor: Tensor, config: Config) -> bool:
    """0, 1, 2 ... in one row."""
    return tensor.dim() in (1, 2) and bool((tensor.flatten() == torch.arange(tensor.numel())).all())


def is_zero(tensor: Tensor, config: Config) -> bool:
    """Nothing but zeros."""
    return not bool(tensor.any())


def undropped(name: str) -> Custom:
    """The dropout of a wiring that leaves one sublayer out, and is the model's for the others."""
    return Custom(lambda options: {name: 0.0}, lambda value, found: None)
