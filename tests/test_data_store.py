"""The token store (DA-1, DA-4, DA-6): nothing stale, damaged or half; splits are pure functions; counts are told."""

from __future__ import annotations

import json
import os
import pickle
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xtcli.config.data import DataConfig
from xtcli.data import prepare as preparing
from xtcli.data import store as storing
from xtcli.data.prepare import prepare, take_sample
from xtcli.data.progress import Meter
from xtcli.data.readers import Piece
from xtcli.data.sources import open_source
from xtcli.data.store import Entry, Split, Store, Stream, hashes
from xtcli.data.text import Tally
from xtcli.data.tokenise import write_entry
from xtcli.data.tokenizers import Bpe, Bytes, File, Tokenizer, WordPiece
from xtcli.errors import UserError
from xtcli.runs.folder import commit_folder

PAIRS = ("source", "target")
TEXTS = ["first document\n", "second\r\n", "", "caf\u00e9 \U0001f600", "x" * 300]
BYTES = Bytes.Config()
BPE = Bpe.Config(vocab=300)


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    folder = tmp_path / "corpus"
    folder.mkdir()
    for number, text in enumerate(TEXTS):
        (folder / f"{number}.txt").write_bytes(text.encode())
    return folder


@pytest.fixture
def go(tmp_path: Path) -> Callable[..., tuple[Tokenizer, Store]]:
    """`prepare` with a cache of its own."""

    def call(source: Path | str, tokenizer: Any = BYTES, columns: Sequence[str] = ("text",), **options: Any) -> Any:
        seed, rows = options.pop("seed", 0), options.pop("rows", None)
        data = DataConfig(source=str(source), cache=str(tmp_path / "cache"), **{"validation": 0.0, **options})
        return prepare(data, tokenizer, seed=seed, columns=columns, rows=rows, progress=False)

    return call


def entries(tmp_path: Path, kind: str = "tokens") -> list[Path]:
    folder = tmp_path / "cache" / kind
    return sorted(folder.iterdir()) if folder.exists() else []


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def decoded(tokenizer: Tokenizer, split: Split, name: str = "text") -> list[bytes]:
    stream = split.streams[name]
    return [tokenizer.decode_bytes(stream.document(i).tolist()) for i in range(len(stream))]


@pytest.mark.parametrize("config", [BYTES, BPE], ids=["bytes", "bpe"])
def test_documents_come_back(corpus: Path, go: Any, config: Any) -> None:
    tokenizer, store = go(corpus, config)
    expected = [text.encode() for text in TEXTS if text]
    assert decoded(tokenizer, store.split("train")) == expected
    stream = store.streams["text"]
    assert stream.tokens.dtype == np.uint16 and len(stream) == 4
    assert stream.ends.tolist() == np.cumsum(stream.lengths).tolist() and stream.ends[-1] == len(stream.tokens)
    assert len(store.split("validation")) == 0


def test_report(corpus: Path, go: Any) -> None:
    (corpus / "a.bin").write_bytes(b"x")
    _, store = go(corpus, validation=0.5)
    assert store.report() == (
        f"{corpus}: 4 files, 333 bytes (left out: 1 binary file, 1 empty file)\n"
        "4 documents, 333 bytes, 333 tokens, 1.00 bytes per token\n"
        "in the text: 1 CRLF line end\n"
        "train 2 documents, 315 tokens; validation 2 documents, 18 tokens (50.00% of the documents, by hash of seed and index)\n"
        "tokenizer bytes: 257 ids; text comes back byte for byte; eos <|endoftext|> = 256"
    )


