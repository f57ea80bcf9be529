"""From the `data` and `tokenizer` sections to a tokenizer and a token store, each made once and kept.

    key = SHA-256 of (contents of the source, options of reading, tokenizer contents, code that makes tokens)

Entries lie under $XT_CACHE, else ~/.cache/xt: tokenizers/<key> and tokens/<key>. An entry is whole or absent
(xtcli.runs.folder); one that was damaged later is noticed by its digest, said, and made anew.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import tokenizers as library
from rich.console import Console

from xtcli.config.data import DataConfig
from xtcli.data.files import amount, counted
from xtcli.data.hub import NAME
from xtcli.data.progress import Meter
from xtcli.data.sources import Source, open_source
from xtcli.data.store import Entry, Store, hashes
from xtcli.data.text import Tally
from xtcli.data.tokenise import write_entry
from xtcli.data.tokenizers import Bytes, File, Tokenizer, Trained
from xtcli.data.train_tokenizer import train
from xtcli.errors import refuse
from xtcli.registry import Config, tree
from xtcli.runs.folder import Damaged, cache_folder, clean, commit_folder, remove_folder, verify

UNWRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR)
CODE = ("readers", "special", "text", "tokenise", "tokenizers", "train_tokenizer", "unigram")
"""Files whose change can change a token."""
Made = TypeVar("Made")


def prepare(
    data: DataConfig,
    tokenizer: Config,
    *,
    seed: int,
    columns: Sequence[str] = ("text",),
    rows: int | None = None,
    progress: bool = True,
) -> tuple[Tokenizer, Store]:
    """The tokenizer and the store of tokens that two config sections describe, from the cache or made now.

    columns: the streams that an objective reads, ("text",) or ("source", "target"). rows: rows of the model's
    token table, to refuse ids that it lacks. progress: tell on stderr about work that takes long.
    Raises UserError for whatever is wrong with source, tokenizer or split.
    """
    if data.workers is not None:
        os.environ["RAYON_NUM_THREADS"] = str(data.workers)
    caches = folder_of(data)
    source = open_source(data, columns)
    held = open_source(held_out(data), columns, key="data.validation") if isinstance(data.validation, str) else None
    made, note = make_tokenizer(tokenizer, source, caches, progress)
    entry = make_entry(source, columns, made, caches, progress)
    validation = make_entry(held, columns, made, caches, progress) if held else data.validation
    for opened, text in ((source, entry), (held, validation)):
        if opened is not None and isinstance(text, Entry) and not text.tokens:
            count = next(iter(text.header["streams"].values()))["documents"]
            raise refuse(
                f"{opened.describe()} gives 0 tokens in {counted(count, 'document')}", "give a source with text"
            )
    assert not isinstance(validation, str)
    store = Store(entry, validation=validation, seed=seed, source=source.describe(), notes=(note,))
    if rows is not None and made.vocab > rows:
        store.check_rows(rows, made)
    return made, store


def make_tokenizer(config: Config, source: Source, caches: Path, progress: bool = True) -> tuple[Tokenizer, str]:
    """The tokenizer of a config, learnt from the source where its kind learns, and a sentence about it."""
    if isinstance(config, File.Config):
        made = Tokenizer.load(config.path, config.special)
        return made, _note(config.path, made)
    if isinstance(config, Bytes.Config):
        made = train(config, [])
        return made, _note(config.kind, made)
    assert isinstance(config, Trained)
    options = [[name, value] for name, value in sorted(tree(config).items()) if name != "special"]
    special = list(tree(config)["special"].items())
    key = key_of({"source": source.fingerprint(), "options": options, "special": special})

    def build() -> Tokenizer:
        sample, said = take_sample(source, config.sample << 20, progress)
        Console(stderr=True).print(
            f"training a {config.kind} tokenizer on {said}", highlight=False
        ) if progress else None
        return train(config, sample)  # type: ignore[arg-type]

    def read(folder: Path) -> Tokenizer:
        verify(folder)
        return Tokenizer.load(folder)

    made = _cached(caches / "tokenizers" / key, lambda folder: build().save(folder), read)
    short = "" if made.vocab >= config.vocab else f" of {config.vocab:,} asked for, the text has no more"
    return made, _note(config.kind, made, short)


def make_entry(
    source: Source, streams: Sequence[str], tokenizer: Tokenizer, caches: Path, progress: bool = True
) -> Entry:
    """The tokens of a source, from the cache or made now."""
    key = key_of({"source": source.fingerprint(), "streams": list(streams), "tokenizer": tokenizer.digest})

    def write(folder: Path) -> None:
        write_entry(folder, source, streams, tokenizer, lambda: Meter("tokenising", _total(source), progress))

    return _cached(caches / "tokens" / key, write, Entry)


def take_sample(source: Source, most: int, progress: bool = True) -> tuple[list[str], str]:
    """Texts of at most about `most` bytes, and which they are, in words.

    All where the source is no larger; else pieces chosen by a hash of their number, spread over the whole; the
    first ones where its size is not known.
    """
    size = _total(source)
    # A little less than would fit, since a hash hits its share only on average.
    share = 1.0 if size is None or size <= most else 0.97 * most / size
    draw = hashes(0, 1 << 16)
    sample: list[str] = []
    taken, whole = 0, True
    with Meter("reading a sample", size, progress) as meter:
        for number, piece in enumerate(source.documents(Tally())):
            length = sum(map(len, piece.texts))
            meter.add(length)
            if share < 1 and int(draw[number % len(draw)]) >= share * 2.0**64:
                continue
            if taken + length > most:
                whole = False
                break
            sample += piece.texts
            taken += length
    if share < 1:
        return (
            sample,
            f"{amount(taken)} of {amount(size or 0)}, spread over {'the whole' if whole else 'its first part'}",
        )
    return sample, f"all {amount(taken)}" if whole else f"the first {amount(taken)}"


def key_of(parts: Any) -> str:
    """The name of a cache entry: SHA-256 of what made it, the code included; the order of keys does not matter."""
    document = {"parts": parts, "code": code_version()}
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()


@cache
def code_version() -> str:
    """SHA-256 of the code that turns bytes into tokens, and the version of the tokenizers library."""
    digest = hashlib.sha256(library.__version__.encode())
    for name in CODE:
        digest.update(Path(__file__).with_name(f"{name}.py").read_bytes())
    return digest.hexdigest()


def folder_of(data: DataConfig) -> Path:
    """Where caches lie."""
    return cache_folder(data.cache)


def _cached(final: Path, write: Callable[[Path], None], read: Callable[[Path], Made]) -> Made:
    """What `read` makes of an entry, written first where it is absent or damaged."""
    try:
        clean(final.parent)
        if final.exists():
            try:
                return read(final)
            except Damaged as damage:
                _say(f"{damage.args[0].split(';')[0]}; this cache entry is made anew")
                remove_folder(final)
        commit_folder(final, write)
    except OSError as error:
        # Another process may have made the same entry meanwhile; it holds the same bytes.
        if not final.exists():
            if error.errno not in UNWRITABLE:
                raise
            cause = f"the cache cannot be written ({error.strerror})"
            raise refuse(cause, "set data.cache or $XT_CACHE", place=str(final.parent)) from None
    return read(final)


def _say(text: str) -> None:
    Console(stderr=True).print(text, highlight=False, markup=False, soft_wrap=True)


def _total(source: Source) -> int | None:
    """Bytes that will be read, where that is known."""
    return None if source.limit else source.size


def held_out(data: DataConfig) -> DataConfig:
    """The config of a validation source: a file or folder, else another split of the same hub dataset."""
    name = str(data.validation)
    hub = not Path(data.source).expanduser().exists() and NAME.fullmatch(data.source)
    if hub and not Path(name).expanduser().exists() and "/" not in name:
        return data.model_copy(update={"split": name})
    return data.model_copy(update={"source": name, "glob": data.glob if Path(name).is_dir() else None})


def _note(name: str, made: Tokenizer, short: str = "") -> str:
    roles = ", ".join(f"{role} {made.names[role]} = {id}" for role, id in made.special.items())
    kept = "text comes back byte for byte" if made.lossless else "text is normalised"
    return f"tokenizer {name}: {counted(made.vocab, 'id')}{short}; {kept}; {roles or 'no special tokens'}"
