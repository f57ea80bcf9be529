"""Causal language modelling: each token from those before it, loss -log p(x[t+1] | x[..t]).

Documents are framed by what the tokenizer has: a bos in front, an eos behind, one token between them where both roles
are the same token (GPT-2's end of text). Block i of the joined text reads tokens [iT, iT + T) and answers
[iT + 1, iT + T + 1), so every token is answered exactly once an epoch and every document ends in a supervised eos.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from xtcli import registry
from xtcli.data.batch import IGNORE, Batch
from xtcli.data.order import Ints
from xtcli.errors import refuse
from xtcli.objectives.base import Array, Documents, Objective, Packing, Sample, Split, Tokenizer
from xtcli.objectives.joined import Joined, isolate
from xtcli.objectives.words import LANES, SHARED, clauses, count, left_out, too_little, too_short, truncated
from xtcli.registry import field, part


@part("objective", "clm")
class CausalLM(Objective):
    """Next-token prediction; the head's targets are (T,), aligned with `input_ids`."""

    class Config(registry.Config):
        """Next-token prediction."""

        pack: Packing = field(
            "stream: documents share blocks and see each other; documents: they share blocks and do not see each "
            "other; none: one document a row, cut at the context",
            "stream",
        )
        carry: bool = field(
            "pack stream: row b of a batch goes on where row b of the batch before ended, and the model remembers it",
            False,
        )
        multiple: int = field("pack none: rows are padded to the longest of a batch, rounded up to this many", 64, gt=0)

    def __init__(
        self,
        config: Config,
        split: Split,
        tokenizer: Tokenizer,
        *,
        context: int,
        seed: int,
        start: int | None = None,
        validation: bool = False,
        head: str = "lm",
    ) -> None:
        super().__init__(
            tokenizer,
            context=context,
            seed=seed,
            multiple=min(config.multiple, context) if config.pack == "none" else 0,
        )
        self.head, self.answer = head, f"targets.{head}"
        self.pack = config.pack
        self.carry = config.carry
        if config.carry and config.pack != "stream":
            raise refuse(f"carry is for pack=stream, and pack is {config.pack}", "set objective.pack=stream")
        bos, eos = self.special.get("bos"), self.special.get("eos")
        least = 1 if (bos is not None or eos is not None) else 2
        self.least = least if config.pack != "stream" else 1
        self.documents = Documents.of(split.streams["text"], self.least)
        self.one_token = bos is not None and bos == eos
        if config.pack == "stream":
            self.joined = Joined(self.documents, bos, None if self.one_token else eos, closed=self.one_token)
            answers = self.joined.total - 1
        else:
            self.joined = Joined(self.documents, bos, eos, ahead=1)
            answers = self.joined.total
        self.bos, self.eos = bos, eos
        self.masks = "always" if config.pack == "none" else "never"
        if not len(self.documents) or answers < 1:
            raise too_little(f"{count(self.documents.total, 'token')} and nothing to predict", validation)
        if config.pack != "none" and answers < context and not validation:
            remedy = f"give more text, or set objective.pack=none or train.context to {answers} or less"
            raise too_short(answers, context, remedy)
        self.answers = answers
        self.samples = len(self.documents) if config.pack == "none" else -(-answers // context)

    @classmethod
    def facts(cls, model: Any) -> dict[str, Any]:
        from xtcli.parts.heads import speaker

        return {"head": speaker(model.heads) or "lm"}

    def __len__(self) -> int:
        return self.samples

    def sample(self, index: int, epoch: int) -> Sample:
        arrays, lengths = self._rows(np.array([index], dtype=np.int64))
        row: Sample = {name: array[0, : lengths[0]] for name, array in arrays.items()}
        return row | {"id": np.array(index)}

    def batch(self, indices: Ints, epochs: Ints) -> Batch:
        if self.pack == "none":
            return super().batch(indices, epochs)
        arrays, lengths = self._rows(np.asarray(indices, dtype=np.int64))
        targets = {self.head: arrays.pop(self.answer)}
        return Batch.of(arrays, targets, indices.tolist(), lengths.tolist())

    def _rows(self, indices: Ints) -> tuple[dict[str, Array], Ints]:
        """Arrays (B, T) of the samples `indices`, and how many places of each row are text."""
        if self.pack == "none":
            offsets = np.broadcast_to(np.arange(self.context), (indices.size, self.context))
            lengths = np.minimum(self.joined.places[indices], self.context)
            documents = np.where(offsets < lengths[:, None], indices[:, None], -1)
        elif self.pack == "documents":
            documents, offsets = self.joined.locate(indices * self.context, self.context)
        else:
            return self._stream(indices)
        text = documents >= 0
        inputs = np.where(text, self.joined.tokens(documents, offsets), self.pad)
        targets = np.where(text, self.joined.tokens(documents, offsets + 1), IGNORE)
        arrays = {"input_ids": inputs, self.answer: targets}
        if self.pack == "documents":
            arrays |= isolate(documents, offsets)
        return arrays, text.sum(1)

    def _stream(self, indices: Ints) -> tuple[dict[str, Array], Ints]:
        documents, offsets = self.joined.locate(indices * self.context, self.context + 1)
        text = documents[:, 1:] >= 0
        tokens = self.joined.tokens(documents, offsets)
        inputs = np.where(text, tokens[:, :-1], self.pad)
        return {"input_ids": inputs, self.answer: np.where(text, tokens[:, 1:], IGNORE)}, text.sum(1)

    def describe(self) -> str:
        documents = count(len(self.documents), "document")
        if self.pack == "none":
            rows = [f"{documents}, one a row{self._frame()}, padded", truncated(self.joined.places, self.context)]
        else:
            blocks = f"{count(self.samples, 'block')} of {self.context:,} tokens"
            alone = "no document sees another (document ids; positions begin at 0 in each)"
            last = self.answers - (self.samples - 1) * self.context
            rows = [f"{documents} end to end{self._frame()}, in {blocks}"]
            rows += [LANES] if self.carry else []
            rows += [SHARED if self.pack == "stream" else alone]
            rows.append(f"the last block has {count(last, 'token')} and is padded" if last < self.context else "")
        return clauses("causal language modelling: " + rows[0], *rows[1:], left_out(self.documents, self.least))

    def _frame(self) -> str:
        if self.bos is None and self.eos is None:
            return " with nothing between them (the tokenizer has neither bos nor eos)"
        if self.one_token:
            return f" with end of text (id {self.eos}) before and after each"
        parts = [f"bos (id {self.bos}) before" if self.bos is not None else "", f"eos (id {self.eos}) after"]
        return " with " + " and ".join(p for p in (parts if self.eos is not None else parts[:1]) if p) + " each"
