"""Shards, pickles and folders: what is refused, where nothing is written, and the command itself."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from checkpoints import write_sources
from torch import Tensor

from xtcli.convert import convert
from xtcli.convert.families import by_name
from xtcli.errors import UserError


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A checkpoint of each family, single and in shards."""
    return write_sources(tmp_path_factory.mktemp("sources"))


def edit(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


def header(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    document = json.loads(data[8 : 8 + length])
    change(document)
    text = json.dumps(document).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


def overlap(document: dict[str, Any]) -> None:
    first, second = sorted((k for k in document if k != "__metadata__"), key=lambda k: document[k]["data_offsets"])[:2]
    size = document[second]["data_offsets"][1] - document[second]["data_offsets"][0]
    start = document[first]["data_offsets"][0]
    document[second]["data_offsets"] = [start, start + size]


def first(folder: Path) -> Path:
    return sorted(folder.glob("*.safetensors"))[0]


def crowded(folder: Path) -> Path:
    """A shard of several tensors."""
    return next(file for file in sorted(folder.glob("*.safetensors")) if len(safetensors.torch.load_file(file)) > 1)


def elsewhere(document: dict[str, Any]) -> None:
    listed = document["weight_map"]
    name = next(iter(listed))
    listed[name] = next(shard for shard in listed.values() if shard != listed[name])


INDEX = "model.safetensors.index.json"
FAULTS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "missing": (lambda f: first(f).unlink(), "tensors is missing"),
    "short": (lambda f: first(f).write_bytes(first(f).read_bytes()[:-10]), "bytes where"),
    "empty": (lambda f: first(f).write_bytes(b""), "it has 0 bytes"),
    "long": (lambda f: first(f).write_bytes(first(f).read_bytes() + b"xx"), "bytes where"),
    "overlapping": (lambda f: header(crowded(f), overlap), "overlaps the one before it"),
    "unreadable": (
        lambda f: first(f).write_bytes(b"\x09" + bytes(7) + b"{'broken'" + bytes(99)),
        "header cannot be read",
    ),
    "unknown type": (
        lambda f: header(first(f), lambda d: next(v for k, v in d.items() if k[0] != "_").update(dtype="F12")),
        "'F12' is unknown",
    ),
    "not listed": (lambda f: edit(f / INDEX, lambda d: d["weight_map"].popitem()), "is not in the index"),
    "listed elsewhere": (lambda f: edit(f / INDEX, elsewhere), "is not in its shard"),
    "listed and absent": (
        lambda f: edit(f / INDEX, lambda d: d["weight_map"].update({"x": min(d["weight_map"].values())})),
        "'x' is not in its shard",
    ),
    "outside": (lambda f: edit(f / INDEX, lambda d: d["weight_map"].update({"x": "../x.safetensors"})), "outside"),
    "wrong total": (
        lambda f: edit(f / INDEX, lambda d: d["metadata"].update(total_size=7)),
        "says that the tensors have 7",
    ),
    "no map": (lambda f: edit(f / INDEX, lambda d: d.pop("weight_map")), "has no weight_map"),
    "no JSON": (lambda f: (f / INDEX).write_text("{"), "cannot be read as JSON"),
    "both": (lambda f: (f / "model.safetensors").write_bytes(b""), "holds both"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_shards_that_are_not_whole(fault: str, sources: dict[str, Path], tmp_path: Path) -> None:
    for file in sources["llama shards"].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    change, said = FAULTS[fault]
    change(tmp_path)
    with pytest.raises(UserError) as refused:
        convert(tmp_path, tmp_path / "there")
    assert said in str(refused.value)
    assert str(tmp_path) in str(refused.value) and not (tmp_path / "there").exists()


def test_a_tensor_in_two_shards(sources: dict[str, Path], tmp_path: Path) -> None:
    for file in sources["llama shards"].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    one, other = sorted(tmp_path.glob("*.safetensors"))[:2]
    found = safetensors.torch.load_file(other) | safetensors.torch.load_file(one)
    safetensors.torch.save_file(found, other)
    with pytest.raises(UserError, match=f"is also in '{one.name}'"):
        convert(tmp_path, tmp_path / "there")


@pytest.mark.parametrize(
    ("prepare", "said"),
    [
        (lambda src: None, "there is no folder '.*src'; give a folder on this machine"),
        (lambda src: src.with_name("srcs").mkdir(), "there is no folder '.*src'; did you mean '.*srcs'"),
        (lambda src: src.mkdir(), "has no config.json"),
        (lambda src: (src.mkdir(), (src / "config.json").write_text("[]")), "is no map"),
        (lambda src: (src.mkdir(), (src / "config.json").write_text('{"a": 1, "a": 2}')), "'a' stands twice"),
        (lambda src: (src.mkdir(), (src / "config.json").write_text("{}")), "states no model_type"),
    ],
)
def test_a_folder_that_is_no_checkpoint(prepare: Callable[[Path], Any], said: str, tmp_path: Path) -> None:
    prepare(tmp_path / "src")
    with pytest.raises(UserError, match=said):
        convert(tmp_path / "src", tmp_path / "there")


def test_where_it_will_not_write(sources: dict[str, Path], tmp_path: Path) -> None:
    there = tmp_path / "there"
    convert(sources["gpt2"], there)
    before = (there / "manifest.json").read_bytes()
    with pytest.raises(UserError, match="exists; choose another folder, or add --force"):
        convert(sources["gpt2"], there)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/letter.txt").write_text("dear")
    with pytest.raises(UserError, match="is no checkpoint, and --force replaces nothing else"):
        convert(sources["gpt2"], tmp_path / "mine", force=True)
    for inside in (sources["gpt2"], sources["gpt2"].parent):
        with pytest.raises(UserError, match="cannot replace its own source"):
            convert(sources["gpt2"], inside, force=True)
    with pytest.raises(UserError, match="is an xt checkpoint already"):
        convert(there, tmp_path / "x")
    with pytest.raises(UserError, match="is a transformers checkpoint already"):
        convert(sources["gpt2"], tmp_path / "x", to="hf")
    assert (there / "manifest.json").read_bytes() == before
    convert(sources["llama"], there, force=True)
    assert json.loads((there / "convert.json").read_text())["family"] == "llama"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", "there"]


def test_what_fails_midway_leaves_what_was_there(
    sources: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = tmp_path / "there"
    convert(sources["gpt2"], there)
    before = (there / "manifest.json").read_bytes()

    def full(self: Any, name: str, tensor: Tensor) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("xtcli.convert.files.Writer.put", full)
    with pytest.raises(UserError, match="the disk is full"):
        convert(sources["llama"], there, force=True)
    with pytest.raises(UserError, match="the disk is full"):
        convert(sources["llama"], tmp_path / "new")
    assert (there / "manifest.json").read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["there"]


class Bomb:
    """Leaves a file behind when a careless reader unpickles it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (Path.touch, (self.path,))


def test_pickles_need_permission(sources: dict[str, Path], tmp_path: Path) -> None:
    src = tmp_path / "src"
    src.mkdir()
    (src / "config.json").write_bytes((sources["bert"] / "config.json").read_bytes())
    found = safetensors.torch.load_file(sources["bert"] / "model.safetensors")
    found["cls.predictions.decoder.weight"] = found["bert.embeddings.word_embeddings.weight"]
    torch.save(found, src / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"pytorch_model\.bin.*--allow-pickle"):
        convert(src, tmp_path / "there")
    assert convert(src, tmp_path / "there", allow_pickle=True).bit_exact
    assert sorted(path.name for path in tmp_path.iterdir()) == ["src", "there"]
    (src / "pytorch_model.bin").write_bytes(pickle.dumps({"x": Bomb(tmp_path / "boom")}))
    with pytest.raises(UserError, match="cannot be read safely"):
        convert(src, tmp_path / "other", allow_pickle=True)
    assert not (tmp_path / "boom").exists() and not (tmp_path / "other").exists()


def test_the_command(sources: dict[str, Path], tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from xtcli.cli import main

    def run(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["xt", "convert", *words])
        with pytest.raises(SystemExit) as ended:
            main()
        said = capsys.readouterr()
        return int(ended.value.code or 0), said.out, said.err

    src, there = str(sources["gpt2"]), str(tmp_path / "there")
    code, out, err = run("auto", src, there, "--dry-run", "--json")
    assert code == 0 and json.loads(out)["written"] is False and "nothing was written" in err
    code, out, err = run("auto", src, there)
    assert code == 0 and "bit-exact" in out and f"next: xt generate --ckpt {there}" in err
    code, out, err = run("auto", src, there)
    assert (code, out) == (2, "") and err == f"{there}: exists; choose another folder, or add --force to replace it\n"
    code, out, err = run("gtp2", str(tmp_path / "nowhere"), str(tmp_path / "x"))
    listed = ", ".join(sorted({"auto", *by_name()}))
    assert code == 2 and err == f"xt: there is no family 'gtp2'; did you mean 'gpt2'? known: {listed}\n"
    code, out, err = run("auto", there, str(tmp_path / "back"), "--to", "hf")
    assert code == 0 and "GPT2LMHeadModel.from_pretrained" in err
