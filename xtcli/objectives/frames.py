"""Regression on a signal: each frame of numbers from those before it, loss (prediction - frame)^2.

The text's token ids, joined with nothing between documents, are read as the samples of a signal: id i of V becomes
2 i / (V - 1) - 1, and a frame is as many of them in a row as the model's vectors are wide. Frame t reads samples
[t W, t W + W) and answers the W behind them.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from xtcli import registry
from xtcli.data.batch import IGNORE, Batch
from xtcli.data.order import Ints
from xtcli.errors import refuse
from xtcli.objectives.base import Array, Documents, Objective, Sample, Split, Tokenizer
from xtcli.objectives.joined import Joined
from xtcli.objectives.words import SHARED, clauses, count, left_out, too_little, too_short
from xtcli.registry import part

PROMPT = 4
"""Frames that a sample of the signal goes on from."""


@part("objective", "frames")
class Frames(Objective):
    """The next frame; `input_values` and `targets.continuous` are (T, W), aligned."""

    textual = False

    class Config(registry.Config):
        """The next frame of a signal."""

    def __init__(
        self,
        config: Config,
        split: Split,
        tokenizer: Tokenizer,
        *,
        context: int,
        seed: int,
        width: int,
        start: int | None = None,
        validation: bool = False,
    ) -> None:
        super().__init__(tokenizer, context=context, seed=seed)
        self.wide, self.levels = width, max(tokenizer.vocab, 2)
        self.documents = Documents.of(split.streams["text"], 1)
        self.joined = Joined(self.documents)
        self.frames = self.joined.total // width - 1  # that are answered
        if self.frames < 1:
            raise too_little(f"{count(self.joined.total, 'token')}, less than two frames of {width}", validation)
        if self.frames < context and not validation:
            remedy = f"give more text, or set train.context to {self.frames} or less"
            raise too_short(self.joined.total, (context + 1) * width, remedy)
        self.samples = -(-self.frames // context)

    @classmethod
    def facts(cls, model: Any) -> dict[str, Any]:
        """Width of the model's vectors; raises UserError for a model of tokens or of two widths."""
        width = getattr(model.embed, "given", None)
        if width is None or "continuous" not in model.heads:
            raise refuse("the objective 'frames' needs vectors in and out", "use embed and head 'continuous'")
        answers = model.heads["continuous"].project
        if answers is not None and answers.out_features != width:
            raise refuse(
                f"frames of {width} numbers are answered by vectors of {answers.out_features}",
                f"set model.heads.continuous.width={width}",
            )
        return {"width": width}

    def __len__(self) -> int:
        return self.samples

    def sample(self, index: int, epoch: int) -> Sample:
        begin = index * self.context
        length = min(self.context, self.frames - begin)
        at = np.array([begin * self.wide], dtype=np.int64)
        documents, offsets = self.joined.locate(at, (length + 1) * self.wide)
        values = self.read(self.joined.tokens(documents, offsets)[0]).reshape(length + 1, self.wide)
        return {"input_values": values[:-1], "targets.continuous": values[1:], "id": np.array(index)}

    def collate(self, samples: list[Sample]) -> Batch:  # type: ignore[override]
        """Rows of `context` frames, what is missing in the last one 0 and not answered."""
        lengths = [len(sample["input_values"]) for sample in samples]
        shape = (len(samples), self.context, self.wide)
        inputs, targets = np.zeros(shape, np.float32), np.full(shape, IGNORE, np.float32)
        for row, (sample, length) in enumerate(zip(samples, lengths, strict=True)):
            inputs[row, :length] = sample["input_values"]
            targets[row, :length] = sample["targets.continuous"]
        ids = [int(sample["id"]) for sample in samples]
        return Batch.of({"input_values": inputs}, {"continuous": targets}, ids, lengths)

    def read(self, ids: Ints) -> Array:
        """Token ids as numbers in [-1, 1]."""
        return (2.0 * ids / (self.levels - 1) - 1.0).astype(np.float32)

    def written(self, values: Array) -> list[int]:
        """The nearest ids; the inverse of `read`."""
        nearest = np.rint((values.reshape(-1) + 1.0) / 2.0 * (self.levels - 1))
        found: list[int] = nearest.clip(0, self.levels - 1).astype(np.int64).tolist()
        return found

    def drawn(self, model: Any, tokenizer: Any, tokens: int) -> str:
        """The signal that the model goes on with from the first frames, as text."""
        import torch

        given = torch.from_numpy(self.sample(0, 0)["input_values"][:PROMPT])[None].to(model.device)
        steps = max(1, min(tokens // self.wide, self.context - PROMPT))
        state = model.new_state(1, PROMPT + steps)
        made, newest = [], given
        with torch.no_grad():
            for _ in range(steps):
                newest = model(input_values=newest, state=state).predictions[:, -1:]
                made.append(newest)
        signal = torch.cat((given, *made), dim=1).float().cpu().numpy()
        return str(tokenizer.decode(self.written(signal)))

    def describe(self) -> str:
        rows = f"{count(self.samples, 'block')} of {self.context:,} frames"
        return clauses(
            f"next frame of a signal: {count(self.wide, 'token id')} a frame, as numbers from -1 to 1",
            f"{count(len(self.documents), 'document')} end to end, nothing between them, in {rows}",
            SHARED,
            left_out(self.documents),
        )
