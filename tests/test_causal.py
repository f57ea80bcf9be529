"""Causal language modelling: what becomes of each token, and of each document's end."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from fakes import FakeTokenizer, documents, tokens
from small_objectives import BARE, BOS, EOS, GPT2, LLAMA, A, B, C, clm, everything, rows

from xtcli.data.batch import IGNORE, Batch
from xtcli.errors import UserError
from xtcli.model import Model, build


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
