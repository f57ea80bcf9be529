"""The one class of error that a user can cause, and how it reads.

A `Problem` has a place (file:line:col, an override, an option), a path in the config tree, a cause
and a remedy; a `UserError` carries one or many. The command line prints them without a traceback
and exits with 2. Any other exception is our own bug and keeps its traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

EXIT_FAILURE = 1
EXIT_USER = 2
EXIT_NON_FINITE = 3
EXIT_INTERRUPTED = 130
EXIT_TERMINATED = 143


@dataclass(frozen=True)
class Problem:
    """One mistake: where it stands, what is wrong, what to do."""

    cause: str
    place: str = ""
    path: str = ""
    remedy: str = ""

    def __str__(self) -> str:
        where = ": ".join(part for part in (self.place, self.path) if part)
        text = f"{where}: {self.cause}" if where else self.cause
        return f"{text}; {self.remedy}" if self.remedy else text


class UserError(Exception):
    """Mistakes of the user, all of them at once; printed without a traceback, exit code 2."""

    exit_code = EXIT_USER

    def __init__(self, *problems: Problem | str) -> None:
        self.problems = tuple(p if isinstance(p, Problem) else Problem(p) for p in problems)
        super().__init__("\n".join(map(str, self.problems)))


def refuse(cause: str, remedy: str = "", *, place: str = "", path: str = "") -> UserError:
    """A `UserError` of one problem, to be raised by the caller."""
    return UserError(Problem(cause, place, path, remedy))


def nearest(word: str, choices: Iterable[str]) -> str | None:
    """The choice that `word` most likely meant, or None when nothing is near."""
    names = list(choices)
    swapped = [name for name in names if sorted(name) == sorted(word)]
    if len(swapped) == 1:
        return swapped[0]
    found = difflib.get_close_matches(word, names, n=1, cutoff=0.5 if len(word) <= 3 else 0.6)
    if found:
        return found[0]
    folded = {name.lower().replace("_", "").replace("-", ""): name for name in names}
    found = difflib.get_close_matches(word.lower().replace("_", "").replace("-", ""), folded, n=1, cutoff=0.6)
    return folded[found[0]] if found else None


def meant(path: Path, beside: Iterable[Path], otherwise: str) -> str:
    """A remedy: the one of the paths `beside` whose name is nearest, or `otherwise` when none is."""
    names = {one.name: one for one in beside}
    best = nearest(path.name, names)
    return f"did you mean '{names[best]}'?" if best else otherwise


def did_you_mean(word: str, choices: Iterable[str]) -> str:
    """A remedy: the nearest choice, or the list of all when none is near."""
    names = sorted(choices)
    best = nearest(word, names)
    if best:
        return f"did you mean '{best}'?"
    return f"known: {', '.join(names)}" if names else ""
