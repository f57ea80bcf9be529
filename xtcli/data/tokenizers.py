"""Tokenizers: text to ids and back, and what the config of each kind says.

    bytes       one id per byte, special tokens from 256 on
    bpe         byte-level BPE: merges of bytes within words, any text is spelt without loss (GPT-2)
    wordpiece   pieces of normalised words, "##" in front of what continues a word (BERT)
    unigram     the likeliest pieces of a normalised text, a space written as U+2581 (T5)
    file        an existing tokenizer.json, or a folder with one

Text is only text: the string "<|endoftext|>" in a document or a prompt is spelt in ordinary tokens and
never becomes the control token, unless the caller asks for `control=True`. Two copies of the library's
tokenizer make this sure: in the one that reads text, every special token has an unguessable name.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np

from xtcli import registry
from xtcli.data import special as roles
from xtcli.data.decode import Decoder, StreamDecoder
from xtcli.data.roles import FILE, SETTINGS
from xtcli.data.text import LONE, is_valid, to_bytes
from xtcli.errors import UserError, refuse
from xtcli.registry import field, part

__all__ = ["Bpe", "Bytes", "File", "StreamDecoder", "Tokenizer", "Trained", "Unigram", "WordPiece", "check_vocab"]

Role = Literal["pad", "unk", "bos", "eos", "cls", "sep", "mask"]
Frame = Literal["none", "eos", "bos", "bos-eos", "cls-sep"]
END = "<|endoftext|>"
SAMPLE = 64
_SPECIAL_DOC = "special tokens by role, in the order of their ids; two roles may share a token"
_FRAME_DOC = "special tokens that transformers' tokenizer puts around a text"
_SENTINELS_DOC = "tokens <extra_id_0>, <extra_id_1> ... for span corruption; the first has the largest id"

_USERS_CHOICE = os.environ.get("TOKENIZERS_PARALLELISM")
os.environ["TOKENIZERS_PARALLELISM"] = _USERS_CHOICE or "false"
"""The library's threads do not survive a fork, so they are on only inside `threads()`."""


class Trained(registry.Config):
    """What the kinds that learn their tokens from the data share."""

    vocab: int = field("ids in all, special tokens and sentinels among them", gt=0, tiny=512, example=400)
    sentinels: int = field(_SENTINELS_DOC, 0, ge=0, tiny=32)
    sample: int = field("MiB of text at most that the tokens are learnt from", SAMPLE, gt=0, tiny=1)


class Kind:
    """A kind of tokenizer. It has no state: a config is turned into a `Tokenizer` by xtcli.data.prepare."""

    class Config(registry.Config):
        """No fields."""


@part("tokenizer", "bytes")
class Bytes(Kind):
    """Bytes of UTF-8: nothing to learn and nothing lost, about four times as many tokens as with words."""

    class Config(registry.Config):
        """No training."""

        special: dict[Role, str] = field(_SPECIAL_DOC, {"eos": END})
        sentinels: int = field(_SENTINELS_DOC, 0, ge=0, tiny=32)
        frame: Frame = field(_FRAME_DOC, "none")


@part("tokenizer", "bpe")
class Bpe(Kind):
    """Byte-level byte-pair encoding, trained on the data (Radford et al. 2019)."""

    class Config(Trained):
        """The most frequent pair of neighbours becomes a token, until `vocab` is reached."""

        special: dict[Role, str] = field(_SPECIAL_DOC, {"eos": END})
        frame: Frame = field(_FRAME_DOC, "none")


@part("tokenizer", "wordpiece")
class WordPiece(Kind):
    """Longest matching pieces of words, trained on the data (Devlin et al. 2019)."""

    class Config(Trained):
        """Control characters go, CJK characters are words; white space only separates."""

        special: dict[Role, str] = field(
            _SPECIAL_DOC, {"pad": "[PAD]", "unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"}
        )
        frame: Frame = field(_FRAME_DOC, "cls-sep")
        lowercase: bool = field("lower the case and drop accents", True)


@part("tokenizer", "unigram")
class Unigram(Kind):
    """The likeliest pieces under a unigram model, trained on the data (Kudo 2018)."""

    class Config(Trained):
        """Text is normalised by NFKC; white space, line ends too, only separates."""

        special: dict[Role, str] = field(_SPECIAL_DOC, {"pad": "<pad>", "eos": "</s>", "unk": "<unk>"})
        frame: Frame = field(_FRAME_DOC, "eos")
        sample: int = field("MiB of text at most that the tokens are learnt from", 16, gt=0, tiny=1)


@part("tokenizer", "file")
class File(Kind):
    """An existing tokenizer."""

    class Config(registry.Config):
        """Roles come from tokenizer_config.json beside the file, else from customary names such as [MASK]."""

        path: str = field("tokenizer.json, or a folder that holds one", min_length=1, example="tokenizer.json")
        special: dict[Role, str] = field("special tokens by role, where the file leaves them open", {})


