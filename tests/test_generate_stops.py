"""Stop strings and streams of text, without a model: what is printed, and when."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xtcli.data.tokenizers import Bytes, StreamDecoder
from xtcli.data.train_tokenizer import train
from xtcli.generate.stops import Text

BYTES = train(Bytes.Config(), [])


class Chunks:
    """A decoder whose tokens are numbers of given pieces of text."""

    def __init__(self, pieces: list[str]) -> None:
        self.pieces = pieces

    def push(self, token: int) -> str:
        return self.pieces[token]

    def finish(self) -> str:
        return ""


def run(pieces: list[str], stops: list[str]) -> tuple[str, bool]:
    """The streamed text of pieces up to the stop."""
    text, said = Text(Chunks(pieces), stops), ""
    for token in range(len(pieces)):
        said += text.push(token)
        assert said == str(text)
        assert not any(stop in said for stop in stops)
        if text.stopped:
            break
    said += text.finish()
    assert said == str(text)
    return said, text.stopped


def cut(whole: str, stops: list[str]) -> tuple[str, bool]:
    """The specification: letter after letter, until the text so far ends in a stop string; the longest is cut."""
    for end in range(1, len(whole) + 1):
        found = [stop for stop in stops if whole[:end].endswith(stop)]
        if found:
            return whole[: end - max(map(len, found))], True
    return whole, False


@pytest.mark.parametrize(
    ("pieces", "stops", "wanted"),
    [
        (["hello", " world"], ["wor"], "hello "),
        (["hello", " wo", "rld"], ["wor"], "hello "),
        (["a", "b", "c", "d"], ["bcd", "c"], "ab"),
        (["abcd"], ["bcd", "c"], "ab"),
        (["abcd"], ["bc", "abc"], ""),
        (["x", "a", "a", "b"], ["aab"], "x"),
        (["aa", "ab"], ["aab"], "a"),
        (["ab", "ab", "ac"], ["abac"], "ab"),
        (["\n", "\n", "x"], ["\n\n"], ""),
        (["one", "two"], ["three"], "onetwo"),
        (["end", "st"], ["stop"], "endst"),
        (["stop"], ["stop"], ""),
        (["no", ""], [], "no"),
    ],
)
def test_table(pieces: list[str], stops: list[str], wanted: str) -> None:
    assert run(pieces, stops)[0] == wanted
    assert cut("".join(pieces), stops)[0] == wanted


@settings(max_examples=400, deadline=None)
@given(
    st.lists(st.text(alphabet="ab\u00e9\n", max_size=3), max_size=12),
    st.lists(st.text(alphabet="ab\u00e9\n", min_size=1, max_size=4), max_size=3),
)
def test_cut_does_not_depend_on_pieces(pieces: list[str], stops: list[str]) -> None:
    assert run(pieces, stops) == cut("".join(pieces), stops)


def test_nothing_is_held_without_need() -> None:
    text = Text(Chunks(["ab", "cS", "T", "x"]), ["STOP"])
    assert [text.push(token) for token in range(4)] == ["ab", "c", "", "STx"]


@pytest.mark.parametrize("text", ["\u00e9t\u00e9", "\u65e5\u672c", "a\U0001f600b", "x\u0301", "\ufffd!"])
def test_characters_come_whole(text: str) -> None:
    said = Text(StreamDecoder(BYTES))
    pieces = [said.push(token) for token in BYTES.encode(text)]
    assert [piece for piece in pieces if piece] == list(text)
    assert said.finish() == "" and str(said) == text


def test_bytes_that_are_no_text() -> None:
    said = Text(StreamDecoder(BYTES), ["\ufffd?"])
    ids = BYTES.encode("ok")
    euro = BYTES.encode("\u20ac")
    pieces = [said.push(token) for token in [*ids, *euro[:2]]]
    assert "".join(pieces) == "ok"
    assert said.finish() == "\ufffd" and str(said) == BYTES.decode([*ids, *euro[:2]])


def test_stop_string_in_the_last_bytes() -> None:
    said = Text(StreamDecoder(BYTES), ["\ufffd"])
    for token in [*BYTES.encode("ok"), BYTES.encode("\u20ac")[0]]:
        said.push(token)
    assert said.finish() == "" and said.stopped and str(said) == "ok"
