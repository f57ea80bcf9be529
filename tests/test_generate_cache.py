"""Cached equals uncached, in chunks or not; a row in a batch equals that row alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import CONTEXT, DECODERS, PAIR, lively, make
from torch import Tensor

from xtcli.generate.feed import Feed, steady
from xtcli.model import Model

VOCAB = 61
EXACT: dict[str, Any] = {"atol": 1e-5, "rtol": 0}


def tokens(length: int, rows: int = 1, seed: int = 0) -> Tensor:
    return torch.randint(0, VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))


def whole(model: Model, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids).logits  # type: ignore[no-any-return]


@pytest.mark.parametrize("chunks", [(1,) * 36, (36,), (9, 1, 1, 20, 5), (1, 35), (35, 1)], ids=str)
@pytest.mark.parametrize("name", DECODERS)
def test_cache_at_every_position(name: str, chunks: tuple[int, ...]) -> None:
    model = lively(name, VOCAB)
    ids = tokens(sum(chunks), 2)
    state, parts, at = model.new_state(2, ids.shape[1]), [], 0  # type: ignore[operator]
    with torch.no_grad():
        for size in chunks:
            parts.append(model(input_ids=ids[:, at : at + size], state=state).logits)
            at += size
    torch.testing.assert_close(torch.cat(parts, 1), whole(model, ids), **EXACT)


def follow(model: Model, prompts: list[list[int]], more: Tensor, sources: list[list[int]] | None = None) -> Tensor:
    """Logits (B, 1 + steps, V) of prompts that `more` (B, steps) follows."""
    feed = Feed(model, prompts, more.shape[1] + 1, sources)
    with torch.no_grad():
        return torch.stack([feed.start(), *(feed.step(column) for column in more.unbind(1))], 1)


PROMPTS = [[5, 9, 2], [7], list(range(20, 40)), [3] * 11]


@pytest.mark.parametrize("name", DECODERS)
def test_row_in_a_batch_equals_row_alone(name: str) -> None:
    model, more = lively(name, VOCAB), tokens(30, len(PROMPTS))
    together = follow(model, PROMPTS, more)
    for row, prompt in enumerate(PROMPTS):
        alone = follow(model, [prompt], more[row : row + 1])[0]
        torch.testing.assert_close(together[row], alone, **EXACT)
        text = torch.cat((torch.tensor([prompt]), more[row : row + 1]), 1)
        if steady(model) is None or text.shape[1] <= steady(model):
            torch.testing.assert_close(alone, whole(model, text)[0, len(prompt) - 1 :], **EXACT)


@pytest.mark.parametrize(
    "name", ["rotary", "rotary-dynamic", "rotary-longrope", "alibi", "alibi-of-keys", "window", "t5-bias", "experts"]
)
def test_beyond_the_context(name: str) -> None:
    """Every step equals a fresh reading of the text so far, also where that forbids a cache."""
    model, prompt = lively(name, VOCAB), tokens(30)[0].tolist()
    more = tokens(50, 1, seed=1)
    ours = follow(model, [prompt, prompt[:7]], more.expand(2, -1))
    for row, start in enumerate((prompt, prompt[:7])):
        for steps in (0, 5, 9, 10, 11, 33, 34, 35, 36, 50):
            text = torch.cat((torch.tensor([start]), more[:, :steps]), 1)
            torch.testing.assert_close(ours[row, steps], whole(model, text)[0, -1], **EXACT)


@pytest.mark.parametrize(("name", "length"), [("rotary-dynamic", CONTEXT), ("rotary-longrope", 40), ("rotary", None)])
def test_where_a_cache_ends(name: str, length: int | None) -> None:
    model = lively(name, VOCAB)
    assert steady(model) == length
    feed = Feed(model, [[1] * 38], 60)
    feed.start()
    for _ in range(58):
        feed.step(torch.tensor([1]))
    assert feed.uncached == (None if length is None else length + 1)
    assert Feed(model, [[1] * 70], 2).uncached == (None if length is None else 70)


def test_seq2seq_rows_and_cache() -> None:
    model = make("encoder-decoder", PAIR, VOCAB)
    sources, more = [[4, 5, 6, 7, 8], [9], [2] * 12], tokens(20, 3)
    starts = [[0]] * 3
    together = follow(model, starts, more, sources)
    for row, source in enumerate(sources):
        alone = follow(model, [[0]], more[row : row + 1], [source])[0]
        torch.testing.assert_close(together[row], alone, **EXACT)
        decoder = torch.cat((torch.tensor([[0]]), more[row : row + 1]), 1)
        with torch.no_grad():
            uncached = model(input_ids=torch.tensor([source]), decoder_input_ids=decoder).logits[0]
        torch.testing.assert_close(alone, uncached, **EXACT)


@pytest.mark.parametrize("name", ["learned", "rotary-dynamic"])
def test_selected_rows_go_on_alone(name: str) -> None:
    model, more = lively(name, VOCAB), tokens(8, 4)
    feed = Feed(model, PROMPTS, 9)
    with torch.no_grad():
        feed.start()
        for column in more[:, :4].unbind(1):
            feed.step(column)
        rows = torch.tensor([2, 0, 0])
        feed.select(rows)
        for column in more[rows][:, 4:].unbind(1):
            last = feed.step(column)
    for at, row in enumerate(rows.tolist()):
        alone = follow(model, [PROMPTS[row]], more[row : row + 1])[0, -1]
        torch.testing.assert_close(last[at], alone, **EXACT)


def test_seen_tokens_leave_out_padding() -> None:
    feed = Feed(lively("learned", VOCAB), [[5, 9], [1, 2, 3]], 4)
    assert [row.nonzero()[:, 0].tolist() for row in feed.seen(VOCAB)] == [[5, 9], [1, 2, 3]]
    assert [row.nonzero()[:, 0].tolist() for row in feed.seen(4)] == [[], [1, 2, 3]]
