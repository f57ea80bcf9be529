"""Tokenizers made from a sample of the data.

    special tokens   tokens by kind   sentinels, <extra_id_0> last
    0 1 2 ...                         ... vocab - 1

The same sample gives the same tokenizer. Two things of the library's own trainers stand in the way of that and
are not used: WordPiece numbers its letters, and breaks ties by those numbers, in the order of a random
hash; Unigram sums floats in such an order. Letters are therefore given to the WordPiece trainer in order, and
Unigram is trained in `xtcli.data.unigram`.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Library

from xtcli.data.decode import byte_letters
from xtcli.data.special import sentinel_name
from xtcli.data.text import LONE
from xtcli.data.tokenizers import Bpe, Bytes, Tokenizer, Unigram, WordPiece, threads
from xtcli.data.unigram import learn
from xtcli.errors import refuse

PREFIX = "##"
SPACE = "\u2581"
COVERAGE = 0.9995
"""Share of the sample's characters that WordPiece and Unigram can spell; rarer ones are unknown, within `vocab`."""

Config = Bytes.Config | Bpe.Config | WordPiece.Config | Unigram.Config
_NAME = re.compile(r"(?=\S*\w)(?=\S*[^\w\s])\S+")


def train(config: Config, sample: Sequence[str]) -> Tokenizer:
    """The tokenizer that a config describes, made from texts; raises UserError where that is impossible."""
    names = list(dict.fromkeys(config.special.values()))
    _check_names(config)
    room = 0 if isinstance(config, Bytes.Config) else config.vocab - config.sentinels - len(names)
    texts = [part for text in sample for part in LONE.split(text) if part]
    with threads():
        if isinstance(config, Bytes.Config):
            library = _byte_level(models.BPE(vocab=_byte_vocab(), merges=[]), split=False)
        elif isinstance(config, Bpe.Config):
            library = _bpe(texts, room, names)
        elif isinstance(config, WordPiece.Config):
            library = _wordpiece(texts, room, names, config.special["unk"], config.lowercase)
        else:
            library = _unigram(texts, room, names, config.special["unk"])
    library.add_special_tokens([_special(name) for name in names])
    library.add_special_tokens([_special(sentinel_name(n)) for n in reversed(range(config.sentinels))])
    tokenizer = Tokenizer(library, dict[str, str](config.special.items()))
    _put_frame(config, tokenizer)
    return tokenizer


def _check_names(config: Config) -> None:
    """Special tokens must be no words, for a word would be read as one; the roles that a kind needs must be there."""
    for role, name in config.special.items():
        if not _NAME.fullmatch(name) or SPACE in name:
            cause = f"{name!r} could be a word of the text"
            raise refuse(cause, f"put signs around it, such as '<{role}>'", path=f"tokenizer.special.{role}")
    if isinstance(config, WordPiece.Config | Unigram.Config) and "unk" not in config.special:
        cause = f"{config.kind} needs a token for what it cannot spell"
        raise refuse(cause, "add unk, such as '<unk>'", path="tokenizer.special")
    wanted = [] if config.frame == "none" else config.frame.split("-")
    missing = next((role for role in wanted if role not in config.special), None)
    if missing:
        cause = f"'{config.frame}' needs the special token {missing}"
        raise refuse(cause, f"set tokenizer.special.{missing}, or tokenizer.frame=none", path="tokenizer.frame")


def _put_frame(config: Config, tokenizer: Tokenizer) -> None:
    """The template [CLS] A [SEP] B [SEP], or bos and eos around each text."""
    if config.frame == "none":
        return
    names, roles = config.special, config.frame.split("-")
    front = {"cls-sep": [names.get("cls")], "bos": [names.get("bos")], "bos-eos": [names.get("bos")]}.get(
        config.frame, []
    )
    back = [names["sep"]] if "sep" in roles else [names["eos"]] if "eos" in roles else []
    second = back if config.frame == "cls-sep" else [*front, *back]
    again = [] if config.frame == "cls-sep" else front
    single = [*front, "$A", *back]
    pair = [*single, *(f"{name}:1" for name in again), "$B:1", *(f"{name}:1" for name in back)]
    used = dict.fromkeys(name for name in [*front, *second] if name)
    tokenizer.library.post_processor = processors.TemplateProcessing(
        single=single, pair=pair, special_tokens=[(name, tokenizer.library.token_to_id(name)) for name in used]
    )