def test_pairs(tmp_path: Path, go: Any) -> None:
    rows = [{"source": f"s{i}", "target": f"target {i}"} for i in range(40)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer, store = go(tmp_path / "a.jsonl", columns=PAIRS, validation=0.25)
    for name in ("train", "validation"):
        split = store.split(name)
        sources, targets = decoded(tokenizer, split, "source"), decoded(tokenizer, split, "target")
        assert len(sources) == len(targets) > 0
        assert [s[1:] for s in sources] == [t[7:] for t in targets]
    assert "40 pairs" in store.report()


class Fixed:
    """Documents given as texts; a source."""

    size = limit = None

    def __init__(self, texts: Sequence[str]) -> None:
        self.texts = texts

    def documents(self, tally: Tally) -> Iterator[Piece]:
        for text in self.texts:
            yield Piece((text,), True)


class Numbers:
    """A tokenizer that reads numbers: "1 70000" is [1, 70000]."""

    def encode_batch(self, texts: Sequence[str]) -> list[Any]:
        return [np.array([int(word) for word in text.split()], dtype=np.uint32) for text in texts]


def written(folder: Path, texts: Sequence[str]) -> Entry:
    source, numbers = Fixed(texts), Numbers()
    commit_folder(folder, lambda f: write_entry(f, source, ["text"], numbers, lambda: Meter("", None, False)))  # type: ignore[arg-type]
    return Entry(folder)


@pytest.mark.parametrize(
    ("texts", "width"),
    [(["0 1", "65535"], "<u2"), (["0 1", "65536"], "<u4"), (["70000 1"], "<u4"), (["1", "", "2 100000", "3"], "<u4")],
)
def test_width_follows_the_largest_id(tmp_path: Path, texts: list[str], width: str) -> None:
    entry = written(tmp_path / "e", texts)
    stream = entry.streams["text"]
    assert stream.tokens.dtype == np.dtype(width) and entry.header["streams"]["text"]["width"] == width
    assert [" ".join(map(str, stream.document(i))) for i in range(len(stream))] == texts
    assert entry.header["streams"]["text"]["largest"] == max(int(n) for text in texts for n in text.split())
    assert {path.name for path in (tmp_path / "e").iterdir()} == {
        "header.json",
        "manifest.json",
        "text.ends",
        "text.tokens",
    }


@settings(max_examples=40, deadline=None)
@given(st.lists(st.lists(st.integers(0, 70_000), max_size=5), min_size=1, max_size=12), st.integers(1, 30))
def test_any_documents_in_any_batches(
    tmp_path_factory: pytest.TempPathFactory, lists: list[list[int]], size: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("xtcli.data.tokenise.BATCH", size * 10)
        entry = written(tmp_path_factory.mktemp("any") / "e", [" ".join(map(str, ids)) for ids in lists])
    stream = entry.streams["text"]
    assert [stream.document(i).tolist() for i in range(len(stream))] == lists


EDITS: dict[str, Callable[[Path], object]] = {
    "a byte of a file": lambda corpus: (corpus / "0.txt").write_text("First document\n"),
    "a new file": lambda corpus: (corpus / "9.txt").write_text("x"),
    "a file gone": lambda corpus: (corpus / "0.txt").unlink(),
}
CHANGES: dict[str, dict[str, Any]] = {
    **{name: {} for name in EDITS},
    "limit": {"limit": 2},
    "glob": {"glob": "0.*"},
    "column": {"column": "body"},
    "vocabulary": {"tokenizer": Bpe.Config(vocab=258)},
    "kind": {"tokenizer": BYTES},
    "added token": {"tokenizer": Bpe.Config(vocab=300, sentinels=1)},
    "order of special tokens": {"tokenizer": BPE.model_copy(update={"special": {"pad": "<p>", "eos": "<e>"}})},
    "template": {"tokenizer": Bpe.Config(vocab=300, frame="eos")},
}


@pytest.mark.parametrize("name", CHANGES)
def test_each_change_alone_makes_a_new_entry(corpus: Path, go: Any, tmp_path: Path, name: str) -> None:
    special = {"eos": "<e>", "pad": "<p>"}
    base = BPE.model_copy(update={"special": special}) if name.startswith("order") else BPE
    go(corpus, base)
    before = entries(tmp_path)
    assert len(before) == 1
    EDITS.get(name, lambda corpus: None)(corpus)
    options = dict(CHANGES[name])
    go(corpus, options.pop("tokenizer", base), **options)
    assert len(entries(tmp_path)) == 2


def test_code_and_library_are_in_the_key(
    corpus: Path, go: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    go(corpus)
    monkeypatch.setattr(preparing, "code_version", lambda: "other")
    go(corpus)
    assert len(entries(tmp_path)) == 2


@pytest.mark.parametrize("name", ["again", "folder moved", "files renamed", "other seed and split", "cwd", "touched"])
def test_entry_is_reused(corpus: Path, go: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    _, first = go(corpus, BPE)
    options: dict[str, Any] = {}
    source: Path | str = corpus
    if name == "folder moved":
        source = corpus.rename(tmp_path / "elsewhere")
    elif name == "files renamed":
        for path in corpus.iterdir():
            path.rename(path.with_name(f"new {path.name}"))
    elif name == "other seed and split":
        options = {"seed": 5, "validation": 0.3}
    elif name == "cwd":
        monkeypatch.chdir(tmp_path)
        source = "corpus"
    elif name == "touched":
        os.utime(corpus / "0.txt", (1, 1))
    monkeypatch.setattr(preparing, "commit_folder", lambda *a: pytest.fail("made again"))
    _, second = go(source, BPE, **options)
    assert second.digest == first.digest


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGE: dict[str, Callable[[Path], object]] = {
    "flipped bit": flip,
    "cut short": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "too long": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
    "empty": lambda path: path.write_bytes(b""),
    "gone": lambda path: path.unlink(),
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("file", ["text.tokens", "text.ends", "header.json", "manifest.json", "tokenizer.json"])
def test_damage_is_noticed_said_and_repaired(
    corpus: Path, go: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], file: str, damage: str
) -> None:
    go(corpus, BPE)
    (folder,) = entries(tmp_path, "tokenizers" if file.startswith("tokenizer") else "tokens")
    before = contents(folder)
    DAMAGE[damage](folder / file)
    tokenizer, store = go(corpus, BPE)
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and str(folder) in said and said.endswith("this cache entry is made anew\n")
    assert contents(folder) == before
    assert decoded(tokenizer, store.split("train"))[0] == b"first document\n"


def test_large_entry_is_checked_by_blocks(
    corpus: Path, go: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    go(corpus)
    monkeypatch.setattr(storing, "VERIFIED", 10)
    (folder,) = entries(tmp_path)
    assert Entry(folder).tokens == 333
    flip(folder / "text.tokens")
    with pytest.raises(storing.Damaged, match="SHA-256 of 64 blocks differs"):
        Entry(folder)


class Stop(BaseException):
    """Stands for a process that ends here."""


@pytest.mark.parametrize("name", ["fsync", "rename", "replace", "mkdir", "open"])
def test_stopped_at_any_operation(
    corpus: Path, go: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Whatever operation is the last: the next start gives the same bytes and leaves no litter."""
    go(corpus, BPE)
    expected = [contents(folder) for kind in ("tokenizers", "tokens") for folder in entries(tmp_path, kind)]
    real, number = getattr(os, name), 0
    while True:
        for kind in ("tokenizers", "tokens"):
            for folder in entries(tmp_path, kind):
                for path in folder.iterdir():
                    path.unlink()
                folder.rmdir()
        left = number

        def limited(*args: Any, **options: Any) -> Any:
            nonlocal left
            if left == 0:
                raise Stop
            left -= 1
            return real(*args, **options)

        with monkeypatch.context() as patch:
            patch.setattr(os, name, limited)
            # A killed process cleans nothing up.
            patch.setattr("shutil.rmtree", lambda *a, **k: None)
            try:
                go(corpus, BPE)
                finished = True
            except Stop:
                finished = False
        go(corpus, BPE)
        assert [contents(f) for kind in ("tokenizers", "tokens") for f in entries(tmp_path, kind)] == expected
        if finished:
            break
        number += 1
    assert number > 1


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL")
def test_killed_at_random_moments(tmp_path: Path, go: Any) -> None:
    path = tmp_path / "a.txt"
    path.write_text("some words and some more words\n" * 100_000)
    go(path)
    (folder,) = entries(tmp_path)
    expected = contents(folder)
    for file in folder.iterdir():
        file.unlink()
    folder.rmdir()
    code = (
        "import sys; from xtcli.config.data import DataConfig; from xtcli.data.prepare import prepare\n"
        "from xtcli.data.tokenizers import Bytes; print('go', flush=True)\n"
        f"prepare(DataConfig(source={str(path)!r}, cache={str(tmp_path / 'cache')!r}), Bytes.Config(), seed=0, progress=False)"
    )
    rng = random.Random(0)
    for _ in range(3):
        child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
        assert child.stdout is not None
        child.stdout.readline()
        time.sleep(rng.uniform(0, 0.12))
        child.send_signal(signal.SIGKILL)
        child.wait()
        child.stdout.close()
    go(path)
    assert [contents(f) for f in entries(tmp_path)] == [expected]


def test_other_process_was_faster(corpus: Path, go: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = preparing.commit_folder

    def slow(final: Path, write: Any) -> None:
        real(final, write)
        raise FileExistsError

    monkeypatch.setattr(preparing, "commit_folder", slow)
    _, store = go(corpus)
    assert store.streams["text"].total == 333


@given(st.integers(0, 2**63), st.integers(1, 300))
def test_hash_is_a_pure_function_of_seed_and_index(seed: int, count: int) -> None:
    assert np.array_equal(hashes(seed, count), hashes(seed, 2 * count)[:count])
    assert not np.array_equal(hashes(seed, 8), hashes(seed + 1, 8))


def fake_store(lengths: Sequence[int], validation: float, seed: int = 0, streams: Sequence[str] = ("text",)) -> Store:
    sizes = np.array(lengths, dtype=np.int64)
    ends = np.cumsum(sizes)
    entry = Entry.__new__(Entry)
    entry.streams = {name: Stream(Path("none"), "<u2", ends - sizes, sizes) for name in streams}
    entry.header = {"streams": {}}
    entry.digest = "0"
    return Store(entry, validation=validation, seed=seed)


@given(
    st.lists(st.integers(1, 50), min_size=1, max_size=200),
    st.sampled_from([0.0, 0.01, 0.05, 0.3, 0.9]),
    st.integers(0, 9),
)
def test_split_takes_each_token_once(lengths: list[int], fraction: float, seed: int) -> None:
    if sum(lengths) < 2 and fraction:
        return
    store = fake_store(lengths, fraction, seed)
    sides = [store.split("train").streams["text"], store.split("validation").streams["text"]]
    places = [place for side in sides for i in range(len(side)) for place in range(side.starts[i], side.ends[i])]
    assert sorted(places) == list(range(sum(lengths)))
    assert all(side.total for side in sides) or not fraction


def test_documents_stay_on_their_side() -> None:
    few, many = fake_store([1] * 500, 0.1, 7), fake_store([1] * 900, 0.1, 7)
    held = few.split("validation").streams["text"].starts.tolist()
    assert held == [s for s in many.split("validation").streams["text"].starts.tolist() if s < 500]
    assert 25 <= len(held) <= 75
    assert held != fake_store([1] * 500, 0.1, 8).split("validation").streams["text"].starts.tolist()


@pytest.mark.parametrize(
    ("lengths", "fraction", "train", "validation", "how"),
    [
        ([100], 0.1, [100 - 10], [10], "the last 10.00% of the text"),
        ([50, 50], 0.1, [50, 40], [10], "the last 10.00% of the text"),
        ([95, 5], 0.1, [90], [5, 5], "the last 10.00% of the text"),
        ([2], 0.01, [1], [1], "the last 1.00% of the text"),
        ([7], 0.0, [7], [], "none held out"),
    ],
)
def test_text_of_few_documents_is_split_at_a_token(
    lengths: list[int], fraction: float, train: list[int], validation: list[int], how: str
) -> None:
    store = fake_store(lengths, fraction)
    assert store.split("train").streams["text"].lengths.tolist() == train
    assert store.split("validation").streams["text"].lengths.tolist() == validation
    assert store.how == how


def test_pairs_are_split_whole() -> None:
    store = fake_store([5, 9], 0.01, streams=PAIRS)
    assert len(store.split("train")) == len(store.split("validation")) == 1
    train = store.split("train").streams
    assert train["source"].starts.tolist() == train["target"].starts.tolist()


BAD: dict[str, tuple[str, Any, dict[str, Any], str]] = {
    "one token": ("x", BYTES, {"validation": 0.1}, "data.validation: the data has 1 token, which cannot be split into training and validation; give more text, or set data.validation=0"),
    "nothing but space": (" \n ", WordPiece.Config(vocab=100), {}, "{}: 3 bytes gives 0 tokens in 1 document; give a source with text"),
    "no rows": ('{{"text": ""}}\n', BYTES, {"suffix": ".jsonl"}, "{}: 13 bytes gives 0 tokens in 0 documents; give a source with text"),
    "one pair": ('{{"source": "a", "target": "b"}}\n', BYTES, {"suffix": ".jsonl", "columns": PAIRS, "validation": 0.1}, "data.validation: 1 pair cannot be split into training and validation; give more data, or set data.validation=0"),
    "validation missing": ("text", BYTES, {"validation": "./held"}, "./held: data.validation: no such file or folder; check the path"),
    "no tokenizer": ("text", File.Config(path="./none"), {}, "none: no such file or folder; give a tokenizer.json of the tokenizers library or its folder"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_too_little_to_train_on(tmp_path: Path, go: Any, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    text, config, options, message = BAD[name]
    options = dict(options)
    monkeypatch.chdir(tmp_path)
    path = tmp_path / f"a{options.pop('suffix', '.txt')}"
    path.write_text(text.replace("{{", "{").replace("}}", "}"))
    with pytest.raises(UserError) as caught:
        go(path, config, **options)
    assert str(caught.value) == message.format(path)


def test_validation_of_its_own(corpus: Path, go: Any, tmp_path: Path) -> None:
    (tmp_path / "held.txt").write_text("held out")
    tokenizer, store = go(corpus, BPE, validation=str(tmp_path / "held.txt"))
    assert decoded(tokenizer, store.split("validation")) == [b"held out"]
    assert len(store.split("train")) == 4
    _, other = go(corpus, BPE)
    assert other.digest != store.digest


def test_ids_beyond_the_model(corpus: Path, go: Any) -> None:
    go(corpus, rows=257)
    go(corpus, rows=250)
    with pytest.raises(UserError) as caught:
        go(corpus, rows=200)
    assert str(caught.value) == (
        "model.vocab: token 29 of stream text (document 2, after 'caf\u00e9 \ufffd') has id 240, the model has 200 rows; "
        "set model.vocab=257 or a smaller tokenizer.vocab"
    )


def test_stream_travels_to_another_process(corpus: Path, go: Any) -> None:
    _, store = go(corpus)
    stream = store.split("train").streams["text"]
    assert stream.tokens.size == 333
    data = pickle.dumps(stream)
    assert len(data) < 2000
    assert pickle.loads(data).document(1).tolist() == list(b"second\r\n")


def test_sample_is_spread_over_a_large_source(tmp_path: Path) -> None:
    lines = [json.dumps({"text": f"{number:09d}"}) + "\n" for number in range(3000)]
    (tmp_path / "a.jsonl").write_text("".join(lines))
    source = open_source(DataConfig(source=str(tmp_path / "a.jsonl")))
    assert source.size == 66_000
    sample, said = take_sample(source, 6900)
    numbers = [int(text) for text in sample]
    assert said.endswith("KiB of 64.5 KiB, spread over the whole") and 200 < len(sample) < 400
    assert numbers[0] < 300 and numbers[-1] > 2700 and numbers == sorted(numbers)
    assert take_sample(source, 6900)[0] == sample
    assert take_sample(source, 10**6)[1] == "all 26.4 KiB"
    limited = open_source(DataConfig(source=str(tmp_path / "a.jsonl"), limit=100))
    assert take_sample(limited, 90)[1] == "the first 90 bytes"


def test_cache_that_cannot_be_written(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(UserError, match=r"the cache cannot be written .*; set data\.cache or \$XT_CACHE"):
        prepare(DataConfig(source=str(corpus), cache=str(tmp_path / "cache")), BYTES, seed=0)


def test_cache_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XT_CACHE", "/a")
    assert preparing.folder_of(DataConfig()) == Path("/a")
    assert preparing.folder_of(DataConfig(cache="/b")) == Path("/b")
    monkeypatch.delenv("XT_CACHE")
    assert preparing.folder_of(DataConfig()) == Path("~/.cache/xt").expanduser()


def test_progress_is_silent_at_first_and_tells_the_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    import io

    from rich.console import Console

    now = 0.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    out = io.StringIO()
    meter = Meter("tokenising", 100 << 20, console=Console(file=out, width=80))
    with meter:
        meter.add(10 << 20)
        assert out.getvalue() == ""
        now = 20.0
        meter.add(10 << 20)
        now = 21.0
        meter.add(10 << 20)
    assert out.getvalue() == "tokenising: 20.0 of 100.0 MiB, 80 s left\n"
