"""Reversible stacks: the plain twin that keeps activations says what values and gradients must be."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from xtcli.model import construct
from xtcli.parts.graphs import Graph
from xtcli.parts.reversible import keeping
from xtcli.parts.scope import Refused
from xtcli.registry import find
from xtcli.train.transforms import checkpoint_blocks, compile_blocks

VOCAB, LENGTH = 67, 20
ATTENTION = {"kind": "attention", "heads": 4, "dropout": 0.1}
MLP = {"kind": "mlp", "hidden": 48, "dropout": 0.1}
CHUNKED = {"kind": "chunked", "heads": 4, "chunk": 4, "dropout": 0.1}
LSH = {"kind": "lsh", "heads": 4, "chunk": 4, "rounds": 2, "dropout": 0.1}


def block(**sublayers: Any) -> dict[str, Any]:
    return {"block": {"sublayers": sublayers}}


STACKS: dict[str, dict[str, Any]] = {
    "attention": block(attn=ATTENTION, ffn=MLP),
    "concat": {"join": "concat", **block(attn=ATTENTION, ffn={**MLP, "kind": "glu"})},
    "bias": {"position": "t5", **block(attn=ATTENTION, ffn=MLP)},
    "rotary": {"position": "rotary", **block(attn={**ATTENTION, "kv_heads": 2}, ffn=MLP)},
    "macaron": block(pre_ffn=MLP, attn=ATTENTION, ffn=MLP),
    "cross": block(attn=ATTENTION, cross={"kind": "cross-attention", "heads": 4}, ffn=MLP),
    "chunked": block(attn=CHUNKED, ffn=MLP),
    "lsh": block(attn=LSH, ffn=MLP),
    "ffn in pieces": block(attn=ATTENTION, ffn={**MLP, "chunk": 7}),
    "ends": {
        "blocks": {name: {"sublayers": parts} for name, parts in (("a", {"attn": ATTENTION}), ("f", {"ffn": MLP}))},
        "pattern": ["a", "a", "f", "f"],
    },
}


def make(stack: dict[str, Any], causal: bool = True, layers: int = 4, heads: Any = None) -> Graph:
    """A small model with every parameter random, in training mode, with dropout."""
    config = {
        "vocab": VOCAB,
        "dim": 32,
        "context": 32,
        "dropout": 0.1,
        "memory": 24,
        "embed": {"kind": "tokens", "positions": "learned"},
        "stack": {"kind": "reversible", "layers": layers, **stack},
        "heads": heads or {"lm": {"tied": stack.get("join") != "concat"}},
    }
    cls = find("graph", "decoder" if causal else "encoder")
    model = construct(cls.Config.model_validate(config)).to_empty(device="cpu")
    model.initialise(0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model.train()


def given(model: Graph) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(0, VOCAB, (2, LENGTH), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, 15:] = 0
    memory = torch.randn(2, 7, 24, generator=generator).requires_grad_()
    return {"input_ids": ids, "attention_mask": mask, "encoder_hidden_states": memory}


def run(model: Graph, twin: bool, dtype: torch.dtype | None = None) -> tuple[Tensor, dict[str, Tensor], int, Tensor]:
    """The loss, all gradients, the bytes that autograd keeps of the stack, and the random number after it all."""
    inputs = given(model)
    kept: dict[int, int] = {}
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    model.zero_grad()
    torch.manual_seed(5)
    casts = torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None)
    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with casts, keeping(model) if twin else torch.enable_grad():
        with hooks:
            hidden = model.hidden(**inputs)
        loss = model.terms(hidden, {"lm": inputs["input_ids"]})["lm"].mean()
    loss.backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    memory = inputs["encoder_hidden_states"].grad
    if memory is not None:
        grads["memory"] = memory
    return loss.detach(), grads, sum(kept.values()), torch.rand(1)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("name", STACKS)
def test_equals_the_twin_that_keeps_activations(name: str, causal: bool) -> None:
    model = make(STACKS[name], causal)
    loss, grads, kept, after = run(model, twin=False)
    expected, wanted, full, then = run(model, twin=True)
    assert torch.equal(loss, expected) and torch.equal(after, then)
    assert grads.keys() == wanted.keys() and kept < full / 2
    for key, grad in grads.items():
        torch.testing.assert_close(grad, wanted[key], atol=2e-5 * max(1.0, wanted[key].abs().max().item()), rtol=1e-4)


def test_equals_the_twin_under_autocast() -> None:
    model = make(STACKS["bias"])
    loss, grads, _, _ = run(model, False, torch.bfloat16)
    expected, wanted, _, _ = run(model, True, torch.bfloat16)
    assert torch.equal(loss, expected)
    for key, grad in grads.items():
        torch.testing.assert_close(grad, wanted[key], atol=0.02 * max(0.1, wanted[key].abs().max().item()), rtol=0.02)


@pytest.mark.parametrize("name", ["attention", "bias", "macaron", "chunked"])
def test_what_is_kept_does_not_grow_with_the_depth(name: str) -> None:
    few, many = (run(make(STACKS[name], layers=layers), twin=False)[2] for layers in (2, 8))
    assert few == many
    assert run(make(STACKS[name], layers=8), twin=True)[2] > 4 * few


def test_hashed_attention_keeps_its_buckets_alone() -> None:
    few, many = (run(make(STACKS["lsh"], layers=layers), twin=False)[2] for layers in (2, 8))
    buckets = 2 * 4 * 2 * LENGTH * 4  # rows, heads, rounds, places, bytes
    assert many - few == 6 * buckets


def test_gradients_without_backward() -> None:
    model = make(STACKS["attention"])
    inputs = given(model)
    weight = model.get_parameter("stack.blocks.1.ffn.up.weight")
    found = []
    for twin in (False, True):
        torch.manual_seed(5)
        with keeping(model) if twin else torch.enable_grad():
            loss = model.losses(inputs, {"lm": inputs["input_ids"]})["lm"].mean()
        found.append(torch.autograd.grad(loss, weight)[0])
    torch.testing.assert_close(*found, atol=1e-6, rtol=1e-4)
    assert weight.grad is None


def test_frozen_parameters_get_no_gradient() -> None:
    model = make(STACKS["bias"])
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("blocks.2.ffn" in name)
    _, grads, _, _ = run(model, twin=False)
    _, wanted, _, _ = run(model, twin=True)
    assert grads.keys() == wanted.keys() and len(grads) == 4
    for key, grad in grads.items():
        torch.testing.assert_close(grad, wanted[key], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["attention", "bias", "cross", "chunked"])
def test_decoding_in_steps_equals_one_pass(name: str) -> None:
    model = make(STACKS[name]).eval()
    inputs = given(model)
    del inputs["attention_mask"]
    ids = inputs.pop("input_ids")
    whole = model(input_ids=ids, **inputs).logits
    state = model.new_state(2, LENGTH)
    steps = [model(input_ids=ids[:, at : at + n], state=state, **inputs).logits for at, n in ((0, 9), (9, 1), (10, 10))]
    torch.testing.assert_close(torch.cat(steps, 1), whole, atol=1e-5 * whole.abs().max().item(), rtol=1e-5)


def test_the_streams_of_every_layer() -> None:
    model = make(STACKS["concat"]).eval()
    inputs = given(model)
    states = model(**inputs, output_hidden_states=True).hidden_states
    assert len(states) == 5 and all(one.shape == (2, LENGTH, 64) for one in states)
    assert torch.equal(states[0][..., :32], states[0][..., 32:])
    assert torch.equal(states[-1], model(**inputs).last_hidden_state)
    assert not torch.equal(states[1][..., :32], states[1][..., 32:])


def test_transforms() -> None:
    plain = make(STACKS["lsh"])
    expected, wanted, _, _ = run(plain, twin=False)
    again = copy.deepcopy(plain)
    assert checkpoint_blocks(again) == 0
    torch._dynamo.reset()
    compiled = copy.deepcopy(plain)
    compile_blocks(compiled, backend="eager", fullgraph=True)
    for model in (again, compiled):
        loss, grads, _, _ = run(model, twin=False)
        torch.testing.assert_close(loss, expected)
        for key, grad in grads.items():
            torch.testing.assert_close(grad, wanted[key], atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize(
    ("stack", "cause"),
    [
        ({"block": {"wiring": "post", "sublayers": {"attn": ATTENTION, "ffn": MLP}}}, "'post' cannot be undone"),
        ({"block": {"wiring": "gated", "sublayers": {"attn": ATTENTION, "ffn": MLP}}}, "'gated' cannot be undone"),
        (block(attn={**ATTENTION, "score": "residual"}, ffn=MLP), "no scores can be carried"),
        (block(attn=ATTENTION), "the second stream never changes"),
        (block(ffn=MLP), "the first stream never changes"),
    ],
)
def test_what_cannot_be_undone_is_refused(stack: dict[str, Any], cause: str) -> None:
    with pytest.raises(Refused) as refused:
        make(stack)
    assert any(cause in problem.cause for problem in refused.value.problems), refused.value.problems
