"""What a conversion did, or would do: kept beside the weights as convert.json and printed by the command."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

FILE = "convert.json"
VERSION = 1


@dataclass
class Report:
    """The facts of one conversion.

    tensors, bytes: of the source's file. ties: names that stand for another tensor. drops: buffers left out since
    every build computes them. kept: tensors that nothing reads, given back on the way out. renamed: names of older
    files. retyped: tensors whose type changed, by `before -> after`. rounding: the largest error that made, with its
    tensor. heads: what answers in our model. tokenizer: what tokenizer.json was made of, where the source has none;
    missing: why none could be made. bit_exact: every tensor was read back and gave the source's bytes again. members:
    the folders below the target with their classes, where the source holds several models.
    """

    family: str
    architecture: str
    to: str
    source: str
    target: str
    tensors: int = 0
    bytes: int = 0
    dtypes: dict[str, int] = field(default_factory=dict)
    ties: list[str] = field(default_factory=list)
    drops: list[str] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)
    renamed: list[str] = field(default_factory=list)
    invented: list[str] = field(default_factory=list)
    companions: list[str] = field(default_factory=list)
    heads: list[str] = field(default_factory=list)
    tokenizer: str = ""
    missing: str = ""
    retyped: dict[str, int] = field(default_factory=dict)
    rounding: dict[str, Any] | None = None
    bit_exact: bool | None = None
    written: bool = False
    verified: dict[str, Any] | None = None
    members: dict[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        return {"version": VERSION, **asdict(self)}

    def write(self, folder: Path) -> None:
        """Keep it beside the weights."""
        (folder / FILE).write_text(json.dumps(self.to_json(), indent=1) + "\n", encoding="utf-8")

    def lines(self) -> Iterator[tuple[str, str]]:
        """What there is to say, as (subject, sentence)."""
        yield "from", self.source
        yield "to", f"{self.target} ({'xt checkpoint' if self.to == 'xt' else 'transformers checkpoint'})"
        yield "model", f"{self.architecture} of family {self.family}"
        for name, architecture in self.members.items():
            yield "folder", f"{name}: {architecture}"
        types = ", ".join(f"{count} {name}" for name, count in self.dtypes.items())
        yield "tensors", f"{self.tensors} tensors, {self.bytes:,} bytes ({types})"
        for subject, names, what in (
            ("ties", self.ties, "stored once, under the name of the other"),
            ("drops", self.drops, "buffers that are computed anew"),
            ("kept", self.kept, "read by nothing, given back by --to hf"),
            ("renamed", self.renamed, "older names"),
            ("zeros", self.invented, "read by nothing, and not in the source"),
        ):
            if names:
                yield subject, f"{_count(names)} ({what}): {_some(names)}"
        for change, count in self.retyped.items():
            yield "dtype", f"{count} tensors {change}"
        if self.rounding is not None:
            yield "rounding", f"at most {self.rounding['error']:.3g} (absolute), in {self.rounding['tensor']}"
        if self.companions:
            yield "beside", ", ".join(self.companions)
        if self.tokenizer:
            yield "tokenizer", self.tokenizer
        if self.bit_exact is not None:
            exact = "bit-exact: read back, every tensor gives the source's bytes"
            yield "fidelity", exact if self.bit_exact else "not bit-exact, see dtype"
        if self.verified is not None:
            counts = f"{self.verified['outputs']} outputs and {self.verified['modules']} modules"
            peer = f"transformers {self.verified['transformers']}"
            yield "verified", f"{counts} agree with {peer} to {self.verified['worst']:.2g} (absolute, float32)"


def _count(names: list[str]) -> str:
    return f"{len(names)} tensor{'s' if len(names) > 1 else ''}"


def _some(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
