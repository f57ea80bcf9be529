"""Masked spans: which tokens are hidden, by what, and what is said of them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from fakes import FakeSplit, FakeTokenizer, tokens
from pydantic import ValidationError
from small_objectives import EOS, MASK, PAD, everything

from xtcli.errors import UserError
from xtcli.objectives import MaskedSpans
from xtcli.registry import find

TOKENIZER = FakeTokenizer(pad=PAD, eos=EOS, mask=MASK)
TEXT = tokens(1000)


def hiding(
    texts: list[list[int]], tokenizer: FakeTokenizer = TOKENIZER, context: int = 101, **options: Any
) -> MaskedSpans:
    start, validation = options.pop("start", None), options.pop("validation", False)
    config = MaskedSpans.Config(**options)
    split = FakeSplit(text=texts)
    return MaskedSpans(config, split, tokenizer, context=context, seed=0, start=start, validation=validation)


def test_kind_is_registered() -> None:
    assert find("objective", "masked-spans") is MaskedSpans


@pytest.mark.parametrize(("every", "density"), [(64, 0.15), (20, 0.25), (7, 0.5), (200, 0.3)])
def test_each_piece_hides_one_run_and_the_target_says_it(every: int, density: float) -> None:
    made = hiding([TEXT], every=every, density=density, mask=1.0, random=0.0, start=9)
    for index in range(len(made)):
        for epoch in range(3):
            sample = made.sample(index, epoch)
            text = np.array(TEXT[index * 100 : index * 100 + 100])
            inputs, said = sample["input_ids"], sample["targets.lm"]
            assert (inputs[-1], said[-1], inputs.size) == (EOS, EOS, 101)
            assert sample["decoder_input_ids"].tolist() == [9, *said[:-1]]
            hidden = inputs[:-1] == MASK
            assert np.array_equal(inputs[:-1][~hidden], text[~hidden])
            assert said[:-1].tolist() == text[hidden].tolist()
            for begin in range(0, 100, every):
                piece = np.flatnonzero(hidden[begin : begin + every])
                wanted = round(density * min(every, 100 - begin))
                assert piece.size == wanted
                assert wanted == 0 or piece[-1] - piece[0] == wanted - 1


def test_every_place_of_a_run_is_equally_likely() -> None:
    made = hiding([TEXT], every=10, density=0.3, mask=1.0, random=0.0)
    begins = [int(np.flatnonzero(made.sample(i, e)["input_ids"] == MASK)[0]) for i in range(10) for e in range(80)]
    counts = np.bincount(begins, minlength=8)
    assert counts.size == 8
    assert abs(counts - 100).max() < 5 * 100**0.5


def test_hidden_tokens_are_masked_swapped_or_kept_by_their_shares() -> None:
    made = hiding([TEXT])
    masked = swapped = kept = 0
    for epoch in range(100):
        for index in range(len(made)):
            inputs, text = made.sample(index, epoch)["input_ids"][:-1], np.array(TEXT[index * 100 : index * 100 + 100])
            other = inputs[inputs != text]
            masked += int((other == MASK).sum())
            swapped += int((other != MASK).sum())
            assert not np.isin(other[other != MASK], [PAD, EOS, *TOKENIZER.sentinels]).any()
            kept += 15 - other.size  # 10 of the first 64, 5 of the other 36
    share = 15 * 10 * 100
    assert masked / share == pytest.approx(0.8, abs=0.02)
    assert swapped / share == pytest.approx(0.1, abs=0.02)
    assert kept / share == pytest.approx(0.1, abs=0.02)


def test_samples_are_pure_and_batches_keep_their_widths() -> None:
    made, again = hiding([TEXT[:300], TEXT[300:]]), hiding([TEXT[:300], TEXT[300:]])
    for index in range(len(made)):
        one, two = made.sample(index, 1), again.sample(index, 1)
        assert all(np.array_equal(one[key], two[key]) for key in one)
    assert any(not np.array_equal(made.sample(0, 0)["input_ids"], made.sample(0, e)["input_ids"]) for e in range(1, 5))
    batch = everything(made)
    assert batch.inputs["input_ids"].shape == (10, 101)
    assert batch.inputs["decoder_input_ids"].shape == batch.targets["lm"].shape == (10, 16)
    assert (batch.padded, batch.supervised()["lm"]) == (0, 160)


def test_rows_of_one_document_are_padded() -> None:
    made = hiding([tokens(n) for n in (5, 1, 40, 2, 230)], pack="none")
    batch = everything(made)
    assert len(made) == 6
    assert {"attention_mask", "decoder_attention_mask"} <= set(batch.inputs)
    for index in range(len(made)):
        assert made.sample(index, 0)["targets.lm"].size >= 2
    assert "masked spans: 0.15 of every 64 tokens hidden in one run, 0.8 of them masked" in made.describe()


@pytest.mark.parametrize(
    ("lacking", "said"), [("mask", "needs a mask token"), ("eos", "learns where to stop"), ("pad", "needs a pad token")]
)
def test_tokens_that_are_missing_are_named(lacking: str, said: str) -> None:
    special = {"pad": PAD, "eos": EOS, "mask": MASK}
    del special[lacking]
    with pytest.raises(UserError, match=said):
        hiding([TEXT], FakeTokenizer(**special))


def test_limits_are_said() -> None:
    with pytest.raises(UserError, match="too short to hide"):
        hiding([TEXT], context=7)
    with pytest.raises(UserError, match=r"objective\.pack=none"):
        hiding([TEXT[:50]])
    with pytest.raises(ValidationError, match="more than all hidden tokens"):
        MaskedSpans.Config(mask=0.8, random=0.3)
