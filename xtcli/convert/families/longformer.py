"""Longformer: a RoBERTa whose layers look through windows, and have projections of their own for global tokens.

`attention_window` counts both sides of a token: half of it is the radius. Which tokens are global without being named
depends on the class.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from xtcli.convert.families import bert, roberta
from xtcli.convert.families.bert import ATTENTION_DROPOUT, DROPOUT
from xtcli.convert.family import Family, Form
from xtcli.convert.options import Custom, Key, Options, Unexpressed
from xtcli.convert.rules import Rule, layer
from xtcli.registry import Config

GLOBALS = {
    "LongformerForSequenceClassification": "first",
    "LongformerForQuestionAnswering": "before-separator",
    "LongformerForMultipleChoice": "after-separator",
}


def _radius(options: Options) -> int | list[int]:
    stated = options.values.get("attention_window")
    if not isinstance(stated, list):
        windows = [options.get("attention_window", int, 512)]
    else:
        windows = options.get("attention_window", list)
        layers = options.get("num_hidden_layers", int, 12)
        if len(windows) != layers or not all(type(window) is int for window in windows):
            options.refuse("attention_window", f"is {windows!r}", f"give one whole number, or {layers} of them")
            windows = [2]
    if any(window < 2 or window % 2 for window in windows):
        options.refuse("attention_window", f"is {stated!r}", "windows are even numbers above 0")
        windows = [2]
    radii = [window // 2 for window in windows]
    return radii[0] if len(set(radii)) == 1 else radii


def _write_radius(value: Any, found: dict[str, Any]) -> None:
    found["attention_window"] = [2 * radius for radius in value] if isinstance(value, list | tuple) else 2 * value


def _no_dilation(value: Any, found: dict[str, Any]) -> None:
    if value not in (1, None):
        raise Unexpressed("their windows have no gaps")


def template(form: Form) -> dict[str, Any]:
    """The tree of a Longformer."""
    tree = roberta.template(form)
    tree |= {"kind": "encoder", "memory": None, "vocab": Key("vocab_size", int, 30522)}
    tree["embed"] = tree["embed"] | {"positions": {"kind": "counted"}}
    block = tree["stack"]["block"]
    attention = {
        "kind": "sliding-global",
        "heads": bert.HEADS,
        "dropout": ATTENTION_DROPOUT,
        "radius": Custom(_radius, _write_radius),
        "dilation": Custom(lambda options: 1, _no_dilation),
        "globals": GLOBALS.get(form.name, "none"),
        "separator": Key("sep_token_id", int, 2),
    }
    sublayers = {"attn": attention, "ffn": block["sublayers"]["ffn"]}
    tree["stack"] = tree["stack"] | {"block": block | {"sublayers": sublayers}}
    return tree


def trunk(config: Config) -> Sequence[Rule]:
    """BERT's names, and those of the global projections."""
    theirs, ours = "encoder.layer.{layer}.attention.self", "stack.blocks.{layer}.attn"
    pairs = (("query_global", "q_global"), ("key_global", "k_global"), ("value_global", "v_global"))
    return (*bert.trunk(config), *(rule for a, b in pairs for rule in layer(f"{theirs}.{a}", f"{ours}.{b}")))


LONGFORMER = Family(
    name="longformer",
    types=("longformer",),
    title="Longformer",
    template=template,
    forms=roberta.forms("Longformer", "longformer.", DROPOUT),
    trunk=trunk,
    heads=roberta.HEADS,
    ties=roberta.ties,
    drops=roberta.DROPS,
    prefixes=("longformer.", ""),
    fixed={"is_decoder": (False,), "is_encoder_decoder": (False,)},
    # onnx_export: the same numbers by other operators. attention_mode, ignore_attention_mask: of another library.
    neutral=frozenset(
        """
        add_cross_attention attention_mode attention_window ignore_attention_mask num_hidden_layers onnx_export
        position_embedding_type tie_word_embeddings
        """.split()
    ),
)
