"""Checkpoints that have a vocabulary and no tokenizer.json: the ids are those of transformers' tokenizers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from checkpoints import save
from references import Case, reference

from xtcli.convert import convert
from xtcli.data.decode import byte_letters
from xtcli.data.tokenizers import Tokenizer
from xtcli.data.vocabularies import build
from xtcli.errors import UserError

transformers = pytest.importorskip("transformers")

WORDS = "[PAD] [UNK] [CLS] [SEP] [MASK] the dog barks ##s run ##ning Dog caf ##e ##\u00e9 \u4f60 , ! [unused1]".split()
MERGES = ["t h", "th e", "\u0120 d", "\u0120d o", "\u0120do g", "i n", "in g"]
ENDED, FRAMED = ["<|endoftext|>"], ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
TEXTS = ["The dog barks, running!", "caf\u00e9 \u4f60\u597d Dogs", "", "[MASK] <mask> [SEP] </s>", "in the thing\n dog"]


def words(folder: Path, *lines: str) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(lines or WORDS) + "\n", encoding="utf-8")
    return folder


def pairs(folder: Path, special: list[str]) -> Path:
    folder.mkdir(exist_ok=True)
    pieces = [*special, *byte_letters(), *(merge.replace(" ", "") for merge in MERGES)]
    (folder / "vocab.json").write_text(json.dumps({piece: id for id, piece in enumerate(pieces)}))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *MERGES]) + "\n", encoding="utf-8")
    return folder


SLOW: list[tuple[str, Any, dict[str, Any]]] = [
    ("BertTokenizer", words, {}),
    ("BertTokenizer", words, {"do_lower_case": False, "strip_accents": True}),
    ("BertTokenizer", words, {"tokenize_chinese_chars": False, "cls_token": "[unused1]"}),
    ("BertTokenizer", words, {"additional_special_tokens": ["[unused1]"]}),
    ("GPT2Tokenizer", lambda folder: pairs(folder, ENDED), {}),
    ("GPT2Tokenizer", lambda folder: pairs(folder, ENDED), {"add_prefix_space": True}),
    ("RobertaTokenizer", lambda folder: pairs(folder, FRAMED), {}),
    ("RobertaTokenizer", lambda folder: pairs(folder, FRAMED), {"additional_special_tokens": ["<ent>"]}),
]


@pytest.mark.parametrize(("name", "write", "options"), SLOW, ids=lambda value: "" if callable(value) else str(value))
@pytest.mark.parametrize("added", [[], ["zebra", "gnu"]], ids=str)
def test_ids_are_the_reference_s(
    name: str, write: Any, options: dict[str, Any], added: list[str], tmp_path: Path
) -> None:
    theirs = getattr(transformers, name).from_pretrained(write(tmp_path / "bare"), **options)
    theirs.add_tokens(added)
    theirs.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved/tokenizer.json").exists()
    made = build(tmp_path / "saved")
    assert made is not None
    # The reference's two kinds of tokenizers differ in where else they put the space in front.
    spaced = "add_prefix_space" in options
    for text in TEXTS if spaced else (*TEXTS, "zebra gnus"):
        if text or not spaced:
            assert made.library.encode(text).ids == theirs(text)["input_ids"], text
        if text:
            expected = theirs(text, "the dog")
            found = made.library.encode(text, "the dog")
            assert found.ids == expected["input_ids"]
            assert found.type_ids == expected.get("token_type_ids", found.type_ids)


@pytest.mark.parametrize(
    ("write", "case", "said"),
    [
        (words, "BertForMaskedLM", "does not say do_lower_case: text is left in its case"),
        (lambda folder: words(folder, *(w for w in WORDS if w != "Dog")), "BertForMaskedLM", "text is lowered"),
        (lambda folder: pairs(folder, ENDED), "GPT2LMHeadModel", "made of vocab.json and merges.txt"),
    ],
)
def test_a_converted_checkpoint_reads_text(write: Any, case: str, said: str, tmp_path: Path) -> None:
    source = save(reference(Case(case)), tmp_path / "source")
    report = convert(write(source), tmp_path / "there")
    assert said in report.tokenizer and not report.missing and "tokenizer.json" in report.companions
    tokenizer = Tokenizer.load(tmp_path / "there")
    assert tokenizer.encode("the dog") == Tokenizer.load(source).encode("the dog") != []
    assert tokenizer.special
    back = convert(tmp_path / "there", tmp_path / "back", to="hf")
    assert "tokenizer.json" in back.companions


@pytest.mark.parametrize(
    ("write", "said"),
    [
        (lambda folder: None, "the source has no tokenizer"),
        (lambda folder: (folder / "spiece.model").write_bytes(b"x"), "spiece.model is a SentencePiece model"),
        (lambda folder: words(folder, "a", "b"), "names no token for what it cannot spell"),
    ],
)
def test_what_is_missing_is_said(write: Any, said: str, tmp_path: Path) -> None:
    source = save(reference(Case("BertModel")), tmp_path / "source")
    write(source)
    report = convert(source, tmp_path / "there")
    assert said in report.missing and not (tmp_path / "there/tokenizer.json").exists()


def saved(folder: Path, **settings: Any) -> Path:
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


@pytest.mark.parametrize(
    ("write", "said"),
    [
        (lambda f: saved(words(f), word_tokenizer_type="mecab"), "word_tokenizer_type: is 'mecab'"),
        (lambda f: saved(words(f), do_basic_tokenize=False), "do_basic_tokenize: is False"),
        (lambda f: (pairs(f, ENDED) / "merges.txt").write_text("t h</w>\n"), "is no byte-level vocabulary"),
        (lambda f: (pairs(f, ENDED) / "merges.txt").write_text("q q\n"), "do not fit together"),
        (lambda f: (words(f) / "added_tokens.json").write_text('{"x": 99}'), "'x' has id 99"),
    ],
)
def test_a_vocabulary_that_says_too_little_is_refused(write: Any, said: str, tmp_path: Path) -> None:
    write(tmp_path)
    with pytest.raises(UserError, match=said):
        build(tmp_path)
