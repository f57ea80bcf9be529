"""Texts written and filled by models that count their places or read in blocks: together as alone."""

from __future__ import annotations

import pytest
import torch
from test_long import encoder
from tiny_models import decoder, make

from xtcli.data.tokenizers import Bytes
from xtcli.data.train_tokenizer import train
from xtcli.generate import Options, Sampling, generate

BYTES = train(Bytes.Config(), [])


def test_a_decoder_counts_on_from_its_state_whatever_stands_beside_it() -> None:
    model = make("decoder", decoder({"kind": "tokens", "positions": "counted"}), BYTES.vocab, pad=0)
    greedy = Options(max_tokens=9, sampling=Sampling(temperature=0))
    prompts = ["def ", "The quick brown fox", "x"]
    together = generate(model, BYTES, prompts, greedy)
    for row, prompt in enumerate(prompts):
        alone = generate(model, BYTES, [prompt], greedy)
        assert alone.written[0].tokens == together.written[row].tokens
        text = torch.tensor([BYTES.encode(prompt)])
        for token in alone.written[0].tokens:
            assert int(model(input_ids=text).logits[0, -1].argmax()) == token
            text = torch.cat((text, torch.tensor([[token]])), 1)


def test_masks_are_filled_beside_others_as_alone() -> None:
    tokenizer = train(Bytes.Config(special={"cls": "<s>", "pad": "<pad>", "sep": "</s>", "mask": "<mask>"}), [])
    for attn in ({"kind": "sliding-global", "radius": 2}, {"kind": "block-sparse", "block": 2, "random": 1}):
        model = encoder(attn, layers=2, vocab=tokenizer.vocab, pad=tokenizer.special["pad"])
        prompts = ["a<mask>b", "much longer <mask> than the other <mask>"]
        both = generate(model, tokenizer, prompts, Options(fill_top=3)).filled
        for row, prompt in enumerate(prompts):
            (alone,) = generate(model, tokenizer, [prompt], Options(fill_top=3)).filled
            for mine, theirs in zip(alone.masks, both[row].masks, strict=True):
                assert [guess.token for guess in mine] == [guess.token for guess in theirs]
                assert [guess.probability for guess in mine] == pytest.approx([g.probability for g in theirs], abs=1e-5)
