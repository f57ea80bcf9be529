"""Images: patches against convolutions, folders as data, objectives on them, and what trained models say of files."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import xt
from pictures import COLOURS, TEXTS, in_folders, listed, square
from torch import nn

import xtcli
from xtcli.config.data import DataConfig
from xtcli.config.preset import load_preset
from xtcli.data.images import ImageConfig, Reader, read_images
from xtcli.errors import UserError
from xtcli.model import construct
from xtcli.objectives import MaskedPatches
from xtcli.parts.graphs import Graph
from xtcli.registry import find
from xtcli.train.start import new

BLOCK = "wiring: pre, sublayers: {attn: {kind: attention, heads: 2}, ffn: {kind: mlp, hidden: 48}}"
CROSS = BLOCK.replace("ffn:", "cross: {kind: cross-attention, heads: 2}, ffn:")
TRAIN = """\
version: 1
about: {title: Small}
train: {steps: 60, batch: 12, lr: 5e-3, warmup: 5, log_every: 20, validate_every: 0, sample_every: 0, save_every: 0,
  sample_tokens: 12, device: cpu, precision: fp32, keep: 1}
"""
CLASSIFIER = f"""\
objective: image-labels
tokenizer: bytes
model:
  kind: encoder
  vocab: 1
  dim: 24
  embed: {{kind: patches, image: [12, 16], patch: 4}}
  stack: {{layers: 1, block: {{{BLOCK}}}}}
  heads: {{sequence: {{pick: first}}}}
"""
CAPTIONER = f"""\
objective: captions
tokenizer: {{kind: bytes, special: {{pad: "<pad>", eos: "</s>"}}}}
model:
  kind: encoder-decoder
  vocab: 258
  dim: 24
  context: 32
  share_tokens: false
  bridge: true
  encoder: {{dim: 16, embed: {{kind: patches, image: [12, 16], patch: 4, class_vector: false}},
    stack: {{layers: 1, block: {{{BLOCK}}}}}}}
  decoder: {{embed: {{kind: tokens, positions: learned}}, stack: {{layers: 1, block: {{{CROSS}}}}}}}
  heads: {{lm: {{}}}}
