"""Objectives over small texts, for the tests of each kind."""

from __future__ import annotations

from typing import Any

import numpy as np
from fakes import FakeSplit, FakeTokenizer, tokens

from xtcli.data.batch import IGNORE, Batch
from xtcli.data.loader import validation_batches
from xtcli.objectives import CausalLM, MaskedLM, Objective, Pairs, SpanCorruption

PAD, UNK, BOS, EOS, CLS, SEP, MASK = range(7)
LLAMA = FakeTokenizer(unk=UNK, bos=BOS, eos=EOS)
GPT2 = FakeTokenizer(bos=EOS, eos=EOS)
BARE = FakeTokenizer()
BERT = FakeTokenizer(pad=PAD, unk=UNK, cls=CLS, sep=SEP, mask=MASK)
T5 = FakeTokenizer(pad=PAD, eos=EOS, unk=UNK, sentinels=8)


A, B, C = tokens(5, 20), tokens(3, 40), tokens(4, 60)


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


def unmasked(sample: dict[str, np.ndarray], head: str = "targets.mlm") -> list[int]:
    text: list[int] = np.where(sample[head] == IGNORE, sample["input_ids"], sample[head]).tolist()
    return text
