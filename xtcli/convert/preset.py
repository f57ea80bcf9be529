"""The preset of a converted checkpoint: complete, so that it loads, trains and generates like any other."""

from __future__ import annotations

from typing import Any

from xtcli.config.compose import VERSION
from xtcli.config.emit import dump
from xtcli.config.preset import Preset
from xtcli.convert.companions import TOKENIZER
from xtcli.convert.plan import Plan
from xtcli.registry import kinds, tree

_BY_HEAD = {
    "lm": "clm",
    "mlm": "mlm",
    "nsp": "mlm",
    "sequence": "classify",
    "token": "classify",
    "choice": "classify",
    "span": "extract",
}
_BY_GRAPH = {"decoder": "clm", "encoder": "mlm", "encoder-decoder": "seq2seq"}


def objective(config: Any) -> dict[str, Any]:
    """What such a model is trained on next: the objective of its first head, where xt has one."""
    usual = _BY_GRAPH[config.kind]
    kind = usual
    for head in config.heads:
        wanted = usual if head == "lm" else _BY_HEAD.get(head, usual)
        kind = wanted if wanted in kinds("objective") else usual
        break
    if kind == "mlm":
        return {"kind": kind, "next_sentence": "nsp" in config.heads}
    return {"kind": kind}


def preset_yaml(plan: Plan, origin: str) -> str:
    """preset.yaml of the model that a plan makes; `origin` names where it comes from."""
    preset = Preset.model_validate(
        {
            "version": VERSION,
            "about": {"title": f"{plan.form.name} converted from {origin}"},
            "model": plan.config,
            "objective": objective(plan.config),
            "tokenizer": {"kind": "file", "path": TOKENIZER},
        }
    )
    return dump(tree(preset))
