"""Denoising: each of the five corruptions is what the paper says, alone and mixed."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from fakes import FakeSplit, FakeTokenizer, documents, tokens
from small_objectives import BOS, EOS, MASK, PAD, everything

from xtcli.errors import UserError
from xtcli.objectives import Denoising
from xtcli.registry import find

NOTHING = {"infill": 0.0, "permute": 0.0}


class Spelling(FakeTokenizer):
    """Ids that divide by 10 end a sentence."""

    def decode(self, ids: list[int]) -> str:
        return "".join("x." if id % 10 == 0 else "x" for id in ids)


BART = Spelling(pad=PAD, bos=BOS, eos=EOS, mask=MASK)


def denoising(texts: list[list[int]], tokenizer: FakeTokenizer = BART, context: int = 34, **options: Any) -> Denoising:
    seed, start, validation = (
        options.pop(name, usual) for name, usual in (("seed", 0), ("start", EOS), ("validation", False))
    )
    config = Denoising.Config(**options)
    return Denoising(
        config, FakeSplit(text=texts), tokenizer, context=context, seed=seed, start=start, validation=validation
    )


def inner(made: Denoising, index: int = 0, epoch: int = 0) -> tuple[list[int], list[int]]:
    """The corrupted and the whole text of a sample, without their frames."""
    sample = made.sample(index, epoch)
    inputs, targets = sample["input_ids"].tolist(), sample["targets.lm"].tolist()
    assert (inputs[0], inputs[-1], targets[0], targets[-1]) == (BOS, EOS, BOS, EOS)
    assert sample["decoder_input_ids"].tolist() == [EOS, *targets[:-1]]
    assert len(inputs) <= len(targets) <= 34
    return inputs[1:-1], targets[1:-1]


TEXT = tokens(500)


def test_kind_is_registered() -> None:
    assert find("objective", "denoising") is Denoising


def test_samples_are_pure_and_cover_the_text() -> None:
    made, again = denoising([TEXT[:200], TEXT[200:]]), denoising([TEXT[:200], TEXT[200:]])
    assert len(made) == 16
    for index in range(len(made)):
        begin = min(32 * index, 500 - 32)
        for epoch in (0, 1):
            one, two = made.sample(index, epoch), again.sample(index, epoch)
            assert all(np.array_equal(one[key], two[key]) for key in one)
            assert inner(made, index, epoch)[1] == TEXT[begin : begin + 32]
    assert any(inner(made, i, 0)[0] != inner(made, i, 1)[0] for i in range(16))
    batch = everything(made)
    assert batch.inputs["input_ids"].shape[1] <= 34
    assert batch.supervised()["lm"] == 16 * 34


def test_without_corruption_the_text_is_copied() -> None:
    made = denoising([TEXT], **NOTHING)
    assert all(source == target for source, target in (inner(made, i) for i in range(len(made))))


@pytest.mark.parametrize("share", [0.1, 0.5])
def test_masking(share: float) -> None:
    made = denoising([TEXT], **NOTHING | {"mask": share})
    for index in range(len(made)):
        source, target = inner(made, index)
        hidden = [a == MASK for a in source]
        assert sum(hidden) == round(share * 32)
        assert all(h or a == b for h, a, b in zip(hidden, source, target, strict=True))


@pytest.mark.parametrize("share", [0.1, 0.5, 0.99])
def test_deletion(share: float) -> None:
    made = denoising([TEXT], **NOTHING | {"delete": share})
    for index in range(len(made)):
        source, target = inner(made, index)
        assert len(source) == max(1, 32 - round(share * 32))
        assert is_subsequence(source, target)


def is_subsequence(short: list[int], long: list[int]) -> bool:
    rest = iter(long)
    return all(token in rest for token in short)


def spans(source: list[int], target: list[int]) -> list[int]:
    """The lengths that masks stand for; tokens of a row are all different here."""
    at, found = 0, []
    for place, token in enumerate(source):
        if token == MASK:
            following = next((t for t in source[place + 1 :] if t != MASK), None)
            end = len(target) if following is None else target.index(following)
            alone = place + 1 == len(source) or source[place + 1] != MASK
            # Masks side by side share what lies between: the last is given all of it.
            found.append(end - at if alone else -1)
            at = end if alone else at
        else:
            assert target[at] == token
            at += 1
    return found


def test_infilling_hides_the_share_in_spans_of_poisson_length() -> None:
    made = denoising([tokens(4000)], context=102, **NOTHING | {"infill": 0.3, "mean_span": 3.0})
    lengths: list[int] = []
    for index in range(len(made)):
        sample = made.sample(index, 0)
        source, target = sample["input_ids"].tolist()[1:-1], sample["targets.lm"].tolist()[1:-1]
        found = spans(source, target)
        assert sum(t != MASK for t in source) == len(target) - 30
        lengths += [
            length for place, length in enumerate(found) if length >= 0 and (place == 0 or found[place - 1] >= 0)
        ]
    counts = np.bincount(lengths, minlength=8)[:8] / len(lengths)
    # Spans of no length stand beside others a little more often, the last of each row is cut.
    poisson = [np.exp(-3.0) * 3.0**k / np.prod(range(1, k + 1)) for k in range(8)]
    assert abs(counts - poisson).max() < 0.07
    assert 0.02 < counts[0] < 0.12
    assert abs(np.mean(lengths) - 3.0) < 0.3


def test_every_place_is_hidden_about_equally_often() -> None:
    made = denoising([tokens(100)], context=102, **NOTHING | {"infill": 0.3})
    hidden = np.zeros(100)
    for epoch in range(400):
        source = set(made.sample(0, epoch)["input_ids"].tolist())
        hidden += [token not in source for token in made.sample(0, epoch)["targets.lm"].tolist()[1:-1]]
    # At both ends fewer spans can lie over a place.
    assert abs(hidden[8:-8] / 400 - 0.32).max() < 0.08
    assert (hidden > 40).all()


def test_permuted_sentences_are_the_same_sentences() -> None:
    made = denoising([TEXT], **NOTHING | {"permute": 1.0})
    moved = 0
    for index in range(len(made)):
        source, target = inner(made, index)
        assert sorted(sentences(source, target)) == sorted(sentences(target, target))
        moved += source != target
    assert moved > len(made) / 2


def sentences(row: list[int], target: list[int]) -> list[tuple[int, ...]]:
    found, open_ = [], []
    last = target[-1]
    for token in row:
        open_.append(token)
        if token % 10 == 0 or token == last:
            found.append(tuple(open_))
            open_ = []
    return found + ([tuple(open_)] if open_ else [])


def test_rotation_begins_anywhere() -> None:
    made = denoising([TEXT[:32]], **NOTHING | {"rotate": 1.0})
    begins = set()
    for epoch in range(300):
        source, target = inner(made, 0, epoch)
        at = target.index(source[0])
        begins.add(at)
        assert source == target[at:] + target[:at]
    assert begins == set(range(32))


@pytest.mark.parametrize(("option", "rows"), [("permute", 0.3), ("rotate", 0.7)])
def test_some_rows_are_left_as_they_are(option: str, rows: float) -> None:
    made = denoising([TEXT[:32]], **NOTHING | {option: rows})
    changed = sum(source != target for source, target in (inner(made, 0, epoch) for epoch in range(500)))
    assert abs(changed / 500 - rows) < 0.1


def test_all_at_once() -> None:
    options = {"infill": 0.2, "mask": 0.1, "delete": 0.2, "permute": 0.5, "rotate": 0.5}
    made = denoising(documents(20, 90), **options, pack="none")
    for index in range(len(made)):
        sample = made.sample(index, 0)
        size = sample["targets.lm"].size - 2
        source = sample["input_ids"][1:-1]
        kept = size - round(0.2 * size) - min(round(0.2 * size), size - round(0.2 * size)) - round(0.1 * size)
        assert (source != MASK).sum() == max(kept, 0) or size < 5
        assert source.size <= size
    words = made.describe()
    for said in ("0.5 of the rows", "0.2 of the tokens deleted", "0.1 masked", "spans of 3", "padded"):
        assert said in words


def test_a_decoder_that_starts_from_bos_says_it_once() -> None:
    sample = denoising([TEXT], start=BOS).sample(0, 0)
    assert sample["decoder_input_ids"].tolist() == [BOS, *TEXT[:32]]
    assert sample["targets.lm"].tolist() == [*TEXT[:32], EOS]


@pytest.mark.parametrize(
    ("tokenizer", "options", "message"),
    [
        (Spelling(pad=PAD, eos=EOS), {}, "denoising needs a mask token"),
        (Spelling(pad=PAD, mask=MASK), {}, "set tokenizer.special.eos"),
        (BART, {"context": 7}, "too short to corrupt; set train.context to 8"),
        (
            BART,
            {"context": 600},
            "the text has 500 tokens, and one block takes 598; .* or train.context to 502 or less",
        ),
    ],
)
def test_what_cannot_be_done_is_refused(tokenizer: FakeTokenizer, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        denoising([TEXT], tokenizer, **options)


def test_shares_beyond_the_whole_are_refused() -> None:
    with pytest.raises(ValueError, match="more than all tokens"):
        Denoising.Config(infill=0.5, mask=0.3, delete=0.3)
