"""Whole generations: rows alone and together, seeds, streams, stop strings, limits, and what is left untouched."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import CONTEXT, DECODERS, ENCODER, PAIR, lively, make

from xtcli.data.tokenizers import Bytes, Tokenizer, Unigram, WordPiece
from xtcli.data.train_tokenizer import train
from xtcli.errors import UserError
from xtcli.generate import Answer, Options, Sampling, Written, generate, task_of
from xtcli.generate.decode import Piece
from xtcli.model import Model

BYTES = train(Bytes.Config(), [])
VOCAB = BYTES.vocab
GREEDY = Sampling(temperature=0)
HOT = Sampling(temperature=1.5, top_p=1.0)
PROMPTS = ["def ", "x", "The quick brown fox", "\u65e5\u672c"]


def texts(answer: Answer) -> list[str]:
    return [written.text for written in answer.written]


def facts(written: Written) -> tuple[str, list[int], str]:
    return written.text, written.tokens, written.finish


def write(model: Model, *prompts: str, tokenizer: Tokenizer = BYTES, **options: Any) -> Answer:
    return generate(model, tokenizer, prompts, Options(**{"max_tokens": 24} | options))


@pytest.mark.parametrize("sampling", [GREEDY, HOT, Sampling(repetition_penalty=1.3, top_k=9)], ids=str)
@pytest.mark.parametrize("name", ["learned", "rotary-dynamic", "alibi", "window", "t5-bias"])
def test_rows_do_not_know_each_other(name: str, sampling: Sampling) -> None:
    model = lively(name, VOCAB)
    together = write(model, *PROMPTS, sampling=sampling, seed=7)
    assert [written.prompt for written in together.written] == PROMPTS
    for row, prompt in enumerate(PROMPTS):
        # Row i of any batch has the random numbers of (seed, i), so it stands at place i here too.
        alone = write(model, *["z"] * row, prompt, sampling=sampling, seed=7)
        assert facts(alone.written[row]) == facts(together.written[row])


def test_rows_that_end_early_leave_the_others_alone() -> None:
    model, prompts = lively("rotary", VOCAB), ["a" * 60, "hello", "b" * 61, "c" * 30]
    for sampling in (Sampling(temperature=0, repetition_penalty=1.6), HOT):
        together = write(model, *prompts, sampling=sampling, seed=1, max_tokens=99)
        sizes = [len(written.tokens) for written in together.written]
        assert sizes[2] == 3 and sizes[0] == 4 and min(sizes[1], sizes[3]) > 30
        for row, prompt in enumerate(prompts):
            alone = write(model, *["z"] * row, prompt, sampling=sampling, seed=1, max_tokens=99)
            assert facts(alone.written[row]) == facts(together.written[row])


def test_samples_of_a_prompt() -> None:
    model = lively("rotary", VOCAB)
    four = write(model, "ab", sampling=HOT, seed=3, samples=4)
    assert len(set(texts(four))) == 4
    assert [written.sample for written in four.written] == [0, 1, 2, 3]
    two = write(model, "ab", sampling=HOT, seed=3, samples=2)
    assert texts(four)[:2] == texts(two)
    both = write(model, "ab", "q", sampling=HOT, seed=3, samples=2)
    assert texts(both)[:2] == texts(two)


def test_seeds() -> None:
    model = lively("learned", VOCAB)
    first = write(model, "ab", sampling=HOT)
    assert first.seed is not None
    assert texts(write(model, "ab", sampling=HOT, seed=first.seed)) == texts(first)
    assert texts(write(model, "ab", sampling=HOT, seed=first.seed + 1)) != texts(first)
    assert write(model, "ab", sampling=HOT).seed != first.seed
    assert write(model, "ab", sampling=GREEDY).seed is None


@pytest.mark.parametrize("sampling", [GREEDY, HOT], ids=str)
def test_stream_joined_is_the_text(sampling: Sampling) -> None:
    """On tokens that are bytes, most of them no whole characters."""
    model = lively("learned", VOCAB)
    heard: dict[int, list[str]] = {}
    prompts = [f"{n}" for n in range(40)]
    options = Options(max_tokens=30, sampling=sampling, seed=1)
    done = []

    def hear(piece: Piece) -> None:
        assert piece.row not in done
        heard.setdefault(piece.row, []).append(piece.text)
        done.extend([piece.row] * piece.done)

    answer = generate(model, BYTES, prompts, options, hear)
    assert sorted(done) == list(range(40))
    for row, written in enumerate(answer.written):
        assert "".join(heard[row]) == written.text
        assert written.text == BYTES.decode([id for id in written.tokens if id != 256])


@pytest.mark.parametrize("name", ["learned", "rotary"])
def test_every_substring_as_stop_string(name: str) -> None:
    model = lively(name, VOCAB, seed=2)
    sampling = Sampling(temperature=0.7, top_k=40)
    whole = write(model, "ab", sampling=sampling, seed=5, max_tokens=14).written[0]
    pieces = {whole.text[a:b] for a in range(len(whole.text)) for b in range(a + 1, len(whole.text) + 1)}
    for stop in sorted(pieces):
        found = write(model, "ab", sampling=sampling, seed=5, max_tokens=14, stop=(stop,)).written[0]
        assert found.text == whole.text[: whole.text.index(stop)]
        assert found.finish == "stop"
        assert found.tokens == whole.tokens[: len(found.tokens)]


def test_stop_ends_one_row_only() -> None:
    model = lively("learned", VOCAB)
    whole = texts(write(model, *PROMPTS, sampling=HOT, seed=1))
    stop = whole[1][3:5]
    answer = write(model, *PROMPTS, sampling=HOT, seed=1, stop=(stop,))
    assert texts(answer) == [text.split(stop)[0] for text in whole]
    assert [w.finish == "stop" for w in answer.written] == [stop in text for text in whole]


class TestEnds:
    """An end token ends a row and is not printed; the tokens keep it."""

    def test_eos(self) -> None:
        model = lively("learned", VOCAB)
        with torch.no_grad():
            model.heads["lm"].decoder.weight[256] *= 4  # type: ignore[union-attr, index]
        answer = write(model, *PROMPTS, sampling=HOT, seed=2, max_tokens=40)
        ended = [written for written in answer.written if written.finish == "eos"]
        assert ended
        for written in ended:
            assert written.tokens[-1] == 256 and 256 not in written.tokens[:-1]
            assert "endoftext" not in written.text

    @pytest.mark.parametrize("name", DECODERS)
    def test_context(self, name: str) -> None:
        answer = write(lively(name, VOCAB), "abcd", "z" * 50, sampling=GREEDY, max_tokens=1000)
        for written, size in zip(answer.written, (4, 50), strict=True):
            assert written.finish == "context"
            assert written.prompt_tokens == size and len(written.tokens) == CONTEXT - size

    def test_length(self) -> None:
        answer = write(lively("rotary", VOCAB), "abcd", sampling=GREEDY, max_tokens=CONTEXT - 4)
        assert answer.written[0].finish == "length" and len(answer.written[0].tokens) == CONTEXT - 4

    def test_past_the_context(self) -> None:
        answer = write(lively("rotary-dynamic", VOCAB), "abcd", sampling=GREEDY, max_tokens=80, past_context=True)
        assert answer.written[0].finish == "length" and len(answer.written[0].tokens) == 80
        assert answer.notes == [
            "from 65 tokens on earlier ones change whenever one follows, so each step reads the whole text"
        ]
        learned = write(lively("learned", VOCAB), "abcd", sampling=GREEDY, max_tokens=80, past_context=True)
        assert learned.written[0].finish == "context" and len(learned.written[0].tokens) == 60


def test_rows_near_the_limit_keep_their_room() -> None:
    """A short prompt beside one that nearly fills the context is written as far as it would be alone."""
    model, prompts = lively("learned", VOCAB), ["a" * 60, "b", "c" * 33, "d" * 60]
    together = write(model, *prompts, sampling=GREEDY, max_tokens=50)
    for row, prompt in enumerate(prompts):
        assert facts(together.written[row]) == facts(write(model, prompt, sampling=GREEDY, max_tokens=50).written[0])


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        (["a" * 64], "the prompt: has 64 tokens, which leaves no room for a new one: the model takes 64; shorten it"),
        (
            ["ok", "a" * 99],
            "prompt 2: has 99 tokens, which leaves no room for a new one: the model takes 64; shorten it",
        ),
    ],
)
def test_prompt_that_is_too_long(prompts: list[str], message: str) -> None:
    with pytest.raises(UserError) as caught:
        write(lively("learned", VOCAB), *prompts)
    assert str(caught.value) == message
    with pytest.raises(UserError) as caught:
        write(lively("rotary", VOCAB), *prompts)
    assert str(caught.value) == message + ", or allow more with --past-context"


def test_empty_prompt_begins_a_document() -> None:
    answer = write(lively("rotary", VOCAB), "", sampling=GREEDY)
    assert answer.written[0].prompt_tokens == 1
    bare = train(Bytes.Config(special={}), [])
    with pytest.raises(UserError, match="the prompt: is empty, and the tokenizer has no token that begins a text"):
        write(lively("rotary", VOCAB), "", tokenizer=bare)


@pytest.mark.parametrize(
    ("options", "place"),
    [
        ({"max_tokens": 0}, "--max-tokens"),
        ({"samples": 0}, "--samples"),
        ({"beams": -1}, "--beams"),
        ({"seed": -1}, "--seed"),
        ({"seed": 2**63}, "--seed"),
        ({"stop": ("a", "")}, "--stop"),
        ({"samples": 2, "sampling": GREEDY}, "--samples"),
        ({"samples": 5, "beams": 4}, "--samples"),
        ({"beams": 4, "sampling": HOT}, "--beams"),
        ({"beams": 4, "lens": 3}, "--lens"),
    ],
)
def test_impossible_options(options: dict[str, Any], place: str) -> None:
    with pytest.raises(UserError) as caught:
        Options(**options)
    assert [problem.place for problem in caught.value.problems] == [place]


@pytest.mark.parametrize("training", [True, False])
def test_training_goes_on_as_if_nothing_had_been(training: bool) -> None:
    model = lively("learned", VOCAB).train(training)
    model.stack.norm.eval()  # type: ignore[union-attr]
    before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()  # type: ignore[index]
    modes = [module.training for module in model.modules()]
    answer = write(model, "ab", sampling=HOT, seed=1)
    write(model, "ab", sampling=HOT)
    after = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()  # type: ignore[index]
    assert torch.equal(before[0], after[0]) and before[1:] == after[1:]
    assert [module.training for module in model.modules()] == modes
    assert texts(answer) == texts(write(model.eval(), "ab", sampling=HOT, seed=1))
    with pytest.raises(UserError):
        write(model.train(), "a" * 99)
    assert all(module.training for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_lens() -> None:
    model = lively("rotary", VOCAB)
    written = write(model, "ab", sampling=GREEDY, lens=3).written[0]
    assert [choice.token for choice in written.choices] == written.tokens
    for choice in written.choices:
        assert choice.likeliest[0] == (choice.token, choice.probability)
        assert len(choice.likeliest) == 3
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([BYTES.encode("ab")])).logits[0, -1]
    assert written.choices[0].probability == pytest.approx(float(logits.softmax(-1).max()), abs=1e-6)


def test_only_tokens_with_a_text_are_written() -> None:
    model = lively("rotary", VOCAB + 100)
    answer = write(model, *PROMPTS, sampling=Sampling(temperature=5.0, top_p=1.0), seed=0)
    assert max(max(written.tokens) for written in answer.written) < VOCAB


def test_tokenizer_of_another_model() -> None:
    with pytest.raises(UserError, match="the tokenizer gives id 122, the model knows ids below 100"):
        write(lively("rotary", 100), "xyz")


def test_logits_that_are_no_numbers() -> None:
    model = lively("learned", VOCAB)
    with torch.no_grad():
        model.embed.tokens.weight[97] = float("nan")  # type: ignore[union-attr, index]
    for options in ({"sampling": GREEDY}, {"sampling": HOT}, {"beams": 2}):
        with pytest.raises(UserError, match="the model's logits are not numbers"):
            write(model, "a", **options)


@pytest.mark.parametrize("options", [{}, {"sampling": HOT, "seed": 4}, {"beams": 3, "samples": 2}], ids=str)
def test_seq2seq(options: dict[str, Any]) -> None:
    model = make("encoder-decoder", PAIR, VOCAB)
    assert task_of(model) == "map"
    together = write(model, *PROMPTS, **options)
    count = options.get("samples", 1)
    for row, prompt in enumerate(PROMPTS):
        alone = write(model, *["z"] * row, prompt, **options)
        for sample in range(count):
            at = row * count + sample
            assert facts(alone.written[at]) == facts(together.written[at])
    assert together.written[0].prompt_tokens == len("def ") + 1
    whole = write(model, "ab", max_tokens=1000).written[0]
    assert whole.finish == "context" and len(whole.tokens) == CONTEXT - 1


def test_beams_equal_alone_and_together() -> None:
    model = lively("learned", VOCAB)
    together = write(model, *PROMPTS, beams=3, samples=2)
    for row, prompt in enumerate(PROMPTS):
        alone = write(model, prompt, beams=3, samples=2)
        assert [facts(w) for w in alone.written] == [facts(w) for w in together.written[2 * row : 2 * row + 2]]
        first, second = alone.written
        assert first.score is not None and second.score is not None and first.score >= second.score


WORDS = ["the cat sat on the mat", "a dog ate the cat", "cats and dogs and mats"] * 20


class TestFill:
    """Masked models."""

    tokenizer = train(WordPiece.Config(vocab=90), WORDS)
    model = make("encoder", ENCODER, 95)

    def test_probabilities(self) -> None:
        answer = write(self.model, "the [MASK] sat", "a [MASK] ate the [MASK] on", tokenizer=self.tokenizer, fill_top=4)
        assert answer.task == "fill" and not answer.written
        assert [len(filled.masks) for filled in answer.filled] == [1, 2]
        special = self.tokenizer.special
        ids = self.tokenizer.encode("the"), self.tokenizer.encode("sat")
        row = [special["cls"], *ids[0], special["mask"], *ids[1], special["sep"]]
        with torch.no_grad():
            logits = self.model(input_ids=torch.tensor([row])).logits[0, 1 + len(ids[0]), : self.tokenizer.vocab]
        best = logits.softmax(-1).topk(4)
        guesses = answer.filled[0].masks[0]
        assert [guess.token for guess in guesses] == best.indices.tolist()
        assert [guess.probability for guess in guesses] == pytest.approx(best.values.tolist(), abs=1e-6)

    def test_together_as_alone(self) -> None:
        prompts = ["the [MASK] sat", "[MASK]", "a dog ate the cat and the [MASK] and [MASK]"]
        together = write(self.model, *prompts, tokenizer=self.tokenizer).filled
        for prompt, filled in zip(prompts, together, strict=True):
            alone = write(self.model, prompt, tokenizer=self.tokenizer).filled[0]
            assert alone.text == filled.text and "[MASK]" not in filled.text
            for ours, theirs in zip(alone.masks, filled.masks, strict=True):
                assert [guess.token for guess in ours] == [guess.token for guess in theirs]

    def test_own_mask_string(self) -> None:
        roles = {"pad": "<pad>", "unk": "<unk>", "cls": "<s>", "sep": "</s>", "mask": "<mask>"}
        tokenizer = train(WordPiece.Config(vocab=90, special=roles), WORDS)
        own = write(self.model, "the <mask> sat", tokenizer=tokenizer).filled[0]
        assert own.masks == write(self.model, "the [MASK] sat", tokenizer=tokenizer).filled[0].masks

    @pytest.mark.parametrize(
        ("prompt", "message"),
        [
            ("the cat", "the prompt: has no mask; write [MASK] for what is to be filled"),
            ("[MASK] " + "the " * 80, "the prompt: has 83 tokens, the model takes 64; shorten it"),
        ],
    )
    def test_refused(self, prompt: str, message: str) -> None:
        with pytest.raises(UserError) as caught:
            write(self.model, prompt, tokenizer=self.tokenizer)
        assert str(caught.value) == message

    def test_tokenizer_without_mask(self) -> None:
        with pytest.raises(UserError, match="the tokenizer has no mask token"):
            write(make("encoder", ENCODER, VOCAB), "the [MASK]")


@pytest.mark.parametrize(
    ("graph", "config", "message"),
    [
        ("decoder", {**DECODERS["learned"], "heads": {}}, "the model has no language-model head"),
        ("encoder", {**ENCODER, "heads": {}}, "has no head that fills masks (heads: none)"),
        ("encoder-decoder", {**PAIR, "heads": {}}, "the model has no language-model head (heads: none)"),
    ],
)
def test_model_without_a_head_for_text(graph: str, config: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        write(make(graph, config, VOCAB), "a")
    assert message in str(caught.value)


def test_sentinels_in_a_source() -> None:
    tokenizer = train(Unigram.Config(vocab=90, sentinels=4), WORDS)
    from xtcli.generate.prompts import Reach, to_read

    text = "the <extra_id_0> sat <extra_id_1> mat"
    ids = to_read(tokenizer, [text], Reach(None, None))[0].ids
    first, second = tokenizer.sentinels[:2]
    word = tokenizer.encode
    assert ids == [*word("the"), first, *word(" sat"), second, *word(" mat"), tokenizer.special["eos"]]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("options", [{"sampling": GREEDY}, {"sampling": HOT, "seed": 1}, {"beams": 3}], ids=str)
@pytest.mark.parametrize("name", ["learned", "rotary-dynamic"])
def test_gpu_writes_as_the_cpu(name: str, options: dict[str, Any]) -> None:
    wanted = texts(write(lively(name, VOCAB), *PROMPTS, **options))
    assert texts(write(lively(name, VOCAB).to("cuda"), *PROMPTS, **options)) == wanted
