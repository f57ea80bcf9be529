"""A step of training waits for no value on its device: fixed slots for targets, masks that nobody looks at."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_graphs import encoder, ids, make, seq2seq
from torch import Tensor

from xtcli.data.batch import IGNORE
from xtcli.parts import heads, vocabulary
from xtcli.parts.graphs import Graph
from xtcli.parts.heads import slotted

ROWS, LENGTH = 3, 11
MODELS: dict[str, Any] = {
    "mlm": lambda: make("encoder", encoder(heads={"mlm": {}, "nsp": {}})),
    "lm": lambda: make("encoder", encoder(heads={"lm": {"shift": False, "bias": True}})),
    "t5": lambda: make("encoder-decoder", seq2seq()),
    "alibi": lambda: make("encoder", encoder(heads={"mlm": {}}, stack=ALIBI)),
}
ALIBI = {
    "layers": 1,
    "position": "alibi",
    "block": {"sublayers": {"attn": {"kind": "attention", "heads": 4}, "ffn": {"kind": "mlp", "hidden": 64}}},
}


def batch(model: Graph) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, int]]:
    """Padded rows in which every fourth token is asked for, and more slots than targets."""
    mask = torch.ones(ROWS, LENGTH, dtype=torch.long)
    mask[1, 7:] = 0
    inputs = {"input_ids": ids(ROWS, LENGTH), "attention_mask": mask}
    if "decoder_input_ids" in model.hidden.__code__.co_varnames:
        inputs |= {"decoder_input_ids": ids(ROWS, LENGTH, 1), "decoder_attention_mask": mask}
    place = torch.arange(ROWS * LENGTH).view(ROWS, LENGTH)
    words = torch.where((place % 4 == 1) & mask.bool(), ids(ROWS, LENGTH, 2), IGNORE)
    known = {"mlm": words, "lm": words, "nsp": torch.tensor([0, 1, 1])}
    return inputs, {name: known[name] for name in model.heads}, {"mlm": 10, "lm": 10, "nsp": 3}


@pytest.mark.parametrize("name", MODELS)
def test_a_step_of_training_reads_no_value(name: str) -> None:
    """On the meta device there are none: what asks for a value raises."""
    model = MODELS[name]().train()
    inputs, targets, slots = batch(model)
    model.to("meta")
    moved, wanted = ({key: value.to("meta") for key, value in part.items()} for part in (inputs, targets))
    hidden = model.hidden(**moved)
    terms = model.terms(hidden, wanted, slots)
    torch.stack([term.sum for term in terms.values()]).sum().backward()
    assert all(parameter.grad is not None for key, parameter in model.named_parameters() if "pooler" not in key)


@pytest.mark.parametrize("slots", [7, 10, 30])
@pytest.mark.parametrize("name", ["mlm", "lm"])
def test_a_fixed_number_of_slots_changes_nothing(name: str, slots: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loss and gradients; rows of slots that nothing is asked of have no part in them."""
    model = MODELS[name]()
    inputs, targets, _ = batch(model)
    targets = {name: targets[name]}
    assert int((targets[name] != IGNORE).sum()) == 7
    found = []
    for fixed in (False, True):
        with monkeypatch.context() as patch:
            if fixed:
                patch.setattr(vocabulary, "supervised", slotted)
                patch.setattr(vocabulary, "FEW", 1)
            given = {name: slots} if fixed else None
            term = model.terms(model.hidden(**inputs), targets, given)[name]
            assert int(term.count) == 7
            gradients = torch.autograd.grad(term.sum, list(model.parameters()), allow_unused=True)
            found.append([term.sum, *(slope for slope in gradients if slope is not None)])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_slots_are_used_off_the_cpu_alone() -> None:
    states, targets = torch.randn(2, 5, 3), torch.full((2, 5), IGNORE)
    targets[1, 2] = 4
    rows, wanted = heads.supervised(states, targets, 6)
    assert torch.equal(rows, states[1, 2:3]) and wanted.tolist() == [4]
    rows, wanted = heads.supervised(states.to("meta"), targets.to("meta"), 6)
    assert rows.shape == (6, 3) and wanted.shape == (6,)
    assert slotted(states, targets, 6)[1].tolist() == [4, *[IGNORE] * 5]
