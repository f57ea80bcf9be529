"""A step of decoding on the CPU against the model's own parts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import DECODERS, lively

from xtcli.fast.oncpu import Lean
from xtcli.fast.plan import Unplanned, plan
from xtcli.generate import ahead
from xtcli.generate.decode import Row, Rules, Timing, decode
from xtcli.generate.engine import undisturbed
from xtcli.generate.feed import Feed
from xtcli.generate.pen import Pen
from xtcli.generate.sampling import Sampling
from xtcli.generate.stops import Text
from xtcli.model import Model, build
from xtcli.parts.int8 import quantise

PLANNED = ["gpt2-small", "tinyllama-1.1b", "falcon-7b", "falcon-40b", "gpt3-175b", "x-glu", "x-decoder"]
PROMPT = [5, 9, 2, 30, 31]
WINDOW = "model.stack.block.sublayers.attn.mask={kind: all, of: [{kind: causal}, {kind: window, left: 3}]}"
CHANGED = [
    ("gpt2-small", WINDOW),
    ("tinyllama-1.1b", WINDOW),
    ("tinyllama-1.1b", "model.stack.block.sublayers.attn.qk_norm={kind: rms, offset: 1.0}"),
    ("tinyllama-1.1b", "model.stack.position={kind: rotary, layout: interleaved, fraction: 0.5}"),
    ("gpt2-small", "model.stack.block.wiring={kind: pre, scale: 0.5}"),
    ("gpt2-small", "model.heads.lm={softcap: 2.0, bias: true}"),
    ("gpt2-small", "model.embed={kind: tokens, positions: learned, segments: tokens, scale: sqrt-dim}"),
    ("gpt2-small", "model.stack.block.wiring=parallel"),
]


class Mute:
    def push(self, token: int) -> str:
        return ""

    def finish(self) -> str:
        return ""


def made(name: str, *overrides: str) -> Model:
    model = build(name, *overrides, tiny=True, seed=3)
    return stirred(model)


def stirred(model: Model) -> Model:
    """With gains and biases that matter."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


def written(model: Model, sampling: Sampling, budget: int = 24, prompts: Any = (PROMPT,)) -> list[list[int]]:
    rules = Rules(sampling, frozenset(), 200, seed=4)
    feed = Feed(model, [list(prompt) for prompt in prompts], budget)
    rows = [Row(number, Text(Mute()), budget, False) for number in range(len(prompts))]
    with undisturbed(model):
        list(decode(feed, rows, 1, rules, Timing()))
    assert feed.slow is None
    return [row.tokens for row in rows]


@pytest.mark.parametrize(("name", "override"), [*((name, None) for name in PLANNED), *CHANGED], ids=str)
def test_logits_are_those_of_the_parts(name: str, override: str | None) -> None:
    model = made(name, *([] if override is None else [override]))
    ids = torch.tensor([PROMPT])
    with undisturbed(model):
        state = model.new_state(1, 16)
        hidden = model.hidden(input_ids=ids, state=state)
        step = Lean(plan(model, 16), 1, 16)
        step.begin(state, torch.tensor([7]), len(PROMPT), None)
        for token in (7, 11, 2):
            hidden = model.hidden(input_ids=torch.tensor([[token]]), state=state)
            expected = model.heads["lm"].outputs(hidden)["logits"][:, -1]
            step.tokens.fill_(token)
            torch.testing.assert_close(step.logits(), expected, atol=2e-5, rtol=1e-4)
            step.slots.add_(1)


def test_padding_in_front_of_a_row_is_not_there() -> None:
    for name in ("gpt2-small", "tinyllama-1.1b"):
        model = made(name)
        found = []
        for pad in (0, 3):
            with undisturbed(model):
                state = model.new_state(1, 16)
                ids = torch.tensor([[0] * pad + PROMPT])
                slots = torch.arange(ids.shape[1])
                places, mask = (slots - pad).clamp(min=0)[None], (slots >= pad)[None]
                model.hidden(input_ids=ids, state=state, attention_mask=mask, position_ids=places)
                step = Lean(plan(model, 16), 1, 16)
                step.begin(state, torch.tensor([7]), ids.shape[1], torch.tensor([[pad]]))
                found.append(step.logits())
        torch.testing.assert_close(*found, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("sampling", [Sampling(temperature=0), Sampling(), Sampling(repetition_penalty=1.3)], ids=str)
@pytest.mark.parametrize("name", PLANNED)
def test_texts_are_those_of_the_parts(name: str, sampling: Sampling, monkeypatch: pytest.MonkeyPatch) -> None:
    model = made(name)
    assert isinstance(pen(model, monkeypatch), ahead.Ahead)
    fast = written(model, sampling)
    monkeypatch.setattr(ahead, "kernels_on", lambda device: None)
    assert fast == written(model, sampling)
    assert len(set(fast[0])) > 1 or sampling.greedy


def pen(model: Model, monkeypatch: pytest.MonkeyPatch, prompts: Any = (PROMPT,)) -> Pen:
    """The pen that a text is written with."""
    found: list[Pen] = []
    usual = ahead.pen_for
    with monkeypatch.context() as inner:

        def noted(*given: Any) -> Pen:
            found.append(usual(*given))
            return found[0]

        inner.setattr("xtcli.generate.decode.pen_for", noted)
        written(model, Sampling(temperature=0), prompts=prompts)
    return found[0]


@pytest.mark.parametrize("name", DECODERS)
def test_other_structures_are_written_by_their_parts(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = stirred(lively(name, 200))
    try:
        plan(model, 64)
        known = True
    except Unplanned:
        known = False
    if Feed(model, [PROMPT], 24).steady is None:
        assert isinstance(pen(model, monkeypatch), ahead.Ahead) == known


def test_no_step_is_asked_for_ahead_where_the_host_would_take_it_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    model = made("gpt2-small")
    taken: list[int] = []
    usual = Lean.logits
    monkeypatch.setattr(Lean, "logits", lambda self: taken.append(1) or usual(self))
    written(model, Sampling(temperature=0), 24)
    # The first token is read off the prompt.
    assert len(taken) == 23
    taken.clear()
    rules = Rules(Sampling(temperature=0), frozenset(written(model, Sampling(temperature=0), 24)[0][4:5]), 200)
    taken.clear()
    feed = Feed(model, [PROMPT], 24)
    rows = [Row(0, Text(Mute()), 24, False)]
    with undisturbed(model):
        list(decode(feed, rows, 1, rules, Timing()))
    assert len(taken) == len(rows[0].tokens) - 1 < 23


def test_several_rows_are_written_by_the_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    assert type(pen(made("gpt2-small"), monkeypatch, (PROMPT, [3]))) is Pen


def test_weights_of_fewer_bits_are_left_to_the_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    small = made("tinyllama-1.1b")
    quantise(small)
    assert type(pen(small, monkeypatch)) is Pen
    assert type(pen(made("gpt2-small").to(torch.bfloat16), monkeypatch)) is Pen
