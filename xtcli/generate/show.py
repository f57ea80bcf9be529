"""How generations are printed: texts in order while they are written, guesses, probabilities, JSON."""

from __future__ import annotations

import sys
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any, TextIO

from rich.console import Console
from rich.table import Table
from rich.text import Text

from xtcli.data.tokenizers import StreamDecoder, Tokenizer
from xtcli.generate.decode import Piece, Timing
from xtcli.generate.fill import Filled
from xtcli.generate.options import Answer, Written
from xtcli.objectives.words import count

COLOURS = ((0.8, "green"), (0.5, "cyan"), (0.2, "yellow"), (0.05, "magenta"), (0.0, "red"))
"""Colours of a token from this probability on."""


def visible(text: str) -> str:
    """Text that cannot steer a terminal: control characters other than line ends and tabs are written out."""
    if text.isprintable():
        return text
    return "".join(c if c in "\n\t" or unicodedata.category(c)[0] != "C" else f"\\x{ord(c):02x}" for c in text)


class Stage:
    """Prints rows one behind the other: the first unfinished one as it is written, the others in their turn.

    `head(row)` is called before a row's first letter. On a terminal control characters are made visible.
    """

    def __init__(self, rows: int, head: Callable[[int], None], out: TextIO) -> None:
        self.rows, self.head, self.out = rows, head, out
        self.clean = visible if out.isatty() else str
        self.waiting: list[str] = [""] * rows
        self.whole: list[bool] = [False] * rows
        self.turn, self.begun = 0, False

    def hear(self, piece: Piece) -> None:
        """Print a piece, or keep it until it is its row's turn."""
        self.waiting[piece.row] += piece.text
        self.whole[piece.row] = piece.done
        while self.turn < self.rows:
            row = self.turn
            text, self.waiting[row] = self.waiting[row], ""
            if text or self.whole[row]:
                self._print(row, text)
            if not self.whole[row]:
                return
            print(file=self.out, flush=True)
            self.turn, self.begun = row + 1, False

    def _print(self, row: int, text: str) -> None:
        if not self.begun:
            self.head(row)
            self.begun = True
        self.out.write(self.clean(text))
        self.out.flush()


def whole(answer: Answer, stage: Stage) -> None:
    """Print texts that are finished."""
    texts = [row.text for row in answer.written] + [guesses(filled) for filled in answer.filled]
    for number, text in enumerate(texts):
        stage.hear(Piece(number, text, True))


def guesses(filled: Filled) -> str:
    """The filled text, and below it the guesses for each mask with their probabilities."""
    lines = [filled.text]
    for number, mask in enumerate(filled.masks, 1):
        for rank, guess in enumerate(mask):
            name = f"mask {number}" if rank == 0 else ""
            lines.append(f"  {name:8}{guess.probability:7.2%}  {visible(guess.text).strip() or repr(guess.text)}")
    return "\n".join(lines)


def lens(written: Written, tokenizer: Tokenizer) -> None:
    """On stderr: the text coloured by probability, and a table of each token's likeliest alternatives."""
    console = Console(stderr=True, highlight=False)
    decoder, coloured = StreamDecoder(tokenizer, tokenizer.encode(written.prompt)), Text()
    table = Table("token", "probability", "likeliest", box=None, pad_edge=False)
    for choice in written.choices:
        colour = next(name for least, name in COLOURS if choice.probability >= least)
        coloured.append(visible(decoder.push(choice.token)), colour)
        others = "  ".join(f"{_quoted(tokenizer, id)} {p:.1%}" for id, p in choice.likeliest)
        table.add_row(_quoted(tokenizer, choice.token), Text(f"{choice.probability:.2%}", colour), Text(others))
    if console.is_terminal:
        legend = Text.assemble(*((f" {least:.0%}+ ", name) for least, name in COLOURS))
        console.print(coloured, legend)
    console.print(table)


def _quoted(tokenizer: Tokenizer, id: int) -> str:
    return repr(tokenizer.decode([id]))


def document(answer: Answer, tokenizer: Tokenizer, facts: dict[str, Any]) -> dict[str, Any]:
    """The whole answer as JSON; every figure has its unit in its name."""
    timing = asdict(answer.timing)
    timing |= {
        "prefill_tokens_per_second": answer.timing.prefill_rate,
        "decode_tokens_per_second": answer.timing.decode_rate,
    }
    results = [_row(row, tokenizer) for row in answer.written] + [asdict(filled) for filled in answer.filled]
    return {
        "task": answer.task,
        **facts,
        "seed": answer.seed,
        "results": results,
        "timings": timing,
        "notes": answer.notes,
    }


def _row(row: Written, tokenizer: Tokenizer) -> dict[str, Any]:
    line = asdict(row)
    line["lens"] = [
        {
            "token": choice.token,
            "text": tokenizer.decode([choice.token]),
            "probability": choice.probability,
            "likeliest": [
                {"token": id, "text": tokenizer.decode([id]), "probability": p} for id, p in choice.likeliest
            ],
        }
        for choice in row.choices
    ]
    del line["choices"]
    if not row.choices:
        del line["lens"]
    if row.score is None:
        del line["score"]
    return line


def speeds(timing: Timing) -> str:
    """How fast prompts were read and tokens written."""
    done = [("prefill", timing.prefill_tokens, timing.prefill_seconds)]
    if timing.decode_tokens:
        done.append(("decode", timing.decode_tokens, timing.decode_seconds))
    rates = [f", {tokens / seconds:,.0f} tokens/s" if seconds > 0 else "" for _, tokens, seconds in done]
    said = [f"{what}: {count(tokens, 'token')} in {seconds:.3g} s" for what, tokens, seconds in done]
    return "; ".join(text + rate for text, rate in zip(said, rates, strict=True))


def ends(answer: Answer) -> Sequence[str]:
    """Sentences about texts that ended for want of context."""
    cut = sum(row.finish == "context" for row in answer.written)
    if not cut:
        return ()
    who = "the text ends" if len(answer.written) == 1 else f"{cut} of {len(answer.written)} texts end"
    return (f"{who} where the model's context ends",)


def use_utf8() -> None:
    """Print text as UTF-8 whatever the locale."""
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(encoding="utf-8", errors="replace")
