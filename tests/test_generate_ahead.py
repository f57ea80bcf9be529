"""Steps that run ahead of the host write the same texts as the model's own parts, token by token."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tiny_models import DECODERS, lively

from xtcli.data.tokenizers import Bytes
from xtcli.data.train_tokenizer import train
from xtcli.errors import UserError
from xtcli.fast import twins
from xtcli.fast.plan import Unplanned, plan
from xtcli.generate import ahead
from xtcli.generate.decode import Row, Rules, Timing, decode
from xtcli.generate.engine import generate, undisturbed
from xtcli.generate.feed import Feed
from xtcli.generate.options import Options
from xtcli.generate.pen import Pen
from xtcli.generate.sampling import Sampling
from xtcli.generate.static import MEMORY, Static
from xtcli.generate.stops import Text
from xtcli.model import Model, build
from xtcli.parts.int8 import Int8Linear, quantise
from xtcli.parts.seq2seq import EncoderDecoder

PLANNED = ["gpt2-small", "tinyllama-1.1b", "falcon-7b", "falcon-40b", "gpt3-175b", "x-glu", "x-decoder"]
PROMPTS = [[5, 9, 2], [7], list(range(20, 40))]
GREEDY = Sampling(temperature=0)


class Mute:
    def push(self, token: int) -> str:
        return ""

    def finish(self) -> str:
        return ""


@pytest.fixture
def fast(monkeypatch: pytest.MonkeyPatch) -> list[type]:
    """Run the twins' steps on the CPU; the kinds of pens that were made."""
    made: list[type] = []
    monkeypatch.setattr(ahead, "kernels_on", lambda device: twins)
    usual = ahead.pen_for

    def noted(*given: object) -> object:
        pen = usual(*given)  # type: ignore[arg-type]
        made.append(type(pen))
        return pen

    monkeypatch.setattr("xtcli.generate.decode.pen_for", noted)
    return made


def written(
    model: Model,
    rules: Rules,
    budgets: list[int],
    prompts: list[list[int]] = PROMPTS,
    repeats: int = 1,
    sources: list[list[int]] | None = None,
) -> list[tuple[list[int], str | None]]:
    feed = Feed(model, prompts, max(budgets), sources)
    rows = [Row(n, Text(Mute(), ()), budget, False) for n, budget in enumerate(budgets)]  # type: ignore[arg-type]
    with undisturbed(model):
        list(decode(feed, rows, repeats, rules, Timing()))
    return [(row.tokens, row.finish) for row in rows]


def plainly(monkeypatch: pytest.MonkeyPatch, *given: object, **more: object) -> list[tuple[list[int], str | None]]:
    with monkeypatch.context() as inner:
        inner.setattr(ahead, "kernels_on", lambda device: None)
        return written(*given, **more)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", PLANNED)
def test_greedy_texts_are_the_same(name: str, fast: list[type], monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(name, tiny=True, seed=3)
    rules = Rules(GREEDY, frozenset(), 200)
    for prompts in (PROMPTS, PROMPTS[2:]):
        budgets = [24, 9, 17][: len(prompts)]
        assert written(model, rules, budgets, prompts) == plainly(monkeypatch, model, rules, budgets, prompts)
    assert fast[0] is fast[2] is ahead.Ahead and fast[1] is not ahead.Ahead


REFUSED = {
    "alibi-of-keys": "rows have padding",
    "experts-with-room": "a sublayer is a MixtureOfExperts",
    "rotary-longrope": "earlier tokens change",
    "shaw": "knows slots in a way of its own",
}
"""Small models whose padded rows of up to 40 tokens are written step by step, and why."""


@pytest.mark.parametrize("name", DECODERS)
def test_small_models_are_alike_or_refused(name: str, fast: list[type], monkeypatch: pytest.MonkeyPatch) -> None:
    model, rules = lively(name, 61), Rules(GREEDY, frozenset([3]), 61)
    if name in REFUSED:
        feed = Feed(model, PROMPTS, 30)
        feed.start()
        with pytest.raises(Unplanned, match=REFUSED[name]):
            ahead._made(feed, 30, rules)
        return
    assert written(model, rules, [30, 5, 12]) == plainly(monkeypatch, model, rules, [30, 5, 12])
    assert fast[0] is ahead.Ahead


def test_texts_that_change_behind_are_refused() -> None:
    feed = Feed(lively("rotary-dynamic", 61), PROMPTS, 60)
    feed.start()
    rules = Rules(GREEDY, frozenset(), 61)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ahead, "kernels_on", lambda device: twins)
        assert ahead._made(feed, 40, rules) is not None
        with pytest.raises(Unplanned, match="earlier tokens change"):
            ahead._made(feed, 60, rules)
        with pytest.raises(Unplanned, match="is asked for"):
            ahead._made(feed, 40, replace(rules, lens=3))


