"""Checkpoints: exact on the way back, found by step, never loaded when damaged."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from small import small
from torch import Tensor, nn

from xtcli.errors import UserError
from xtcli.runs.checkpoint import checkpoint_bytes, locate, newest, save_checkpoint
from xtcli.runs.folder import Damaged, read_manifest, verify
from xtcli.runs.state import Progress, collect, stateful
from xtcli.runs.tensors import load_weights, save_weights

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.int64, torch.bool]


@pytest.mark.parametrize("shard_bytes", [10**9, 300, 1], ids=["one file", "shards", "a shard each"])
def test_weights_round_trip(tmp_path: Path, shard_bytes: int) -> None:
    base = torch.arange(48.0).reshape(6, 8)
    state: dict[str, Tensor] = {str(dtype): torch.arange(12).to(dtype) for dtype in DTYPES}
    state |= {"slice": base[2:4], "transposed": base.T, "scalar": torch.tensor(3.5), "empty": torch.zeros(0, 4)}
    state |= {"table": base, "head": base, "nan": torch.tensor([float("nan"), -0.0, float("-inf")])}
    save_weights(state, tmp_path, shard_bytes)
    loaded = load_weights(tmp_path)
    assert loaded.keys() == state.keys()
    for name, tensor in state.items():
        assert loaded[name].dtype == tensor.dtype and loaded[name].shape == tensor.shape
        assert (
            loaded[name].contiguous().view(-1).view(torch.uint8).equal(tensor.contiguous().view(-1).view(torch.uint8))
        ), name
    assert loaded["head"].data_ptr() == loaded["table"].data_ptr()
    assert loaded["slice"].data_ptr() != loaded["table"].data_ptr()
    assert any("index" in path.name for path in tmp_path.iterdir()) == (shard_bytes < 10**9)


def test_ties_are_stored_once(tmp_path: Path) -> None:
    table = torch.zeros(1000, 4)
    save_weights({"table": table, "head": table}, tmp_path)
    assert (tmp_path / "model.safetensors").stat().st_size < 1.1 * table.nbytes


def test_a_mapped_file_is_never_written_over(tmp_path: Path) -> None:
    save_weights({"a": torch.ones(5000)}, tmp_path)
    mapped = load_weights(tmp_path)
    with pytest.raises(FileExistsError):
        save_weights(mapped, tmp_path)
    assert mapped["a"].sum() == 5000


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("{", "not an index of shards"),
        ('{"weight_map": {"a": "../secret.safetensors"}, "metadata": {}}', "names a shard outside its folder"),
        ('{"weight_map": {"a": "/etc/passwd"}, "metadata": {}}', "names a shard outside its folder"),
        ('{"weight_map": {"a": "gone.safetensors"}, "metadata": {}}', "the file is missing"),
        ('{"weight_map": {"a": "x.safetensors"}, "metadata": {"ties": {"b": "c"}}}', "'b' is tied to 'c'"),
        ('{"weight_map": {"z": "x.safetensors"}, "metadata": {}}', "'a' is not both in the index and in its shard"),
        ('{"weight_map": ["a"], "metadata": {}}', "not an index of shards"),
    ],
)
def test_bad_index_is_refused(tmp_path: Path, index: str, message: str) -> None:
    save_weights({"a": torch.ones(2)}, tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "x.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(UserError, match=message):
        load_weights(tmp_path)


FILES = ["manifest.json", "model.safetensors", "preset.yaml", "tokenizer.json", "trainer/optimizer.safetensors",
         "trainer/state.json"]  # fmt: skip


def test_the_files_of_a_checkpoint(tmp_path: Path) -> None:
    path = small(tmp_path, 1, 1.0)
    found = sorted(file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file())
    assert found == FILES
    assert sorted(read_manifest(path)) == FILES[1:]
    magic = [file.read_bytes()[:2] for file in path.rglob("*") if file.is_file()]
    assert not any(start.startswith((b"PK", b"\x80")) for start in magic), "a pickle or a zip of one"


@pytest.mark.parametrize("file", FILES)
def test_damage_is_never_loaded(tmp_path: Path, file: str) -> None:
    old, new = small(tmp_path, 9, 1.0), small(tmp_path, 10, 2.0)
    path = new / file
    whole = path.read_bytes()
    versions: list[bytes | None] = [None, b"", whole + b"\0", whole[:-1]]
    versions += [whole[:size] for size in range(4096, len(whole), 4096)]
    bits = random.Random(0).sample(range(8 * len(whole)), 200 if file == "manifest.json" else 40)
    versions += [whole[: b // 8] + bytes([whole[b // 8] ^ 1 << b % 8]) + whole[b // 8 + 1 :] for b in bits]
    for version in versions:
        path.unlink() if version is None else path.write_bytes(version)
        with pytest.raises(UserError) as caught:
            verify(new)
        # A flipped bit in the manifest may accuse the file it speaks of, or the version.
        assert file == "manifest.json" or f"step-10: {file}: " in str(caught.value)
        path.write_bytes(whole)
    path.write_bytes(whole[:-1])
    seen: list[UserError] = []
    assert newest(tmp_path, trainer=True, warn=seen.append) == old
    assert len(seen) == 1 and file in str(seen[0])
    with pytest.raises(UserError, match=file):
        locate(new, trainer=True)


def test_generating_does_not_read_the_optimizer(tmp_path: Path) -> None:
    path = small(tmp_path, 10, 2.0)
    file = path / "trainer/optimizer.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] + b"?")
    assert locate(tmp_path) == locate(path) == path
    file.write_bytes(whole[:-1])
    with pytest.raises(Damaged, match=r"trainer/optimizer\.safetensors: cut short"):
        locate(path)


def test_newest_goes_by_step(tmp_path: Path) -> None:
    for step in (9, 100, 20):
        small(tmp_path, step, 1.0)
    (tmp_path / "checkpoints/step-500.aside-1234abcd").mkdir()
    (tmp_path / "checkpoints/notes").mkdir()
    os.utime(tmp_path / "checkpoints/step-9", (2e9, 2e9))
    assert newest(tmp_path).name == "step-100"


def test_nothing_whole_is_one_error_with_every_cause(tmp_path: Path) -> None:
    for step in (1, 2):
        (small(tmp_path, step, 1.0) / "preset.yaml").unlink()
    with pytest.raises(UserError) as caught:
        newest(tmp_path)
    lines = str(caught.value).splitlines()
    assert lines[0] == f"{tmp_path}: no checkpoint of this run is whole; start a new run"
    assert [line.split(": ")[1:3] for line in lines[1:]] == [
        ["preset.yaml", "missing; use another checkpoint, or copy it anew"]
    ] * 2


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "x: no such run or checkpoint"),
        (lambda path: path.mkdir(), "x: is neither a run nor a checkpoint; give a folder that xt train or build made"),
        (
            lambda path: (path.mkdir(), (path / "config.json").write_text("{}")),
            "x: is neither a run nor a checkpoint; a checkpoint of transformers is converted first: xt convert auto",
        ),
        (lambda path: path.write_text("?"), "x: is neither a run nor a checkpoint"),
        (lambda path: (path / "checkpoints").mkdir(parents=True), "x: the run has no checkpoint yet; start it anew"),
    ],
)
def test_what_is_no_checkpoint(tmp_path: Path, make: Callable[[Path], Any], message: str) -> None:
    make(tmp_path / "x")
    with pytest.raises(UserError, match=message):
        locate(tmp_path / "x")


def test_hints_for_near_misses(tmp_path: Path) -> None:
    path = small(tmp_path, 3, 1.0)
    with pytest.raises(UserError, match=f"did you mean {path}"):
        locate(path / "model.safetensors")
    (path / "manifest.json").unlink()
    with pytest.raises(Damaged, match=r"manifest.json: missing, so the folder was never finished"):
        locate(path)
    (path / "manifest.json").write_text('{"version": 2, "files": {}}\n')
    with pytest.raises(UserError, match="written as version 2; this xt reads version 1; use the xt that wrote it"):
        locate(path)


@pytest.mark.parametrize("name", ["../outside", "/etc/passwd", "a\\..\\b", "C:x", ""])
def test_a_manifest_cannot_name_files_outside(tmp_path: Path, name: str) -> None:
    entry = '{"size": 1, "sha256": "00"}'
    (tmp_path / "manifest.json").write_text(f'{{"version": 1, "files": {{"{name}": {entry}}}}}\n'.replace("\\", "\\\\"))
    with pytest.raises(Damaged, match="bad entry"):
        verify(tmp_path)


def test_a_step_that_is_saved_is_not_saved_again_unless_damaged(tmp_path: Path) -> None:
    path = small(tmp_path, 1, 1.0)
    assert small(tmp_path, 1, 2.0) == path
    assert load_weights(path)["weight"][0, 0] == 1
    (path / "preset.yaml").unlink()
    small(tmp_path, 1, 2.0)
    assert load_weights(path)["weight"][0, 0] == 2
    assert len(list((tmp_path / "checkpoints").glob("step-1.aside-*"))) == 1


def test_checkpoint_bytes_are_those_on_disk(tmp_path: Path) -> None:
    model = nn.Linear(200, 200)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 200)).sum().backward()
    optimizer.step()
    state = collect(stateful(model, optimizer, Progress()))
    path = save_checkpoint(tmp_path, 1, preset_yaml="", model=model, tokenizer=None, trainer=state)
    found = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    expected = checkpoint_bytes(model, 2 * sum(p.nbytes for p in model.parameters()))
    assert expected < found < expected + 60_000
