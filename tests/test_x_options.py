"""Wirings and orders of sublayers, each against a slow twin written from its paper's formula: values and gradients.

Options inside attention have theirs in test_x_attention.py, what enters and leaves in test_x_inputs.py, and all of
them together in test_x_combinations.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn
from x_models import ATTENTION, DIM, FFN, LENGTH, VOCAB, agree, context, model_of, normed, random

from xtcli.model import construct
from xtcli.parts.context import Ctx
from xtcli.parts.scope import Refused
from xtcli.parts.stack import Block, Stack
from xtcli.registry import find


class Toy(nn.Module):
    """A sublayer whose branch is easy to write down: tanh(x W)."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(random(DIM, DIM, seed=seed) / 4)

    def forward(self, x: Tensor, ctx: Ctx) -> Tensor:
        return torch.tanh(x @ self.weight)


def pre(x: Tensor, f: dict[str, Toy], w: Any) -> Tensor:
    for name, sublayer in f.items():
        x = x + torch.tanh(normed(x, w.norm[name]) @ sublayer.weight)
    return x


def post(x: Tensor, f: dict[str, Toy], w: Any) -> Tensor:
    for name, sublayer in f.items():
        x = normed(x + torch.tanh(x @ sublayer.weight), w.norm[name])
    return x


def macaron(x: Tensor, f: dict[str, Toy], w: Any) -> Tensor:
    x = x + 0.5 * torch.tanh(normed(x, w.norm["pre_ffn"]) @ f["pre_ffn"].weight)
    x = x + torch.tanh(normed(x, w.norm["attn"]) @ f["attn"].weight)
    return x + 0.5 * torch.tanh(normed(x, w.norm["ffn"]) @ f["ffn"].weight)


def macaron_post(x: Tensor, f: dict[str, Toy], w: Any) -> Tensor:
    x = normed(x + 0.5 * torch.tanh(x @ f["pre_ffn"].weight), w.norm["pre_ffn"])
    x = normed(x + torch.tanh(x @ f["attn"].weight), w.norm["attn"])
    return normed(x + 0.5 * torch.tanh(x @ f["ffn"].weight), w.norm["ffn"])


def sandwich_norm(x: Tensor, f: dict[str, Toy], w: Any) -> Tensor:
    for name, sublayer in f.items():
        x = x + normed(torch.tanh(normed(x, w.norm[name]) @ sublayer.weight), w.out[name])
    return x


def parallel(x: Tensor, f: dict[str, Toy], w: Any) -> Tensor:
    return x + sum(torch.tanh(normed(x, w.norm[name]) @ sublayer.weight) for name, sublayer in f.items())


def parallel_shared(x: Tensor, f: dict[str, Toy], w: Any) -> Tensor:
    return x + sum(torch.tanh(normed(x, w.norm) @ sublayer.weight) for sublayer in f.values())


def rezero(x: Tensor, f: dict[str, Toy], w: Any) -> Tensor:
    for sublayer in f.values():
        x = x + w.alpha[0] * torch.tanh(x @ sublayer.weight)
    return x


def rezero_each(x: Tensor, f: dict[str, Toy], w: Any) -> Tensor:
    for number, sublayer in enumerate(f.values()):
        x = x + w.alpha[number] * torch.tanh(x @ sublayer.weight)
    return x


def gated(x: Tensor, f: dict[str, Toy], w: Any) -> Tensor:
    for name, sublayer in f.items():
        gate = w.gate[name]
        wr, wz, wg = gate.of_branch.weight.chunk(3)
        ur, uz = gate.of_stream.weight.chunk(2)
        y = torch.tanh(normed(x, w.norm[name]) @ sublayer.weight).clamp(min=0)
        r = 1 / (1 + torch.exp(-(y @ wr.T + x @ ur.T)))
        z = 1 / (1 + torch.exp(-(y @ wz.T + x @ uz.T - gate.shut)))
        h = torch.tanh(y @ wg.T + (r * x) @ gate.of_reset.weight.T)
        x = (1 - z) * x + z * h
    return x


def gated_cell(x: Tensor, f: dict[str, Toy], w: Any) -> Tensor:
    """What torch's own cell makes of branch and stream."""
    for name, sublayer in f.items():
        gate = w.gate[name]
        y = torch.tanh(normed(x, w.norm[name]) @ sublayer.weight)
        weights = (gate.of_branch.weight, gate.of_stream.weight, gate.of_branch.bias, gate.of_stream.bias)
        cell = torch._VF.gru_cell(y.reshape(-1, DIM), x.reshape(-1, DIM), *weights)  # type: ignore[attr-defined]
        x = cell.reshape(x.shape)
    return x


TWO, THREE = ("attn", "ffn"), ("pre_ffn", "attn", "ffn")
HALVES = {"pre_ffn": 0.5, "ffn": 0.5}


@pytest.mark.parametrize(
    ("wiring", "names", "twin"),
    [
        ("pre", TWO, pre),
        ("post", TWO, post),
        ({"kind": "pre", "scale": HALVES}, THREE, macaron),
        ({"kind": "post", "scale": HALVES}, THREE, macaron_post),
        ("sandwich-norm", TWO, sandwich_norm),
        ("parallel", THREE, parallel),
        ("parallel-shared", THREE, parallel_shared),
        ("rezero", TWO, rezero),
        ({"kind": "rezero", "per": "sublayer"}, TWO, rezero_each),
        ("gated", TWO, gated),
        ("gated-cell", TWO, gated_cell),
    ],
    ids=lambda value: value.__name__ if callable(value) else None,
)
def test_wiring_is_its_formula(wiring: Any, names: tuple[str, ...], twin: Callable[..., Tensor]) -> None:
    sublayers = {name: ATTENTION if name == "attn" else FFN for name in names}
    block = next(m for m in model_of(wiring=wiring, sublayers=sublayers).modules() if isinstance(m, Block))
    toys = {name: Toy(seed) for seed, name in enumerate(names)}
    x = random(2, LENGTH, DIM).requires_grad_()
    leaves = [x, *block.wiring.parameters(), *(toy.weight for toy in toys.values())]
    agree(lambda: block.wiring(x, toys, context(x)), lambda: twin(x, toys, block.wiring), leaves)


