"""Ids back to bytes and text, whole or while they are being made.

Nearly every tokenizer's decoder joins one byte string per id, with another string for the first id (no space
in front). That table makes decoding exact and a stream trivial: bytes are gathered, and a character is
text once its last byte is there. A decoder that works otherwise is asked for the whole text each time.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

from xtcli.data.text import to_bytes

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_TABLED = {"WordPiece", "Metaspace", "ByteLevel", "BPEDecoder"}
_SEQUENCED = {"Replace", "ByteFallback", "Fuse", "Strip"}
_CONTEXT = "a"


def byte_letters() -> dict[str, int]:
    """The letter that byte-level tokenizers write for each byte: itself where visible, else one from U+0100 on."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    letters = {chr(byte): byte for byte in visible}
    hidden = (byte for byte in range(256) if chr(byte) not in letters)
    return letters | {chr(0x100 + number): byte for number, byte in enumerate(hidden)}


class Decoder:
    """The bytes of each id of a `tokenizers.Tokenizer`.

    `style` is "bytes" (byte-level letters), "table" (a string per id, perhaps with byte pieces), or "whole"
    (the library must see all ids at once).
    """

    def __init__(self, library: Any, added: dict[int, str]) -> None:
        self.library = library
        self.added = added
        self.vocab = library.get_vocab_size(with_added_tokens=True)
        form = json.loads(library.to_str())["decoder"]
        self.style = _style(form)
        self.fallback = "ByteFallback" in json.dumps(form)
        self._letters = byte_letters() if self.style == "bytes" else {}
        self._first: dict[int, bytes] = {}
        self._rest: dict[int, bytes] = {}

    def bytes_of(self, id: int, first: bool) -> bytes:
        """What one id adds. An id without a token shows itself as `<id N>`."""
        table = self._first if first else self._rest
        if id not in table:
            table[id] = self._find(id, first)
        return table[id]

    def decode(self, ids: Sequence[int]) -> bytes:
        """The bytes of a sequence."""
        if self.style == "whole":
            return to_bytes(self.library.decode(list(ids), skip_special_tokens=False))
        return b"".join(self.bytes_of(id, number == 0) for number, id in enumerate(ids))

    def _find(self, id: int, first: bool) -> bytes:
        token = self.library.id_to_token(id)
        if token is None:
            return f"<id {id}>".encode()
        if self.style == "bytes":
            if id in self.added:
                return to_bytes(token)
            return b"".join(
                bytes([self._letters[letter]]) if letter in self._letters else letter.encode() for letter in token
            )
        byte = _BYTE.fullmatch(token) if self.fallback else None
        if byte:
            return bytes([int(byte[1], 16)])
        decode = self.library.decoder.decode if self.library.decoder else " ".join
        if first:
            return to_bytes(decode([token]))
        return to_bytes(decode([_CONTEXT, token])[len(decode([_CONTEXT])) :])


class StreamDecoder:
    """Text of ids that come one by one; joined, it is the decoding of all of them.

    A character is given out when its last byte is there; U+FFFD only for bytes that are no text. `context` are
    ids that stand before: they decide on a leading space or an unfinished character, and are not given out.
    """

    def __init__(self, tokenizer: _Decodes, context: Iterable[int] = ()) -> None:
        self._decoder = tokenizer.decoder
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._ids: list[int] = list(context)
        self._first = not self._ids
        self._said = ""
        if self._decoder.style == "whole":
            self._said = self._whole()
        else:
            self._utf8.decode(self._decoder.decode(self._ids))

    def push(self, id: int) -> str:
        """The text that is final now that `id` has come; "" inside a character."""
        if self._decoder.style == "whole":
            self._ids.append(id)
            return self._more(self._whole().rstrip("\ufffd"))
        first, self._first = self._first, False
        return self._utf8.decode(self._decoder.bytes_of(id, first))

    def finish(self) -> str:
        """What is left: U+FFFD for an unfinished character."""
        if self._decoder.style == "whole":
            return self._more(self._whole())
        return self._utf8.decode(b"", True)

    def _whole(self) -> str:
        return self._decoder.decode(self._ids).decode("utf-8", "replace")

    def _more(self, text: str) -> str:
        # Such a decoder may change its mind on what is out already; that cannot be taken back.
        more, self._said = text[len(self._said) :], max(text, self._said, key=len)
        return more


class _Decodes(Protocol):
    @property
    def decoder(self) -> Decoder: ...


def _style(decoder: Any) -> str:
    """How a decoder of tokenizer.json works, by its type."""
    if decoder is None:
        return "table"
    kind = decoder["type"]
    if kind == "ByteLevel":
        return "bytes"
    if kind == "Sequence":
        inner = {"end" if part.get("stop") else part["type"] for part in decoder["decoders"]}
        return "bytes" if inner == {"ByteLevel"} else "table" if inner <= _SEQUENCED else "whole"
    return "table" if kind in _TABLED else "whole"
