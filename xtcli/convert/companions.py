"""Files that travel with the weights: the tokenizer's and the generation settings, each as it is.

A folder without a tokenizer.json gets one, made of the vocabulary that came before it.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xtcli.data.vocabularies import SENTENCEPIECE, build
from xtcli.errors import UserError

TOKENIZER = "tokenizer.json"
COMPANIONS = (
    TOKENIZER,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
    "tokenizer.model",
    "sentencepiece.bpe.model",
    "chat_template.jinja",
    "chat_template.json",
    "preprocessor_config.json",
    "generation_config.json",
)


def copy_companions(source: Path, target: Path) -> list[str]:
    """Copy what is there, byte for byte; returns the names."""
    found = [name for name in COMPANIONS if (source / name).is_file()]
    for name in found:
        shutil.copyfile(source / name, target / name)
    return found


@dataclass(frozen=True)
class Vocabulary:
    """What stands in for an absent tokenizer.json: the library's tokenizer, how it was `made`, or what is `missing`."""

    library: Any = None
    made: str = ""
    missing: str = ""

    def write(self, target: Path) -> list[str]:
        """Put the tokenizer into a folder; returns the names of the files written."""
        if self.library is None:
            return []
        (target / TOKENIZER).write_text(self.library.to_str(pretty=True) + "\n", encoding="utf-8")
        return [TOKENIZER]


def vocabulary(source: Path, reads_text: bool) -> Vocabulary:
    """What a folder has in the place of a tokenizer.json; nothing needs to be made or said where it has one."""
    if (source / TOKENIZER).is_file() or not reads_text:
        return Vocabulary()
    try:
        made = build(source)
    except UserError as error:
        return Vocabulary(missing=f"no {TOKENIZER} could be made: {error}")
    if made is not None:
        return Vocabulary(made.library, made.said)
    pieces = next((name for name in SENTENCEPIECE if (source / name).is_file()), None)
    if pieces is None:
        return Vocabulary(missing=f"the source has no tokenizer: put a {TOKENIZER} beside its weights to read text")
    return Vocabulary(
        missing=f"{pieces} is a SentencePiece model, which xt does not read: make a {TOKENIZER} of it "
        "(transformers.AutoTokenizer.from_pretrained(SRC).save_pretrained(SRC)) and put it beside the weights"
    )
