"""Pairs and triples of all options: what builds trains whole, stays causal and decodes as it reads; what cannot says why."""

from __future__ import annotations

import random
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor
from x_options import KINDS, OPTIONS, VOCAB, Option, combined

from xtcli.model import construct
from xtcli.parts.graphs import Graph
from xtcli.parts.scope import Refused
from xtcli.registry import find

COUNT, LENGTH, ROWS = 200, 8, 6
Chosen = tuple[str, tuple[Option, ...]]

REFUSED = {
    ("reversible", "post-norm"): "norms over the sum",
    ("reversible", "gated residual"): "a gate mixes the stream",
    ("reversible", "gated residual, cell"): "a gate mixes the stream",
    ("reversible", "parallel"): "parallel sublayers read one stream",
    ("reversible", "parallel, one norm"): "parallel sublayers read one stream",
    ("reversible", "residual attention"): "no scores can be carried",
    ("reversible", "residual cross attention"): "no scores can be carried",
    ("recurrence", "memory tokens"): "between a text and what is remembered",
    ("cross attender", "memory tokens"): "no word would see memory tokens",
    ("recurrence", "learned places"): "absolute positions begin anew",
    ("recurrence", "sinusoidal places"): "absolute positions begin anew",
    ("recurrence", "tupe"): "absolute places begin anew",
    ("rotary", "distance vectors"): "queries that are turned already",
    ("continuous", "tied logits"): "there is no token table",
    ("reversible, end to end", "tied logits"): "the states are 32 wide, the token table's rows 16",
}
"""What cannot be together, and words of the reason."""


def may_meet(chosen: tuple[Option, ...]) -> bool:
    """Whether no two options fill one slot: those no config can state at once."""
    slots = [option.slot for option in chosen if option.slot is not None]
    return len(slots) == len(set(slots))


@cache
def draws() -> tuple[Chosen, ...]:
    """Distinct pairs and triples, the kinds of model in turn."""
    rng = random.Random(20210417)
    found: dict[tuple[str, frozenset[str]], Chosen] = {}
    while len(found) < COUNT:
        kind = KINDS[len(found) % len(KINDS)]
        chosen = tuple(rng.sample([o for o in OPTIONS if kind in o.kinds], rng.choice((2, 3))))
        if may_meet(chosen):
            found[kind, frozenset(option.name for option in chosen)] = (kind, chosen)
    return tuple(found.values())


def name_of(drawn: Chosen) -> str:
    return f"{drawn[0]}: {' + '.join(option.name for option in drawn[1])}"