"""
PRESETS = {"classifier": CLASSIFIER, "captioner": CAPTIONER}


def train(preset: str, folder: Path, data: Path, *overrides: str) -> list[dict[str, Any]]:
    """Train a small preset into FOLDER/run; returns the lines of metrics."""
    file = folder / f"{preset}.yaml"
    file.write_text(TRAIN + PRESETS[preset], encoding="utf-8")
    lines: list[dict[str, Any]] = []
    resolved = load_preset(file, [f"data={data}", *overrides])
    code, _ = new(resolved, out=folder / "run", command=["xt"], record=lines.append, talk=lambda text: None)
    assert code == 0
    return lines


def embedding(**config: Any) -> Graph:
    tree = {
        "vocab": 1,
        "dim": 8,
        "embed": {"kind": "patches", "image": [9, 12], "patch": [3, 4], "channels": 2, "positions": "none", **config},
        "stack": {"layers": 1, "norm": "none", "block": {"sublayers": {"ffn": {"kind": "mlp", "hidden": 4}}}},
    }
    model = construct(find("graph", "encoder").Config.model_validate(tree)).to_empty(device="cpu")
    model.initialise(0)
    return model


@pytest.mark.parametrize("size", [(9, 12), (11, 14)])
def test_patches_are_a_convolution_with_gradients(size: tuple[int, int]) -> None:
    embed: Any = embedding(image=list(size), class_vector=False).embed
    pixels = torch.randn(2, 2, *size)
    twin = nn.functional.conv2d
    kernel = embed.project.weight.detach().unflatten(1, (2, 3, 4)).clone().requires_grad_()
    slow = twin(pixels, kernel, embed.project.bias, stride=(3, 4)).flatten(2).transpose(1, 2)
    fast = embed.project(embed.cut(pixels))
    torch.testing.assert_close(fast, slow)
    wanted = torch.randn_like(slow)
    slow.backward(wanted)
    fast.backward(wanted)
    torch.testing.assert_close(embed.project.weight.grad, kernel.grad.flatten(1))


def test_rows_first_lays_out_the_pixels_of_each_row_with_their_channels() -> None:
    embed: Any = embedding(order="row-column-channel").embed
    pixels = torch.arange(2 * 9 * 12).reshape(1, 2, 9, 12)
    patch = embed.cut(pixels)[0, 4]  # second row, second column
    assert patch.tolist() == pixels[0, :, 3:6, 4:8].permute(1, 2, 0).flatten().tolist()


def test_every_parameter_of_normed_and_masked_patches_learns() -> None:
    model = embedding(before="layer", norm="layer", mask_vector=True, positions="learned")
    masked = torch.zeros(2, 9).long()
    masked[:, ::2] = 1
    model(pixel_values=torch.randn(2, 2, 9, 12), bool_masked_pos=masked).last_hidden_state.square().sum().backward()
    still = [name for name, p in model.named_parameters() if p.grad is None or not bool(p.grad.abs().sum() > 0)]
    assert not still


def test_hidden_patches_say_nothing_of_their_pixels() -> None:
    model = embedding(mask_vector=True)
    one, other = torch.randn(1, 2, 9, 12), torch.randn(1, 2, 9, 12)
    masked = torch.ones(1, 9)
    made = [model(pixel_values=pixels, bool_masked_pos=masked).last_hidden_state for pixels in (one, other)]
    assert torch.equal(*made)


@pytest.mark.parametrize(
    ("config", "words"),
    [({"patch": 12}, "12 x 12 pixels are more than the image's 9 x 12"), ({"patch": 0}, "greater than 0")],
)
def test_impossible_patches_are_refused(config: dict[str, Any], words: str) -> None:
    with pytest.raises((UserError, ValueError), match=words):
        embedding(**config)


def rows(source: Path, column: str | None = "label", folders: bool = True, **data: Any) -> list[tuple[str, Any]]:
    config = DataConfig(source=str(source), **data)
    found = read_images(config, column, f"objective.{column}", 0, folders=folders)
    return [(Path(values[0]).name, values[1]) for _, values in found.rows]


def test_folders_are_labels_and_a_limit_takes_as_many_of_each(tmp_path: Path) -> None:
    folder = in_folders(tmp_path / "images", 3, ("red", "green"))
    square("red", 0).save(folder / "outside.png")
    (folder / "red" / "notes.txt").write_text("no image")
    found = rows(folder, validation=0)
    assert sorted(found) == sorted((f"{n}.png", colour) for n in range(3) for colour in ("red", "green"))
    assert sorted(label for _, label in rows(folder, validation=0, limit=4)) == ["green", "green", "red", "red"]
    config = DataConfig(source=str(folder), validation=0)
    notes = read_images(config, "label", "objective.label", 0, folders=True).notes
    assert notes == ("in the text: 1 file that is no image", "in the text: 1 image outside the folders")


@pytest.mark.parametrize("form", ["jsonl", "csv"])
def test_a_table_lists_images(form: str, tmp_path: Path) -> None:
    folder = listed(tmp_path / "images", 2, ("red", "blue"))
    if form == "csv":
        lines = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
        (folder / "metadata.jsonl").unlink()
        with open(folder / "metadata.csv", "w", newline="") as file:
            writer = csv.DictWriter(file, lines[0])
            writer.writeheader()
            writer.writerows(lines)
    assert sorted(rows(folder, "text", folders=False)) == sorted(
        (f"{n}.png", TEXTS[("red", "blue")[n % 2]]) for n in range(4)
    )
    assert len(rows(folder / f"metadata.{form}")) == 4


@pytest.mark.parametrize(
    ("change", "column", "words"),
    [
        ("nothing", "colour", "no column 'colour'.*set objective.colour to one of them"),
        ("a missing image", "label", r"metadata.jsonl:9: names the image 'none.png', which is not there"),
        ("no table", "text", "has no metadata.jsonl, .*write lines such as"),
        ("no table", "label", "holds no images in folders; give each label a folder"),
        ("no folder", "label", "no such file or folder"),
    ],
)
def test_bad_folders_are_refused(change: str, column: str, words: str, tmp_path: Path) -> None:
    folder = listed(tmp_path / "images", 2)
    if change == "a missing image":
        with open(folder / "metadata.jsonl", "a") as file:
            file.write('{"file_name": "none.png", "label": "red"}\n')
    elif change == "no table":
        (folder / "metadata.jsonl").unlink()
    elif change == "no folder":
        folder = tmp_path / "imagse"
    with pytest.raises(UserError, match=words):
        rows(folder, column, folders=column == "label")


def test_files_become_numbers_of_the_stated_size_mean_and_deviation(tmp_path: Path) -> None:
    from PIL import Image

    pixels = np.zeros((4, 8, 3), np.uint8)
    pixels[:, :4], pixels[:, 4:] = (255, 0, 51), (0, 255, 102)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    config = ImageConfig(mean=(0.5, 0.0, 0.2), std=(0.5, 1.0, 0.1))
    found = Reader(config, (4, 8), 3).read(tmp_path / "a.png")
    assert found.shape == (3, 4, 8) and found.dtype == np.float32
    np.testing.assert_allclose(found[:, 0, 0], [1.0, 0.0, 0.0], atol=1e-6)
    np.testing.assert_allclose(found[:, 3, 7], [-1.0, 1.0, 2.0], atol=1e-5)
    grey = Reader(ImageConfig(fit="crop"), (2, 2), 1).read(tmp_path / "a.png")
    assert grey.shape == (1, 2, 2)
    (tmp_path / "b.png").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"b.png: is no image that can be read"):
        Reader(config, (4, 8), 3).read(tmp_path / "b.png")
    with pytest.raises(UserError, match=r"objective.images.mean: has 3 numbers, and the model reads 1 channels"):
        Reader(config, (4, 8), 1)


def test_without_pillow_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(UserError, match=r"needs Pillow; pip install 'xt-transformers\[images\]'"):
        Reader(ImageConfig(), (4, 4), 3)


def test_masked_patches_hide_their_share_anew_in_each_epoch(tmp_path: Path) -> None:
    folder = listed(tmp_path / "images", 2)
    records = read_images(DataConfig(source=str(folder), validation=0), None, "", 0, folders=False)
    options = {"context": 8, "seed": 3, "size": (12, 16), "channels": 3, "places": 12}
    made = MaskedPatches(MaskedPatches.Config(share=0.25), records.split("train"), Nobody(), **options)
    one, again, later = made.sample(1, 0), made.sample(1, 0), made.sample(1, 1)
    assert one["bool_masked_pos"].sum() == 3
    assert one["targets.pixels"].tolist() == [0 if hidden else -100 for hidden in one["bool_masked_pos"]]
    assert all(np.array_equal(one[name], again[name]) for name in one)
    assert not np.array_equal(one["bool_masked_pos"], later["bool_masked_pos"])
    batch = made.batch(np.array([0, 1]), np.zeros(2, dtype=np.int64))
    assert batch.inputs["pixel_values"].shape == (2, 3, 12, 16)
    assert batch.supervised() == {"pixels": 6}


class Nobody:
    """A tokenizer that nobody asks."""

    vocab, special, sentinels = 1, {}, ()


def test_a_classifier_learns_and_says_labels_of_files(tmp_path: Path) -> None:
    data = in_folders(tmp_path / "images", 16)
    lines = train("classifier", tmp_path, data, "data.validation=0.25")
    assert lines[-1]["val_accuracy"] > 0.9
    sample = (tmp_path / "run" / "samples" / "step-60.txt").read_text(encoding="utf-8")
    assert sample.count("(expected: ") == 3
    file = tmp_path / "new.png"
    square("green", 12345).save(file)
    done = xt("generate", "--ckpt", str(tmp_path / "run"), "--image", str(file))
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0].endswith("%  green")
    assert len(done.stdout.splitlines()) == len(COLOURS)
    loaded = load_preset(tmp_path / "run").preset
    assert loaded.objective.labels == tuple(sorted(COLOURS))  # type: ignore[attr-defined]
    text = xt("generate", "--ckpt", str(tmp_path / "run"), "--prompt", "green")
    assert (text.returncode, text.stderr.splitlines()[-1]) == (
        2,
        "--prompt: the model reads images; give one with --image FILE",
    )


def test_a_captioner_learns_two_captions_and_says_them_of_files(tmp_path: Path) -> None:
    data = listed(tmp_path / "images", 12, ("red", "blue"))
    lines = train("captioner", tmp_path, data, "train.steps=120", "data.validation=0")
    losses = [line["loss"] for line in lines if "loss" in line]
    assert losses[-1] < 0.2 < 2 < losses[0]
    files = [data / "0.png", data / "1.png"]
    words = [word for file in files for word in ("--image", str(file))]
    command = [sys.executable, "-m", "xtcli", "generate", "--ckpt", str(tmp_path / "run"), *words, "--max-tokens", "30"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [TEXTS["red"], TEXTS["blue"]]
    beams = xt("generate", "--ckpt", str(tmp_path / "run"), *words[:2], "--beams", "3", "--max-tokens", "30")
    assert beams.stdout.splitlines() == [TEXTS["red"]]


def test_captions_step_by_step_equal_one_pass() -> None:
    model = construct(load_config("captioner")).to_empty(device="cpu")
    model.initialise(0)
    model.eval()
    pixels, ids = torch.randn(2, 3, 12, 16), torch.randint(0, 258, (2, 9))
    whole = model(pixel_values=pixels, decoder_input_ids=ids)
    memory = model.encode(extras={"pixel_values": pixels})  # type: ignore[operator]
    assert (memory.shape[-1], whole.last_hidden_state.shape[-1]) == (16, 24)
    state = model.new_state(2, 9)  # type: ignore[operator]
    for at in range(9):
        hidden = model.decode(ids[:, at : at + 1], memory, state=state)  # type: ignore[operator]
        torch.testing.assert_close(hidden.states, whole.last_hidden_state[:, at : at + 1], atol=1e-5, rtol=1e-5)


def load_config(preset: str) -> Any:
    import yaml

    tree = yaml.safe_load(PRESETS[preset])["model"]
    return find("graph", tree.pop("kind")).Config.model_validate(tree)


MASKED = CLASSIFIER.replace("image-labels", "masked-patches").replace(
    "[12, 16], patch: 4", "16, patch: 4, mask_vector: true"
)


def test_hidden_pixels_are_learnt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PRESETS, "masked", MASKED.replace("sequence: {pick: first}", "pixels: {side: 4}"))
    lines = train("masked", tmp_path, listed(tmp_path / "images"), "data.validation=0")
    losses = [line["loss"] for line in lines if "loss" in line]
    assert losses[-1] < 0.8 * losses[0]
    assert {line["unit"] for line in lines if "loss" in line} == {"absolute error"}
    assert xtcli.load(tmp_path / "run").embed.mask_vector.abs().sum() > 0  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("preset", "overrides", "words"),
    [
        ("classifier", ("data=stdlib",), "data.source: stdlib is plain text, and this objective reads images"),
        ("classifier", ("model.embed.channels=2",), "the model reads 2 channels, and images have 1, 3, 4"),
        ("classifier", ("model.heads.sequence.labels=7",), "is 7, and there are 4 labels"),
        ("classifier", ("objective=masked-patches",), "the model has none; set model.embed.mask_vector=true"),
        ("classifier", ("objective=captions",), "captions need a decoder that reads the image"),
        ("captioner", ("objective.length=64",), "length is 64, and the context has 32 tokens"),
        ("captioner", ("model.share_tokens=true",), "dim: is 16, the shared token table's rows are 24"),
    ],
)
def test_what_does_not_fit_is_refused(preset: str, overrides: tuple[str, ...], words: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=words):
        train(preset, tmp_path, listed(tmp_path / "images", 2), *overrides)


def test_a_model_of_text_is_refused(tmp_path: Path) -> None:
    resolved = load_preset("bert-base", [f"data={tmp_path}", "objective=image-labels"], tiny=True)
    with pytest.raises(UserError, match="the objective 'image-labels' gives images, and the model reads none"):
        new(resolved, out=tmp_path / "run", command=["xt"], record=lambda line: None, talk=lambda text: None)