class Tokenizer:
    """Text to ids and back.

    `special` maps roles (pad, unk, bos, eos, cls, sep, mask) to ids; `sentinels` are the ids of <extra_id_0>,
    <extra_id_1> ...; `vocab` is the largest id + 1; `settings` are tokenizer_config.json's keys, kept as read.
    """

    def __init__(self, library: Any, special: Mapping[str, str], settings: Mapping[str, Any] | None = None) -> None:
        self.library = library
        self.settings = dict(settings or {})
        self.names = dict(special)
        self.special = {role: _id(library, token, role) for role, token in special.items()}
        self._added = library.get_added_tokens_decoder()
        self.sentinels = roles.sentinels({id: token.content for id, token in self._added.items()})
        self.vocab = 1 + max(library.get_vocab(with_added_tokens=True).values(), default=-1)
        self.control = {id for id, token in self._added.items() if token.special} | set(self.special.values())
        self.decoder = Decoder(library, {id: token.content for id, token in self._added.items()})

    @classmethod
    def load(cls, path: Path | str, special: Mapping[Role, str] | None = None) -> Tokenizer:
        """The tokenizer of a folder or a tokenizer.json; raises UserError for what is none. `special` adds roles."""
        library, names, settings = roles.load(Path(path), dict[str, str]((special or {}).items()))
        return cls(library, names, settings)

    def save(self, folder: Path) -> None:
        """Write tokenizer.json and tokenizer_config.json, which transformers reads too."""
        extra = [self.library.id_to_token(id) for id in self.sentinels]
        settings = roles.settings(self.names, extra, self.settings)
        (folder / FILE).write_text(self.library.to_str(pretty=True) + "\n", encoding="utf-8")
        (folder / SETTINGS).write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")

    @cached_property
    def digest(self) -> str:
        """SHA-256 of all that decides on ids and text: vocabulary, added tokens, templates, roles."""
        document = {
            "tokenizer": json.loads(self.library.to_str()),
            "roles": self.names,
            "chat_template": self.settings.get("chat_template"),
        }
        return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()

    @property
    def mask_text(self) -> str | None:
        """How a mask is written."""
        return self.names.get("mask")

    @cached_property
    def lossless(self) -> bool:
        """Whether the text of every document comes back byte for byte."""
        form = json.loads(self.library.to_str())
        front = json.dumps(form["pre_tokenizer"])
        spelt = self.decoder.style == "bytes" and form["normalizer"] is None and '"add_prefix_space": true' not in front
        return spelt and len(self._byte_ids) == 256

    def encode(self, text: str, pair: str | None = None, *, special: bool = False, control: bool = False) -> list[int]:
        """The ids of a text.

        special: put the tokens of the template around it, [CLS] text [SEP] pair [SEP] for instance.
        control: read special tokens that are written in the text as such.
        """
        if special or pair is not None:
            return self.encode_pair(text, pair, special=special, control=control)[0]
        if not control:
            return [int(id) for id in self.encode_batch([text])[0]]
        return list(self.library.encode(_strict(text), add_special_tokens=False).ids)

    def encode_pair(
        self, text: str, pair: str | None = None, *, special: bool = True, control: bool = False
    ) -> tuple[list[int], list[int]]:
        """The ids of one text or two in the template, and the type of each id: 0 in the first text, 1 in the second."""
        texts = [text] if pair is None else [text, pair]
        around, types, inner = self.frame(len(texts)) if special else ([[]] * 3, [[]] * 3, [0, 1])
        ids, kinds = list(around[0]), list(types[0])
        for number, value in enumerate(texts):
            found = self.encode(value, control=control)
            ids += [*found, *around[number + 1]]
            kinds += [*[inner[number]] * len(found), *types[number + 1]]
        return ids, kinds

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray[Any, np.dtype[np.uint32]]]:
        """The ids of many texts as arrays, control tokens never among them; in parallel inside `threads()`."""
        if self._table is not None:
            return [self._table[np.frombuffer(to_bytes(text), dtype=np.uint8)] for text in texts]
        valid = [is_valid(text) for text in texts]
        found = iter(
            self._reader.encode_batch_fast(
                [t for t, ok in zip(texts, valid, strict=True) if ok], add_special_tokens=False
            )
        )
        return [
            np.array(next(found).ids, dtype=np.uint32) if ok else self._spell(text)
            for text, ok in zip(texts, valid, strict=True)
        ]

    def encode_spans(self, texts: Sequence[str]) -> list[tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]]:
        """The ids (N,) of many texts and the characters (N, 2) of each: id i stands for text[start:end]."""
        found = self._reader.encode_batch([_strict(text) for text in texts], add_special_tokens=False)
        return [(np.array(e.ids, dtype=np.int64), np.array(e.offsets, dtype=np.int64).reshape(-1, 2)) for e in found]

    def frame(self, texts: int) -> tuple[list[list[int]], list[list[int]], list[int]]:
        """What the template puts around `texts` texts, one or two.

        The ids before, between and behind the texts (texts + 1 lists), the types of these ids, the type of each text.
        """
        if self.library.post_processor is None:
            return [[]] * (texts + 1), [[]] * (texts + 1), list(range(texts))
        marked = [self._reader.encode("a", add_special_tokens=False) for _ in range(texts)]
        joined = self.library.post_process(*marked, add_special_tokens=True)
        ids: list[list[int]] = [[] for _ in range(texts + 1)]
        types: list[list[int]] = [[] for _ in range(texts + 1)]
        inner, at = [0] * texts, 0
        for id, type, text in zip(joined.ids, joined.type_ids, joined.sequence_ids, strict=True):
            if text is None:
                ids[at].append(id)
                types[at].append(type)
            else:
                inner[text], at = type, text + 1
        return ids, types, inner

    def decode(self, ids: Sequence[int], *, special: bool = True) -> str:
        """The text of ids, U+FFFD for bytes that are no text; special tokens are written out unless left out."""
        return self.decode_bytes(ids, special=special).decode("utf-8", "replace")

    def decode_bytes(self, ids: Sequence[int], *, special: bool = True) -> bytes:
        """The bytes of ids, exact where the tokenizer is lossless."""
        ids = ids.tolist() if isinstance(ids, np.ndarray) else ids
        return self.decoder.decode(ids if special else [id for id in ids if id not in self.control])

    @cached_property
    def _reader(self) -> Any:
        """The library's tokenizer with unguessable names for the special tokens, and without a template."""
        form = json.loads(self.library.to_str())
        names = {self.library.id_to_token(id): f"\uffff{secrets.token_hex(16)}\uffff" for id in sorted(self.control)}
        form |= {"post_processor": None, "truncation": None, "padding": None}
        for token in form["added_tokens"]:
            token["content"] = names.get(token["content"], token["content"])
        model = form["model"]
        vocab = model["vocab"]
        if isinstance(vocab, dict):
            model["vocab"] = {names.get(token, token): id for token, id in vocab.items()}
        else:
            model["vocab"] = [[names.get(token, token), score] for token, score in vocab]
        if model.get("unk_token") is not None:
            model["unk_token"] = names.get(model["unk_token"], model["unk_token"])
        return type(self.library).from_str(json.dumps(form))

    @cached_property
    def _byte_ids(self) -> dict[int, int]:
        """The id that stands for each byte, where the tokenizer has such."""
        return roles.byte_ids(self.library, self.decoder)

    @cached_property
    def _table(self) -> np.ndarray[Any, np.dtype[np.uint32]] | None:
        """The id of each byte, for a tokenizer that knows no longer token."""
        if not self.lossless or json.loads(self.library.to_str())["model"].get("merges") != []:
            return None
        return np.array([self._byte_ids[byte] for byte in range(256)], dtype=np.uint32)

    def _spell(self, text: str) -> np.ndarray[Any, np.dtype[np.uint32]]:
        """The ids of a text with bytes that are no UTF-8: the byte's own id, or that of U+FFFD."""
        ids: list[int] = []
        for piece in re.split(f"({LONE.pattern})", text):
            if LONE.match(piece) and len(self._byte_ids) == 256:
                ids += [self._byte_ids[byte] for byte in to_bytes(piece)]
            elif piece:
                ids += self._reader.encode(_strict(piece), add_special_tokens=False).ids
        return np.array(ids, dtype=np.uint32)


