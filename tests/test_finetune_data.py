"""Labelled rows: what becomes of each, which labels there are, and what is said about those that cannot be used."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from labelled import rows, write

from xtcli.config.data import DataConfig
from xtcli.config.preset import load_preset
from xtcli.data.batch import IGNORE
from xtcli.data.records import Records, Side, read_records
from xtcli.data.tokenizers import Bpe, Bytes, Tokenizer, Unigram, WordPiece
from xtcli.data.train_tokenizer import train as learn
from xtcli.errors import UserError
from xtcli.objectives import Classify, Extract
from xtcli.objectives.frame import Frame, lengths
from xtcli.train.job import make_job

WORDS = ["the cat sat on the mat .", "a dog ran far away !", "what did the cat do ?"]
KINDS = {
    "wordpiece": learn(WordPiece.Config(vocab=120), WORDS),
    "bpe": learn(Bpe.Config(vocab=300), WORDS),
    "bytes": learn(Bytes.Config(), []),
    "unigram": learn(Unigram.Config(vocab=80), WORDS),
}
WORDPIECE = KINDS["wordpiece"]
CLS, SEP = WORDPIECE.special["cls"], WORDPIECE.special["sep"]


def side(*values: list[Any]) -> Side:
    return Side("train", [(f"rows:{number}", row) for number, row in enumerate(values, 1)])


def classify(values: Side, tokenizer: Tokenizer = WORDPIECE, context: int = 32, **fields: Any) -> Classify:
    model = {name: fields.pop(name) for name in ("segments", "decoder", "start", "predict") if name in fields}
    config = Classify.Config(**({"of": "sequence", "labels": ("no", "yes")} | fields))
    return Classify(config, values, tokenizer, context=context, seed=0, **model)


def extract(values: Side, tokenizer: Tokenizer = WORDPIECE, context: int = 32, **fields: Any) -> Extract:
    whole = fields.pop("validation", False)
    return Extract(Extract.Config(**fields), values, tokenizer, validation=whole, context=context, seed=0)


def all_of(objective: Any) -> Any:
    numbers = np.arange(len(objective), dtype=np.int64)
    return objective.batch(numbers, numbers * 0)


def test_texts_are_framed_and_padded() -> None:
    made = all_of(classify(side(["the cat", "yes"], ["a dog ran far", "no"])))
    ids = made.inputs["input_ids"].tolist()
    assert ids[0][: len(WORDPIECE.encode("the cat")) + 2] == [CLS, *WORDPIECE.encode("the cat"), SEP]
    assert (len(ids[0]), len(ids[0]) % 8) == (len(ids[1]), 0)
    assert made.inputs["attention_mask"].sum(1).tolist() == list(made.lengths)
    assert made.targets["sequence"].tolist() == [1, 0]
    assert "token_type_ids" not in made.inputs
    assert made.supervised() == {"sequence": 2}


@pytest.mark.parametrize("kind", KINDS)
def test_pairs(kind: str) -> None:
    tokenizer = KINDS[kind]
    made = classify(side(["the cat", "a dog", "yes"]), tokenizer, pair="pair", segments=True)
    sample = made.sample(0, 0)
    one, two = tokenizer.encode("the cat"), tokenizer.encode("a dog")
    ids, types = sample["input_ids"].tolist(), sample["token_type_ids"].tolist()
    if kind == "wordpiece":
        assert ids == [CLS, *one, SEP, *two, SEP]
        assert types == [0] * (len(one) + 2) + [1] * (len(two) + 1)
    else:
        end = tokenizer.special["eos"]
        assert ids == [*one, end, *two, end]


def test_decoder_reads_the_text_moved_by_one() -> None:
    sample = classify(side(["the cat", "yes"]), KINDS["unigram"], decoder=True, start=0).sample(0, 0)
    assert sample["decoder_input_ids"].tolist() == [0, *sample["input_ids"][:-1].tolist()]


def test_long_rows_are_cut() -> None:
    made = classify(side([" ".join(["cat"] * 90), "yes"], ["cat", "no"]), context=16)
    sample = made.sample(0, 0)
    assert (sample["input_ids"].size, int(sample["input_ids"][-1])) == (16, SEP)
    assert "1 row cut at 14 tokens" in made.describe()
    pair = classify(side([" ".join(["cat"] * 90), "dog", "yes"]), pair="pair", context=16).sample(0, 0)["input_ids"]
    assert pair[-len(WORDPIECE.encode("dog")) - 1 :].tolist() == [*WORDPIECE.encode("dog"), SEP]
    with pytest.raises(UserError, match="a context of 4 tokens leaves no room"):
        classify(side(["cat", "yes"]), context=4)


@pytest.mark.parametrize(
    ("sizes", "room", "left"),
    [
        ([3, 4], 9, [3, 4]),
        ([10, 3], 8, [5, 3]),
        ([3, 10], 8, [3, 5]),
        ([9, 9], 7, [4, 3]),
        ([12], 5, [5]),
        ([4, 4], 7, [4, 3]),
    ],
)
def test_the_longer_text_gives_way(sizes: list[int], room: int, left: list[int]) -> None:
    assert lengths(sizes, room) == left


@pytest.mark.parametrize("kind", KINDS)
def test_the_first_token_of_each_word_has_its_label(kind: str) -> None:
    tokenizer = KINDS[kind]
    words = ["the", "catdog", "sat", "!", "mat"]
    made = classify(side([words, [0, 1, 2, 3, 4]]), tokenizer, 64, of="token", labels=tuple("01234"))
    sample = made.sample(0, 0)
    text = " ".join(words)
    at = np.flatnonzero(sample["targets.token"] != IGNORE)
    assert sample["targets.token"][at].tolist() == [0, 1, 2, 3, 4]
    inner = at - made.frame.before(1)
    ((_, spans),) = tokenizer.encode_spans([text])
    for word, place in zip(words, inner, strict=True):
        start, end = spans[place]
        assert word.startswith(text[start:end].strip())
    assert made.places(0).tolist() == at.tolist()


def test_a_word_without_a_label_or_beyond_the_context_is_not_supervised() -> None:
    words = ["cat"] * 9
    made = classify(side([words, ["yes", None, *["no"] * 7]]), context=8, of="token")
    size = len(WORDPIECE.encode("cat"))
    seen = made.sample(0, 0)["targets.token"]
    assert (seen[1], seen[1 + size] == IGNORE) == (1, True)
    assert (made.places(0) >= 0).sum() == -(-6 // size)


def test_choices() -> None:
    made = all_of(
        classify(side(["the cat", ["ran", "sat on the mat"], 1], ["a dog", ["ran", "sat"], "ran"]), of="choice")
    )
    ids = made.inputs["input_ids"]
    assert ids.shape[:2] == (2, 2)
    assert made.inputs["attention_mask"].shape == ids.shape
    one = [CLS, *WORDPIECE.encode("the cat"), SEP, *WORDPIECE.encode("ran"), SEP]
    assert ids[0, 0, : len(one)].tolist() == one
    assert made.targets["choice"].tolist() == [1, 0]
    assert made.tokens == int(made.inputs["attention_mask"].sum())
    assert [len(part) for part in made.split(1)] == [1, 1]
    columns = classify(side(["the cat", "ran", "sat", "1"]), of="choice", choices=("a", "b"))
    assert columns.columns(columns.config) == ("text", "a", "b", "label")
    assert all_of(columns).targets["choice"].tolist() == [1]


QUESTION = "what did the cat do ?"
CONTEXT = "a dog ran far away ! " * 6 + "the cat sat on the mat . " + "a dog ran far away ! " * 6
ANSWER = {"text": ["sat on the mat"], "answer_start": [CONTEXT.index("sat on")]}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stride", [3, 7, 1000])
def test_windows_cover_the_context_and_point_at_the_answer(kind: str, stride: int) -> None:
    tokenizer = KINDS[kind]
    context = 96 if kind in ("bytes", "bpe") else 40
    made = extract(side([QUESTION, CONTEXT, ANSWER]), tokenizer, context, stride=stride)
    length = len(made.contexts[0][0])
    seen: set[int] = set()
    held = 0
    for index in range(len(made)):
        window, sample = made.windows[index], made.sample(index, 0)
        assert sample["input_ids"].size <= context
        places = made.places(index)
        assert sample["input_ids"][places.start : places.stop].tolist() == made.contexts[0][0][
            window.start : window.start + window.length
        ].tolist()  # fmt: skip
        seen |= set(range(window.start, window.start + window.length))
        first, last = sample["targets.span"].tolist()
        if (first, last) == (0, 0):
            continue
        held += 1
        start, end = made.characters(index, first, last)
        assert CONTEXT[start:end].strip() == "sat on the mat"
    assert seen == set(range(length))
    assert held >= (1 if stride < 1000 else 0)
    assert len(made) > 1
    whole = extract(side([QUESTION, CONTEXT, ANSWER]), tokenizer, context, stride=stride, validation=True)
    assert len(whole) == 1
    assert len(all_of(whole)) == len(made)


def test_batch_of_windows() -> None:
    made = all_of(extract(side([QUESTION, CONTEXT, ANSWER], [QUESTION, "the cat sat", "sat"]), context=40))
    assert made.targets["span"].shape == (len(made), 2)
    parts = made.split(2)
    assert [part.targets["span"].shape[1] for part in parts] == [2] * len(parts)
    assert sum(part.targets["span"].sum().item() for part in parts) == made.targets["span"].sum().item()


ANSWERS = {
    "text": "sat",
    "list": ["sat", "sat on the mat"],
    "squad": {"text": ["sat"], "answer_start": [8]},
    "maps": [{"text": "sat", "answer_start": 8}],
    "one map": {"text": "sat", "answer_start": 8},
    "with blanks": " sat ",
    "second is there": ["slept", "sat"],
}


@pytest.mark.parametrize("form", ANSWERS)
def test_forms_of_answers(form: str) -> None:
    made = extract(side([QUESTION, "the cat sat on the mat .", ANSWERS[form]]))
    question = made.questions[0]
    assert question.span is not None
    assert question.context[slice(*question.span)] == "sat"
    assert "sat" in {answer.strip() for answer in question.answers}


def test_start_column_and_questions_without_an_answer() -> None:
    text = "the cat sat . the dog sat ."
    made = extract(
        side([QUESTION, text, "sat", 22], [QUESTION, text, "sat", "8"], [QUESTION, text, None, None]), start="at"
    )
    assert [question.span for question in made.questions] == [(22, 25), (8, 11), None]
    assert made.sample(2, 0)["targets.span"].tolist() == [0, 0]
    assert "1 question without an answer" in made.describe()


def test_an_answer_that_is_not_where_it_should_be_leaves_the_row_out() -> None:
    text = "the cat sat on the mat ."
    made = extract(
        side([QUESTION, text, "sat"], [QUESTION, text, "slept"], [QUESTION, text, {"text": "sat", "answer_start": 7}])
    )
    assert len(made.questions) == 1
    assert "2 rows without a text, or whose answer is not in it, left out" in made.describe()
    with pytest.raises(UserError) as caught:
        extract(side([QUESTION, text, "slept"]))
    assert str(caught.value).startswith(
        "data.source: none of 1 row has a question, a context and an answer in it; the first is {question: "
    )


# What the data of a preset becomes, through files.


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XT_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


def job(folder: Path, *overrides: str, name: str = "rows.jsonl") -> Any:
    return make_job(load_preset(folder / "small.yaml", [f"data.source={folder / name}", *overrides]), lambda text: None)


@pytest.mark.parametrize("form", ["jsonl", "csv", "tsv", "parquet", "json"])
def test_files(form: str, tmp_path: Path) -> None:
    records = rows("sequence", 40)
    write(tmp_path, records)
    path = tmp_path / f"data.{form}"
    if form == "parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), path)
    elif form.startswith("json"):
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
    else:
        mark = "\t" if form == "tsv" else ","
        path.write_text("".join(f"{mark.join(row)}\n" for row in [["text", "label"], *(r.values() for r in records)]))
    made = job(tmp_path, name=path.name)
    assert made.resolved.preset.objective.labels == ("negative", "positive")
    assert (len(made.objective), len(made.validation)) == (30, 10)
    texts = {item.texts[0] for one in (made.objective, made.validation) for item in one.items}
    assert texts == {record["text"] for record in records}


def test_dataset_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    features = datasets.Features(
        {
            "tokens": datasets.Sequence(datasets.Value("string")),
            "tags": datasets.Sequence(datasets.ClassLabel(names=["O", "PER", "LOC"])),
        }
    )
    number = {"O": 0, "PER": 1, "LOC": 2}
    records = [row | {"tags": [number[tag] for tag in row["tags"]]} for row in rows("token", 20)]
    found = datasets.Dataset.from_list(records, features=features)
    monkeypatch.setattr(datasets, "load_dataset", lambda *names, **options: found)
    write(tmp_path, [])
    options = ["data.source=owner/name", "model.heads={token: {}}"]
    made = make_job(load_preset(tmp_path / "small.yaml", options), lambda text: None)
    assert made.resolved.preset.objective.labels == ("LOC", "O", "PER")
    assert {len(item.words) for item in made.objective.items} <= {4, 5, 6}


def test_split_is_exact_and_depends_on_the_seed_alone(tmp_path: Path) -> None:
    data = DataConfig(source=str(write(tmp_path, rows("sequence", 50))), validation=0.1)

    def read(seed: int, **changes: Any) -> Records:
        return read_records(data.model_copy(update=changes), ("text", "label"), seed, {})

    made = read(3)
    assert [len(made.split(name)) for name in ("train", "validation")] == [45, 5]
    assert made.digest == read(3).digest != read(4).digest
    places = [place for place, _ in made.rows]
    assert sorted(places) == sorted(f"{tmp_path}/rows.jsonl:{line}" for line in range(1, 51))
    assert len(read(0, validation=0.0).split("validation")) == 0
    assert len(read(0, validation=0.001).split("validation")) == 1
    write(tmp_path, rows("sequence", 7), "held.jsonl")
    own = read(0, validation=str(tmp_path / "held.jsonl"))
    assert [len(own.split(name)) for name in ("train", "validation")] == [50, 7]


LABELS = {
    "numbers": ([10, 2, 1], ("1", "2", "10")),
    "numbers as text": (["10", "2", "-1"], ("-1", "2", "10")),
    "booleans": ([True, False], ("false", "true")),
    "floats that are whole": ([1.0, 0.0], ("0", "1")),
    "words": (["b", "a", "10"], ("10", "a", "b")),
    "some without": (["b", None, "a", ""], ("a", "b")),
}


@pytest.mark.parametrize("case", LABELS)
def test_names_of_labels(case: str, tmp_path: Path) -> None:
    values, names = LABELS[case]
    write(tmp_path, [{"text": f"the cat {number}", "label": value} for number, value in enumerate(values * 8)])
    made = job(tmp_path)
    preset = made.resolved.preset
    assert preset.objective.labels == names
    assert preset.model.heads["sequence"].labels == len(names)
    assert made.skeleton.heads["sequence"].classifier.weight.shape[0] == len(names)
    assert load_preset_again(made, tmp_path) == preset


def load_preset_again(made: Any, folder: Path) -> Any:
    (folder / "again.yaml").write_text(made.resolved.to_yaml())
    return load_preset(folder / "again.yaml").preset


def texts(*labels: Any, **more: Any) -> list[dict[str, Any]]:
    return [{"text": "the cat", "label": label} | more for label in labels]


REFUSED: dict[str, tuple[list[dict[str, Any]], list[str], str]] = {
    "no such column": (
        [{"text": "the cat", "labels": "a"}],
        [],
        "{}:1: has no column 'label'; its columns are text, labels; its first row is {{text: 'the cat', labels: 'a'}}; "
        "did you mean 'labels'? set objective.label to one of them",
    ),
    "nothing like it": (
        [{"body": "the cat", "label": "a"}],
        [],
        "{}:1: has no column 'text'; its columns are body, label; its first row is {{body: 'the cat', label: 'a'}}; "
        "set objective.text to one of them",
    ),
    "text of another type": (
        [{"text": 3, "label": "a"}, {"text": "cat", "label": "b"}],
        ["data.validation=0"],
        "{}:1: column 'text' holds int, not text; name a column of text",
    ),
    "label of another type": (
        texts("a", ["b"]),
        [],
        "{}:2: column 'label' holds list, not labels; name a column of labels",
    ),
    "fractions": (
        texts("a", 0.5),
        [],
        "{}:2: column 'label' holds 0.5, and a label is a name or a whole number; name a column of labels",
    ),
    "one label": (
        texts("a", "a"),
        [],
        "objective.label: column 'label' holds only the label 'a' in 2 rows; "
        "name another column with objective.label, or read more rows",
    ),
    "no labels": (
        texts(*range(30)),
        [],
        "objective.label: column 'label' holds 30 different values in 30 rows: no labels; "
        "name the column of labels with objective.label, or list them in objective.labels",
    ),
    "label that is not listed": (
        texts("yes", "no", "yse"),
        ["objective.labels=['no', 'yes']", "data.validation=0"],
        "{}:3: column 'label' holds 'yse', which is none of the 2 labels of the model; did you mean 'yes'?; "
        "objective.labels=null collects them from the data",
    ),
    "another number of outputs": (
        texts("a", "b", "c"),
        ["model.heads.sequence.labels=2"],
        "override 'model.heads.sequence.labels=2': model.heads.sequence.labels: is 2, and there are 3 labels (a, b, c); "
        "set model.heads.sequence.labels=3, or check objective.label",
    ),
    "no head": (
        texts("a", "b"),
        ["model.heads={mlm: {}}"],
        "override 'objective=classify': objective: one of the heads sequence, token, choice is to be trained; "
        "the model has: mlm; set model.heads='{{sequence: {{}}}}' for instance",
    ),
    "two heads": (
        texts("a", "b"),
        ["model.heads={sequence: {}, token: {}}"],
        "override 'objective=classify': objective: one of the heads sequence, token, choice is to be trained; "
        "the model has: sequence, token; say which with objective.of",
    ),
    "another problem than the head's": (
        texts("a", "b"),
        ["model.heads={sequence: {problem: many}}", "objective.problem=number"],
        "override 'model.heads={{sequence: {{problem: many}}}}': model.heads.sequence.problem: is 'many', and "
        "objective.problem is 'number'; set model.heads.sequence.problem=number",
    ),
    "several labels of words": (
        [{"tokens": ["a", "b"], "tags": ["X", "Y"]}],
        ["model.heads={token: {}}", "objective.problem=many"],
        "override 'objective.problem=many': objective.problem: is 'many', and of=token has one label; leave it out",
    ),
    "numbers that are none": (
        texts("1.5", "high"),
        ["objective.problem=number", "data.validation=0"],
        "{}:2: column 'label' holds 'high', and what is learnt is a finite number other than -100; "
        "name the column of numbers with objective.label",
    ),
    "more numbers than before": (
        [{"text": "a", "label": [1, 2]}, {"text": "b", "label": [3]}],
        ["objective.problem=number", "data.validation=0"],
        "{}:2: column 'label' holds 1 number, and the model gives 2; give each row as many",
    ),
    "a list that is none": (
        texts("[1, 2", "[3]"),
        ["objective.problem=many", "data.validation=0"],
        "{}:1: column 'label' begins like a JSON list and is none (Expecting ',' delimiter: line 1 column 6 (char 5)); "
        "repair it",
    ),
    "the wrong head": (
        texts("a", "b"),
        ["model.heads={token: {}}", "objective.of=sequence"],
        "override 'objective=classify': objective: objective 'classify' needs the head 'sequence'; the model has: token; "
        "add it under model.heads, or known: token",
    ),
    "no texts": (
        [{"text": "", "label": "a"}, {"text": None, "label": "b"}],
        ["data.validation=0"],
        "data.source: none of 2 rows has both text and label; the first is {{text: '', label: 'a'}}; check its columns",
    ),
    "lists of different lengths": (
        [{"tokens": ["a", "b"], "tags": ["X", "Y", "X"]}],
        ["model.heads={token: {}}", "data.validation=0"],
        "{}:1: has 2 words and 3 labels; column 'tags' must hold one for each word",
    ),
    "no lists": (
        [{"tokens": {"a": 1}, "tags": ["X", "Y"]}],
        ["model.heads={token: {}}", "data.validation=0"],
        "{}:1: column 'tokens' holds dict, not lists of words; name a column of lists of words",
    ),
    "choices of different numbers": (
        [{"text": "a", "choices": ["b", "c"], "label": 0}, {"text": "a", "choices": ["b", "c", "d"], "label": 0}],
        ["model.heads={choice: {}}", "data.validation=0"],
        "{}:2: has 3 choices, the first row has 2; give each row as many",
    ),
    "a choice that is none": (
        [{"text": "a", "choices": ["b", "c"], "label": 2}],
        ["model.heads={choice: {}}", "data.validation=0"],
        "{}:1: '2' is neither one of the 2 choices nor a number from 0 to 1; "
        "name the column that says which is right with objective.label",
    ),
    "answers of another type": (
        [{"question": "a", "context": "b", "answers": 3}],
        ["model.heads={span: {}}", "objective=extract", "data.validation=0"],
        "{}:1: column 'answers' holds int, not answers; name a column of answers",
    ),
    "one row": (
        texts("a"),
        [],
        "data.validation: one row cannot be split into training and validation; give more data, or set data.validation=0",
    ),
    "no rows": ([], [], "{}: data.source: is empty (0 bytes); give a file with text"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_rows_that_cannot_be_used(case: str, tmp_path: Path) -> None:
    records, overrides, message = REFUSED[case]
    path = write(tmp_path, records)
    with pytest.raises(UserError) as caught:
        job(tmp_path, "objective=classify", *overrides)
    assert str(caught.value) == message.format(path)


def test_sources_without_columns(tmp_path: Path) -> None:
    write(tmp_path, [])
    (tmp_path / "plain.txt").write_text("the cat")
    (tmp_path / "bad.jsonl").write_text('{"text": "a", "label": "b"}\n{"text"\n')
    with pytest.raises(UserError, match="is plain text, and labels need columns; give a jsonl, csv or parquet file"):
        job(tmp_path, name="plain.txt")
    with pytest.raises(UserError, match=r"bad\.jsonl:2: is not JSON"):
        job(tmp_path, name="bad.jsonl")
    with pytest.raises(UserError, match="stdlib is plain text, and labels need a file with columns"):
        make_job(load_preset(tmp_path / "small.yaml", ["data=stdlib"]), lambda text: None)


def test_label_of_the_validation_side_alone_is_refused(tmp_path: Path) -> None:
    write(tmp_path, texts("a", "b"))
    held = write(tmp_path, texts("a", "c"), "held.jsonl")
    made = job(tmp_path, f"data.validation={held}")
    assert made.resolved.preset.objective.labels == ("a", "b", "c")
    with pytest.raises(UserError, match=r"held\.jsonl:2: column 'label' holds 'c', which is none of the 2 labels"):
        job(tmp_path, f"data.validation={held}", "objective.labels=[a, b]")


def test_frame_leaves_room() -> None:
    for tokenizer in KINDS.values():
        frame = Frame(tokenizer, 20)
        for texts_in in (1, 2):
            parts = [np.arange(40)] * texts_in
            assert frame.row(*frame.cut(*parts))[0].size == 20