STATIC = [
    "bart-base",
    "bloom-560m",
    "falcon-rw-1b",
    "long-t5-local-base",
    "mixtral-8x7b",
    "t5-small",
    "t5-v1.1-base",
    "x-cross-attender",
    "x-entmax",
    "x-infused",
    "x-residual-cross-attention",
    "x-rezero",
    "x-t5-bias",
    "x-talking-heads",
]
"""Presets that are written by steps of their own parts."""


@pytest.mark.parametrize("name", STATIC)
def test_steps_of_the_model_s_own_parts(name: str) -> None:
    model = build(name, tiny=True, seed=1)
    with pytest.raises(Unplanned):
        plan(model, 64)
    both = isinstance(model, EncoderDecoder)
    with undisturbed(model):
        for prompts in (PROMPTS, PROMPTS[2:]):
            if len(prompts) > 1 and name in ("bloom-560m", "falcon-rw-1b"):
                continue
            feed = Feed(model, [[1]] * len(prompts) if both else prompts, 10, prompts if both else None)
            chosen = feed.start().argmax(-1)
            step = Static(model, len(prompts), 40, twins, MEMORY if both else None, feed.pads is not None)
            step.begin(feed.state, chosen, feed.width, feed.pads)
            if feed.memory is not None:
                step.remember(feed.memory, feed.memory_mask)
            for _ in range(6):
                logits, wanted = step.logits(), feed.step(chosen)
                torch.testing.assert_close(logits, wanted, atol=3e-5, rtol=0)
                step.likeliest(logits, model.vocab)
                chosen = wanted.argmax(-1)


@pytest.mark.parametrize("name", ["t5-small", "bart-base"])
def test_answers_of_several_sources(name: str, fast: list[type], monkeypatch: pytest.MonkeyPatch) -> None:
    model, rules = build(name, tiny=True, seed=1), Rules(GREEDY, frozenset(), 200)
    for sources in (PROMPTS, [PROMPTS[2], [8] * 70, [3]], [[9, 8, 7]] * 3):
        given = (model, rules, [14, 14, 9], [[1]] * 3, 1, sources)
        assert written(*given) == plainly(monkeypatch, *given)
    assert set(fast[::2]) == {ahead.Ahead}
    assert len(ahead._kept[model]) == 2, "a step serves memories of one size"