def check_vocab(tokenizer: Tokenizer, rows: int, place: str = "", path: str = "model.vocab") -> None:
    """Raise UserError when the tokenizer has ids that a table of `rows` rows lacks."""
    if tokenizer.vocab > rows:
        raise refuse(
            f"the tokenizer's largest id is {tokenizer.vocab - 1:,}, the model has {rows:,} rows",
            f"set model.vocab={tokenizer.vocab} or a smaller tokenizer.vocab",
            place=place,
            path=path,
        )


@contextmanager
def threads() -> Iterator[None]:
    """Let the library use all cores inside; a TOKENIZERS_PARALLELISM of the user's own stays."""
    before = os.environ["TOKENIZERS_PARALLELISM"]
    if _USERS_CHOICE is None:
        os.environ["TOKENIZERS_PARALLELISM"] = "true"
    try:
        yield
    finally:
        os.environ["TOKENIZERS_PARALLELISM"] = before


def _id(library: Any, token: str, role: str) -> int:
    id = library.token_to_id(token)
    if id is None:
        raise UserError(f"the tokenizer has no token {token!r} for the role {role}; name one of its own tokens")
    return int(id)


def _strict(text: str) -> str:
    """A text that the library takes: U+FFFD for what is no UTF-8."""
    return text if is_valid(text) else LONE.sub(lambda found: "\ufffd" * len(found[0]), text)