def build(drawn: Chosen) -> Graph:
    """The model, every parameter random; raises Refused."""
    kind, chosen = drawn
    model = construct(find("graph", kind).Config.model_validate(combined(kind, chosen)))
    model.to_empty(device="cpu").initialise(0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model.double()


def reasons(drawn: Chosen) -> list[str]:
    """Words of why these options cannot be together, by the table."""
    names = {option.name for option in drawn[1]}
    if any(name.startswith("reversible") for name in names):
        names |= {"reversible"}
    if drawn[0] == "encoder":  # whose head has a transform as wide as the table
        names -= {"reversible, end to end"}
    if drawn[0] == "encoder-decoder" and "recurrence" in names:
        return ["carries nothing on to the next"]
    return [words for pair, words in REFUSED.items() if names.issuperset(pair)]


def inputs(model: Graph, seed: int = 3) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    # No token twice in a row: without positions their keys tie, and rounding would say which are the k largest.
    ids = torch.rand(ROWS, VOCAB - 1, generator=generator).argsort(-1)[:, :LENGTH] + 1
    if "input_values" in model.accepts:
        return {"input_values": torch.randn(ROWS, LENGTH, 5, generator=generator, dtype=torch.float64)}
    if hasattr(model, "decode"):
        return {"input_ids": ids.roll(1, 0)[:, :5], "decoder_input_ids": ids}
    return {"input_ids": ids}


def written(given: dict[str, Tensor]) -> str:
    """The input that grows while decoding."""
    return "decoder_input_ids" if "decoder_input_ids" in given else next(iter(given))


def answers(model: Graph, given: dict[str, Tensor], **more: Any) -> Tensor:
    """What the head says, (B, T, ...)."""
    out = model(**given, **more)
    return out.predictions if "continuous" in model.heads else out.logits  # type: ignore[no-any-return]


def check_training(model: Graph) -> None:
    """A step with a gradient in every parameter lowers the loss on its own batch."""
    torch.manual_seed(0)
    model.train()
    given = inputs(model)
    head = next(iter(model.heads))
    wanted = given[written(given)].roll(-1, 1)
    term = model.losses(given, {head: wanted})[head]
    term.mean().backward()
    bare = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    # What adds the same to every score of a query, a softmax cannot see: the distance network's last bias, and what
    # tupe's first row has in the place of its positions.
    assert not [name for name in bare if not name.endswith(("layers.2.bias", "theta_from"))]
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
    model.eval()
    before = model.losses(given, {head: wanted})[head].mean()
    norm = torch.stack([p.grad.square().sum() for p in model.parameters() if p.grad is not None]).sum().sqrt()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.sub_(parameter.grad * (1e-6 / norm))  # type: ignore[operator]
    assert model.losses(given, {head: wanted})[head].mean() < before


def disturbed(given: dict[str, Tensor], name: str, half: int) -> dict[str, Tensor]:
    """The same with another second half."""
    changed = given[name].clone()
    changed[:, half:] = changed[:, half:].flip(0)
    return given | {name: changed}


def check_causal(model: Graph) -> None:
    """What comes later changes nothing before it, and something at its place."""
    given = inputs(model)
    half = LENGTH // 2
    before, after = answers(model, given), answers(model, disturbed(given, written(given), half))
    torch.testing.assert_close(before[:, :half], after[:, :half], atol=1e-12, rtol=1e-12)
    assert not torch.allclose(before[:, half:], after[:, half:])


def check_two_sided(model: Graph) -> None:
    """An encoder sees what comes later, and not the padding behind it."""
    given = inputs(model)
    half = LENGTH // 2
    name = written(given)
    before, after = answers(model, given), answers(model, disturbed(given, name, half))
    assert not torch.allclose(before[:, :half], after[:, :half])
    mask = (torch.arange(LENGTH) < half).expand(ROWS, -1)
    alone = answers(model, given | {name: given[name][:, :half]})
    torch.testing.assert_close(answers(model, given, attention_mask=mask)[:, :half], alone, atol=1e-10, rtol=1e-8)


@torch.no_grad()
def check_decoding(model: Graph) -> None:
    """Three tokens, then one by one, equal one pass."""
    given = inputs(model)
    name = written(given)
    whole = answers(model, given)
    state = model.new_state(ROWS, LENGTH)  # type: ignore[operator]
    if name == "decoder_input_ids":
        given["encoder_outputs"] = model.encode(given.pop("input_ids"))  # type: ignore[operator]
    steps = [given[name][:, :3], *given[name][:, 3:].split(1, 1)]
    found = torch.cat([answers(model, given | {name: step}, state=state) for step in steps], dim=1)
    torch.testing.assert_close(found, whole, atol=1e-10, rtol=1e-8)


@torch.no_grad()
def check_padding(model: Graph) -> None:
    """A decoder's row behind padding, read in steps, is what it is alone."""
    given = inputs(model)
    name, pad = written(given), 3
    alone = answers(model, {name: given[name][:, :-pad]})
    row = torch.cat((torch.zeros_like(given[name][:, :pad]), given[name][:, :-pad]), dim=1)
    mask = (torch.arange(LENGTH) >= pad).long().expand(ROWS, -1)
    places = (mask.cumsum(-1) - 1).clamp(min=0)
    state, parts, at = model.new_state(ROWS, LENGTH), [], 0  # type: ignore[operator]
    for width in (pad + 2, *(1,) * (LENGTH - pad - 2)):
        end = at + width
        more = {"attention_mask": mask[:, :end], "position_ids": places[:, at:end], "state": state}
        parts.append(answers(model, {name: row[:, at:end]}, **more))
        at = end
    torch.testing.assert_close(torch.cat(parts, dim=1)[:, pad:], alone, atol=1e-10, rtol=1e-8)


@torch.no_grad()
def check_segments(model: Graph) -> None:
    """Two segments, the second with the memories of the first, are one text."""
    given = inputs(model)
    name, half = written(given), LENGTH // 2
    first = model(**{name: given[name][:, :half]})
    second = answers(model, {name: given[name][:, half:]}, mems=first.mems)
    torch.testing.assert_close(second, answers(model, given)[:, half:], atol=1e-10, rtol=1e-8)


@pytest.mark.parametrize("drawn", draws(), ids=name_of)
def test_options_compose_or_say_why_not(drawn: Chosen) -> None:
    expected = reasons(drawn)
    try:
        model = build(drawn)
    except Refused as refused:
        assert expected, f"refused, and no table says why: {refused}"
        assert all(any(words in problem.cause for problem in refused.problems) for words in expected)
        assert all(problem.path.startswith("model.") and problem.remedy for problem in refused.problems)
        return
    assert not expected, "builds, and the table says that it cannot"
    check_training(model)
    if drawn[0] == "encoder":
        check_two_sided(model)
    else:
        check_causal(model)
        check_decoding(model)
    if drawn[0] == "decoder":
        check_padding(model)
    if drawn[0] == "decoder" and any(option.name == "recurrence" for option in drawn[1]):
        check_segments(model)


def test_few_combinations_are_refused_and_every_option_is_drawn() -> None:
    refused = [drawn for drawn in draws() if reasons(drawn)]
    assert len(refused) < 0.08 * COUNT, [name_of(drawn) for drawn in refused]
    assert {option.name for _, chosen in draws() for option in chosen} == {option.name for option in OPTIONS}


@pytest.mark.parametrize(
    ("pair", "words"), REFUSED.items(), ids=lambda value: "+".join(value) if len(value) == 2 else ""
)
def test_what_cannot_be_together_is_refused_with_the_reason(pair: tuple[str, str], words: str) -> None:
    chosen = tuple(option for option in OPTIONS if option.name in pair)
    kind = next(kind for kind in KINDS if all(kind in option.kinds for option in chosen))
    with pytest.raises(Refused) as caught:
        build((kind, chosen))
    assert any(words in problem.cause and problem.remedy for problem in caught.value.problems)