def test_wide_streams_and_64_bits_are_left_to_the_model_s_own_parts(
    fast: list[type], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, rules = lively("rotary", 61), Rules(GREEDY, frozenset(), 61)
    with monkeypatch.context() as inner:
        inner.setattr("xtcli.fast.plan.WIDEST", 16)
        with pytest.raises(Unplanned, match="kernels norm 16 at most"):
            plan(model, 64)
        assert written(model, rules, [9, 9, 9]) == plainly(monkeypatch, model, rules, [9, 9, 9])
    assert type(ahead._kept[model][-1].step) is Static
    wide = lively("rotary", 61).double()
    assert written(wide, rules, [9, 9, 9]) == plainly(monkeypatch, wide, rules, [9, 9, 9])
    assert type(ahead._kept[wide][-1].step) is Static
    model.stack.blocks[0].attn.q.weight.data = model.stack.blocks[0].attn.q.weight.data.t().contiguous().t()  # type: ignore[union-attr, index]
    with pytest.raises(Unplanned, match="one piece"):
        plan(model, 64)


def test_why_steps_are_not_recorded_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def slow(feed: Feed, rules: Rules, logits: torch.Tensor, *rest: object) -> Pen:
        assert feed.eager is False
        feed.slow = "the reason"
        return Pen(feed, rules, logits, None)

    monkeypatch.setattr("xtcli.generate.decode.pen_for", slow)
    model = build("gpt2-nano", tiny=True)
    answer = generate(model, train(Bytes.Config(), []), ["abc"], Options(max_tokens=3, sampling=GREEDY))
    assert answer.notes == ["steps wait for one another and are not recorded: the reason"]


SAMPLINGS = [
    Sampling(),
    Sampling(top_k=5, min_p=0.01),
    Sampling(repetition_penalty=1.3),
    replace(GREEDY, repetition_penalty=1.5),
]


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
def test_draws_are_the_same(sampling: Sampling, fast: list[type], monkeypatch: pytest.MonkeyPatch) -> None:
    model = lively("rotary", 61)
    for seed in (0, 1):
        rules = Rules(sampling, frozenset([3, 4]), 61, seed)
        given = (model, rules, [25, 11, 4, 25, 7, 7], PROMPTS, 2)
        assert written(*given) == plainly(monkeypatch, *given)
    assert set(fast[::2]) == {ahead.Ahead}
    assert len(ahead._kept[model]) == 1, "a step serves every text of its size"


def test_an_end_by_force_and_a_first_token(fast: list[type], monkeypatch: pytest.MonkeyPatch) -> None:
    model = lively("learned", 61)
    rules = Rules(GREEDY, frozenset([2]), 61, first=7, last=2)
    made = written(model, rules, [12, 6, 9])
    assert made == plainly(monkeypatch, model, rules, [12, 6, 9])
    assert all(tokens[0] == 7 and tokens[-1] == 2 for tokens, _ in made)


def test_rows_that_end_at_once_leave_before_the_step_begins(fast: list[type], monkeypatch: pytest.MonkeyPatch) -> None:
    model = lively("learned", 61)
    rules = Rules(GREEDY, frozenset(), 61)
    assert written(model, rules, [1, 1, 20]) == plainly(monkeypatch, model, rules, [1, 1, 20])


def test_logits_that_are_no_numbers_are_refused(fast: list[type]) -> None:
    model = lively("learned", 61)
    rules = Rules(GREEDY, frozenset(), 61)
    written(model, rules, [8, 8, 8])
    whole = written(model, rules, [8, 8, 8])[0][0]
    model.embed.tokens.weight.data[whole[4]] = float("nan")  # type: ignore[union-attr, index]
    with pytest.raises(UserError, match="not numbers"):
        written(model, rules, [8, 8, 8])


def test_weights_that_changed_are_seen(fast: list[type], monkeypatch: pytest.MonkeyPatch) -> None:
    model, rules = lively("learned", 61), Rules(GREEDY, frozenset(), 61)
    before = written(model, rules, [12, 12, 12])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    after = written(model, rules, [12, 12, 12])
    assert after == plainly(monkeypatch, model, rules, [12, 12, 12]) != before


def test_texts_longer_than_a_bucket(fast: list[type], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ahead, "bucket", lambda slots: slots)
    model, rules = lively("rotary", 61), Rules(GREEDY, frozenset(), 61)
    for budgets in ([5, 5, 5], [30, 30, 30], [12, 12, 12]):
        assert written(model, rules, budgets) == plainly(monkeypatch, model, rules, budgets)
    assert 1 <= len(ahead._kept[model]) <= ahead.KEPT


def test_eight_bits_are_one_function_for_all_paths(fast: list[type], monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("tinyllama-1.1b", tiny=True, seed=3)
    ids = torch.tensor([PROMPTS[2]])
    with undisturbed(model):
        exact = model(input_ids=ids).logits
        assert quantise(model) == 2 * 7 + 1
        near = model(input_ids=ids).logits
    assert 0 < (near - exact).abs().max() < 0.1 * exact.abs().max()
    layer = next(module for module in model.modules() if isinstance(module, Int8Linear))
    assert layer.whole.dtype == torch.int8 and layer.whole.abs().max() == 127
    rules = Rules(GREEDY, frozenset(), 200)
    assert written(model, rules, [20, 20, 20]) == plainly(monkeypatch, model, rules, [20, 20, 20])
    assert fast[0] is ahead.Ahead