def test_a_fresh_rezero_is_the_identity_and_its_alphas_learn() -> None:
    config = {"vocab": VOCAB, "dim": DIM, "context": 16, "heads": {"lm": {"tied": False}}}
    stack = {"layers": 2, "norm": "none", "block": {"wiring": "rezero", "sublayers": {"attn": ATTENTION, "ffn": FFN}}}
    model = construct(find("graph", "decoder").Config.model_validate(config | {"stack": stack}))
    model.to_empty(device="cpu").initialise(0)
    ids = torch.arange(LENGTH)[None]
    hidden = model.hidden(input_ids=ids)
    torch.testing.assert_close(hidden.states, model.embed.tokens(ids))  # type: ignore[operator, union-attr]
    model.losses({"input_ids": ids}, {"lm": ids.roll(-1)})["lm"].mean().backward()
    for name, parameter in model.stack.named_parameters():
        assert (parameter.grad.abs().sum() > 0) == ("alpha" in name), name  # type: ignore[union-attr]


def test_fresh_gates_are_nearly_shut() -> None:
    model = construct(
        find("graph", "decoder").Config.model_validate(
            {
                "vocab": VOCAB,
                "dim": DIM,
                "stack": {"layers": 1, "block": {"wiring": "gated", "sublayers": {"ffn": FFN}}},
            }
        )
    )
    model.to_empty(device="cpu").initialise(0)
    gate = model.stack.blocks[0].wiring.gate["ffn"]  # type: ignore[index, union-attr]
    assert gate.shut.tolist() == [2.0] * DIM
    x, y = random(1, 3, DIM).float(), torch.zeros(1, 3, DIM)
    torch.testing.assert_close(gate(x, y), x * (1 - 1 / (1 + math.e**2)), atol=0.1, rtol=0.0)


def test_rows_go_past_a_sublayer_as_often_as_said_and_none_when_evaluated() -> None:
    block = next(
        m for m in model_of(wiring={"kind": "pre", "drop_path": 0.25}).modules() if isinstance(m, Block)
    ).train()
    torch.manual_seed(0)
    y = torch.ones(20000, 1, 1)
    kept = block.wiring.path(y)  # type: ignore[union-attr, operator]
    assert kept.unique().tolist() == [0.0, pytest.approx(4 / 3)]
    assert abs(kept.mean().item() - 1.0) < 0.01
    assert torch.equal(block.eval().wiring.path(y), y)  # type: ignore[union-attr, operator]


@pytest.mark.parametrize(
    ("layers", "ends", "names", "expected"),
    [
        (16, 6, ("attn", "ffn"), "aaaaaa" + "af" * 10 + "ffffff"),
        (6, 6, ("attn", "ffn"), "aaaaaaffffff"),
        (3, 0, ("attn", "ffn"), "afafaf"),
        (3, 1, ("attn", "cross", "ffn"), "aacfacff"),
        (3, 2, ("pre_ffn", "attn", "ffn"), "aapafff"),
    ],
)
def test_sandwich_order_is_the_papers_string(layers: int, ends: int, names: tuple[str, ...], expected: str) -> None:
    made = {"attn": ATTENTION, "cross": {"kind": "cross-attention", "heads": 2}, "ffn": FFN, "pre_ffn": FFN}
    wiring = {"kind": "pre", "scale": HALVES} if "pre_ffn" in names else "pre"
    model = model_of(
        wiring=wiring,
        sublayers={name: made[name] for name in names},
        stack={"layers": layers, "order": {"kind": "sandwich", "ends": ends}},
        memory=DIM,
    )
    assert isinstance(model.stack, Stack)
    assert "".join(name[0] for block in model.stack.blocks for name in block.names) == expected  # type: ignore[union-attr]
    x = random(1, LENGTH, DIM)
    ctx = context(x, memory=random(1, 5, DIM, seed=6))
    y = x
    shared = model.stack.shared.prepare(x, ctx)
    for block in model.stack.blocks:
        for name in block.names:  # type: ignore[union-attr]
            part = getattr(block, name)
            weight = 0.5 if name in HALVES and "pre_ffn" in names else 1.0
            y = y + weight * part(normed(y, block.wiring.norm[name]), shared)  # type: ignore[union-attr, index]
    torch.testing.assert_close(model.stack(x, ctx), normed(y, model.stack.norm))


@pytest.mark.parametrize(
    ("stack", "words"),
    [
        ({"layers": 2, "order": {"kind": "sandwich", "ends": 3}}, "3 ends do not fit 2 layers"),
        ({"order": {"kind": "sandwich", "ends": 1, "front": "atn"}}, "did you mean 'attn'"),
        (
            {
                "block": None,
                "blocks": {"a": {"sublayers": {"attn": ATTENTION}}},
                "pattern": ["a"],
                "order": {"kind": "sandwich", "ends": 1},
            },
            "both say what stands where",
        ),
    ],
)
def test_orders_that_cannot_be_are_refused(stack: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        model_of(stack=stack)


def test_scale_of_a_sublayer_that_is_not_there_is_refused() -> None:
    with pytest.raises(Refused, match=r"wiring\.scale: the block has no sublayer 'pre_ffn'; did you mean 'ffn'"):
        model_of(wiring={"kind": "pre", "scale": {"pre_ffn": 0.5}})
