"""Masked words and masked entities (Yamada et al. 2020, LUKE, arXiv:2010.01057), on text whose entities nobody marked.

The paper's entities are the links of Wikipedia. Plain text has none: here the entities are the names that occur most
often in the data, and a mention is every place where one of them stands as a whole word. A name is a capitalised word,
or an identifier with an underscore or a capital inside, of at least three characters. Which names have a row in the
entity table is settled when training starts and written to the run's preset, since without it the rows mean nothing.

Words are hidden as in mlm.py. Of the mentions of a row at most `most` are taken, at random where there are more;
round(hide * count) of them, at least one, become the hidden entity, and the model must name them. Masks of words and
of entities are drawn apart: what hides an entity need not hide its words. All is drawn anew in every epoch.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

import numpy as np
from pydantic import Strict, model_validator

from xtcli import registry
from xtcli.data.batch import IGNORE, Batch
from xtcli.data.order import Ints
from xtcli.errors import refuse
from xtcli.objectives.base import Sample, Split, Tokenizer, generator
from xtcli.objectives.masking import continuations
from xtcli.objectives.mlm import MaskedLM
from xtcli.objectives.words import clauses, count
from xtcli.registry import field, part

if TYPE_CHECKING:
    from xtcli.config.preset import Resolved

HIDDEN, FIRST = 2, 3
"""Rows of the entity table: the hidden entity, and the first that has a name; 0 is padding, 1 an unknown one."""
WORD = re.compile(r"\w+")
SHORTEST = 3
"""Characters of the shortest name."""
MARKS = ("entity_ids", "entity_position_ids", "entity_attention_mask", "targets.mep")


@part("objective", "masked-entities")
class MaskedEntities(MaskedLM):
    """Masked tokens (`targets.mlm`, (T,)) and masked entities (`targets.mep`, (E,)), with E = `most` in every row."""

    class Config(registry.Config):
        """Masked words and masked entities."""

        probability: float = field("share of the tokens that are chosen and supervised", 0.15, gt=0, le=1)
        mask: float = field("share of the chosen tokens that become the mask token", 0.8, ge=0, le=1)
        random: float = field(
            "share of the chosen tokens that become a random token; the rest stay as they are", 0.1, ge=0, le=1
        )
        whole_word: bool = field("hide all tokens of a word together", True)
        ngram: int = field(
            "hide up to this many neighbours together, n of them with a chance that falls as 1 / n", 1, ge=1
        )
        pack: Literal["stream", "none"] = field(
            "stream: documents share rows and see each other; none: one document a row, cut at the context", "stream"
        )
        entities: int = field("names that count as entities: the most frequent ones of the data", 10000, gt=0, tiny=64)
        names: Annotated[tuple[str, ...], Strict(False)] | None = field(
            "the entities in the order of their rows; null: collected from the data", None
        )
        sample: int = field("MiB of text that they are collected from", 64, gt=0)
        hide: float = field("share of the mentions of a row that are hidden", 0.15, gt=0, le=1)
        most: int = field("mentions of a row", 32, gt=0, tiny=8)
        longest: int = field("tokens of a mention whose places the model is told", 30, gt=0, tiny=8)

        pairs: ClassVar[bool] = False
        multiple: ClassVar[int] = 0
        head: ClassVar[str] = "mlm"

        @property
        def supervised(self) -> float:
            """Share of the places that have a target."""
            return self.probability

        @model_validator(mode="after")
        def _agree(self) -> Self:
            if self.mask + self.random > 1:
                raise ValueError(f"mask + random is {self.mask + self.random:g}, and shares add up to 1 at most")
            return self

    def __init__(
        self,
        config: Any,
        split: Split,
        tokenizer: Tokenizer,
        *,
        context: int,
        seed: int,
        start: int | None = None,
        validation: bool = False,
        rows: int | None = None,
    ) -> None:
        super().__init__(config, split, tokenizer, context=context, seed=seed, start=start, validation=validation)
        if rows is None:
            raise refuse(
                "the objective 'masked-entities' needs a model that reads entities", "set model.stack.kind=entities"
            )
        if config.names is None:
            raise AssertionError("the names are settled before")
        if len(config.names) + FIRST > rows:
            raise refuse(
                f"objective.names has {count(len(config.names), 'name')}, the model {rows:,} rows for entities, "
                f"{FIRST} of them for none, unknown and hidden ones",
                f"set model.stack.entities.vocab={len(config.names) + FIRST}",
            )
        self.mentions = Mentions(tokenizer, config.names)

    @classmethod
    def prepare(cls, resolved: Resolved, model: Any) -> tuple[Resolved, Any, Any]:
        from xtcli.data.prepare import take_sample
        from xtcli.data.sources import open_source

        resolved, tokenizer, store = super().prepare(resolved, model)
        preset = resolved.preset
        config: Any = preset.objective
        rows = cls.facts(model)["rows"]
        if config.names is not None or rows is None:
            return resolved, tokenizer, store
        texts, _ = take_sample(open_source(preset.data, cls.streams), config.sample << 20)
        names = frequent(texts, min(config.entities, rows - FIRST))
        if not names:
            cause = "the text has no names: no capitalised word, and no identifier with '_' or a capital inside"
            raise refuse(
                cause, "state objective.names, or set objective=mlm", place=resolved.place("data"), path="data"
            )
        config = config.model_copy(update={"names": names})
        return replace(resolved, preset=preset.model_copy(update={"objective": config})), tokenizer, store

    @classmethod
    def facts(cls, model: Any) -> dict[str, Any]:
        table = getattr(getattr(model, "stack", None), "entity_table", None)
        return {"rows": None if table is None else table[0]}

    def sample(self, index: int, epoch: int) -> Sample:
        rng = generator(self.seed, epoch, index, use=1)
        found = self.mentions.find(self._row(index, rng)[0])
        config: Any = self.config
        kept = np.sort(rng.permutation(len(found))[: config.most])
        ids, targets = np.zeros(config.most, dtype=np.int64), np.full(config.most, IGNORE, dtype=np.int64)
        places = np.full((config.most, config.longest), -1, dtype=np.int64)
        for slot, number in enumerate(kept):
            ids[slot], begin, end = found[number]
            end = min(end, begin + config.longest)
            places[slot, : end - begin] = np.arange(begin, end)
        real = (np.arange(config.most) < kept.size).astype(np.int64)
        if kept.size:
            hidden = rng.permutation(kept.size)[: max(1, int(kept.size * config.hide + 0.5))]
            targets[hidden] = ids[hidden]
            ids[hidden] = HIDDEN
        marks = dict(zip(MARKS, (ids, places, real, targets), strict=True))
        return super().sample(index, epoch) | marks

    def collate(self, samples: Sequence[Sample]) -> Batch:
        words = super().collate([{name: row[name] for name in row if name not in MARKS} for row in samples])
        made = {name: np.stack([row[name] for row in samples]) for name in MARKS}
        targets = {"mep": made.pop("targets.mep")}
        entities = Batch.of(made, targets, [0] * len(samples), [0] * len(samples))
        return replace(words, inputs=words.inputs | entities.inputs, targets=words.targets | entities.targets)

    def describe(self) -> str:
        config: Any = self.config
        return clauses(
            super().describe(),
            "the text has no marks of entities: they are the "
            f"{count(len(config.names), 'name')} that occur most often in the data (capitalised words, "
            "identifiers with '_' or a capital inside), and mentions are the places where these stand as whole words",
            f"{config.hide:.4g} of the mentions of a row, {config.most:,} at most, are hidden, apart from their words",
        )


class Mentions:
    """Finds where entities are mentioned: `names` are those of rows FIRST, FIRST + 1 ... of the entity table."""

    def __init__(self, tokenizer: Tokenizer, names: Sequence[str]) -> None:
        self.tokenizer = tokenizer
        self.rows = {name: FIRST + number for number, name in enumerate(names)}
        special = [*tokenizer.special.values(), *tokenizer.sentinels]
        self.begins = np.ones(max(tokenizer.vocab, *special) + 1, dtype=bool)
        self.begins[: tokenizer.vocab] = ~continuations(tokenizer, "_")
        self.special = np.zeros_like(self.begins)
        self.special[special] = True
        self.known: dict[bytes, tuple[int, int] | None] = {}

    def find(self, tokens: Ints) -> list[tuple[int, int, int]]:
        """(row, begin, end) of each mention in a row of tokens, from left to right."""
        alone = self.special[tokens]
        begins = self.begins[tokens] | alone
        begins[:1] = True
        begins[1:] |= alone[:-1]
        edges = [*np.flatnonzero(begins).tolist(), tokens.size]
        found = []
        for begin, end in pairwise(edges):
            piece = tokens[begin:end]
            key = piece.tobytes()
            if key not in self.known:
                self.known[key] = self._read(piece.tolist())
            known = self.known[key]
            if known is not None:
                found.append((known[0], begin + known[1], end))
        return found

    def _read(self, ids: list[int]) -> tuple[int, int] | None:
        """The entity that one word's tokens name, and how many of them stand before it (a bracket, a dot)."""
        word = WORD.search(self.tokenizer.decode(ids))
        if word is None or word.group() not in self.rows:
            return None
        lead = 0
        while lead < len(ids) - 1 and not WORD.search(self.tokenizer.decode(ids[lead : lead + 1])):
            lead += 1
        return self.rows[word.group()], lead


def is_name(word: str) -> bool:
    """Whether a word is capitalised, or an identifier of several parts."""
    if len(word) < SHORTEST or word[0].isdigit():
        return False
    inner = word.strip("_")
    return word[0].isupper() or "_" in inner or inner[1:] != inner[1:].lower()


def frequent(texts: Iterable[str], size: int) -> tuple[str, ...]:
    """The names that occur most often, `size` at most; those that occur as often stand in the order of the alphabet."""
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(WORD.findall(text))
    names = ((-number, word) for word, number in counts.items() if is_name(word))
    return tuple(word for _, word in sorted(names)[:size])
