"""YAML as plain data: what each scalar means, where everything stands, what is refused."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xtcli.config.document import MAX_DEPTH, parse, read
from xtcli.config.emit import dump, scalar
from xtcli.errors import UserError

SCALARS = [
    ("3e-4", 3e-4),
    ("1e5", 100000),
    ("2E+3", 2000),
    ("1.5e3", 1500.0),
    ("1e30", 1e30),
    (".5", 0.5),
    ("5.", 5.0),
    ("-0.1", -0.1),
    ("+3", 3),
    ("0", 0),
    ("-0", 0),
    ("1_000_000", 1000000),
    ("1_000.5", 1000.5),
    ("0x1F", 31),
    ("0o17", 15),
    (".inf", math.inf),
    ("-.inf", -math.inf),
    ("true", True),
    ("False", False),
    ("TRUE", True),
    ("null", None),
    ("~", None),
    ("", None),
    ("no", "no"),
    ("yes", "yes"),
    ("on", "on"),
    ("Off", "Off"),
    ("y", "y"),
    ("12:30:45", "12:30:45"),
    ("2019-02-14", "2019-02-14"),
    ("1.2.3", "1.2.3"),
    ("1_", "1_"),
    ("1__0", "1__0"),
    ("e5", "e5"),
    ("1e", "1e"),
    (".", "."),
    ("=", "="),
    ("'3e-4'", "3e-4"),
    ('"true"', "true"),
    ("!!str 12", "12"),
    ("!!float 3", 3.0),
]


@pytest.mark.parametrize(("text", "value"), SCALARS)
def test_scalars_mean_what_yaml_1_2_says(text: str, value: object) -> None:
    found = parse(f"a: {text}\n", "f").tree["a"]
    assert type(found) is type(value)
    assert found == value


def test_every_key_is_text() -> None:
    assert list(parse("{1: a, no: b, 1.1b: c, null: d, true: e}", "f").tree) == ["1", "no", "1.1b", "null", "true"]


def test_places_are_those_of_keys_and_values() -> None:
    text = "a: 1\nb:\n  c: [1, {d: 2}]\n  e: x\n"
    found = parse(text, "f.yaml")
    assert found.values[("a",)] == "f.yaml:1:4"
    assert found.keys[("b", "e")] == "f.yaml:4:3"
    assert found.values[("b", "c", 1, "d")] == "f.yaml:3:14"
    assert found.values[("b",)] == "f.yaml:2:1"  # a block map is where its key is
    assert found.place(("b", "c", 1, "nothing", "below")) == "f.yaml:3:10"
    assert found.place(("nothing",)) == "f.yaml:1:1"


REFUSED_AT_ONCE = [
    ("a: [1, 2\nb: 3", "f:2:2: is not YAML: expected ',' or ']'"),
    ("a: b: c", "f:1:5: is not YAML: mapping values are not allowed here; check the indentation"),
    (
        "a:\n\tb: 1",
        "f:2:1: is not YAML: found character '\\t' that cannot start any token; indent with spaces, not tabs",
    ),
    ("a: 1\n---\nb: 2", "f:2:1: is not YAML"),
    ("a: *nobody", "f:1:4: is not YAML: found undefined alias 'nobody'"),
    ("a: 'x", "f:1:6: is not YAML"),
    ("a: x\x07y", "f:1:5: holds the unprintable character U+0007"),
    ("a: &a [*a]", "f:1:4: holds an alias of itself"),
    ("a: @x", "f:1:4: is not YAML"),
    ("[" * 5000, f"nested more than {MAX_DEPTH} levels deep"),
]


@pytest.mark.parametrize(("text", "message"), REFUSED_AT_ONCE)
def test_broken_syntax_is_refused_with_its_place(text: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        parse(text, "f")
    assert message in str(caught.value)


def test_a_bomb_of_aliases_is_refused() -> None:
    text = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n"
    text += "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 10))
    with pytest.raises(UserError, match="unfolds into more than 100000 values; use fewer aliases"):
        parse(text, "f")


COLLECTED = [
    ("a: 012", "f:1:4: 012 starts with a zero, which some read as octal; write 12, or quote it if it is text"),
    ("a: 1\nb: 2\na: 3", "f:3:1: a: stands twice in one map; the first is on line 1; keep one"),
    ("a: {b: 1, b: 1}", "f:1:11: a.b: stands twice in one map; the first is on line 1; keep one"),
    ("a: !!python/object:os.system x", "f:1:4: the tag !!python/object:os.system has no meaning here; remove it"),
    ("a: !own x", "f:1:4: the tag !own has no meaning here; remove it"),
    ("a: !!int x", "f:1:4: 'x' is no int; remove the tag !!int"),
    ("? [a, b]\n: 1", "f:1:3: a list or map cannot be a key; write a plain word"),
    ("a: 1e999", "f:1:4: 1e999 is larger than any float; write .inf if infinity is meant"),
    ("a: " + "9" * 5000, "f:1:4: a number of more than 400 digits; quote it if it is text"),
    ("a:\n  <<: 3", "f:2:3: '<<' takes a map or a list of maps; name an alias of a map"),
]


@pytest.mark.parametrize(("text", "message"), COLLECTED)
def test_mistakes_are_collected_with_their_places(text: str, message: str) -> None:
    assert [str(problem) for problem in parse(text, "f").problems] == [message]


def test_merge_keys_fill_in_and_what_is_stated_wins() -> None:
    text = "x: &x {a: 1, b: 2}\ny: &y {b: 3, c: 4}\nz:\n  <<: [*x, *y]\n  a: 9\n"
    found = parse(text, "f")
    assert found.tree["z"] == {"a": 9, "b": 2, "c": 4}
    assert found.values[("z", "b")] == "f:1:17"
    assert not found.problems


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"\xff\xfe\x00", "is not UTF-8 text"), (b" " * (5 << 20), "is larger than 4 MiB")],
)
def test_a_file_that_is_no_text_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    file = tmp_path / "f.yaml"
    file.write_bytes(content)
    with pytest.raises(UserError, match=message):
        read(file)


def test_a_missing_file_and_a_byte_order_mark(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read: No such file"):
        read(tmp_path / "none.yaml")
    (tmp_path / "bom.yaml").write_bytes(b"\xef\xbb\xbfa: 1\n")
    assert read(tmp_path / "bom.yaml").tree == {"a": 1}


LEAVES = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=20)
TREES = st.dictionaries(
    st.text(max_size=8),
    st.recursive(
        LEAVES, lambda below: st.lists(below, max_size=3) | st.dictionaries(st.text(max_size=8), below, max_size=3)
    ),
    max_size=4,
)


@settings(max_examples=300, deadline=None)
@given(TREES)
def test_what_is_written_reads_back_equal(tree: dict[str, object]) -> None:
    document = parse(dump(tree), "f")
    assert not document.problems
    assert document.tree == (tree or None)


@settings(max_examples=300, deadline=None)
@given(st.floats(allow_nan=False))
def test_floats_read_back_exactly(value: float) -> None:
    found = parse(f"a: {scalar(value)}", "f").tree["a"]
    assert type(found) is float
    assert found == value and math.copysign(1, found) == math.copysign(1, value)
