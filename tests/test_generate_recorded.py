"""A step that is recorded once and replayed computes what it computes anew: the host puts no number of its own into it.

The operators of one run, played again on the same memory, stand for a GPU's graph.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_generate_ahead import PROMPTS, STATIC
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from xtcli.fast import twins
from xtcli.fast.engine import Planned
from xtcli.fast.plan import plan
from xtcli.generate.engine import undisturbed
from xtcli.generate.feed import Feed
from xtcli.generate.static import MEMORY, Static
from xtcli.model import build
from xtcli.parts.seq2seq import EncoderDecoder

PLANNED = ["gpt2-small", "tinyllama-1.1b", "falcon-7b", "x-decoder"]
STEPS = 6


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("name", [*PLANNED, *STATIC])
def test_replays(name: str, rows: int) -> None:
    if rows > 1 and name in ("bloom-560m", "falcon-rw-1b"):
        pytest.skip("padded rows are refused")
    model = build(name, tiny=True, seed=1)
    both = isinstance(model, EncoderDecoder)
    prompts = PROMPTS if rows == 3 else PROMPTS[2:]
    with undisturbed(model):
        feed = Feed(model, [[1]] * rows if both else prompts, STEPS + 1, prompts if both else None)
        chosen = feed.start().argmax(-1)
        step: Any
        if name in PLANNED:
            step = Planned(plan(model, 40), rows, 40, twins)
        else:
            step = Static(model, rows, 40, twins, MEMORY if both else None, feed.pads is not None)

        def begin() -> None:
            step.begin(feed.state, chosen, feed.width, feed.pads)
            if feed.memory is not None:
                step.remember(feed.memory, feed.memory_mask)

        def run() -> Tensor:
            logits: Tensor = step.logits()
            step.likeliest(logits, model.vocab)
            return logits

        begin()
        recorded = make_fx(run)()
        found = []
        for again in (recorded, run):
            begin()
            found.append([again().clone() for _ in range(STEPS)])
            found[-1].append(step.said[feed.width + 1 : feed.width + STEPS + 1].clone())
    replayed, anew = found
    for one, other in zip(replayed, anew, strict=True):
        assert torch.equal(one, other)
    assert not torch.equal(replayed[0], replayed[STEPS - 1]), "what is read must matter"
