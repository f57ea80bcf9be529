"""Texts that a command line gives, words of options, files, standard input, and the tokenizer that reads them."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from xtcli.errors import refuse

if TYPE_CHECKING:
    from xtcli.data.tokenizers import Tokenizer


def prompts_of(given: list[str], files: list[Path]) -> list[str]:
    """The texts of --prompt, then those of --prompt-file, else standard input."""
    prompts = list(given)
    for file in files:
        if file.is_dir() or not file.exists():
            cause = "is a folder" if file.is_dir() else "no such file"
            raise refuse(cause, "give a text file", place=str(file))
        try:
            prompts.append(_text(file.read_bytes(), str(file)))
        except OSError as error:
            raise refuse(f"cannot be read: {error.strerror}", place=str(file)) from None
    if not prompts:
        if sys.stdin is None or sys.stdin.isatty():
            raise refuse("no prompt was given", "add --prompt TEXT or --prompt-file FILE, or pipe a text in")
        content = sys.stdin.buffer.read()
        if not content:
            raise refuse("no prompt was given", "add --prompt TEXT or --prompt-file FILE, or pipe a text in")
        prompts.append(_text(content, "standard input"))
    return prompts


def _text(content: bytes, place: str) -> str:
    """A file's content as a prompt."""
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise refuse(f"byte {error.start + 1} is no UTF-8", "save the file as UTF-8", place=place) from None
    text = text.removesuffix("\n").removesuffix("\r")
    if not text:
        raise refuse("is empty", 'write a prompt into it; --prompt "" begins a text from nothing', place=place)
    return text


def second_text(context: str | None) -> str | None:
    """The text of --context, or of the file that it names."""
    if context is None or "\n" in context or not os.path.isfile(context):
        return context
    return _text(Path(context).read_bytes(), context)


def tokenizer_of(folder: Path, other: Path | None) -> Tokenizer:
    """The tokenizer of a checkpoint's folder, or an other one; raises UserError where there is none."""
    from xtcli.data.tokenizers import Tokenizer

    if other is None and not (folder / "tokenizer.json").exists():
        raise refuse("has weights but no tokenizer", "name one with --tokenizer, or train the model", place=str(folder))
    return Tokenizer.load(folder if other is None else other)
