"""The preset of a converted checkpoint: complete, so that it loads, trains and generates like any other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from xtcli.config.compose import VERSION
from xtcli.config.emit import dump
from xtcli.config.preset import Preset
from xtcli.convert.companions import TOKENIZER
from xtcli.convert.plan import Plan
from xtcli.data.images import ImageConfig
from xtcli.parts.heads import SPEAKING
from xtcli.registry import tree

_BY_HEAD = {
    "mlm": "mlm",
    "nsp": "mlm",
    "sequence": "classify",
    "token": "classify",
    "choice": "classify",
    "span": "extract",
}
_BY_GRAPH = {"decoder": "clm", "encoder": "mlm", "encoder-decoder": "span-corruption"}


def objective(config: Any, names: Sequence[str] | None, own: Mapping[str, str]) -> dict[str, Any]:
    """What such a model is trained on next: the objective of its first head; `names` are those of its labels,
    `own` the family's objectives, by graph or head."""
    usual = own.get(config.kind, _BY_GRAPH[config.kind])
    head = next(iter(config.heads), "lm")
    kind = usual if head in SPEAKING else own.get(head) or _BY_HEAD.get(head, usual)
    if kind == "mlm":
        asked = {"next_sentence": "nsp" in config.heads, "sentence_order": "sop" in config.heads}
        # A model of all words, whatever its graph is: where it reads both ways its words are masked.
        own = {"head": "lm"} if head == "lm" else {}
        return {"kind": kind} | {name: True for name, value in asked.items() if value} | own
    if kind in ("classify", own.get(head)) and names and len(names) == getattr(config.heads[head], "labels", 0):
        return {"kind": kind, "labels": list(names)}
    return {"kind": kind}


def label_names(values: Mapping[str, Any]) -> list[str] | None:
    """The names of the labels in the order of their numbers, where config.json names 0, 1, 2 ... wholly."""
    found = values.get("id2label")
    if not isinstance(found, dict) or any(str(number) not in found for number in range(len(found))):
        return None
    names = [str(found[str(number)]) for number in range(len(found))]
    return names if len(set(names)) == len(names) else None


def preset_yaml(plan: Plan, values: Mapping[str, Any], origin: str, images: ImageConfig | None = None) -> str:
    """preset.yaml of the model that a plan and a config.json make; `origin` names where it comes from, `images` is how
    it prepares them, where that is said."""
    preset = Preset.model_validate(
        {
            "version": VERSION,
            "about": {"title": f"{plan.form.name} converted from {origin}"},
            "model": plan.config,
            "objective": objective(plan.config, label_names(values), plan.family.objectives)
            | ({} if images is None else {"images": images}),
            "tokenizer": {"kind": "file", "path": TOKENIZER},
        }
    )
    return dump(tree(preset))
