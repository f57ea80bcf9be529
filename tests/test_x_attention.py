"""The options inside attention: each and in combination as the papers write them, values and gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from attentions import DIM, EVERYTHING, HEADS, LAYERS, LENGTH, OPTIONS, POSITIONS, ROWS, WIDE, config, drawn, make
from slow_attention import Case, attention, bucket
from torch import Tensor

from xtcli.parts.graphs import Graph

TIGHT = {"atol": 2e-6, "rtol": 2e-6}
"""Softmax and entmax are float32 at least; angles are float32 whatever the model, and then the bound is looser."""
CASES = [
    *((name, option, "none") for name, option in OPTIONS.items()),
    *((name, {}, position) for name, position in POSITIONS.items()),
    *((f"everything-{name}", EVERYTHING, position) for name, position in POSITIONS.items()),
]


def bias_of(position: Any, weights: dict[str, Tensor], at: str, causal: bool) -> Any:
    """The bias of a position kind as a function of (head, query, key)."""
    position = {"kind": position} if isinstance(position, str) else position
    kind = position["kind"]
    if kind in ("none", "rotary", "infused"):
        return None
    if kind == "all":
        members = [m for m in position["of"] if bias_of(m, weights, at, causal)]
        names = [at] if len(members) == 1 else [f"{at}of.{n}." for n in range(len(members))]
        found = [bias_of(m, weights, name, causal) for m, name in zip(members, names, strict=True)]
        return (lambda h, i, j: sum(one(h, i, j) for one in found)) if found else None
    if kind == "t5":
        return lambda h, i, j: weights[f"{at}table.weight"][bucket(j - i, 8, 5, causal), h]
    if kind == "alibi":
        slopes = [2**-4, 2**-8, 2**-2]
        return lambda h, i, j: torch.tensor(slopes[h] * (-abs(j - i)))
    if kind == "distance-mlp":

        def network(h: int, i: int, j: int) -> Tensor:
            x = torch.tensor([float(j - i)], dtype=torch.float64)
            x = x.sign() * (1 + x.abs()).log() if position.get("log") else x
            last = position["depth"]
            for n in range(last + 1):
                x = weights[f"{at}layers.{n}.weight"] @ x + weights[f"{at}layers.{n}.bias"]
                x = x if n == last else x / (1 + (-x).exp())
            return x[h]

        return network
    inner = bias_of(position.get("relative", "none"), weights, at + "relative.", causal)
    width = DIM // HEADS
    reset = position.get("reset", not causal)

    def untied(h: int, i: int, j: int) -> Tensor:
        if reset and i == 0:
            return weights[at + "theta_from"][h]
        if reset and j == 0:
            return weights[at + "theta_to"][h]
        own = slice(h * width, (h + 1) * width)
        q, k = (
            (weights[f"{at}{name}.weight"] @ weights[f"{at}table.weight"][place] + weights[f"{at}{name}.bias"])[own]
            for name, place in (("q", i), ("k", j))
        )
        score = q @ k / (2 * width) ** 0.5
        return score if inner is None else score + inner(h, i, j)

    return untied


def reference(model: Graph, option: dict[str, Any], position: Any, causal: bool, given: dict[str, Tensor]) -> Any:
    """The last hidden states and the weights, float64, with a graph."""
    weights = {name: p.detach().double().requires_grad_() for name, p in model.named_parameters()}
    text = str(position)
    flags = {"infused": "infused" in text, "rotary": "rotary" in text}
    scale = 2**-0.5 if "tupe" in text else 1.0
    x = given["inputs_embeds"].double().requires_grad_()
    leaf, keep, carried = x, given.get("attention_mask"), {}
    memory, memory_keep = given.get("encoder_hidden_states"), given.get("encoder_attention_mask")
    bias = bias_of(position, weights, "stack.shared.biases.0.", causal)

    def seen(row: int, i: int, j: int) -> bool:
        padded = keep is not None and not keep[row, j]
        return (j <= i if causal else True) and (not padded or (i == j and not bool(keep[row, i])))

    for layer in range(LAYERS):
        own = Case(option | flags, weights, f"stack.blocks.{layer}.attn.", HEADS, bias, scale, carried)
        x = x + attention(own, x, x, seen, "self")
        if memory is not None:
            other = Case(option, weights, f"stack.blocks.{layer}.cross.", HEADS, carried=carried)
            x = x + attention(
                other, x, memory.double(), lambda row, i, j: memory_keep is None or bool(memory_keep[row, j]), "cross"
            )
    return x, weights, leaf


def compare(model: Graph, option: dict[str, Any], position: Any, causal: bool, given: dict[str, Tensor]) -> None:
    wanted, weights, leaf = reference(model, option, position, causal, given)
    model.double()
    inputs = {name: value.double() if value.is_floating_point() else value for name, value in given.items()}
    inputs["inputs_embeds"].requires_grad_()
    found = model(**inputs).last_hidden_state
    real = given.get("attention_mask", torch.ones(ROWS, LENGTH)).bool()
    # Padding rows are never used; a query there may see itself or more.
    loose = {"atol": 2e-4, "rtol": 2e-4} if any(word in str(position) for word in ("rotary", "infused")) else TIGHT
    torch.testing.assert_close(found[real], wanted[real], **loose)
    pull = torch.randn(found[real].shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    (found[real] * pull).sum().backward()
    (wanted[real] * pull).sum().backward()
    torch.testing.assert_close(inputs["inputs_embeds"].grad, leaf.grad, **loose)
    for name, parameter in model.named_parameters():
        if name == "embed.tokens.weight":
            continue
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in (parameter, weights[name])]
        torch.testing.assert_close(*grads, **loose, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize(("option", "position"), [pytest.param(o, p, id=n) for n, o, p in CASES])
@pytest.mark.parametrize("causal", [True, False], ids=["decoder", "padded-encoder"])
def test_is_what_the_papers_write(option: dict[str, Any], position: Any, causal: bool) -> None:
    model = make(config(option, position), causal)
    given = {"inputs_embeds": drawn(ROWS, LENGTH, DIM)}
    if not causal:
        given["attention_mask"] = torch.tensor([[1] * LENGTH, [1] * 4 + [0] * 2])
    compare(model, option, position, causal, given)


@pytest.mark.parametrize("option", [pytest.param(o, id=n) for n, o in OPTIONS.items()])
def test_cross_attention_is_what_the_papers_write(option: dict[str, Any]) -> None:
    model = make(config(option, cross=True), True)
    given = {
        "inputs_embeds": drawn(ROWS, LENGTH, DIM),
        "encoder_hidden_states": drawn(ROWS, 4, WIDE, seed=4),
        "encoder_attention_mask": torch.tensor([[1] * 4, [0, 1, 1, 0]]),
    }
    compare(model, option, "none", True, given)


STEPS = [
    *((name, option, "none") for name, option in OPTIONS.items()),
    *((f"everything-{name}", EVERYTHING, position) for name, position in POSITIONS.items()),
]


@pytest.mark.parametrize(("option", "position"), [pytest.param(o, p, id=n) for n, o, p in STEPS])
def test_decoding_in_steps_equals_one_pass(option: dict[str, Any], position: Any) -> None:
    """Self- and cross-attention, with padding on the left, from a prompt shorter than k."""
    model = make(config(option, position, cross=True), True, 0.3)
    x, memory = drawn(ROWS, LENGTH, DIM), drawn(ROWS, 4, WIDE, seed=4)
    mask = torch.tensor([[1] * LENGTH, [0] + [1] * (LENGTH - 1)])
    places = (mask.cumsum(1) - 1).clamp(min=0)
    more = {"encoder_hidden_states": memory}
    with torch.no_grad():
        whole = model(inputs_embeds=x, attention_mask=mask, position_ids=places, **more).last_hidden_state
        state, parts, at = model.new_state(ROWS, LENGTH), [], 0
        for size in (2, 1, 2, 1):
            fed = {"inputs_embeds": x[:, at : at + size], "position_ids": places[:, at : at + size]}
            at += size
            parts.append(model(**fed, attention_mask=mask[:, :at], state=state, **more).last_hidden_state)
    torch.testing.assert_close(torch.cat(parts, 1)[mask.bool()], whole[mask.bool()], atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("option", [pytest.param(o, id=n) for n, o in OPTIONS.items()])
def test_the_future_is_unseen(option: dict[str, Any]) -> None:
    """Also by the threshold of top-k, by tau of entmax and by heads that mix."""
    model = make(config(option, "t5"), True)
    x = drawn(ROWS, LENGTH, DIM)
    later = x.clone()
    later[:, 3:] += 5 * drawn(ROWS, LENGTH - 3, DIM, seed=9)
    with torch.no_grad():
        one, two = (model(inputs_embeds=given).last_hidden_state for given in (x, later))
    assert torch.equal(one[:, :3], two[:, :3])
    assert not torch.allclose(one[:, 3:], two[:, 3:])
