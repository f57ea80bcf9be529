"""Permutation language modelling (Yang et al. 2019, arXiv:1906.08237): late tokens of a random order from earlier ones.

    row       [stream | A [SEP] B [SEP] [CLS]]    the stream is what a model with `reuse` remembers for the next row
    targets   spans of 1 ... `longest` tokens, n with a chance of 1 / n, in contexts `targets`^-1 times as long
    order     random in each of the two parts; the second part comes after the first

Tokens that are neither targets nor special come first in every order and see one another. A target sees those, and the
targets and special tokens before it in the order; so does a special token. `perm_mask` (T, T) is 1 where i may not
see j, `target_mapping` (P, T) says where the P targets are. B follows A in half of the rows, else it is from elsewhere.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from xtcli import registry
from xtcli.data.batch import IGNORE, Batch
from xtcli.data.order import Ints
from xtcli.errors import refuse
from xtcli.objectives.base import Array, Documents, Objective, Sample, Split, Tokenizer, generator
from xtcli.objectives.joined import Joined
from xtcli.objectives.words import LANES, clauses, count, left_out, repeated, too_little, too_short
from xtcli.registry import field, part

SMALLEST = 8
"""Tokens of the smallest part with two texts: three markers, and some text of both."""


@part("objective", "permutation")
class Permutation(Objective):
    """The targets of a random order (`targets.lm`, (P,)); inputs of a model of two streams."""

    class Config(registry.Config):
        """Permutation language modelling."""

        targets: float = field("share of the places that are predicted", 1 / 6, gt=0, le=0.5)
        longest: int = field("tokens of the longest span of targets", 5, gt=0)
        carry: bool = field(
            "row b of a batch goes on where the stream of row b of the batch before ended, and the model remembers it",
            False,
        )
        both_ways: bool = field("every text is also read from its end, in rows of their own", False)

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
        reuse: int | None = None,
        segments: bool = True,
        backwards: bool = False,
        ordered: bool = True,
    ) -> None:
        super().__init__(tokenizer, context=context, seed=seed)
        self.config, self.carry, self.segments = config, config.carry, segments
        if not ordered:
            raise refuse("the objective 'permutation' needs a model of two streams", "set model.stack.kind=two-stream")
        if config.both_ways and not backwards:
            raise refuse(
                "the objective reads both ways, and the model's positions know only one",
                "set model.stack.position.mirrored=true, or objective.both_ways=false",
            )
        if config.both_ways and config.carry:
            raise refuse(
                "a row that goes on cannot turn around", "set objective.both_ways=false, or objective.carry=false"
            )
        self.cls, self.sep = self.need("cls", "sep", why="permutation language modelling")
        stream = context if config.carry and reuse is None else reuse or 0
        self.stream = context if context - stream < SMALLEST else stream
        if context < SMALLEST:
            raise refuse(
                f"a context of {context} tokens leaves no room for text", f"set train.context to {SMALLEST} or more"
            )
        self.texts = max(context - self.stream - 3, 0)
        self.step = self.stream or self.texts
        self.documents = Documents.of(split.streams["text"])
        self.joined = Joined(self.documents, None, self.special.get("eos", self.sep))
        total, need = self.joined.total, self.stream + self.texts
        if total < need:
            if validation:
                raise too_little(f"{count(total, 'token')}, and one row takes {need:,}", validation)
            raise too_short(total, need, f"give more text, or set train.context to {max(total - 3, SMALLEST)} or less")
        self.goal = max(1, round(context * config.targets))

    @classmethod
    def facts(cls, model: Any) -> dict[str, Any]:
        from xtcli.parts.twostream import in_streams

        recurrence = getattr(model, "recurrence", None)
        return {
            "reuse": None if recurrence is None else recurrence.reuse,
            "segments": getattr(model.embed, "segments_pass", False),
            "backwards": "backwards" in model.accepts,
            "ordered": in_streams(model),
        }

    @property
    def once(self) -> int:
        """Rows that read the text in one direction."""
        return max(
            1, (self.joined.total - self.texts) // self.step if self.stream else -(-self.joined.total // self.step)
        )

    def __len__(self) -> int:
        return self.once * (2 if self.config.both_ways else 1)

    def sample(self, index: int, epoch: int) -> Sample:
        rng = generator(self.seed, epoch, index)
        turned, number = divmod(index, self.once)
        tokens, types, special = self._row(number, bool(turned), rng)
        chosen = np.zeros(self.context, dtype=bool)
        halves = [(0, self.stream), (self.stream, self.context)]
        parts = [(begin, end) for begin, end in halves if end > begin]
        left = self.goal
        for place, (begin, end) in enumerate(parts):
            share = left if place == len(parts) - 1 else self.goal * (end - begin) // self.context
            chosen[begin:end] = self._spans(~special[begin:end], share, rng)
            left -= int(chosen[begin:end].sum())
        hidden = np.zeros((self.context, self.context), dtype=np.int64)
        for begin, end in parts:
            hidden[begin:end, begin:end] = order(chosen[begin:end], special[begin:end], rng)
            hidden[begin:end, end:] = 1
        places = np.flatnonzero(chosen)
        mapping = np.zeros((self.goal, self.context), dtype=np.int64)
        mapping[np.arange(places.size), places] = 1
        targets = np.full(self.goal, IGNORE, dtype=np.int64)
        targets[: places.size] = tokens[places]
        row: Sample = {"input_ids": tokens, "perm_mask": hidden, "target_mapping": mapping, "targets.lm": targets}
        if self.segments:
            row["token_type_ids"] = types
        if self.config.both_ways:
            row["backwards"] = np.array(turned)
        return row | {"id": np.array(index)}

    def batch(self, indices: Ints, epochs: Ints) -> Batch:
        samples = [self.sample(int(i), int(e)) for i, e in zip(indices, epochs, strict=True)]
        made: dict[str, Array] = {name: np.stack([row[name] for row in samples]) for name in samples[0] if name != "id"}
        answers = {"lm": made.pop("targets.lm")}
        return Batch.of(made, answers, indices.tolist(), [self.context] * len(samples))

    def _row(self, number: int, turned: bool, rng: np.random.Generator) -> tuple[Ints, Ints, Array]:
        """Tokens (T,), their segments, and which of them are special."""
        begin = number * self.step
        pieces, types = [self._read(begin, self.stream, turned)], [np.zeros(self.stream, dtype=np.int64)]
        special = [np.zeros(self.stream, dtype=bool)]
        if self.texts:
            begin = begin + self.stream if self.stream else begin
            begin = min(begin, self.joined.total - self.texts)
            cut = int(rng.integers(1, self.texts))
            size = self.texts - cut
            second = begin + cut
            if rng.random() >= 0.5:
                second = int(rng.integers(self.joined.total - size + 1))
            marks = [np.array([self.sep]), np.array([self.sep]), np.array([self.cls])]
            pieces += [self._read(begin, cut, turned), marks[0], self._read(second, size, turned), *marks[1:]]
            types += [np.zeros(cut + 1, dtype=np.int64), np.ones(size + 1, dtype=np.int64), np.full(1, 2)]
            special += [np.arange(cut + 1) == cut, np.arange(size + 1) == size, np.ones(1, dtype=bool)]
        return np.concatenate(pieces), np.concatenate(types), np.concatenate(special)

    def _read(self, begin: int, width: int, turned: bool) -> Ints:
        """`width` tokens from `begin` on, counted and read from the end of the text where it is `turned`."""
        if not width:
            return np.zeros(0, dtype=np.int64)
        at = self.joined.total - begin - width if turned else begin
        tokens: Ints = self.joined.tokens(*self.joined.locate(np.array([at], dtype=np.int64), width))[0]
        return tokens[::-1].copy() if turned else tokens

    def _spans(self, text: Array, goal: int, rng: np.random.Generator) -> Array:
        """Which places are targets: spans with context around them, then single ones until there are `goal`."""
        chosen = np.zeros(text.size, dtype=bool)
        goal = min(goal, int(text.sum()) - 1)
        sizes = np.arange(1, self.config.longest + 1)
        around = round(1 / self.config.targets)
        at = left = 0
        while at < text.size and left < goal:
            size = min(int(rng.choice(sizes, p=(1 / sizes) / (1 / sizes).sum())), goal - left)
            before = int(rng.integers(size * around))
            begin = at + before
            chosen[begin : begin + size] = text[begin : begin + size]
            at = begin + size + size * around - before
            left = int(chosen.sum())
        free = np.flatnonzero(text & ~chosen)
        chosen[rng.permutation(free)[: max(goal - left, 0)]] = True
        return chosen

    def describe(self) -> str:
        rows = f"{count(self.goal, 'target')} of {self.context:,} places, in spans of up to {self.config.longest}"
        form = f"{self.stream:,} tokens of the text end to end" if self.stream else ""
        if self.texts:
            pair = f"A [SEP] B [SEP] [CLS] with {count(self.texts, 'token')} of text, B from elsewhere in half of them"
            form = f"{form}, then {pair}" if form else pair
        return clauses(
            f"permutation language modelling: {rows}, in an order chosen anew each epoch",
            f"{count(len(self.documents), 'document')} in {count(len(self), 'row')}: {form}",
            LANES if self.carry else "",
            "half of the rows read the text from its end" if self.config.both_ways else "",
            "" if self.stream else repeated(self.once, self.step, self.joined.total),
            left_out(self.documents),
        )


def order(chosen: Array, special: Array, rng: np.random.Generator) -> Ints:
    """1 where i may not see j, (T, T), in a random order of the places that are `chosen` or `special`."""
    late = chosen | special
    rank = np.where(late, rng.permutation(chosen.size), -1)
    # A target may not see itself; a special token may.
    own = np.where(chosen, rank, rank + 1)
    return ((own[:, None] <= rank[None, :]) & late[None, :]).astype(np.int64)
