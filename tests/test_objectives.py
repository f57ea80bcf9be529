"""Objectives: what becomes of the text, down to the token."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from fakes import FakeSplit, FakeTokenizer, documents, tokens

from xtcli.data.batch import IGNORE, Batch
from xtcli.data.loader import validation_batches
from xtcli.errors import UserError
from xtcli.model import Model, build
from xtcli.objectives import CausalLM, MaskedLM, Objective, Pairs, SpanCorruption
from xtcli.registry import find, kinds

PAD, UNK, BOS, EOS, CLS, SEP, MASK = range(7)
LLAMA = FakeTokenizer(unk=UNK, bos=BOS, eos=EOS)
GPT2 = FakeTokenizer(bos=EOS, eos=EOS)
BARE = FakeTokenizer()
BERT = FakeTokenizer(pad=PAD, unk=UNK, cls=CLS, sep=SEP, mask=MASK)
T5 = FakeTokenizer(pad=PAD, eos=EOS, unk=UNK, sentinels=8)


def clm(texts: list[list[int]], tokenizer: FakeTokenizer = LLAMA, context: int = 8, **options: Any) -> CausalLM:
    validation = options.pop("validation", False)
    split = FakeSplit(text=texts)
    return CausalLM(CausalLM.Config(**options), split, tokenizer, context=context, seed=0, validation=validation)


def mlm(texts: list[list[int]], tokenizer: FakeTokenizer = BERT, context: int = 32, **options: Any) -> MaskedLM:
    seed, validation = options.pop("seed", 0), options.pop("validation", False)
    split = FakeSplit(text=texts)
    return MaskedLM(MaskedLM.Config(**options), split, tokenizer, context=context, seed=seed, validation=validation)


def spans(texts: list[list[int]], tokenizer: FakeTokenizer = T5, context: int = 32, **options: Any) -> SpanCorruption:
    start, validation = options.pop("start", None), options.pop("validation", False)
    config = SpanCorruption.Config(**options)
    split = FakeSplit(text=texts)
    return SpanCorruption(config, split, tokenizer, context=context, seed=0, start=start, validation=validation)


def pairs(source: list[list[int]], target: list[list[int]], tokenizer: FakeTokenizer = T5, **options: Any) -> Pairs:
    start = options.pop("start", None)
    split = FakeSplit(source=source, target=target)
    return Pairs(Pairs.Config(**options), split, tokenizer, context=12, seed=0, start=start)


def rows(made: Objective) -> list[tuple[list[int], list[int]]]:
    """(input_ids, targets of the first head) of every sample of epoch 0."""
    samples = [made.sample(i, 0) for i in range(len(made))]
    head = next(name for name in samples[0] if name.startswith("targets."))
    return [(s["input_ids"].tolist(), s[head].tolist()) for s in samples]


def everything(made: Objective) -> Batch:
    return next(iter(validation_batches(made, batch=len(made))))


A, B, C = tokens(5, 20), tokens(3, 40), tokens(4, 60)


# All kinds


def test_kinds_are_registered() -> None:
    assert set(kinds("objective")) == {"clm", "mlm", "span-corruption", "seq2seq"}
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


# Causal


@pytest.mark.parametrize(
    ("tokenizer", "joined"),
    [
        (LLAMA, [BOS, *A, EOS, BOS, *B, EOS, BOS, *C, EOS]),
        (GPT2, [EOS, *A, EOS, *B, EOS, *C, EOS]),
        (FakeTokenizer(eos=EOS), [*A, EOS, *B, EOS, *C, EOS]),
        (FakeTokenizer(bos=BOS), [BOS, *A, BOS, *B, BOS, *C]),
        (BARE, [*A, *B, *C]),
    ],
    ids=["bos eos", "one token", "eos", "bos", "neither"],
)
def test_stream_is_cut_without_loss(tokenizer: FakeTokenizer, joined: list[int]) -> None:
    made = clm([A, B, C], tokenizer, context=4)
    got = rows(made)
    assert len(got) == -(-(len(joined) - 1) // 4)
    assert [t for inputs, _ in got for t in inputs] == joined[:-1]
    assert [t for _, targets in got for t in targets] == joined[1:]


def test_packed_documents_do_not_leak() -> None:
    made = clm([A, B, C], LLAMA, context=7, pack="documents")
    batch = everything(made)
    assert batch.inputs["input_ids"].tolist() == [[BOS, *A, BOS], [*B, BOS, *C[:3]], [C[3], *[EOS] * 6]]
    assert batch.targets["lm"].tolist() == [[*A, EOS, B[0]], [*B[1:], EOS, *C], [EOS, *[IGNORE] * 6]]
    assert batch.inputs["document_ids"].tolist() == [[0] * 6 + [1], [0] * 3 + [1] * 4, [0] + [-1] * 6]
    assert batch.inputs["position_ids"].tolist() == [[0, 1, 2, 3, 4, 5, 0], [0, 1, 2, 0, 1, 2, 3], [0] * 7]
    assert (batch.tokens, batch.padded) == (15, 6)


@pytest.mark.parametrize("tokenizer", [LLAMA, GPT2, BARE], ids=["bos eos", "one token", "neither"])
def test_a_document_reads_the_same_whatever_stands_beside_it(tokenizer: FakeTokenizer) -> None:
    """DA-2: B's rows are independent of A's content, and its targets never come from another document."""
    other = [[t + 1 for t in A], B, C]
    one, two = (
        everything(clm(texts, tokenizer, context=32, pack="documents", validation=True)) for texts in ([A, B, C], other)
    )
    ids = one.inputs["document_ids"]
    assert (ids == two.inputs["document_ids"]).all()
    for k in ("input_ids", "position_ids"):
        assert (one.inputs[k][ids > 0] == two.inputs[k][ids > 0]).all()
    assert (one.targets["lm"][ids > 0] == two.targets["lm"][ids > 0]).all()
    for number, text in enumerate((A, B, C)):
        alone = everything(clm([text], tokenizer, context=32, pack="documents", validation=True))
        for both, single in ((one.inputs, alone.inputs), (one.targets, alone.targets)):
            for k in both:
                if k != "document_ids":
                    assert both[k][ids == number].tolist() == single[k][alone.inputs["document_ids"] == 0].tolist()


def gradients(model: Model, batch: Batch, number: int) -> tuple[float, list[torch.Tensor]]:
    """The loss of document `number` of a one-row batch, and its gradient for every parameter."""
    targets = torch.where(batch.inputs["document_ids"] == number, batch.targets["lm"], IGNORE)
    loss = model.losses(batch.inputs, {"lm": targets})["lm"].sum
    return loss.item(), list(torch.autograd.grad(loss, list(model.parameters())))


@pytest.mark.parametrize("preset", ["gpt2-small", "tinyllama-1.1b"])
def test_a_model_learns_the_same_from_a_document_whatever_stands_beside_it(preset: str) -> None:
    """DA-2, through the model: bit for bit beside another text; alone, but for the shape of the sums."""
    model = build(preset, tiny=True).eval()
    loss, first = gradients(model, everything(clm([A, B], context=10, pack="documents")), 1)
    other_loss, other = gradients(model, everything(clm([[90, 91, 17, 23, 50], B], context=10, pack="documents")), 1)
    alone_loss, alone = gradients(model, everything(clm([B], context=4, pack="documents")), 0)
    assert loss == other_loss
    assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))
    assert loss == pytest.approx(alone_loss, rel=1e-5)
    for a, b in zip(first, alone, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("pack", ["stream", "documents", "none"])
@pytest.mark.parametrize(
    "tokenizer", [LLAMA, GPT2, FakeTokenizer(eos=EOS, pad=EOS)], ids=["bos eos", "one token", "pad"]
)
@pytest.mark.parametrize("context", [1, 7, 64])
def test_every_document_ends_in_a_supervised_eos(pack: str, tokenizer: FakeTokenizer, context: int) -> None:
    """DA-9: only padding is unsupervised, even where padding has the id of eos."""
    texts = documents(30, 60, seed=context)
    if pack == "none":
        texts = [t[: context - 1] for t in texts if context > 1] or [[16]]
        context = max(context, 2)
    batch = everything(clm(texts, tokenizer, context=context, pack=pack))
    assert int((batch.targets["lm"] == EOS).sum()) == len(texts)
    assert batch.tokens == batch.supervised()["lm"]


def test_one_document_a_row_counts_what_it_cuts() -> None:
    made = clm([A, tokens(20), B], LLAMA, context=8, pack="none", multiple=4)
    batch = made.batch(np.array([0, 2]), np.zeros(2, np.int64))
    assert batch.inputs["input_ids"].tolist() == [[BOS, *A, EOS, EOS], [BOS, *B, EOS, EOS, EOS, EOS]]
    assert batch.inputs["attention_mask"].tolist() == [[1] * 6 + [0] * 2, [1] * 4 + [0] * 4]
    assert batch.targets["lm"].tolist() == [[*A, EOS, *[IGNORE] * 2], [*B, EOS, *[IGNORE] * 4]]
    assert [p.inputs["input_ids"].shape[1] for p in batch.split(1)] == [8, 4]
    assert made.describe() == (
        "causal language modelling: 3 documents, one a row with bos (id 2) before and eos (id 3) after each, padded; "
        "1 document cut at 8 tokens (13 tokens never seen)"
    )


def test_stream_says_what_it_does() -> None:
    assert clm([A, [], B, C], GPT2, context=4).describe() == (
        "causal language modelling: 3 documents end to end with end of text (id 3) before and after each, in 4 blocks "
        "of 4 tokens; documents in one block see each other; the last block has 3 tokens and is padded; "
        "1 empty document left out"
    )


SIZES = (0, 1, 2, 7, 8, 9, 10, 15, 16, 17)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("pack", ["stream", "documents", "none"])
@pytest.mark.parametrize("tokenizer", [LLAMA, GPT2, BARE], ids=["bos eos", "one token", "neither"])
def test_short_text_trains_or_is_refused(size: int, pack: str, tokenizer: FakeTokenizer) -> None:
    """DA-4: never zero samples, and the sentence names the count and the fix."""
    framed = size + len({tokenizer.special.get("bos"), tokenizer.special.get("eos")} - {None})
    answers = framed - 1 if tokenizer is not GPT2 else size + 1
    enough = size > 0 and answers >= (1 if pack == "none" else 8)
    for validation in (False, True):
        if enough or (validation and size > 0 and answers > 0):
            made = clm([tokens(size)], tokenizer, pack=pack, validation=validation)
            batch = everything(made)
            assert len(made) == (1 if pack == "none" else -(-answers // 8))
            assert batch.supervised()["lm"] == min(answers, 8 if pack == "none" else answers)
        else:
            with pytest.raises(
                UserError,
                match=r"the (validation )?text has \d+ tokens?( and nothing to predict|, and one block takes 8); ",
            ):
                clm([tokens(size)], tokenizer, pack=pack, validation=validation)


# Masked


def unmasked(sample: dict[str, np.ndarray], head: str = "targets.mlm") -> list[int]:
    text: list[int] = np.where(sample[head] == IGNORE, sample["input_ids"], sample[head]).tolist()
    return text


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


# Span corruption


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


# Pairs


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


# Refusals


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
