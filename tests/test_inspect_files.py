"""What is read from disk: tensor statistics, what a checkpoint stores, loss curves, the record of a run."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from small import small

from xtcli.errors import UserError
from xtcli.inspect import curves, figure, record, tensors
from xtcli.runs.metrics import Metrics
from xtcli.runs.tensors import save_weights

STATE = {
    "plain": torch.randn(7, 5, generator=torch.Generator().manual_seed(1)),
    "far": 1e6 + torch.randn(301, generator=torch.Generator().manual_seed(2)).double(),
    "half": torch.linspace(-3, 3, 64).bfloat16().reshape(4, 4, 4),
    "broken": torch.tensor([1.0, math.nan, 3.0, math.inf, -math.inf]),
    "hollow": torch.full((3,), math.nan),
    "scalar": torch.tensor(2.5),
    "count": torch.tensor([[1, 2], [3, 250]], dtype=torch.int64),
    "flags": torch.tensor([True, False, True]),
    "empty": torch.empty(0, 4),
}


@pytest.mark.parametrize("piece", [1, 6, 2**22])
@pytest.mark.parametrize("shard", [100, 10**9], ids=("shards", "one file"))
def test_statistics_are_those_of_the_finite_elements(
    piece: int, shard: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensors, "PIECE", piece)
    save_weights(STATE, tmp_path, shard)
    found = {one.name: one for one in tensors.statistics(tmp_path)}
    assert list(found) == sorted(STATE)
    for name, tensor in STATE.items():
        one, values = found[name], tensor.double().reshape(-1)
        finite = values[values.isfinite()]
        assert (one.shape, one.dtype) == (tuple(tensor.shape), str(tensor.dtype)[6:])
        assert (one.bytes, one.non_finite) == (tensor.nbytes, len(values) - len(finite))
        if not len(finite):
            assert (one.mean, one.std, one.min, one.max) == (None, None, None, None)
            continue
        assert one.mean == pytest.approx(finite.mean().item(), rel=1e-12, abs=1e-12)
        assert one.std == pytest.approx(finite.std(correction=0).item(), rel=1e-9, abs=1e-12)
        assert (one.min, one.max) == (finite.min().item(), finite.max().item())


def test_no_more_than_a_piece_is_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensors, "PIECE", 100)
    save_weights({"a": torch.zeros(1000, 10), "b": torch.zeros(3, 200)}, tmp_path)
    sizes: list[int] = []
    whole = tensors._pieces

    def watched(stored: Any, shape: tuple[int, ...]) -> Any:
        for piece in whole(stored, shape):
            sizes.append(piece.numel())
            yield piece

    monkeypatch.setattr(tensors, "_pieces", watched)
    list(tensors.statistics(tmp_path))
    assert sorted(set(sizes)) == [100, 200] and sum(sizes) == 10600


TABLE = """\
tensor  shape   dtype                mean    std    min    max  non-finite
a       (2, 2)  float32               2.5  1.118      1      4           0
b       (2, 2)  tied to a
c       (3)     bfloat16                1      0      1      1           1
2 tensors, 7 elements, 22 bytes, 1 tie, 1 elements not finite"""


def test_statistics_as_printed(tmp_path: Path) -> None:
    a = torch.tensor([[1.0, 2], [3, 4]])
    save_weights({"a": a, "b": a, "c": torch.tensor([1, 1, math.inf]).bfloat16()}, tmp_path)
    text = "\n".join(tensors.lines(tensors.statistics(tmp_path)))
    assert text.split() == TABLE.split() and len(text.splitlines()) == 5
    assert str(tensors.stored(tmp_path)) == "2 tensors, 1 tie, 22 bytes, bf16 and f32"
    facts = tensors.facts(tensors.statistics(tmp_path))
    assert json.loads(json.dumps(facts))[1] == facts[0] | {"name": "b", "tied": "a"}


def test_a_checkpoint_a_run_and_a_single_file_are_read(tmp_path: Path) -> None:
    folder = small(tmp_path / "run", 3, 0.5)
    small(tmp_path / "run", 2, 0.25)
    save_file({"x": torch.ones(2)}, tmp_path / "x.safetensors")
    for path, mean in ((folder, 0.5), (tmp_path / "run", 0.5), (tmp_path / "x.safetensors", 1.0)):
        assert {one.mean for one in tensors.statistics(path) if one.name != "bias"} == {mean}
    assert float(tensors.Reader(tmp_path / "run").tensor("weight")[0, 0]) == 0.5
    with pytest.raises(UserError, match="tensor 'wait' is missing"):
        tensors.Reader(folder).tensor("wait")


def test_what_holds_no_tensors_or_is_damaged_is_refused(tmp_path: Path) -> None:
    folder = small(tmp_path, 1, 0.5)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    (tmp_path / "cut.safetensors").write_bytes(b"\x00" * 20)
    (tmp_path / "note.txt").write_text("x")
    for name, message in (
        (str(folder), "model.safetensors: cut short"),
        ("cut.safetensors", "not a whole safetensors file"),
        ("note.txt", "holds no tensors; give a checkpoint, a run or a .safetensors file"),
        ("nowhere", "no such run or checkpoint"),
    ):
        with pytest.raises(UserError, match=message):
            list(tensors.statistics(tmp_path / name))


def log(folder: Path, losses: list[float], every: int = 2) -> Path:
    """A run's log: a training loss each step, a validation loss each `every` steps that is 1 more."""
    folder.mkdir(parents=True)
    metrics = Metrics(folder)
    metrics.append({"event": "start"})
    for step, loss in enumerate(losses, 1):
        metrics.append({"step": step, "loss": loss, "lr": 0.1})
        if step % every == 0:
            metrics.append({"step": step, "val_loss": loss + 1})
    metrics.close()
    return folder


