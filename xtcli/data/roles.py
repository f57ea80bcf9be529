"""The roles that special tokens play, and the files beside a tokenizer that say which token plays which."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from xtcli.errors import refuse

FILE, SETTINGS, MAP = "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"
TEMPLATE = "chat_template.jinja"
ROLES = ("pad", "unk", "bos", "eos", "cls", "sep", "mask")
CUSTOMARY = {
    "pad": ("[PAD]", "<pad>", "<|pad|>"),
    "unk": ("[UNK]", "<unk>"),
    "bos": ("<s>", "<bos>", "<|begin_of_text|>", "<|startoftext|>"),
    "eos": ("</s>", "<eos>", "<|end_of_text|>", "<|endoftext|>"),
    "cls": ("[CLS]", "<cls>"),
    "sep": ("[SEP]", "<sep>"),
    "mask": ("[MASK]", "<mask>"),
}
"""Names that say their role where no file does."""


def content(token: Any) -> str | None:
    """A token as transformers writes it: a string or a map."""
    if isinstance(token, Mapping):
        token = token.get("content")
    return token if isinstance(token, str) else None


def read_json(file: Path) -> dict[str, Any]:
    """A map from a JSON file, empty where there is none; raises UserError for anything else."""
    if not file.is_file():
        return {}
    try:
        found = json.loads(file.read_bytes())
    except ValueError as error:
        raise refuse(f"is not JSON ({error})", "repair or remove it", place=str(file)) from None
    if not isinstance(found, dict):
        raise refuse("is not a map of settings", "repair or remove it", place=str(file))
    return found
