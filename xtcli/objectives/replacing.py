"""Replaced-token detection (Clark et al. 2020): a generator fills masks, a discriminator finds where it did not guess.

Rows and masks are those of masked language modelling; a chosen token is masked (85 %) or stays (15 %). Beside them a
sample has what the replacements are drawn by: `draws`, a random whole number in [0, 2^31) for each chosen place and -1
elsewhere. What is drawn then depends on the weights, the seed, the epoch and the sample alone: neither on how a batch
is split nor on what happened before, so that a run which goes on draws what it would have drawn.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from xtcli.data.batch import IGNORE
from xtcli.objectives.base import Sample, generator
from xtcli.objectives.mlm import MaskedLM
from xtcli.objectives.words import count
from xtcli.registry import field, part

RANGE = 2**31
DRAWS = 1
"""The use of a sample's random numbers that draws are; masks are use 0."""


@part("objective", "replaced-token")
class ReplacedTokens(MaskedLM):
    """`targets.mlm` (T,) at the chosen places, and `targets.replaced` (T,): what truly stands at each place."""

    class Config(MaskedLM.Config):
        """Replaced-token detection."""

        mask: float = field("share of the chosen tokens that become the mask token", 0.85, ge=0, le=1)
        random: float = field(
            "share of the chosen tokens that become a random token; the rest stay as they are", 0.0, ge=0, le=1
        )

    def sample(self, index: int, epoch: int) -> Sample:
        sample = super().sample(index, epoch)
        shown, hidden = sample["input_ids"], sample["targets.mlm"]
        chosen = hidden != IGNORE
        draws = generator(self.seed, epoch, index, DRAWS).integers(RANGE, size=shown.size)
        truth = np.where(chosen, hidden, shown)
        return sample | {"draws": np.where(chosen, draws, -1), "targets.replaced": truth}

    def describe(self) -> str:
        return f"replaced tokens: a generator fills the masks, and every token is asked after; {super().describe()}"

    def drawn(self, model: Any, tokenizer: Any, tokens: int) -> str:
        """One row: what was put in the place of what, how much each looks replaced, and how many were found."""
        import torch

        batch = self.batch(np.zeros(1, dtype=np.int64), np.zeros(1, dtype=np.int64)).to(model.device)
        with torch.no_grad():
            hidden = model.hidden(**batch.inputs)
            chances = model.heads["replaced"].outputs(hidden)["logits"][0].float().sigmoid().tolist()
        shown, truth = hidden.ids[0].tolist(), batch.targets["replaced"][0].tolist()
        places = [place for place, draw in enumerate(batch.inputs["draws"][0].tolist()) if draw >= 0]
        lines = [
            f"{tokenizer.decode([truth[place]]).strip()!r} -> {tokenizer.decode([shown[place]]).strip()!r}, "
            f"{chances[place]:.0%} replaced"
            for place in places[:tokens]
        ]
        rows = [(shown[at] != truth[at], chances[at] >= 0.5) for at in range(len(truth)) if truth[at] != IGNORE]
        found = [said for changed, said in rows if changed]
        false = [said for changed, said in rows if not changed]
        replaced = count(len(found), "replaced token")
        lines.append(f"{sum(found)} of {replaced} found, {sum(false)} of {len(false)} others named")
        return "\n".join(lines)

    def _fill(self, name: str) -> int:
        return -1 if name == "draws" else super()._fill(name)