def _byte_vocab() -> dict[str, int]:
    return dict(sorted(byte_letters().items(), key=lambda item: item[1]))


def _byte_level(model: Any, *, split: bool) -> Any:
    library = Library(model)
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split)
    library.decoder = decoders.ByteLevel()
    return library


def _bpe(texts: Sequence[str], room: int, names: Sequence[str]) -> Any:
    _need(room, 256, "256 bytes")
    library = _byte_level(models.BPE(), split=True)
    trainer = trainers.BpeTrainer(
        vocab_size=room + len(names),
        min_frequency=2,
        special_tokens=[_special(name) for name in names],
        initial_alphabet=sorted(byte_letters()),
        show_progress=False,
    )
    library.train_from_iterator(texts, trainer)
    return library


def _wordpiece(texts: Sequence[str], room: int, names: Sequence[str], unk: str, lowercase: bool) -> Any:
    normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(normalizer.normalize_str(text))
    letters = _alphabet(counts, room // 4)
    _need(room, 2 * len(letters), f"{len(letters)} letters at the start of a word and as many within")
    reader = Library(models.BPE())
    reader.normalizer = normalizer
    reader.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.BpeTrainer(
        vocab_size=room + len(names),
        min_frequency=2,
        special_tokens=[*names, *(PREFIX + letter for letter in letters)],
        initial_alphabet=letters,
        limit_alphabet=len(letters),
        continuing_subword_prefix=PREFIX,
        show_progress=False,
    )
    reader.train_from_iterator(texts, trainer)
    library = Library(models.WordPiece(vocab=reader.get_vocab(), unk_token=unk))
    library.normalizer = normalizer
    library.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    library.decoder = decoders.WordPiece(prefix=PREFIX)
    return library


def _unigram(texts: Sequence[str], room: int, names: Sequence[str], unk: str) -> Any:
    normalizer = normalizers.Sequence([normalizers.Nmt(), normalizers.NFKC()])
    splitter = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(replacement=SPACE, prepend_scheme="always")]
    )
    words: Counter[str] = Counter()
    for text in texts:
        words.update(SPACE + word for word in normalizer.normalize_str(text).split())
    counts: Counter[str] = Counter()
    for word, count in words.items():
        for letter in word:
            counts[letter] += count
    letters = _alphabet(counts, room // 2)
    _need(room, len(letters), f"{len(letters)} letters")
    pieces = [piece for piece in learn(words, letters, room + len(names)) if piece[0] not in names][:room]
    vocab = [*((name, 0.0) for name in names), *pieces]
    library = Library(models.Unigram(vocab, unk_id=list(names).index(unk), byte_fallback=False))
    library.normalizer = normalizer
    library.pre_tokenizer = splitter
    library.decoder = decoders.Metaspace(replacement=SPACE, prepend_scheme="always")
    return library


def _alphabet(counts: Counter[str], most: int) -> list[str]:
    """The most frequent of the characters that cover COVERAGE of a text, at most `most`, in the order of Unicode."""
    visible = {letter: count for letter, count in counts.items() if not letter.isspace()}
    total, covered = sum(visible.values()), 0
    kept: list[str] = []
    for letter, count in sorted(visible.items(), key=lambda item: (-item[1], item[0])):
        if len(kept) >= max(most, 1) or covered >= COVERAGE * total:
            break
        kept.append(letter)
        covered += count
    return sorted(kept)


def _need(room: int, least: int, what: str) -> None:
    if room < least:
        cause = f"leaves {max(room, 0)} ids beside special tokens and sentinels, too few for {what}"
        raise refuse(cause, f"raise it by {least - room} or more", path="tokenizer.vocab")


def _special(name: str) -> Any:
    return AddedToken(name, special=True, normalized=False)
