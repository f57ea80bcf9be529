"""Encoder-decoder objectives: span corruption gives the text back; pairs are framed, shifted, padded."""

from __future__ import annotations

import numpy as np
import pytest
from fakes import FakeTokenizer, documents, tokens
from small_objectives import BOS, EOS, PAD, T5, A, B, C, everything, pairs, rows, spans

from xtcli.data.batch import IGNORE


def restored(inputs: list[int], targets: list[int], final: bool = True) -> list[int]:
    """The text that a corrupted row and its target came from."""
    assert inputs[-1] == targets[-1] == EOS
    said: dict[int, list[int]] = {}
    for token in targets[:-1]:
        if token in T5.sentinels:
            said[token] = []
            mark = token
        else:
            said[mark].append(token)
    marks = list(said)
    assert marks == T5.sentinels[: len(marks)]
    if final:
        assert said.pop(marks[-1]) == []
    assert [t for t in inputs if t in T5.sentinels] == list(said)
    assert all(said.values())
    return [u for t in inputs[:-1] for u in said.get(t, [t])]


@pytest.mark.parametrize("final", [True, False])
@pytest.mark.parametrize("context", [8, 32, 50])
def test_input_and_target_give_the_text_back(final: bool, context: int) -> None:
    texts = documents(6, 80)
    made = spans(texts, context=context, final_sentinel=final)
    joined = [t for text in texts for t in text]
    batch = everything(made)
    assert context - 1 <= batch.inputs["input_ids"].shape[1] <= context
    assert batch.padded == 0
    for epoch in (0, 1):
        for i in range(len(made)):
            begin = min(made.block * i, len(joined) - made.block)
            sample = made.sample(i, epoch)
            targets = sample["targets.lm"].tolist()
            assert restored(sample["input_ids"].tolist(), targets, final) == joined[begin : begin + made.block]
            assert sample["decoder_input_ids"].tolist() == [PAD, *targets[:-1]]


def test_rows_of_one_document_give_the_documents_back() -> None:
    texts = documents(9, 90, shortest=2)
    made = spans(texts, pack="none", start=5)
    got = [t for i in range(len(made)) for t in restored(*rows(made)[i])]
    assert got == [t for text in texts for t in text]
    batch = everything(made)
    assert set(batch.inputs) == {"input_ids", "attention_mask", "decoder_input_ids", "decoder_attention_mask"}
    assert (batch.inputs["decoder_input_ids"][:, 0] == 5).all()
    assert batch.supervised()["lm"] == batch.inputs["decoder_attention_mask"].sum()


def test_noise_has_the_stated_density_and_spans() -> None:
    made = spans([tokens(5000)], FakeTokenizer(pad=PAD, eos=EOS, sentinels=15), context=100)
    noise, count = made._counts(made.block)
    assert (made.block, noise, count) == (110, 16, 5)
    assert spans([tokens(600)], context=30, density=0.5, mean_span=4.0)._counts(40) == (20, 5)


def test_every_place_is_hidden_about_equally_often() -> None:
    made = spans([tokens(2000)], context=20)
    hidden = np.zeros(made.block)
    rounds = 40
    for epoch in range(rounds):
        for i in range(len(made)):
            place = 0
            for token in made.sample(i, epoch)["input_ids"][:-1]:
                if token in T5.sentinels:
                    targets = made.sample(i, epoch)["targets.lm"].tolist()
                    at = targets.index(token)
                    size = next(n for n, t in enumerate(targets[at + 1 :]) if t in T5.sentinels)
                    hidden[place : place + size] += 1
                    place += size
                else:
                    place += 1
            assert place == made.block
    share = hidden / (rounds * len(made))
    assert share.min() > 0.04
    assert share.max() < 0.25


def test_pairs_are_framed_shifted_and_padded() -> None:
    made = pairs([A, B, [20] * 30], [B, A, C], multiple=4)
    batch = everything(made)
    assert batch.ids == [2, 0, 1]
    assert batch.inputs["input_ids"].tolist() == [[20] * 11 + [EOS], [*A, EOS, *[PAD] * 6], [*B, EOS, *[PAD] * 8]]
    assert batch.inputs["attention_mask"].sum(1).tolist() == [12, 6, 4]
    assert batch.targets["lm"].tolist() == [
        [*C, EOS, *[IGNORE] * 3],
        [*B, EOS, *[IGNORE] * 4],
        [*A, EOS, *[IGNORE] * 2],
    ]
    assert batch.inputs["decoder_input_ids"].tolist() == [
        [PAD, *C, *[PAD] * 3],
        [PAD, *B, *[PAD] * 4],
        [PAD, *A, *[PAD] * 2],
    ]
    assert batch.inputs["decoder_attention_mask"].sum(1).tolist() == [5, 4, 6]
    assert (batch.tokens, batch.padded) == (37, 23)
    assert [p.inputs["input_ids"].shape[1] for p in batch.split(1)] == [12, 8, 4]
    assert [p.targets["lm"].shape[1] for p in batch.split(1)] == [8, 4, 8]
    assert "1 source cut at 11 tokens (19 tokens never seen)" in made.describe()


def test_pairs_with_a_bos_carry_it_once() -> None:
    bart = FakeTokenizer(pad=PAD, bos=BOS, eos=EOS)
    one = pairs([A], [B], bart, start=EOS).sample(0, 0)
    assert one["input_ids"].tolist() == [BOS, *A, EOS]
    assert one["decoder_input_ids"].tolist() == [EOS, BOS, *B]
    two = pairs([A], [B], bart, start=BOS).sample(0, 0)
    assert two["decoder_input_ids"].tolist() == [BOS, *B]
    assert two["targets.lm"].tolist() == [*B, EOS]


def test_pairs_with_an_empty_side_are_left_out_and_counted() -> None:
    made = pairs([A, [], C], [B, A, []])
    assert len(made) == 1
    assert made.describe().endswith("2 pairs with an empty side left out")
