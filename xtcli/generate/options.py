"""What may be asked of a generation, and what comes back."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from xtcli.errors import Problem, UserError
from xtcli.generate.decode import Choice, Finish, Timing
from xtcli.generate.fill import Filled
from xtcli.generate.sampling import Sampling

Task = Literal["continue", "map", "fill", "label"]


@dataclass(frozen=True)
class Options:
    """What to write; raises UserError for values that are impossible or contradict each other.

    max_tokens      new tokens of a text, at most
    sampling        None is the default of the task: draws for a continuation, greedy for a map
    samples         texts for each prompt
    beams           beams in place of draws when above 1; length_penalty is theirs
    stop            a text ends before any of these strings
    seed            of the draws; None draws one
    fill_top        guesses for each mask
    lens            the likeliest tokens to note beside each token, 0 for none
    past_context    texts may grow beyond the length that the preset plans for, where positions allow it
    eager           no step is recorded and replayed: for a model whose weights change between calls
    """

    max_tokens: int = 200
    sampling: Sampling | None = None
    samples: int = 1
    beams: int = 1
    length_penalty: float = 1.0
    stop: tuple[str, ...] = ()
    seed: int | None = None
    fill_top: int = 5
    lens: int = 0
    past_context: bool = False
    eager: bool = False

    def __post_init__(self) -> None:
        wrong = []
        for name in ("max_tokens", "samples", "beams", "fill_top"):
            if getattr(self, name) < 1:
                option = "--" + name.replace("_", "-")
                wrong.append(Problem(f"{getattr(self, name)} is not possible", option, remedy="give 1 or more"))
        if self.seed is not None and not 0 <= self.seed < 2**63:
            remedy = "give a number from 0 to 2^63 - 1"
            wrong.append(Problem(f"{self.seed} is not possible", "--seed", remedy=remedy))
        if "" in self.stop:
            cause = "an empty stop string would end every text at once"
            wrong.append(Problem(cause, "--stop", remedy="give some text"))
        greedy = self.sampling is not None and self.sampling.greedy
        if self.beams > 1:
            if self.sampling is not None and not greedy:
                remedy = "leave out the options of sampling, or --beams"
                wrong.append(Problem("beams do not draw", "--beams", remedy=remedy))
            if self.samples > self.beams:
                cause = f"{self.beams} beams cannot give {self.samples} texts"
                wrong.append(Problem(cause, "--samples", remedy=f"set --beams {self.samples} or more"))
            if self.lens:
                wrong.append(Problem("follows one text, not several beams", "--lens", remedy="leave out --beams"))
        elif self.samples > 1 and greedy:
            cause = "greedy texts of one prompt are all alike"
            wrong.append(Problem(cause, "--samples", remedy="set --temperature above 0"))
        if wrong:
            raise UserError(*wrong)


@dataclass(frozen=True)
class Written:
    """A text that was generated. `tokens` are all new ids, an end token and a cut stop string included."""

    prompt: str
    sample: int
    text: str
    tokens: list[int]
    finish: Finish
    prompt_tokens: int
    score: float | None = None
    choices: list[Choice] = field(default_factory=list)


@dataclass
class Answer:
    """All that one call made: texts, prompt after prompt, or filled prompts.

    `seed` is None where nothing was drawn; `notes` are sentences for the reader.
    """

    task: Task
    seed: int | None = None
    written: list[Written] = field(default_factory=list)
    filled: list[Filled] = field(default_factory=list)
    timing: Timing = field(default_factory=Timing)
    notes: list[str] = field(default_factory=list)
