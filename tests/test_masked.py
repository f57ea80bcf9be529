"""Masked language modelling: which tokens are hidden, and which sentence follows which."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from fakes import documents, tokens
from small_objectives import BERT, CLS, MASK, PAD, SEP, UNK, A, B, C, everything, mlm, unmasked

from xtcli.data.batch import IGNORE


def test_blocks_of_masked_text_cover_the_stream() -> None:
    texts = documents(12, 40)
    made = mlm(texts, context=18)
    joined = [t for text in texts for t in (*text, SEP)]
    for i in range(len(made)):
        begin = min(16 * i, len(joined) - 16)
        assert unmasked(made.sample(i, 5)) == [CLS, *joined[begin : begin + 16], SEP]
    assert "attention_mask" not in everything(made).inputs


def test_masked_documents_do_not_see_each_other() -> None:
    made = mlm([A, B, C], context=10, pack="documents")
    batch = everything(made)
    assert unmasked(made.sample(0, 0)) == [CLS, *A, SEP, CLS, *B[:2]]
    assert batch.inputs["document_ids"].tolist() == [[0] * 7 + [1] * 3, [0] * 4 + [1] * 6]
    assert batch.inputs["position_ids"].tolist() == [[0, 1, 2, 3, 4, 5, 6, 0, 1, 2], [0, 1, 2, 3, 0, 1, 2, 3, 4, 5]]


@pytest.mark.parametrize(
    "options", [{}, {"probability": 0.3, "mask": 0.5, "random": 0.25}, {"mask": 1.0, "random": 0.0}]
)
def test_masks_have_the_stated_shares(options: dict[str, Any]) -> None:
    probability, mask, random = (options.get(k, d) for k, d in (("probability", 0.15), ("mask", 0.8), ("random", 0.1)))
    made = mlm([tokens(100_000)], context=130, **options)
    index = np.arange(len(made))
    batch = made.batch(index, index)
    inputs, targets = batch.inputs["input_ids"].numpy(), batch.targets["mlm"].numpy()
    chosen = targets != IGNORE
    assert set(chosen.sum(1)) == {int(128 * probability + 0.5)}
    assert not chosen[:, 0].any()
    assert not chosen[:, -1].any()
    assert (inputs[chosen] != MASK).sum() + (inputs == MASK).sum() == chosen.sum()
    count = chosen.sum()
    masked, kept = (inputs[chosen] == MASK).mean(), (inputs[chosen] == targets[chosen]).mean()
    # Four standard deviations of slack; a random token is the right one once in about 190 times.
    same = 1 - mask - random + random / 190
    assert abs(masked - mask) < 4 * (mask * (1 - mask) / count) ** 0.5 + 1e-9
    assert abs(kept - same) < 4 * (same * (1 - same) / count) ** 0.5 + 1e-3
    swapped = inputs[chosen & (inputs != MASK)]
    assert not np.isin(swapped, [PAD, UNK, CLS, SEP, *BERT.sentinels]).any()
    places = np.bincount(np.nonzero(chosen)[1], minlength=130)[1:-1]
    assert places.std() < 1.5 * places.mean() ** 0.5


def test_whole_words_are_hidden_together() -> None:
    """Odd ids continue the word before them."""
    rng = np.random.default_rng(0)
    made = mlm([rng.integers(16, 200, size=4000).tolist()], context=66, whole_word=True, probability=0.3)
    for i in range(len(made)):
        sample = made.sample(i, 0)
        text, chosen = np.array(unmasked(sample)), sample["targets.mlm"] != IGNORE
        word = np.cumsum((text % 2 == 0) | (text < 16) | (np.roll(text, 1) < 16))
        for number in np.unique(word[chosen]):
            assert chosen[word == number].all()
        assert 1 <= chosen.sum() <= 20


def test_next_sentences_are_labelled_truly() -> None:
    """Tokens of document d are 16 + 20 d + (place mod 20), so that each says where it comes from."""
    texts = [[16 + 20 * d + i % 20 for i in range(n)] for d, n in enumerate((50, 90, 2, 33, 120))]
    made = mlm(texts, context=32, next_sentence=True, short=0.5)
    labels, shorter = [], 0
    for epoch in range(40):
        for i in range(len(made)):
            sample = made.sample(i, epoch)
            text, types = np.array(unmasked(sample)), sample["token_type_ids"]
            assert text[0] == CLS
            ends = np.flatnonzero(text == SEP)
            assert len(ends) == 2
            assert ends[1] == len(text) - 1 <= 31
            assert types.tolist() == [0] * (ends[0] + 1) + [1] * (ends[1] - ends[0])
            first, second = text[1 : ends[0]] - 16, text[ends[0] + 1 : ends[1]] - 16
            assert first.size
            assert second.size
            for side in (first, second):
                assert (side // 20 == side[0] // 20).all()
                assert (np.diff(side % 20) % 20 == 1).all()
            label = int(sample["targets.nsp"])
            labels.append(label)
            assert (first[0] // 20 == second[0] // 20) == (label == 0)
            if label == 0:
                assert (second[0] - first[-1]) % 20 == 1
            shorter += len(text) < 20
    assert abs(np.mean(labels) - 0.5) < 0.08
    assert shorter
    batch = everything(made)
    assert batch.targets["nsp"].shape == (len(made),)
    assert batch.supervised()["nsp"] == len(made)
    assert batch.inputs["attention_mask"].sum() == batch.tokens


def test_next_sentences_of_one_document_come_from_another_place_of_it() -> None:
    made = mlm([list(range(16, 116))], context=32, next_sentence=True)
    seen = set()
    for epoch in range(40):
        for i in range(len(made)):
            sample = made.sample(i, epoch)
            text, label = unmasked(sample), int(sample["targets.nsp"])
            cut = text.index(SEP)
            assert (text[cut + 1] - text[cut - 1] == 1) == (label == 0)
            seen.add(label)
    assert seen == {0, 1}
    assert "B comes from another place" in made.describe()
    pair = mlm([[16, 17]], next_sentence=True)
    assert {tuple(unmasked(pair.sample(0, e))) for e in range(20)} == {(CLS, 16, SEP, b, SEP) for b in (16, 17)}


def test_sentences_change_places_truly() -> None:
    """Tokens of document d are 16 + 20 d + (place mod 20), so that each says where it comes from."""
    texts = [[16 + 20 * d + i % 20 for i in range(n)] for d, n in enumerate((50, 90, 2, 33, 120))]
    made = mlm(texts, context=32, sentence_order=True, short=0.5)
    labels = []
    for epoch in range(40):
        for i in range(len(made)):
            sample = made.sample(i, epoch)
            assert "targets.nsp" not in sample
            text, types = np.array(unmasked(sample)), sample["token_type_ids"]
            first_end, last = np.flatnonzero(text == SEP)
            assert types.tolist() == [0] * (first_end + 1) + [1] * (last - first_end)
            first, second = text[1:first_end] - 16, text[first_end + 1 : last] - 16
            label = int(sample["targets.sop"])
            labels.append(label)
            assert first[0] // 20 == second[0] // 20
            before, after = (first, second) if label == 0 else (second, first)
            assert (after[0] - before[-1]) % 20 == 1
    assert abs(np.mean(labels) - 0.5) < 0.08
    assert "A and B change places" in made.describe()
    assert everything(made).supervised()["sop"] == len(made)


def test_two_questions_of_one_pair_are_refused() -> None:
    with pytest.raises(ValueError, match="two questions"):
        mlm([A, B], next_sentence=True, sentence_order=True)
    with pytest.raises(ValueError, match="sentence_order=false"):
        mlm([A, B], sentence_order=True, pack="none")


@pytest.mark.parametrize("longest", [2, 3])
def test_runs_have_the_stated_lengths(longest: int) -> None:
    """At a low rate runs seldom touch, so that their lengths show."""
    made = mlm([tokens(60_000)], context=130, ngram=longest, probability=0.02)
    lengths: list[int] = []
    for i in range(len(made)):
        chosen = made.sample(i, 1)["targets.mlm"] != IGNORE
        assert chosen.sum() == 3  # 0.02 of 128 tokens
        assert not chosen[0]
        assert not chosen[-1]
        edges = np.flatnonzero(np.diff(np.concatenate([[0], chosen, [0]])))
        # The first run that is drawn is whole; the last is cut short at the goal, and the order is not to be seen.
        lengths += (edges[1::2] - edges[::2]).tolist()
    counts = np.bincount(lengths, minlength=5)
    assert counts[4:].sum() < 0.02 * len(lengths)
    assert counts[1] > counts[2]
    assert (counts[3] > 0.1 * len(made)) == (longest == 3)
    assert f"up to {longest} tokens together" in made.describe()


def test_runs_of_whole_words_hide_no_part_of_one() -> None:
    """Odd ids continue the word before them."""
    rng = np.random.default_rng(0)
    made = mlm([rng.integers(16, 200, size=4000).tolist()], context=66, whole_word=True, ngram=3, probability=0.3)
    for i in range(len(made)):
        sample = made.sample(i, 0)
        text, chosen = np.array(unmasked(sample)), sample["targets.mlm"] != IGNORE
        word = np.cumsum((text % 2 == 0) | (text < 16) | (np.roll(text, 1) < 16))
        for number in np.unique(word[chosen]):
            assert chosen[word == number].all()
        assert 1 <= chosen.sum() <= 20


def test_runs_do_not_cross_special_tokens() -> None:
    made = mlm([[16, 18], [20, 22], [24, 26]] * 30, context=32, ngram=3, pack="documents", probability=0.5)
    for i in range(len(made)):
        sample = made.sample(i, 0)
        special = np.isin(unmasked(sample), [CLS, SEP])
        assert not (special & (sample["targets.mlm"] != IGNORE)).any()
