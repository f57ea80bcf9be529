"""One preset, run or checkpoint in short: what it states, what it counts, what it costs, what its folder holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from xtcli.config.preset import Resolved
from xtcli.config.show import outline, values
from xtcli.inspect import cost, modules, record
from xtcli.model import count, count_active, skeleton

SECTIONS = ("model", "objective", "tokenizer", "data", "train")


def facts(found: Resolved, ref: str, batch: int = 1, length: int | None = None) -> dict[str, Any]:
    """Everything as plain data; raises UserError as `cost.measure_costs` does."""
    model = skeleton(found)
    return {
        "name": found.name,
        "file": str(found.file),
        "size": found.size,
        "sizes": list(found.sizes),
        "parameters": count(model),
        "active_parameters": count_active(model),
        "published_parameters": found.preset.expect.parameters,
        "components": modules.components(model),
        "costs": cost.measure_costs(found, batch=batch, length=length).facts(),
        **record.facts(Path(ref)),
        "preset": found.to_tree(),
        "origins": {item.path: str(item.origin) for item in values(found)},
    }


def lines(found: Resolved, ref: str, batch: int = 1, length: int | None = None) -> list[str]:
    """Everything as text; raises UserError as `cost.measure_costs` does."""
    model, about = skeleton(found), found.preset.about
    text = [f"{about.title} ({found.name}{f', size {found.size}' if found.size else ''})"]
    text += [f"  {item}" for item in (about.paper, about.url, about.new) if item]
    others = [size for size in found.sizes if size != found.size]
    if others:
        text.append(f"  other sizes: {', '.join(others)}")
    text.append("")
    for name in SECTIONS:
        text += outline(found, name)
    text += ["", _parameters(count(model), found.preset.expect.parameters)]
    active = count_active(model)
    if active != count(model):
        text.append(f"{active:,} parameters active for each token")
    sections = (
        modules.share_lines(modules.components(model)),
        cost.lines(cost.measure_costs(found, batch=batch, length=length)),
        record.lines(record.facts(Path(ref))),
    )
    for section in sections:
        text += ["", *section] if section else []
    return text


def _parameters(have: int, published: object) -> str:
    if published is None:
        return f"{have:,} parameters"
    return f"{have:,} parameters, " + ("as published" if published == have else f"but {published:,} were published")
