"""A model of ours as a peer starts from: the class, config.json and tensors that `xt convert --to hf` would write.

That makes one place say what a network is in the words that other projects know; each peer reads its sizes from
there. Nothing is written to disk.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from xtcli.bench.peers import Unmatched
from xtcli.convert.engine import to_theirs
from xtcli.convert.exports import find_form
from xtcli.convert.plan import make_plan
from xtcli.errors import UserError
from xtcli.parts.graphs import Graph
from xtcli.registry import part_of


@dataclass(frozen=True)
class Exported:
    """`values` is config.json. `tensors` are by the names of `architecture`, those that stand for another left out;
    `free` are the names of tensors that a class of theirs makes itself."""

    architecture: str
    values: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    free: frozenset[str]

    def must(self, **wanted: Any) -> None:
        """Raise Unmatched unless config.json says this; a tuple holds several values that will do, None is no value."""
        for name, value in wanted.items():
            accepted = value if isinstance(value, tuple) else (value,)
            if self.values.get(name) not in accepted:
                raise Unmatched(f"{name} is {self.values.get(name)!r}, it knows {' or '.join(map(repr, accepted))}")


def export(model: Graph) -> Exported:
    """The model as it is now, in tensors of its own; raises Unmatched where no class expresses it."""
    config = model.config
    if part_of(config).members(config):
        raise Unmatched("it holds several models")
    with torch.no_grad():
        ours = {name: tensor.detach().cpu().clone() for name, tensor in model.state_dict().items()}
    try:
        (family, form), values = find_form(config, "auto", {}, "")
    except UserError as error:
        raise Unmatched("; ".join(problem.cause for problem in error.problems[:2])) from None
    plan = make_plan(family, form, config, ours)
    tensors = {name: tensor for move in plan.moves for name, tensor in to_theirs(move, ours.__getitem__).items()}
    return Exported(form.name, values, tensors, frozenset({*plan.ties, *plan.dead}))
