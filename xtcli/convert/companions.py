"""Files that travel with the weights as they are: the tokenizer's, the generation settings."""

from __future__ import annotations

import shutil
from pathlib import Path

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
    "generation_config.json",
)


def copy_companions(source: Path, target: Path) -> list[str]:
    """Copy what is there, byte for byte; returns the names."""
    found = [name for name in COMPANIONS if (source / name).is_file()]
    for name in found:
        shutil.copyfile(source / name, target / name)
    return found
