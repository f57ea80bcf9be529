"""Special tokens and the files of a tokenizer: which token plays which role, read from and written for transformers.

    tokenizer.json          the library's own file: vocabulary, added tokens, template
    tokenizer_config.json   roles as "pad_token", "eos_token" ..., chat template
    chat_template.jinja     a chat template in a file of its own; saved among the settings

Sentinels are the tokens <extra_id_0>, <extra_id_1> ... of span corruption (T5).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from xtcli.data import vocabularies
from xtcli.data.decode import Decoder, byte_letters
from xtcli.data.roles import CUSTOMARY, FILE, MAP, ROLES, SETTINGS, TEMPLATE, content, read_json
from xtcli.errors import refuse

LIMIT = 1 << 30

_SENTINEL = re.compile(r"<extra_id_(\d+)>")


def sentinel_name(number: int) -> str:
    """How sentinel `number` is written."""
    return f"<extra_id_{number}>"


def sentinels(added: Mapping[int, str]) -> list[int]:
    """The ids of the sentinels among the added tokens, <extra_id_0> first."""
    found = [(int(match[1]), id) for id, token in added.items() if (match := _SENTINEL.fullmatch(token))]
    return [id for _, id in sorted(found)]


def settings(names: Mapping[str, str], extra: Sequence[str], kept: Mapping[str, Any]) -> dict[str, Any]:
    """tokenizer_config.json: `names` by role, sentinels in `extra`; `kept` is what the file held before."""
    default = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    more = {"additional_special_tokens": list(extra)} if extra else {}
    return default | dict(kept) | more | {f"{role}_token": token for role, token in names.items()}


def byte_ids(library: Any, decoder: Decoder) -> dict[int, int]:
    """The id of each single byte, all 256 or fewer."""
    if decoder.style == "bytes":
        tokens = {byte: letter for letter, byte in byte_letters().items()}
    elif decoder.fallback:
        tokens = {byte: f"<0x{byte:02X}>" for byte in range(256)}
    else:
        return {}
    found = {byte: library.token_to_id(token) for byte, token in tokens.items()}
    return {byte: id for byte, id in found.items() if id is not None}


def load(path: Path, special: Mapping[str, str]) -> tuple[Any, dict[str, str], dict[str, Any]]:
    """The library's tokenizer, the token of each role, and the settings beside it.

    A role comes from `special`, else from tokenizer_config.json or special_tokens_map.json; where these state none
    at all, from a customary name. Raises UserError for a file that is missing or no tokenizer.
    """
    path = path.expanduser()
    file = path / FILE if path.is_dir() else path
    library = _library(file) if file.is_file() else _older(path)
    library.no_padding()
    library.no_truncation()
    kept = read_json(file.with_name(SETTINGS))
    template = file.with_name(TEMPLATE)
    if template.is_file():
        # transformers prefers it to one among the settings.
        kept["chat_template"] = template.read_text(encoding="utf-8")
    stated = read_json(file.with_name(MAP)) | kept
    found = {role: content(stated.get(f"{role}_token")) for role in ROLES}
    if not any(found.values()):
        found = {role: _customary(role, library) for role in ROLES}
    names = {role: token for role, token in found.items() if token and library.token_to_id(token) is not None}
    names |= special
    return library, dict(sorted(names.items(), key=lambda item: library.token_to_id(item[1]) or 0)), kept


def _library(file: Path) -> Any:
    """The library's tokenizer in a tokenizer.json."""
    from tokenizers import Tokenizer

    if file.stat().st_size > LIMIT:
        raise refuse(f"is larger than {LIMIT >> 20} MiB", "give a tokenizer.json", place=str(file))
    try:
        return Tokenizer.from_str(file.read_text(encoding="utf-8"))
    except Exception as error:
        # The library raises bare Exception for whatever it cannot read.
        cause = f"is not a tokenizer ({str(error).splitlines()[0]})"
        remedy = f"give a {FILE} of the tokenizers library; a SentencePiece model must be converted first"
        raise refuse(cause, remedy, place=str(file)) from None


def _older(path: Path) -> Any:
    """The tokenizer of a folder without a tokenizer.json, from the files that came before it."""
    made = vocabularies.build(path) if path.is_dir() else None
    if made is None:
        cause = f"holds no {FILE}" if path.is_dir() else "no such file or folder"
        raise refuse(cause, f"give a {FILE} of the tokenizers library or its folder", place=str(path))
    return made.library


def _customary(role: str, library: Any) -> str | None:
    added = {token.content for token in library.get_added_tokens_decoder().values() if token.special}
    return next((name for name in CUSTOMARY[role] if name in added), None)
