"""Every objective: pure samples, batches that are their rows, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from fakes import FakeTokenizer, documents, tokens
from small_objectives import BERT, CLS, EOS, GPT2, PAD, SEP, T5, A, B, clm, everything, mlm, pairs, spans

from xtcli.data.batch import IGNORE
from xtcli.errors import UserError
from xtcli.objectives import CausalLM, MaskedLM, Objective
from xtcli.registry import find, kinds


def test_kinds_are_registered() -> None:
    assert set(kinds("objective")) >= {"clm", "mlm", "span-corruption", "seq2seq", "classify", "extract", "denoising"}
    assert find("objective", "clm") is CausalLM


MADE: dict[str, Callable[[], Objective]] = {
    "clm": lambda: clm(documents(9, 20), pack="stream"),
    "clm documents": lambda: clm(documents(9, 20), GPT2, pack="documents"),
    "clm none": lambda: clm(documents(9, 20), pack="none", multiple=4),
    "mlm": lambda: mlm(documents(9, 20)),
    "mlm documents": lambda: mlm(documents(9, 20), pack="documents"),
    "mlm none": lambda: mlm(documents(9, 20), pack="none", multiple=4),
    "mlm words": lambda: mlm(documents(9, 20), whole_word=True),
    "mlm pairs": lambda: mlm(documents(9, 20), next_sentence=True),
    "spans": lambda: spans(documents(9, 20)),
    "spans none": lambda: spans(documents(9, 20), pack="none"),
    "pairs": lambda: pairs(documents(9, 20), documents(9, 9, 1)),
}


@pytest.mark.parametrize("name", MADE)
def test_samples_are_pure_and_batches_are_their_rows(name: str) -> None:
    made, again = MADE[name](), MADE[name]()
    order = np.random.default_rng(0).permutation(len(made))
    for i in order:
        one, two = made.sample(int(i), 3), again.sample(int(i), 3)
        assert one.keys() == two.keys()
        assert all(np.array_equal(one[k], two[k]) for k in one)
    batch = made.batch(order, np.full_like(order, 3))
    where = {int(i): row for row, i in enumerate(batch.ids)}
    for i in order:
        sample = made.sample(int(i), 3)
        for key, array in sample.items():
            if key == "id":
                continue
            head = key.removeprefix("targets.")
            tensor = (batch.inputs if head == key else batch.targets)[head][where[int(i)]].numpy()
            assert np.array_equal(tensor[: array.size] if array.ndim else tensor, array)
            if array.ndim and head != key:
                assert (tensor[array.size :] == IGNORE).all()
    assert all(ids.min() >= 0 for name, ids in batch.inputs.items() if name != "document_ids")
    assert made.describe()
    assert "\n" not in made.describe()


@pytest.mark.parametrize("name", [n for n in MADE if n.startswith(("mlm", "spans"))])
def test_corruption_differs_between_epochs(name: str) -> None:
    made = MADE[name]()
    index = np.arange(len(made))
    one, two = made.batch(index, index * 0), made.batch(index, index * 0 + 1)
    assert any(not np.array_equal(one.inputs[k], two.inputs[k]) for k in one.inputs)


class Speechless(FakeTokenizer):
    """A tokenizer that cannot spell."""

    def encode(self, text: str) -> list[int]:
        return [16]


LONG = tokens(400)
REFUSALS: dict[str, tuple[Callable[[], Objective], str]] = {
    "mask": (lambda: mlm([LONG], FakeTokenizer(cls=CLS, sep=SEP)), "masked language modelling needs a mask token"),
    "cls": (
        lambda: mlm([LONG], T5),
        "needs a cls and sep and mask token and the tokenizer has none; set tokenizer.spe",
    ),
    "no text": (lambda: mlm([[]]), "the text has no document of 1 token or more; give more text"),
    "short mlm": (lambda: mlm([A]), r"the text has 6 tokens, and one block takes 30; .* train.context to 8 or less"),
    "narrow": (lambda: mlm([LONG], context=7), "a context of 7 tokens leaves no room for text; set train.context to 8"),
    "eos": (lambda: spans([LONG], BERT), "span corruption needs a eos token"),
    "start": (lambda: spans([LONG], FakeTokenizer(eos=EOS)), "the decoder's first input needs a pad token"),
    "sentinels": (
        lambda: spans([LONG], FakeTokenizer(pad=PAD, eos=EOS, sentinels=2)),
        "needs 3 sentinels, and the tokenizer has 2; set tokenizer.sentinels=3",
    ),
    "short spans": (lambda: spans([A]), "the text has 5 tokens, and one block takes 34; give more text"),
    "no validation": (
        lambda: mlm([[]], validation=True),
        "the validation text has no document of 1 token or more; set data.validation to a larger share, or to 0",
    ),
    "no spans": (lambda: spans([[20]], pack="none"), "the text has 0 tokens, and a span takes 2"),
    "no pairs": (lambda: pairs([A, []], [[], B]), "no pair has text on both sides; check data.source"),
    "long pairs": (
        lambda: pairs([A], [B], target_length=13),
        "target_length is 13, and the context has 12 tokens; raise train.context, or lower objective.target_length",
    ),
    "pair eos": (lambda: pairs([A], [B], FakeTokenizer(pad=PAD)), "set tokenizer.special.eos"),
    "no words": (lambda: mlm([LONG], Speechless(mask=6, cls=4, sep=5), whole_word=True), "whole-word masks need"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_what_cannot_be_done_is_refused_in_one_sentence(name: str) -> None:
    make, message = REFUSALS[name]
    with pytest.raises(UserError, match=message) as caught:
        make()
    assert len(caught.value.problems) == 1
    assert caught.value.problems[0].remedy


@pytest.mark.parametrize("make", [mlm, spans], ids=["mlm", "spans"])
@pytest.mark.parametrize("extra", [-1, 0, 1])
def test_about_one_block(make: Any, extra: int) -> None:
    """DA-4: block - 1 is refused, block is one sample, block + 1 two; validation takes what there is."""
    whole = 29 if make is mlm else make([LONG]).block
    if extra < 0:
        with pytest.raises(UserError):
            make([tokens(whole + extra)])
        batch = everything(make([tokens(whole + extra)], validation=True))
        assert len(batch) == 1
        assert batch.inputs["attention_mask"].sum() < batch.inputs["attention_mask"].numel()
    else:
        batch = everything(make([tokens(whole + extra)]))
        assert len(batch) == 1 + extra
        assert batch.padded == 0


@pytest.mark.parametrize(
    "options", [{"mask": 0.8, "random": 0.3}, {"next_sentence": True, "pack": "documents"}, {"probability": 0.0}]
)
def test_fields_that_contradict_each_other_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"mask \+ random|pairs of sentences|greater than 0"):
        MaskedLM.Config(**options)
