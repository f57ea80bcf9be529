"""Tokenizers: nothing lost, nothing smuggled in, the same each time, and read by transformers as written."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
import textwrap
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import tokenizers as library
from hypothesis import given, settings
from hypothesis import strategies as st

from xtcli.data import unigram
from xtcli.data.text import from_bytes, to_bytes
from xtcli.data.tokenizers import Bpe, Bytes, File, StreamDecoder, Tokenizer, Unigram, WordPiece, check_vocab, threads
from xtcli.data.train_tokenizer import train
from xtcli.errors import UserError
from xtcli.registry import kinds

SAMPLE = [inspect.getsource(module) for module in (textwrap, json, inspect)] + [
    "na\u00efve caf\u00e9 \u65e5\u672c\u8a9e \U0001f600\n"
] * 3
MARKS = {"pad": "[PAD]", "unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"}
CONFIGS = {
    "bytes": Bytes.Config(special={"eos": "<|endoftext|>", "pad": "<pad>"}, sentinels=3),
    "bpe": Bpe.Config(vocab=600, special={"bos": "<s>", "eos": "</s>", "pad": "</s>"}, sentinels=2, frame="bos-eos"),
    "wordpiece": WordPiece.Config(vocab=700, special=MARKS),
    "cased": WordPiece.Config(vocab=700, special=MARKS, lowercase=False),
    "unigram": Unigram.Config(vocab=600, sentinels=4),
}
EXACT = ("bytes", "bpe")


def byte_fallback() -> Tokenizer:
    """As Llama 2's: pieces with U+2581 for a space, bytes for what has no piece."""
    letters = "\u2581abcdehlotw"
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"<0x{byte:02X}>": byte + 3 for byte in range(256)}
    for token in [*letters, "\u2581a", "he", "\u2581he", "lo", "llo"]:
        vocab.setdefault(token, len(vocab))
    merges = [("\u2581", "a"), ("h", "e"), ("\u2581", "he"), ("l", "o"), ("l", "lo")]
    made = library.Tokenizer(
        library.models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    made.normalizer = library.normalizers.Sequence(
        [library.normalizers.Prepend("\u2581"), library.normalizers.Replace(" ", "\u2581")]
    )
    made.decoder = library.decoders.Sequence(
        [
            library.decoders.Replace("\u2581", " "),
            library.decoders.ByteFallback(),
            library.decoders.Fuse(),
            library.decoders.Strip(content=" ", left=1, right=0),
        ]
    )
    made.add_special_tokens(["<unk>", "<s>", "</s>"])
    return Tokenizer(made, {"unk": "<unk>", "bos": "<s>", "eos": "</s>"})


def whole() -> Tokenizer:
    """One whose decoder does not go token by token."""
    made = library.Tokenizer(
        library.models.WordLevel({"a": 0, "b": 1, "|": 2, "<pad>": 3, "<unk>": 4}, unk_token="<unk>")
    )
    made.pre_tokenizer = library.pre_tokenizers.Split("", "isolated")
    made.decoder = library.decoders.CTC(pad_token="<pad>", word_delimiter_token="|")
    made.add_special_tokens(["<pad>"])
    return Tokenizer(made, {"pad": "<pad>"})


@pytest.fixture(scope="module")
def made() -> dict[str, Tokenizer]:
    return {name: train(config, SAMPLE) for name, config in CONFIGS.items()} | {"fallback": byte_fallback()}


ALL = [*CONFIGS, "fallback"]


@settings(max_examples=200)
@given(data=st.one_of(st.binary(max_size=60), st.text(max_size=40).map(str.encode)))
@pytest.mark.parametrize("name", EXACT)
def test_bytes_in_are_bytes_out(made: dict[str, Tokenizer], name: str, data: bytes) -> None:
    tokenizer = made[name]
    assert tokenizer.lossless
    assert tokenizer.decode_bytes(tokenizer.encode(from_bytes(data))) == data


def test_lossless_is_claimed_where_it_holds(made: dict[str, Tokenizer]) -> None:
    assert [name for name in ALL if made[name].lossless] == ["bytes", "bpe"]


def test_invalid_bytes_where_letters_are_spelt(made: dict[str, Tokenizer]) -> None:
    assert made["wordpiece"].decode(made["wordpiece"].encode("a \udcff b")) == "a b"
    assert made["unigram"].encode("a\udcffb") != made["unigram"].encode("ab")
    assert made["fallback"].decode_bytes(made["fallback"].encode("a\udcff")).endswith(b"\xff")


@pytest.mark.parametrize("name", ALL)
def test_control_tokens_come_only_when_asked_for(made: dict[str, Tokenizer], name: str) -> None:
    tokenizer = made[name]
    control = tokenizer.control - {tokenizer.special.get("unk")}
    for id in control:
        token = tokenizer.library.id_to_token(id)
        for text in (token, f"a{token}", f"{token} {token}", f"a {token}b", f" {token}\n"):
            assert not control & set(tokenizer.encode(text)), text
            assert not control & set(tokenizer.encode_pair(text, text, special=False)[0]), text
            assert id in tokenizer.encode(text, control=True)
        if tokenizer.lossless:
            assert tokenizer.decode(tokenizer.encode(token)) == token


@pytest.mark.parametrize("name", ALL)
def test_batch_equals_one_by_one_and_the_library(made: dict[str, Tokenizer], name: str) -> None:
    tokenizer = made[name]
    texts = ["", "a", *SAMPLE[0].splitlines(), "caf\u00e9 \U0001f600", "\ud800", "a\udc80b"]
    with threads():
        batch = [ids.tolist() for ids in tokenizer.encode_batch(texts)]
    assert batch == [tokenizer.encode(text) for text in texts]
    valid = texts[:-2]
    assert batch[:-2] == [tokenizer.library.encode(text, add_special_tokens=False).ids for text in valid]
    assert [tokenizer.decode(ids) for ids in batch[:-2]] == [
        tokenizer.library.decode(ids, skip_special_tokens=False) for ids in batch[:-2]
    ]


def test_ids_are_in_the_order_of_the_config(made: dict[str, Tokenizer]) -> None:
    assert made["bytes"].special == {"eos": 256, "pad": 257} and made["bytes"].sentinels == [260, 259, 258]
    assert made["bpe"].special == {"bos": 0, "eos": 1, "pad": 1} and made["bpe"].sentinels == [599, 598]
    assert made["wordpiece"].special == {"pad": 0, "unk": 1, "cls": 2, "sep": 3, "mask": 4}
    assert made["unigram"].special == {"pad": 0, "eos": 1, "unk": 2} and made["unigram"].sentinels == [
        599,
        598,
        597,
        596,
    ]
    assert [made[name].vocab for name in CONFIGS] == [261, 600, 700, 700, 600]


def test_templates(made: dict[str, Tokenizer]) -> None:
    bert, cls, sep = made["wordpiece"], 2, 3
    a, b = bert.encode("hello"), bert.encode("world x")
    assert bert.encode("hello", special=True) == [cls, *a, sep]
    assert bert.encode("hello", "world x", special=True) == [cls, *a, sep, *b, sep]
    assert bert.encode_pair("hello", "world x")[1] == [0] * (len(a) + 2) + [1] * (len(b) + 1)
    a, b = made["bpe"].encode("a\udcff"), made["bpe"].encode("b")
    assert made["bpe"].encode("a\udcff", "b", special=True) == [0, *a, 1, 0, *b, 1]
    assert made["unigram"].encode("a", special=True)[-1] == 1
    assert made["bytes"].encode_pair("a", "b") == ([97, 98], [0, 1])


@pytest.mark.parametrize("name", CONFIGS)
def test_training_is_deterministic(made: dict[str, Tokenizer], name: str) -> None:
    """The library's maps have a new random order in each run of a trainer."""
    assert {train(CONFIGS[name], SAMPLE).digest for _ in range(3)} == {made[name].digest}


@pytest.mark.parametrize("name", CONFIGS)
def test_digest_sees_each_change(made: dict[str, Tokenizer], name: str) -> None:
    config = CONFIGS[name]
    changes: list[dict[str, Any]] = [
        {"sentinels": config.sentinels + 1},
        {"special": {**config.special, "bos": "<bos>"}},
    ]
    changes.append({"frame": "none", "special": {**config.special, "mask": "<m>"}})
    digests = {train(config.model_copy(update=change), SAMPLE).digest for change in changes}
    assert len(digests | {made[name].digest}) == len(changes) + 1


@pytest.mark.parametrize("name", ALL)
def test_saved_and_loaded(made: dict[str, Tokenizer], name: str, tmp_path: Path) -> None:
    tokenizer = made[name]
    tokenizer.save(tmp_path)
    for again in (Tokenizer.load(tmp_path), Tokenizer.load(str(tmp_path / "tokenizer.json"))):
        assert (again.digest, again.special, again.sentinels, again.vocab) == (
            tokenizer.digest, tokenizer.special, tokenizer.sentinels, tokenizer.vocab,
        )  # fmt: skip


@pytest.mark.parametrize("name", ALL)
def test_transformers_reads_what_is_saved(made: dict[str, Tokenizer], name: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizer = made[name]
    tokenizer.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert len(theirs) == tokenizer.vocab
    for role, id in tokenizer.special.items():
        assert getattr(theirs, f"{role}_token_id") == id
    for id in tokenizer.sentinels:
        assert theirs.convert_ids_to_tokens(id) in theirs.additional_special_tokens
    for text in ("def f(x):\n    return 'caf\u00e9'  # \U0001f600", "hello", ""):
        assert theirs(text)["input_ids"] == tokenizer.encode(text, special=True)
        assert theirs(text, add_special_tokens=False)["input_ids"] == tokenizer.encode(text)
        assert theirs(text, "b")["input_ids"] == tokenizer.encode(text, "b", special=True)
        assert theirs.decode(tokenizer.encode(text)) == tokenizer.decode(tokenizer.encode(text))


def test_settings_beside_the_file_are_kept(made: dict[str, Tokenizer], tmp_path: Path) -> None:
    made["bpe"].save(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": "{{ x }}", "model_max_length": 9}))
    again = Tokenizer.load(tmp_path)
    assert again.digest != made["bpe"].digest
    (tmp_path / "out").mkdir()
    again.save(tmp_path / "out")
    found = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert found["chat_template"] == "{{ x }}" and found["model_max_length"] == 9
    assert Tokenizer.load(tmp_path / "out").digest == again.digest


def test_a_chat_template_in_a_file_of_its_own_is_kept(made: dict[str, Tokenizer], tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    made["bpe"].save(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": "{{ old }}"}))
    template = "{% for m in messages %}<{{ m.content }}>\n{% endfor %}"
    (tmp_path / "chat_template.jinja").write_text(template)
    again = Tokenizer.load(tmp_path)
    (tmp_path / "out").mkdir()
    again.save(tmp_path / "out")
    assert Tokenizer.load(tmp_path / "out").digest == again.digest != made["bpe"].digest
    spoken = [{"role": "user", "content": "caf\u00e9"}]
    for folder in (tmp_path, tmp_path / "out"):
        theirs = transformers.AutoTokenizer.from_pretrained(folder)
        assert theirs.apply_chat_template(spoken, tokenize=False) == "<caf\u00e9>\n"


def test_roles_by_customary_names(tmp_path: Path) -> None:
    made = library.Tokenizer(library.models.WordLevel({"a": 0, "<s>": 1, "[MASK]": 2, "x": 3}, unk_token="a"))
    made.add_special_tokens(["<s>", "[MASK]"])
    made.save(str(tmp_path / "t.json"))
    assert Tokenizer.load(tmp_path / "t.json").special == {"bos": 1, "mask": 2}
    assert Tokenizer.load(tmp_path / "t.json", {"eos": "<s>"}).special == {"bos": 1, "eos": 1, "mask": 2}
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": {"content": "<s>"}, "pad_token": "<gone>"}')
    assert Tokenizer.load(tmp_path / "t.json").special == {"eos": 1}


@settings(max_examples=150)
@given(seed=st.lists(st.integers(0, 10_000), max_size=30))
@pytest.mark.parametrize("name", ALL)
def test_stream_joins_to_the_whole(made: dict[str, Tokenizer], name: str, seed: list[int]) -> None:
    tokenizer = made[name]
    ids = [number % tokenizer.vocab for number in seed]
    for start in (0, len(ids) // 2):
        stream = StreamDecoder(tokenizer, ids[:start])
        parts = [stream.push(id) for id in ids[start:]]
        if start == 0:
            assert "".join([*parts, stream.finish()]) == tokenizer.decode(ids)
            continue
        before = StreamDecoder(tokenizer)
        said = "".join(before.push(id) for id in ids[:start])
        assert said + "".join(parts) == "".join(map(StreamDecoder(tokenizer).push, ids))


@pytest.mark.parametrize("name", [*EXACT, "fallback"])
def test_stream_holds_unfinished_characters_back(made: dict[str, Tokenizer], name: str) -> None:
    text = "a\U0001f468\u200d\U0001f469\u65e5\u672c caf\u00e9 "
    stream = StreamDecoder(made[name])
    parts = [stream.push(id) for id in made[name].encode(text)]
    assert "".join(parts) == text and "\ufffd" not in "".join(parts) and stream.finish() == ""
    half = made[name].encode(text[:2])[:-1]
    stream = StreamDecoder(made[name])
    assert "".join(map(stream.push, half)) == "a" and stream.finish() == "\ufffd"
    stream = StreamDecoder(made[name], half)
    assert stream.push(made[name].encode(text[:2])[-1]) == text[1]


def test_replacement_character_of_the_text_itself(made: dict[str, Tokenizer]) -> None:
    stream = StreamDecoder(made["bpe"])
    assert "".join(map(stream.push, made["bpe"].encode("a\ufffdb"))) == "a\ufffdb"


def test_decoder_that_needs_all_tokens() -> None:
    tokenizer = whole()
    ids = [0, 0, 3, 0, 1, 1, 2, 0]
    stream = StreamDecoder(tokenizer)
    assert tokenizer.decode(ids) == "aab a"
    assert "".join([*map(stream.push, ids), stream.finish()]) == "aab a"


def test_special_tokens_in_decoded_text(made: dict[str, Tokenizer]) -> None:
    tokenizer = made["bpe"]
    ids = [0, *tokenizer.encode("a b"), 1, 599]
    assert tokenizer.decode(ids) == "<s>a b</s><extra_id_0>"
    assert tokenizer.decode(ids, special=False) == "a b"
    assert tokenizer.decode([*tokenizer.encode("a"), 600]) == "a<id 600>"


def test_pieces_are_shorter_than_letters(made: dict[str, Tokenizer]) -> None:
    for name in ("bpe", "wordpiece", "unigram"):
        assert len(made[name].encode(SAMPLE[2])) < 0.6 * len(SAMPLE[2])


def test_unigram_prefers_what_is_frequent() -> None:
    """Two words and a rare third: the words become pieces, and no letter is lost."""
    words = Counter({"\u2581the": 1000, "\u2581hen": 900, "\u2581tax": 3})
    pieces = unigram.learn(words, sorted(set("\u2581thenax")), 10)
    names = [piece for piece, _ in pieces]
    assert set("\u2581thenax") <= set(names) and {"\u2581the", "\u2581hen"} <= set(names)
    assert [score for _, score in pieces] == sorted((score for _, score in pieces), reverse=True)


def test_unigram_sums_over_all_segmentations() -> None:
    import numpy as np

    lattice = unigram.Lattice(["ab"], ["a", "b", "ab"])
    p = np.array([0.3, 0.2, 0.1])
    whole = 0.1 / (0.1 + 0.3 * 0.2)
    expected = lattice.expected(np.log(p), np.array([4.0]))
    assert np.allclose(expected, [4 * (1 - whole), 4 * (1 - whole), 4 * whole])
    assert np.allclose(unigram.Lattice(["ab"], ["a", "b", "ab"], whole=False).best(np.log(p)), np.log(0.06))


def test_alphabet_leaves_out_what_is_rare() -> None:
    tokenizer = train(WordPiece.Config(vocab=200, special=MARKS), ["ab " * 5000 + "\u03a9"])
    assert tokenizer.encode("ab \u03a9")[1:] == [1]


def test_small_text_gives_fewer_tokens() -> None:
    assert train(Bpe.Config(vocab=5000), ["abc abc"]).vocab < 300


BAD = {
    "word": (Bpe.Config(vocab=400, special={"eos": "end"}), "tokenizer.special.eos: 'end' could be a word of the text; put signs around it, such as '<eos>'"),
    "sign": (Bytes.Config(special={"pad": "##"}), "tokenizer.special.pad: '##' could be a word of the text; put signs around it, such as '<pad>'"),
    "space": (Bytes.Config(special={"pad": "<a b>"}), "tokenizer.special.pad: '<a b>' could be a word of the text; put signs around it, such as '<pad>'"),
    "no unk": (Unigram.Config(vocab=400, special={"eos": "</s>"}), "tokenizer.special: unigram needs a token for what it cannot spell; add unk, such as '<unk>'"),
    "no sep": (WordPiece.Config(vocab=400, special={"unk": "[U]", "cls": "[C]"}), "tokenizer.frame: 'cls-sep' needs the special token sep; set tokenizer.special.sep, or tokenizer.frame=none"),
    "bpe vocab": (Bpe.Config(vocab=256, sentinels=9), "tokenizer.vocab: leaves 246 ids beside special tokens and sentinels, too few for 256 bytes; raise it by 10 or more"),
    "unigram vocab": (Unigram.Config(vocab=3), "tokenizer.vocab: leaves 0 ids beside special tokens and sentinels, too few for 1 letters; raise it by 1 or more"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_impossible_configs(name: str) -> None:
    config, message = BAD[name]
    with pytest.raises(UserError) as caught:
        train(config, SAMPLE)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "{}: no such file or folder; give a tokenizer.json of the tokenizers library or its folder"),
        (b"\x0a\x0e\x0a\x05<unk>", "{}: is not a tokenizer ("),
        (b"{}", "{}: is not a tokenizer ("),
        (b"", "{}: is not a tokenizer ("),
        (b"\xff\xfe", "{}: is not a tokenizer ("),
    ],
)
def test_files_that_are_no_tokenizer(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "tokenizer.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        Tokenizer.load(path)
    assert str(caught.value).startswith(message.format(path)) and "\n" not in str(caught.value)


def test_folder_without_tokenizer_and_unknown_role(made: dict[str, Tokenizer], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no tokenizer\.json; give a"):
        Tokenizer.load(tmp_path)
    made["bytes"].save(tmp_path)
    with pytest.raises(UserError, match="no token '<x>' for the role mask"):
        Tokenizer.load(tmp_path, {"mask": "<x>"})
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(UserError, match=r"tokenizer_config.json: is not JSON"):
        Tokenizer.load(tmp_path)


def test_vocab_larger_than_the_model(made: dict[str, Tokenizer]) -> None:
    check_vocab(made["bpe"], 600)
    with pytest.raises(UserError) as caught:
        check_vocab(made["bpe"], 599)
    assert str(caught.value) == (
        "model.vocab: the tokenizer's largest id is 599, the model has 599 rows; "
        "set model.vocab=600 or a smaller tokenizer.vocab"
    )


def test_kinds() -> None:
    assert sorted(kinds("tokenizer")) == ["bpe", "bytes", "file", "unigram", "wordpiece"]
    assert File.Config(path="x").kind == "file"


@pytest.mark.skipif(sys.platform == "win32", reason="Windows does not fork")
def test_threads_then_fork_without_a_word() -> None:
    """Worker processes that are forked after a parallel encode work, and nothing is said on stderr."""
    code = """
import os
from xtcli.data.tokenizers import Bytes, Bpe, threads
from xtcli.data.train_tokenizer import train
made = train(Bpe.Config(vocab=300), ["some text, some more"] * 50)
with threads():
    made.encode_batch(["some text"] * 200)
child = os.fork()
if not child:
    os._exit(0 if made.encode_batch(["some text"] * 200)[0].size else 1)
assert os.waitpid(child, 0)[1] == 0
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_text_of_any_kind_of_argument() -> None:
    """A prompt from the command line carries invalid bytes as surrogates; they are those bytes."""
    tokenizer = train(CONFIGS["bytes"], [])
    assert tokenizer.encode("\udcff") == [255] and to_bytes("\udcff") == b"\xff"
