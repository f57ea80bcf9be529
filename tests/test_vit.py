"""ViT and image captioners against the reference: every class, every option; files there and back."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from checkpoints import opens_cleanly, same, save, tensors
from pictures import square
from PIL import Image
from references import VOCAB, ids, mask, noise, randomise
from test_parity import converted, difference
from torch import Tensor

import xtcli
from xtcli.config.preset import load_preset
from xtcli.convert import convert
from xtcli.convert.images import FILE
from xtcli.errors import UserError
from xtcli.generate.pictures import read, reader_of
from xtcli.runs.folder import MANIFEST, commit_folder

VIT: dict[str, Any] = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 12,
    "patch_size": 4,
    "encoder_stride": 4,
}
TEXT: dict[str, dict[str, Any]] = {
    "gpt2": {"vocab_size": VOCAB, "n_embd": 24, "n_layer": 2, "n_head": 4, "n_positions": 48},
    "bert": {
        "vocab_size": VOCAB,
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 48,
    },
    "bart": {
        "vocab_size": VOCAB,
        "d_model": 24,
        "decoder_ffn_dim": 40,
        "decoder_layers": 2,
        "decoder_attention_heads": 4,
        "max_position_embeddings": 48,
    },
}
TEXT |= {"roberta": TEXT["bert"] | {"pad_token_id": 1}, "electra": TEXT["bert"] | {"embedding_size": 24}}
TOLERANCE = 2e-5


def vit(name: str, options: dict[str, Any]) -> Any:
    said = VIT | json.loads(json.dumps(options))
    more = {key: said.pop(key) for key in ("add_pooling_layer", "use_mask_token") if key in said}
    cls = getattr(transformers, name)
    return randomise(cls(transformers.ViTConfig(**said), **more))


def images(rows: int, config: Any, height: int | None = None, width: int | None = None) -> Tensor:
    size = config.image_size
    sides = (size, size) if isinstance(size, int) else size
    return noise(rows, config.num_channels, height or sides[0], width or sides[1])


def feeds(name: str, options: dict[str, Any], config: Any) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {f"{rows} rows": {"pixel_values": images(rows, config)} for rows in (1, 3)}
    square = isinstance(config.image_size, int) and isinstance(config.patch_size, int)
    patches = (config.image_size // config.patch_size) ** 2 if square else 0
    if name == "ViTForMaskedImageModeling" or options.get("use_mask_token"):
        generator = torch.Generator().manual_seed(4)
        masked = torch.randint(0, 2, (3, patches), generator=generator).bool()
        if config.patch_size == config.encoder_stride:
            found["masked"] = {"pixel_values": images(3, config), "bool_masked_pos": masked}
    if square and config.image_size % config.patch_size == 0:
        # The reference makes square images alone.
        other = images(2, config, 20, 20 if name == "ViTForMaskedImageModeling" else 9)
        found["interpolated"] = {"pixel_values": other, "interpolate_pos_encoding": True}
    if name == "ViTForImageClassification":
        many = config.problem_type == "multi_label_classification"
        numbers = config.num_labels == 1 or config.problem_type == "regression"
        labels = torch.rand(4, config.num_labels) if many or numbers else torch.arange(4) % config.num_labels
        found["loss"] = {"pixel_values": images(4, config), "labels": labels.round() if many else labels}
    return found


ACTIVATIONS = ("gelu", "gelu_new", "relu", "silu", "quick_gelu")
CASES: list[tuple[str, dict[str, Any]]] = [
    ("ViTModel", {}),
    ("ViTModel", {"add_pooling_layer": False}),
    ("ViTModel", {"use_mask_token": True}),
    ("ViTModel", {"use_mask_token": True, "add_pooling_layer": False, "hidden_dropout_prob": 0.3}),
    ("ViTModel", {"pooler_act": "relu", "pooler_output_size": 10}),
    ("ViTModel", {"pooler_act": "gelu", "pooler_output_size": 40, "num_hidden_layers": 1}),
    ("ViTModel", {"image_size": [12, 20], "patch_size": [4, 5], "num_channels": 2}),
    ("ViTModel", {"image_size": 14, "layer_norm_eps": 0.1, "num_hidden_layers": 3}),
    ("ViTForImageClassification", {}),
    ("ViTForImageClassification", {"num_labels": 5, "qkv_bias": False}),
    ("ViTForImageClassification", {"num_labels": 1}),
    ("ViTForImageClassification", {"num_labels": 3, "problem_type": "regression"}),
    ("ViTForImageClassification", {"num_labels": 3, "problem_type": "multi_label_classification"}),
    *(("ViTForImageClassification", {"hidden_act": name}) for name in ACTIVATIONS),
    ("ViTForImageClassification", {"patch_size": 3, "num_channels": 1, "num_attention_heads": 1}),
    ("ViTForMaskedImageModeling", {}),
    ("ViTForMaskedImageModeling", {"num_channels": 1, "patch_size": 2, "encoder_stride": 2, "qkv_bias": False}),
    ("ViTForMaskedImageModeling", {"encoder_stride": 3, "num_labels": 0}),
]


@pytest.mark.parametrize(("name", "options"), CASES, ids=str)
def test_equals_the_reference(name: str, options: dict[str, Any]) -> None:
    theirs = vit(name, options)
    ours = converted(theirs, "vit")
    for feed, given in feeds(name, options, theirs.config).items():
        off = {key: value for key, value in difference(theirs, ours, given).items() if not value <= TOLERANCE}
        assert not off, (feed, off)


@pytest.mark.parametrize(("name", "options"), CASES, ids=str)
def test_files_come_back_byte_for_byte(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    source = save(vit(name, options), tmp_path / "source")
    convert(source, tmp_path / "ours", family="auto", verify=name != "ViTModel")
    convert(tmp_path / "ours", tmp_path / "back", to="hf")
    assert same(tensors(source), tensors(tmp_path / "back"))
    more = {key: value for key, value in options.items() if key in ("add_pooling_layer", "use_mask_token")}
    opens_cleanly(tmp_path / "back", getattr(transformers, name), **more)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"image_size": [12, 12, 3]}, "image_size"),
        ({"patch_size": 16}, "more than the image's"),
        ({"layer_scale": 0.1}, "layer_scale"),
        ({"pooler_act": "sine"}, "pooler_act"),
    ],
)
def test_what_is_not_expressed_is_refused(options: dict[str, Any], words: str, tmp_path: Path) -> None:
    source = save(vit("ViTModel", {}), tmp_path / "source")
    config = source / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | options))
    with pytest.raises(UserError, match=words):
        convert(source, tmp_path / "ours", family="auto")


def test_images_of_another_size_are_refused_with_the_sizes() -> None:
    ours = converted(vit("ViTModel", {}), "vit")
    with pytest.raises(UserError, match="the image is 8 x 12 pixels, the model reads 12 x 12"):
        ours(pixel_values=noise(1, 3, 8, 12))
    with pytest.raises(UserError, match="the image has 1 channels, the model reads 3"):
        ours(pixel_values=noise(1, 1, 12, 12))
    with pytest.raises(TypeError, match="no input bool_masked_pos"):
        ours(pixel_values=noise(1, 3, 12, 12), bool_masked_pos=torch.ones(1, 9))


def captioner(text: str, encoder: dict[str, Any], decoder: dict[str, Any], top: dict[str, Any]) -> Any:
    seeing = transformers.ViTConfig(**VIT | json.loads(json.dumps(encoder)))
    writing = transformers.AutoConfig.for_model(text, **TEXT[text] | json.loads(json.dumps(decoder)))
    settings = {"pad_token_id": 60, "decoder_start_token_id": 58} | top
    config = transformers.VisionEncoderDecoderConfig.from_encoder_decoder_configs(seeing, writing, **settings)
    config.encoder._attn_implementation = config.decoder._attn_implementation = "eager"
    return randomise(transformers.VisionEncoderDecoderModel(config))


PAIRS: list[tuple[str, dict[str, Any], dict[str, Any], dict[str, Any]]] = [
    ("gpt2", {}, {}, {}),
    ("gpt2", {"hidden_size": 32, "qkv_bias": False}, {}, {}),
    ("gpt2", {"layer_norm_eps": 0.1}, {"layer_norm_epsilon": 0.01, "n_inner": 30, "activation_function": "relu"}, {}),
    ("gpt2", {"image_size": 14, "patch_size": 7}, {"tie_word_embeddings": False}, {"tie_word_embeddings": False}),
    ("gpt2", {"hidden_dropout_prob": 0.2, "pooler_output_size": 10}, {"scale_attn_weights": False}, {}),
    ("gpt2", {"num_channels": 1}, {"scale_attn_by_inverse_layer_idx": True, "reorder_and_upcast_attn": True}, {}),
    ("bert", {}, {}, {}),
    ("bert", {"hidden_size": 32}, {"tie_word_embeddings": False, "hidden_act": "relu"}, {}),
    # With a cache the reference measures all distances from the last place.
    ("bert", {}, {"position_embedding_type": "relative_key", "use_cache": False}, {}),
    ("bert", {}, {"cross_attention_hidden_size": 24}, {"pad_token_id": None}),
    # Its places are counted from another padding than the pair's.
    ("roberta", {"hidden_size": 32}, {}, {}),
    # The same network as BERT's, under other names.
    ("electra", {}, {}, {}),
    ("electra", {"hidden_size": 32}, {"embedding_size": 10, "tie_word_embeddings": False}, {}),
    ("bart", {"hidden_size": 32}, {"scale_embedding": True, "activation_function": "relu"}, {}),
    ("bart", {}, {"tie_word_embeddings": False, "decoder_layers": 1}, {}),
]


@pytest.mark.parametrize(("text", "encoder", "decoder", "top"), PAIRS, ids=str)
def test_captioner_equals_the_reference(text: str, encoder: Any, decoder: Any, top: Any) -> None:
    theirs = captioner(text, encoder, decoder, top)
    ours = converted(theirs, "vision-encoder-decoder")
    kept = mask(3, 12, "right")
    pixels = images(3, theirs.config.encoder)
    words = ids(3, 9).masked_fill(torch.arange(9) > 6, -100)
    given = {
        "one": {"pixel_values": pixels, "decoder_input_ids": ids(3, 1)},
        "many": {"pixel_values": pixels, "decoder_input_ids": ids(3, 17)},
        "padded": {"pixel_values": pixels, "decoder_input_ids": ids(3, 12), "decoder_attention_mask": kept},
    }
    if theirs.config.pad_token_id is not None:
        given["labels"] = {"pixel_values": pixels, "labels": words}
    if text != "bart":
        places = torch.tensor([[3, 1, 4]])
        given["places"] = {"pixel_values": pixels, "decoder_input_ids": ids(3, 3), "decoder_position_ids": places}
        types = torch.tensor([[0, 1, 1]] * 3)
        given["types"] = {"pixel_values": pixels, "decoder_input_ids": ids(3, 3), "decoder_token_type_ids": types}
    for feed, one in given.items():
        off = {key: value for key, value in difference(theirs, ours, one).items() if not value <= TOLERANCE}
        assert not off, (feed, off)


@pytest.mark.parametrize(("text", "encoder", "decoder", "top"), PAIRS, ids=str)
def test_captioner_files_come_back(text: str, encoder: Any, decoder: Any, top: Any, tmp_path: Path) -> None:
    source = save(captioner(text, encoder, decoder, top), tmp_path / "source")
    convert(source, tmp_path / "ours", family="auto", verify=True)
    convert(tmp_path / "ours", tmp_path / "back", to="hf")
    assert same(tensors(source), tensors(tmp_path / "back"))
    opens_cleanly(tmp_path / "back", transformers.VisionEncoderDecoderModel)


@pytest.mark.parametrize(
    ("side", "options", "words"),
    [
        ("encoder", {"model_type": "swin"}, "encoder.model_type"),
        ("decoder", {"add_cross_attention": False}, "add_cross_attention"),
        ("decoder", {"cross_attention_hidden_size": 32}, "is 32, the encoder's width 24 and the decoder's 24"),
        ("decoder", {"model_type": "xlnet"}, "decoder.model_type.*xt converts gpt2, bert, roberta, electra, bart"),
        ("encoder", {"window": 3}, "window"),
    ],
)
def test_sides_that_are_not_expressed_are_refused(side: str, options: Any, words: str, tmp_path: Path) -> None:
    source = save(captioner("gpt2", {}, {}, {}), tmp_path / "source")
    config = source / "config.json"
    values = json.loads(config.read_text())
    values[side] |= options
    config.write_text(json.dumps(values))
    with pytest.raises(UserError, match=words):
        convert(source, tmp_path / "ours", family="auto")


PIXELS: list[dict[str, Any]] = [
    {},
    {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.5, 0.6, 0.7], "resample": 3},
    {"do_normalize": False, "resample": 0},
    {"do_rescale": False, "image_mean": [120.0, 110.0, 100.0], "image_std": [60.0, 50.0, 40.0]},
    {"rescale_factor": 0.01, "resample": 1},
]


def pictured(options: dict[str, Any], folder: Path) -> Path:
    """A classifier of 12 x 20 pixels with its processor, and an image of another size."""
    source = save(vit("ViTForImageClassification", {"image_size": [12, 20], "patch_size": 4}), folder / "source")
    transformers.ViTImageProcessor(size={"height": 12, "width": 20}, **options).save_pretrained(source)
    square("red", 3, (31, 17)).save(folder / "a.png")
    return source


def altered(folder: Path, change: Callable[[str, bytes], bytes | None]) -> Path:
    """A whole copy of a checkpoint with other files beside its weights; None leaves one out."""

    def write(inside: Path) -> None:
        shutil.copytree(folder, inside, dirs_exist_ok=True)
        for file in (inside / FILE, inside / "preset.yaml"):
            found = change(file.name, file.read_bytes())
            file.unlink() if found is None else file.write_bytes(found)
        (inside / MANIFEST).unlink()

    commit_folder(folder.with_name("altered"), write)
    return folder.with_name("altered")


@pytest.mark.parametrize("options", PIXELS, ids=str)
def test_files_become_the_pixels_of_the_reference_s_processor(options: dict[str, Any], tmp_path: Path) -> None:
    source = pictured(options, tmp_path)
    convert(source, tmp_path / "ours")
    preset = load_preset(tmp_path / "ours").preset
    pixels = read(reader_of(xtcli.load(tmp_path / "ours"), preset), [str(tmp_path / "a.png")])  # type: ignore[arg-type]
    theirs = transformers.ViTImageProcessor.from_pretrained(source)
    image = Image.open(tmp_path / "a.png")
    torch.testing.assert_close(pixels, theirs(image, return_tensors="pt").pixel_values, atol=1e-5, rtol=1e-6)
    convert(tmp_path / "ours", tmp_path / "back", to="hf")
    assert (tmp_path / "back" / FILE).read_bytes() == (source / FILE).read_bytes()
    # Without the file of the source, one that means the same is written.
    convert(altered(tmp_path / "ours", lambda name, text: None if name == FILE else text), tmp_path / "anew", to="hf")
    anew = transformers.AutoImageProcessor.from_pretrained(tmp_path / "anew", use_fast=False)
    torch.testing.assert_close(pixels, anew(image, return_tensors="pt").pixel_values, atol=1e-5, rtol=1e-6)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"size": {"height": 12, "width": 12}}, "size: is 12 x 12 pixels, and the model reads 12 x 20"),
        ({"size": {"shortest_edge": 12}}, "size: is .*, not a height and a width"),
        ({"image_processor_type": "DeiTImageProcessor"}, "image_processor_type: is 'DeiTImageProcessor'"),
        ({"do_center_crop": True}, "do_center_crop: is True"),
        ({"resample": 9}, "resample: is 9"),
        ({"image_std": [0.0, 0.5]}, "image_std"),
    ],
)
def test_a_processor_that_is_not_expressed_is_refused(options: dict[str, Any], words: str, tmp_path: Path) -> None:
    source = pictured({}, tmp_path)
    (source / FILE).write_text(json.dumps(json.loads((source / FILE).read_text()) | options))
    with pytest.raises(UserError, match=rf"{FILE}.*{words}"):
        convert(source, tmp_path / "ours")


def test_images_that_are_cropped_have_no_processor(tmp_path: Path) -> None:
    convert(pictured({}, tmp_path), tmp_path / "ours")
    cropped = altered(tmp_path / "ours", lambda name, text: text.replace(b"stretch", b"crop"))
    report = convert(cropped, tmp_path / "back", to="hf")
    assert "fitted by 'crop'" in report.missing and not (tmp_path / "back" / FILE).exists()
