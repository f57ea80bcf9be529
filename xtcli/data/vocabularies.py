"""Tokenizers of checkpoints that have no tokenizer.json, from the files that came before it.

    vocab.txt                   WordPiece: a piece a line, "##" in front of what continues a word
    vocab.json, merges.txt      byte-level BPE: pieces with their ids, pairs in the order in which they are joined
    spiece.model and its like   SentencePiece, which is not read here

What such a tokenizer does beside looking up pieces stands in tokenizer_config.json, special_tokens_map.json and
added_tokens.json. An option of these that changes the ids and is not known is refused, never passed over.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xtcli.data import roles
from xtcli.data.decode import byte_letters
from xtcli.errors import refuse

WORDS, PIECES, MERGES = "vocab.txt", "vocab.json", "merges.txt"
SENTENCEPIECE = ("spiece.model", "sentencepiece.bpe.model", "tokenizer.model")
PREFIX = "##"
SPACE, WORD_END = "\u0120", "</w>"
"""How a space is written among bytes, and what ends a word in vocabularies of characters."""
CUSTOMARY = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "<s>", "<pad>", "</s>", "<unk>", "<mask>", "<|endoftext|>")
"""Tokens that are special where no file says which are."""

MEANINGS: Mapping[str, tuple[Any, ...]] = {
    "do_basic_tokenize": (True,),
    "never_split": (None, []),
    "do_word_tokenize": (True,),
    "do_subword_tokenize": (True,),
    "word_tokenizer_type": (None, "basic"),
    "subword_tokenizer_type": (None, "wordpiece"),
    "add_eos_token": (None, False),
    "dropout": (None,),
}
"""Options of tokenizer_config.json that change the ids, and the values of them that are expressed here."""


@dataclass(frozen=True)
class Made:
    """A `tokenizers.Tokenizer`, the files that it was made of, and what had to be inferred."""

    library: Any
    said: str


def build(folder: Path) -> Made | None:
    """The tokenizer that the older files of a folder describe; None where there are none of a kind that is read.

    Raises UserError for files that are damaged, or that describe what a tokenizer.json of xt's making would not do.
    """
    words = (folder / WORDS).is_file()
    if not words and not ((folder / PIECES).is_file() and (folder / MERGES).is_file()):
        return None
    settings = roles.read_json(folder / roles.SETTINGS)
    stated = roles.read_json(folder / roles.MAP) | settings
    for name, values in MEANINGS.items():
        if name in settings and settings[name] not in values:
            cause = f"is {settings[name]!r}, with which '{WORDS if words else PIECES}' alone says too little"
            raise refuse(
                cause, "make a tokenizer.json with transformers", place=str(folder / roles.SETTINGS), path=name
            )
    return _wordpiece(folder, settings, stated) if words else _bpe(folder, settings, stated)


def _wordpiece(folder: Path, settings: Mapping[str, Any], stated: Mapping[str, Any]) -> Made:
    """BERT's: text is cleaned, perhaps lowered, split at white space and punctuation, then into pieces."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

    lines = _text(folder / WORDS).split("\n")
    vocab = {piece.removesuffix("\r"): number for number, piece in enumerate(lines[:-1] if not lines[-1] else lines)}
    known = _roles(stated, vocab, ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"))
    unknown = known.get("unk")
    if unknown is None:
        cause = "names no token for what it cannot spell, such as [UNK]"
        raise refuse(cause, "make a tokenizer.json with transformers", place=str(folder / WORDS))
    lower = settings.get("do_lower_case")
    inferred = ""
    if lower is None:
        # Without a word of the settings: pieces with capital letters could never be met in lowered text.
        lower = not any(
            piece != piece.lower() for piece in vocab if not piece.startswith("[") and piece not in CUSTOMARY
        )
        inferred = (
            f"; {roles.SETTINGS} does not say do_lower_case: text is {'lowered' if lower else 'left in its case'}"
        )
    library = Tokenizer(models.WordPiece(vocab=vocab, unk_token=unknown))
    library.normalizer = normalizers.BertNormalizer(
        clean_text=True,
        handle_chinese_chars=settings.get("tokenize_chinese_chars", True),
        strip_accents=settings.get("strip_accents"),
        lowercase=lower,
    )
    library.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    library.decoder = decoders.WordPiece(prefix=PREFIX)
    _add(library, folder, stated, known)
    _frame(library, known, prefix=False)
    return Made(library, f"made of {WORDS}: {len(vocab):,} pieces of words{inferred}")


def _bpe(folder: Path, settings: Mapping[str, Any], stated: Mapping[str, Any]) -> Made:
    """GPT-2's and RoBERTa's: bytes, joined pair by pair."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    vocab = roles.read_json(folder / PIECES)
    merges = [tuple(line.split()) for line in _text(folder / MERGES).splitlines() if line and line[:9] != "#version:"]
    known = _roles(stated, vocab, ("<s>", "<pad>", "</s>", "<unk>", "<mask>", "<|endoftext|>"))
    worded = [pair for pair in merges if pair[-1].endswith(WORD_END)]
    if not byte_letters().keys() & vocab.keys() or (
        worded and not any(SPACE in piece for pair in merges for piece in pair)
    ):
        cause = f"is no byte-level vocabulary ({WORD_END!r} ends its words)" if worded else "has no single bytes"
        raise refuse(cause, "make a tokenizer.json with transformers", place=str(folder / PIECES))
    prefix = bool(settings.get("add_prefix_space", False))
    try:
        library = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    except Exception as error:
        # The library raises bare Exception for whatever does not fit together.
        said = str(error).splitlines()[0]
        raise refuse(
            f"and {MERGES} do not fit together ({said})", "copy both anew", place=str(folder / PIECES)
        ) from None
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    library.decoder = decoders.ByteLevel()
    _add(library, folder, stated, known)
    if settings.get("add_bos_token") and "bos" in known:
        bos = known["bos"]
        library.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A $B:1", special_tokens=[(bos, library.token_to_id(bos))]
        )
    else:
        library.post_processor = processors.ByteLevel(trim_offsets=False)
        _frame(library, known, prefix)
    return Made(library, f"made of {PIECES} and {MERGES}: {len(vocab):,} pieces, {len(merges):,} joints of bytes")


def _roles(stated: Mapping[str, Any], vocab: Mapping[str, int], customary: tuple[str, ...]) -> dict[str, str]:
    """The token of each role, as the files say it; where they say nothing at all, customary tokens that exist."""
    found = {role: roles.content(stated.get(f"{role}_token")) for role in roles.ROLES}
    if any(found.values()):
        return {role: token for role, token in found.items() if token}
    there = [token for token in customary if token in vocab]
    names = {role: next((t for t in roles.CUSTOMARY[role] if t in there), None) for role in roles.ROLES}
    if names["cls"] is None and {"<s>", "</s>"} <= set(there):
        names |= {"cls": "<s>", "sep": "</s>"}
    return {role: token for role, token in names.items() if token}


def _add(library: Any, folder: Path, stated: Mapping[str, Any], known: Mapping[str, str]) -> None:
    """Enter special and added tokens, each under the id that the files give it."""
    from tokenizers import AddedToken

    entries = {int(id): dict(token) for id, token in (stated.get("added_tokens_decoder") or {}).items()}
    said = {token["content"] for token in entries.values()}
    further = roles.read_json(folder / "added_tokens.json")
    entries |= {int(id): {"content": token, "normalized": True} for token, id in further.items() if token not in said}
    more = [roles.content(token) for token in stated.get("additional_special_tokens") or ()]
    special = {*known.values(), *(token for token in more if token)}
    said |= set(further)
    first = [(library.token_to_id(token), token) for token in special - said]
    every = [(id, {"content": token}) for id, token in first if id is not None] + list(entries.items())
    every += [(-1, {"content": token}) for id, token in first if id is None]
    for id, entry in sorted(every, key=lambda one: (one[0] < 0, one[0])):
        token = entry["content"]
        flags = {name: bool(entry.get(name, False)) for name in ("lstrip", "rstrip", "single_word", "normalized")}
        if "lstrip" not in entry and token == known.get("mask") and token == "<mask>":
            flags["lstrip"] = True  # as byte-level vocabularies have it: the space before a mask belongs to it
        made = AddedToken(token, special=bool(entry.get("special", token in special)), **flags)
        (library.add_special_tokens if made.special else library.add_tokens)([made])
        if id >= 0 and library.token_to_id(token) != id:
            cause = f"added token {token!r} has id {id}, which is not the next free one ({library.token_to_id(token)})"
            raise refuse(cause, "make a tokenizer.json with transformers", place=str(folder))


def _frame(library: Any, known: Mapping[str, str], prefix: bool) -> None:
    """What stands around one text and two: [CLS] A [SEP] B [SEP], or <s> A </s></s> B </s> without types."""
    from tokenizers import processors

    names = [known.get("cls"), known.get("sep")]
    ids = [library.token_to_id(name) if name else None for name in names]
    if None in ids:
        return
    (cls, sep), tokens = names, list(zip(names, ids, strict=True))
    if cls == "<s>":
        library.post_processor = processors.RobertaProcessing(
            sep=tokens[1], cls=tokens[0], add_prefix_space=prefix, trim_offsets=True
        )
    else:
        library.post_processor = processors.TemplateProcessing(
            single=f"{cls}:0 $A:0 {sep}:0", pair=f"{cls}:0 $A:0 {sep}:0 $B:1 {sep}:1", special_tokens=tokens
        )


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise refuse(f"cannot be read as text ({error})", "copy it anew", place=str(file)) from None
