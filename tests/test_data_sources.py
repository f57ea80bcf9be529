"""Sources (DA-7, DA-8): bytes in = bytes out, rows of each format, what identifies a source, each mistake in one sentence."""

from __future__ import annotations

import io
import json
import os
import re
import sys
import types
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xtcli.config.data import DataConfig
from xtcli.data import files, hub, text
from xtcli.data.sources import Source, open_source
from xtcli.data.text import Tally, from_bytes, pieces, read_pieces, to_bytes
from xtcli.errors import UserError

PAIRS = ("source", "target")


def read(source: Source, tally: Tally | None = None) -> list[tuple[bytes, ...]]:
    """The documents of a source, whole, as bytes."""
    documents: list[list[str]] = [[]]
    for piece in source.documents(Tally() if tally is None else tally):
        documents[-1] = [a + b for a, b in zip(documents[-1] or [""] * len(piece.texts), piece.texts, strict=True)]
        if piece.last:
            documents.append([])
    assert documents.pop() == []
    return [tuple(map(to_bytes, document)) for document in documents]


def opened(path: Path, streams: tuple[str, ...] = ("text",), **options: Any) -> Source:
    return open_source(DataConfig(source=str(path), **options), streams)


@given(st.binary())
def test_text_holds_all_bytes(data: bytes) -> None:
    assert to_bytes(from_bytes(data)) == data


@given(st.text(st.characters()))
def test_any_text_has_bytes(value: str) -> None:
    assert from_bytes(to_bytes(value)) == value or any("\ud800" <= letter <= "\udfff" for letter in value)


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text, "PIECE", 8)
    monkeypatch.setattr(text, "LONGEST", 20)


ALPHABET = [
    b"a",
    b" ",
    b"\n",
    b"\r\n",
    b"\t",
    "\u00e9".encode(),
    "\U0001f600".encode(),
    b"\xff",
    b"\0",
    b"ab cd",
    "\u3000".encode(),
]


@pytest.mark.usefixtures("small_pieces")
@given(st.lists(st.sampled_from(ALPHABET), max_size=60).map(b"".join))
def test_pieces_join_to_the_whole(data: bytes) -> None:
    found = list(read_pieces(io.BytesIO(data), Tally()))
    assert b"".join(to_bytes(piece) for piece, _ in found) == data
    assert [last for _, last in found] == [False] * (len(found) - 1) + [True]
    assert found == list(pieces(from_bytes(data), Tally()))
    assert all(len(piece) <= 20 for piece, _ in found)


@pytest.mark.usefixtures("small_pieces")
@given(
    st.lists(st.sampled_from(["a", "don't", " ", "  ", "\n", "\n\n", "x1", "\u00e9", "=", "\t"]), max_size=40).map(
        "".join
    )
)
def test_cuts_change_no_token(value: str) -> None:
    from tokenizers import pre_tokenizers

    split = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tally = Tally()
    words = [word for piece, _ in pieces(value, tally) for word, _ in split.pre_tokenize_str(piece)]
    if not tally["cut word"]:
        assert words == [word for word, _ in split.pre_tokenize_str(value)]


ODD = {
    "byte order mark": (b"\xef\xbb\xbfabc\n", {"byte order mark": 1}),
    "CRLF": (b"a\r\nb\r\n", {"CRLF line end": 2}),
    "NUL": (b"a plain line with one\0in it, and more text", {"NUL": 1}),
    "surrogate": (b"a long enough line \xed\xa0\x80 of text", {"invalid byte": 3}),
    "invalid UTF-8": (b"caf\xe9 in a line of Latin-1", {"invalid byte": 1}),
    "cut character": ("a line that ends in half a \u20ac".encode()[:-1], {"invalid byte": 2}),
    "blank line": (b"\n\na\n \n\nb\n\n", {"blank line": 5}),
    "one long line": (b"x" * 10_000_000, {"cut word": 9}),
    "long lines": (b"word " * 700_000, {}),
    "no end of line": (b"a", {}),
    "white space": (b" \n\t", {"blank line": 1}),
}