CURVES = """\
run  steps  training loss  validation loss  best validation loss  not finite
a        4         2.0000           3.0000      2.5000 at step 2           1
b        2         5.0000           6.0000      6.0000 at step 2        none
losses in nats per target

a, training"""


def test_curves_as_printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    log(Path("a"), [4.0, 1.5, math.nan, 2.0])
    log(Path("b"), [7.0, 5.0])
    runs = curves.read([Path("a"), Path("b")])
    text = curves.lines(runs, 60, 40)
    assert "\n".join(text).startswith(CURVES)
    assert [line for line in text if line.startswith(("a, ", "b, "))] == ["a, training", "a, validation", "b, training"]
    assert {line.split()[0] for line in text if line.endswith("\u2800")} >= {"7", "1.5"}
    assert sum(line.split() == ["step", "0", "step", "4"] for line in text) == 3
    assert curves.lines(runs, 60, 40, blocks=False) == text[:4]
    facts = json.loads(json.dumps(curves.facts(runs)))
    assert facts[0]["training"] == [[1, 4.0], [2, 1.5], [4, 2.0]] and facts[0]["not_finite"] == 1
    assert facts[1]["best_validation"] == [2, 6.0]


def test_curves_as_a_png(tmp_path: Path) -> None:
    runs = curves.read([log(tmp_path / name, [3.0, 2.0, 1.0, 0.5]) for name in "ab"])
    drawn = figure.draw_curves(runs)
    lines = drawn.axes[0].get_lines()
    assert [list(line.get_xdata()) for line in lines] == [[1, 2, 3, 4], [2, 4]] * 2
    assert len({line.get_color() for line in lines}) == 2
    figure.save(drawn, tmp_path / "c.png")
    assert (tmp_path / "c.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def test_what_is_no_run_is_refused_with_the_nearest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    log(Path("runs/nano"), [1.0])
    log(Path("runs/new"), [])
    for name, message in (
        ("runs/nanp", "'runs/nanp' is not a run: it has no metrics.jsonl; did you mean 'runs/nano'?"),
        ("runs/new", "'runs/new' has logged no finite loss; let it train some steps first"),
        ("gpt2", "'gpt2' is not a run: it has no metrics.jsonl; give the folder of a run, as xt train printed it"),
    ):
        with pytest.raises(UserError) as refused:
            curves.read([Path(name)])
        assert str(refused.value) == message


def test_the_record_of_a_run(tmp_path: Path) -> None:
    run = log(tmp_path / "run", [4.0, 1.5])
    (run / "preset.yaml").write_text("version: 1\n")
    (run / "checkpoints").mkdir()
    assert not record.has_weights(run)
    assert record.lines(record.facts(run)) == [
        "checkpoints  none yet",
        "progress     2 steps logged, training loss 1.5000 nats per target, best validation loss 2.5000 at step 2",
    ]
    folder = small(run, 2, 0.5)
    assert record.has_weights(run) and record.has_weights(folder) and not record.has_weights(tmp_path)
    assert record.lines(record.facts(run))[0] == "checkpoints  of step 2"
    stored = "stored       2 tensors, 14.3 KiB, f32"
    assert record.lines(record.facts(run))[2] == stored and record.lines(record.facts(folder)) == [stored]
    assert record.facts(tmp_path) == {}
