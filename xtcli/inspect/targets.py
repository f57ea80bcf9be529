"""What the words behind `xt inspect` name: presets, runs and checkpoints, each with the overrides that follow it.

xt inspect A model.dim=64            A, changed
xt inspect A B model.dim=64          A beside B, changed
xt inspect A model.dim=64 B          A, changed, beside B
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from xtcli.errors import refuse

MODEL = ("--size", "--tiny")
TAKES = {
    "": ("--batch", "--length", *MODEL),
    "--tree": MODEL,
    "--masks": ("--length", "--png", *MODEL),
    "--tensors": (),
    "--curves": ("--png",),
    "--parts": (),
    "--resolved": MODEL,
    "--explain": MODEL,
    "--copy": MODEL,
    "--schema": (),
}
"""The options that each answer depends on; the answer without a name is the summary, or the comparison of two."""


@dataclass(frozen=True)
class Target:
    """A preset, run or checkpoint, and the overrides on it."""

    ref: str
    overrides: tuple[str, ...] = ()


def is_override(word: str) -> bool:
    """Whether a word is KEY=VALUE; a path that exists is not, whatever its name."""
    return "=" in word and not Path(word).exists()


def targets(words: Sequence[str]) -> list[Target]:
    """The targets in order; raises UserError where an override comes before any."""
    found: list[Target] = []
    for word in words:
        if not is_override(word):
            found.append(Target(word))
        elif found:
            found[-1] = Target(found[-1].ref, (*found[-1].overrides, word))
        else:
            raise refuse(f"'{word}' is an override, and no preset was named", "write xt inspect PRESET " + word)
    return found


def applicable(view: str, given: Sequence[str]) -> None:
    """Refuse options that the asked-for answer does not depend on; `view` is the option that asks for it."""
    takes = TAKES[view]
    for option in given:
        if option not in takes:
            answer = view or "the summary of a preset"
            known = f"it takes {', '.join(takes)}" if takes else "it takes no other options"
            raise refuse(f"{option} changes nothing in the answer of {answer}", known)


def one_view(asked: Sequence[str]) -> str:
    """The option that names the answer, or nothing; two are refused."""
    if len(asked) > 1:
        raise refuse(f"{' and '.join(asked)} are different answers", "ask for one at a time")
    return asked[0] if asked else ""


def exactly(found: Sequence[Target], most: int, view: str) -> None:
    """Refuse more targets than an answer is about."""
    if len(found) > most:
        names = ", ".join(target.ref for target in found)
        limit = "one target" if most == 1 else f"{most} targets at most"
        raise refuse(
            f"{view or 'xt inspect'} takes {limit}, not {len(found)} ({names})", "overrides are written KEY=VALUE"
        )