@pytest.mark.parametrize("name", ODD)
def test_odd_text_is_kept_and_counted(tmp_path: Path, name: str) -> None:
    data, counts = ODD[name]
    (tmp_path / "a.txt").write_bytes(data)
    tally = Tally()
    assert read(opened(tmp_path / "a.txt"), tally) == [(data,)]
    assert {name: count for name, count in tally.items() if count} == counts


def rows_of(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Rows as a file of the format that the suffix names."""
    if path.suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif path.suffix in (".csv", ".tsv"):
        import csv

        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]), delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


FORMATS = ["a.jsonl", "a.ndjson", "a.json", "a.csv", "a.tsv", "a.parquet"]
ROWS = [
    {"id": 1, "text": "one, two\nthree\r\n", "de": "eins"},
    {"id": 2, "text": 'say "\u00e9\U0001f600"', "de": "sag"},
    {"id": 3, "text": "", "de": "leer"},
    {"id": 4, "text": "x\0y", "de": "z"},
]


@pytest.mark.parametrize("name", FORMATS)
def test_rows(tmp_path: Path, name: str) -> None:
    path = rows_of(tmp_path / name, ROWS)
    tally = Tally()
    assert read(opened(path), tally) == [(row["text"].encode(),) for row in ROWS if row["text"]]
    assert tally["empty row"] == 1 and tally["NUL"] == 1 and tally["CRLF line end"] == 1


@pytest.mark.parametrize("name", FORMATS)
def test_pairs(tmp_path: Path, name: str) -> None:
    path = rows_of(tmp_path / name, ROWS)
    found = read(opened(path, PAIRS, source_column="text", target_column="de", limit=2))
    assert found == [(row["text"].encode(), row["de"].encode()) for row in ROWS[:2]]


def test_pair_columns_are_source_and_target_by_default(tmp_path: Path) -> None:
    path = rows_of(tmp_path / "a.jsonl", [{"target": "b", "source": "a"}])
    assert read(opened(path, PAIRS)) == [(b"a", b"b")]


def test_long_row_comes_in_pieces(tmp_path: Path) -> None:
    path = rows_of(tmp_path / "a.jsonl", [{"text": "word " * 500_000}])
    source = opened(path)
    assert len(list(source.documents(Tally()))) > 1
    assert read(source) == [(b"word " * 500_000,)]


def test_surrogates_in_json(tmp_path: Path) -> None:
    """Escapes that are no character become the three bytes that they would have in UTF-8, never bytes of their own."""
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "a\\udc80b\\ud83d\\ude00\\ud800"}\n{"text": "caf\xe9"}\n')
    tally = Tally()
    assert read(opened(tmp_path / "a.jsonl"), tally) == [
        (b"a\xed\xb2\x80b" + "\U0001f600".encode() + b"\xed\xa0\x80",),
        (b"caf\xe9",),
    ]
    assert tally["lone surrogate"] == 2


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv"])
def test_mark_in_front_of_rows_is_dropped(tmp_path: Path, name: str) -> None:
    path = rows_of(tmp_path / name, [{"text": "a"}, {"text": "b"}])
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\n\n"))
    tally = Tally()
    assert read(opened(path), tally) == [(b"a",), (b"b",)]
    assert tally["byte order mark"] == 1 and tally["blank line"] == (2 if name == "a.jsonl" else tally["blank line"])


def folder(root: Path, **contents: bytes) -> Path:
    """A folder of files; `__` in a name is a slash, `_` a dot."""
    for name, data in contents.items():
        path = root / name.replace("__", "/").replace("_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return root


NOISE = bytes(range(256)) * 20


def test_folder(tmp_path: Path) -> None:
    folder(tmp_path, b_py=b"B", a__z_md=b"Z", a_txt=b"A", _git__x=b"hidden", _env=b"hidden", c_png=b"text", d=NOISE)
    folder(tmp_path, e_txt="wide".encode("utf-16"), f_txt=b"", g_jsonl=b'{"text": "row"}')
    source = opened(tmp_path)
    assert read(source) == [(b"A",), (b"Z",), (b"B",), (b"row",)]
    assert source.describe() == (
        f"{tmp_path}: 4 files, 18 bytes (left out: 1 UTF-16 file, 2 binary files, 1 empty file, 1 hidden file, "
        "1 hidden folder)"
    )


@pytest.mark.parametrize(
    ("glob", "expected"),
    [
        (None, "a/b/c.py a/b/c.txt a/d.py e.py"),
        ("*.py", "a/b/c.py a/d.py e.py"),
        ("**/*.py", "a/b/c.py a/d.py e.py"),
        ("a/*.py", "a/d.py"),
        ("a/**", "a/b/c.py a/b/c.txt a/d.py"),
        ("[e-z].py", "e.py"),
        ("?.py", "a/b/c.py a/d.py e.py"),
    ],
)
def test_glob(tmp_path: Path, glob: str | None, expected: str) -> None:
    for name in ("a/b/c.py", "a/b/c.txt", "a/d.py", "e.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    assert b" ".join(text for (text,) in read(opened(tmp_path, glob=glob))).decode() == expected


def test_json_is_text_in_a_folder_and_rows_where_it_is_named(tmp_path: Path) -> None:
    rows_of(tmp_path / "a.json", [{"text": "row"}])
    assert read(opened(tmp_path)) == [(b'{"text": "row"}\n',)]
    assert read(opened(tmp_path, glob="*.json")) == [(b"row",)] == read(opened(tmp_path / "a.json"))


def test_stdlib() -> None:
    source = open_source(DataConfig(source="stdlib"))
    assert re.fullmatch(r"stdlib \(source of Python 3\.\d+\): \d+ files, \d\.\d MiB", source.describe())
    assert isinstance(source, files.Files)
    names = [file.path.as_posix() for file in source.files]
    assert names == sorted(names) and len(set(names)) == len(names)
    assert not [
        name
        for name in names
        if re.search(r"/(tests?|site-packages|encodings|idlelib)/", name.split("/lib/python")[-1])
    ]
    assert any(name.endswith("/argparse.py") for name in names) and any(
        name.endswith("/asyncio/tasks.py") for name in names
    )


def test_what_identifies_a_source(tmp_path: Path) -> None:
    first = folder(tmp_path / "one", a_txt=b"text a", b_txt=b"text b")
    base = opened(first).fingerprint()
    moved = folder(tmp_path / "other" / "place", c_txt=b"text a", d_txt=b"text b")
    assert opened(moved).fingerprint() == base == opened(first).fingerprint()
    assert opened(first, limit=1).fingerprint() != base
    assert opened(first, column="body").fingerprint() != base
    for change in ({"a_txt": b"text A"}, {"c_txt": b"c"}, {"b_txt": b"text b "}):
        other = folder(tmp_path / f"changed {change}", a_txt=b"text a", b_txt=b"text b")
        assert opened(folder(other, **change)).fingerprint() != base
    rows = folder(tmp_path / "rows", a_csv=b"text a", b_txt=b"text b")
    assert opened(rows).fingerprint() != base


def test_large_sources_are_told_apart_by_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "WHOLE", 100)
    monkeypatch.setattr(files, "BLOCK", 10)
    path = tmp_path / "a.txt"
    path.write_bytes(b"x" * 5000)
    status = os.stat(path)
    base = opened(path).fingerprint()
    assert opened(path).fingerprint() == base
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    assert opened(path).fingerprint() != base
    path.write_bytes(b"x" * 4999 + b"y")
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert opened(path).fingerprint() != base


def test_change_while_reading_is_noticed(tmp_path: Path) -> None:
    folder(tmp_path, a_txt=b"a", b_txt=b"b")
    source = opened(tmp_path)
    source.fingerprint()
    documents = source.documents(Tally())
    next(documents)
    (tmp_path / "a.txt").write_bytes(b"longer")
    with pytest.raises(UserError, match=r"a\.txt: was changed while it was read; start again"):
        list(documents)


BAD: dict[str, tuple[dict[str, bytes], dict[str, Any], str]] = {
    "missing": ({"corpus_txt": b"a"}, {"source": "{}/corpos.txt"}, "{}/corpos.txt: data.source: no such file or folder; did you mean '{}/corpus.txt'?"),
    "missing folder": ({"data__a_txt": b"a"}, {"source": "{}/dta/a.txt"}, "{}/dta/a.txt: data.source: no such file or folder; did you mean '{}/data'?"),
    "empty file": ({"a_txt": b""}, {"source": "{}/a.txt"}, "{}/a.txt: data.source: is empty (0 bytes); give a file with text"),
    "binary file": ({"a_txt": NOISE}, {"source": "{}/a.txt"}, "{}/a.txt: data.source: is binary or not in UTF-8; give a text, jsonl, csv or parquet file"),
    "wide file": ({"a_txt": "a".encode("utf-16")}, {"source": "{}/a.txt"}, "{}/a.txt: data.source: is in UTF-16; convert it to UTF-8 text"),
    "empty folder": ({}, {}, "{}: data.source: holds no files; give a folder with text, code, jsonl, csv or parquet files"),
    "no text": ({"a_png": b"x", "b_png": b"x", "c_zip": b"x"}, {}, "{}: data.source: holds no text (2 .png, 1 .zip); give a folder with text, code, jsonl, csv or parquet files"),
    "glob": ({"a_txt": b"x"}, {"glob": "*.py"}, "{}: data.glob: no file matches glob '*.py'; try '**/*.txt'"),
    "glob of a file": ({"a_txt": b"x"}, {"source": "{}/a.txt", "glob": "*.py"}, "{}/a.txt: data.glob: is a file, so glob '*.py' picks nothing; set data.glob=null"),
    "column, jsonl": (
        {"a_jsonl": b'{"text": "a"}\n{"txt": "b", "id": 7}\n'},
        {"source": "{}/a.jsonl"},
        "{}/a.jsonl:2: has no column 'text'; its columns are txt, id; its first row is {{txt: 'b', id: 7}}; did you mean 'txt'?",
    ),
    "column, csv": (
        {"a_csv": b"body,id\nsome words,1\n"},
        {"source": "{}/a.csv"},
        "{}/a.csv:1: has no column 'text'; its columns are body, id; its first row is {{body: 'some words', id: '1'}}; set data.column to one of them",
    ),
    "no JSON": ({"a_jsonl": b'{"text": "a"}\n{"text": }\n'}, {"source": "{}/a.jsonl"}, "{}/a.jsonl:2: is not JSON (Expecting value: line 1 column 10 (char 9)); each line must hold one JSON object"),
    "JSON list": ({"a_json": b'[{"text": "a"}]'}, {"source": "{}/a.json"}, "{}/a.json:1: holds a JSON list, not an object; each line must hold one"),
    "deep JSON": ({"a_jsonl": b"[" * 100_000}, {"source": "{}/a.jsonl"}, "{}/a.jsonl:1: is not JSON (maximum recursion depth exceeded while decoding a JSON array from a unicode string); each line must hold one JSON object"),
    "number": ({"a_jsonl": b'{"text": 3}'}, {"source": "{}/a.jsonl"}, "{}/a.jsonl:1: column 'text' holds int, not text; name a column of text"),
    "ragged csv": ({"a_csv": b"text,id\na,1\nb,c,d\n"}, {"source": "{}/a.csv"}, "{}/a.csv:3: has 3 fields where the header has 2; quote fields that hold commas"),
    "open quote": ({"a_csv": b'text\n"a\nb\n'}, {"source": "{}/a.csv"}, "{}/a.csv:3: is not CSV (unexpected end of data); repair the line"),
    "no parquet": ({"a_parquet": b"PAR1 not"}, {"source": "{}/a.parquet"}, None),
    "pairs of text": ({"a_txt": b"x"}, {"source": "{}/a.txt", "streams": PAIRS}, "{}/a.txt: is plain text, and pairs need two columns; give a jsonl, csv or parquet file"),
    "pairs of a folder": ({"a_txt": b"x"}, {"streams": PAIRS}, "{}: data.source: holds no text (1 .txt); give a folder with text, code, jsonl, csv or parquet files"),
    "bare word": ({}, {"source": "wikitxt"}, "wikitxt: data.source: no such file or folder, and a dataset of the hub is named owner/name; check the path"),
    "path that looks like a name": ({"data__a_txt": b"x"}, {"source": "data/a.text"}, "data/a.text: data.source: no such file or folder; did you mean 'data/a.txt'?"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_mistakes(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    contents, options, message = BAD[name]
    monkeypatch.chdir(tmp_path)
    folder(tmp_path, **contents)
    options = {"source": "{}", **options}
    streams = options.pop("streams", ("text",))
    options["source"] = options["source"].format(tmp_path)
    with pytest.raises(UserError) as caught:
        read(open_source(DataConfig(**options), streams))
    if message is not None:
        assert str(caught.value) == message.format(tmp_path, tmp_path)
    assert "\n" not in str(caught.value)


def test_wrong_column_of_parquet(tmp_path: Path) -> None:
    path = rows_of(tmp_path / "a.parquet", [{"texts": "a" * 100, "n": 1}])
    with pytest.raises(UserError) as caught:
        read(opened(path))
    first = "{texts: '" + "a" * 55 + "...', n: 1}"
    assert str(caught.value) == (
        f"{path}: has no column 'text'; its columns are texts, n; its first row is {first}; did you mean 'texts'?"
    )


@pytest.mark.skipif(sys.platform == "win32" or os.geteuid() == 0, reason="root reads everything")
def test_unreadable_file(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "a.txt").chmod(0)
    with pytest.raises(UserError, match="cannot be read"):
        opened(tmp_path)


class FakeDataset:
    """What `datasets.load_dataset` gives, as far as the source uses it."""

    _fingerprint = "f00d"
    dataset_size = 1000

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Any:
        return iter(self.rows)

    def select_columns(self, names: list[str]) -> FakeDataset:
        return FakeDataset([{name: row[name] for name in names} for row in self.rows])


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """A stand-in for `datasets` that serves ROWS, and the calls to it."""
    made: list[Any] = []

    def load_dataset(name: str, subset: str | None, *, split: str, streaming: bool) -> FakeDataset:
        made.append((name, subset, split, streaming))
        if split == "tset":
            raise ValueError('Unknown split "tset". Should be one of [train].\nmore')
        return FakeDataset([{**row, "none": None} for row in ROWS])

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    return made


def test_hub(calls: list[Any]) -> None:
    source = open_source(DataConfig(source="owner/name", subset="small", split="test", limit=2))
    assert read(source) == [(row["text"].encode(),) for row in ROWS[:2]]
    assert calls == [("owner/name", "small", "test", False)]
    assert source.describe() == "hub dataset owner/name (small), split test, 4 rows"
    assert source.fingerprint() == {
        "hub": ["owner/name", "small", "test"], "version": "f00d", "columns": ("text",), "limit": 2,
    }  # fmt: skip


def test_hub_streamed(calls: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "_commit", lambda name: "c0ffee")
    source = open_source(DataConfig(source="owner/name", streaming=True))
    assert calls[0][3] is True and source.size is None and source.fingerprint()["version"] == "c0ffee"
    assert len(read(source)) == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"column": "tex"}, "owner/name: has no column 'tex'; its columns are id, text, de, none; its first row is"),
        (
            {"split": "tset"},
            'owner/name: cannot be loaded from the hub, and is no file or folder here (Unknown split "tset". ',
        ),
        ({"column": "id"}, "owner/name: row 1: column 'id' holds int, not text; name a column of text"),
    ],
)
def test_hub_mistakes(calls: list[Any], options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        read(open_source(DataConfig(source="owner/name", **options)))
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)


def test_hub_rows_without_text_are_counted(calls: list[Any]) -> None:
    tally: Counter[str] = Tally()
    assert read(open_source(DataConfig(source="owner/name", column="none")), tally) == []
    assert tally["empty row"] == 4
