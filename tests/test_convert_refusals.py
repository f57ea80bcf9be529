"""What conversion refuses: every mutation of a checkpoint's tensors, shards, options, ties; and where it will not write."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from references import Case, reference
from torch import Tensor

from xtcli.convert import convert
from xtcli.errors import UserError

CASES = {
    "gpt2": Case("GPT2LMHeadModel", {"n_layer": 1, "add_cross_attention": True, "n_inner": 40}),
    "llama": Case("LlamaForCausalLM", {"num_hidden_layers": 1, "num_key_value_heads": 2, "head_dim": 8}),
    "bert": Case("BertForPreTraining", {"num_hidden_layers": 1, "position_embedding_type": "relative_key"}),
    "t5": Case("T5ForConditionalGeneration", {"num_layers": 1, "tie_word_embeddings": False, "d_kv": 5}),
}


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A checkpoint of each family, single and in shards."""
    folder = tmp_path_factory.mktemp("sources")
    for family, case in CASES.items():
        model: Any = reference(case)
        model.save_pretrained(folder / family)
        model.save_pretrained(folder / f"{family} shards", max_shard_size="8KB")
    return {path.name: path for path in folder.iterdir()}


def renamed(found: dict[str, Tensor], name: str) -> None:
    found[name + "x"] = found.pop(name)


def transposed(found: dict[str, Tensor], name: str) -> None:
    found[name] = found[name].t().contiguous()


def reshaped(found: dict[str, Tensor], name: str) -> None:
    found[name] = found[name].reshape(1, *found[name].shape)


def retyped(found: dict[str, Tensor], name: str) -> None:
    found[name] = found[name].half()


def cut(found: dict[str, Tensor], name: str) -> None:
    found[name] = found[name][:-1].clone()


def shifted(found: dict[str, Tensor], name: str) -> None:
    digits = [part for part in name.split(".") if part.isdigit()]
    where = name.replace(f".{digits[0]}.", ".7.", 1) if digits else f"other.{name}"
    found[where] = found.pop(name)


MUTATIONS: dict[str, Callable[[dict[str, Tensor], str], Any]] = {
    "removed": lambda found, name: found.pop(name),
    "added": lambda found, name: found.update({f"{name}.1": found[name].clone()}),
    "renamed": renamed,
    "moved": shifted,
    "transposed": transposed,
    "reshaped": reshaped,
    "cut": cut,
    "retyped": retyped,
    "counted": lambda found, name: found.update({name: found[name].long()}),
}


@pytest.mark.parametrize("mutation", MUTATIONS)
@pytest.mark.parametrize("family", CASES)
def test_every_mutation_of_every_tensor(family: str, mutation: str, sources: dict[str, Path], tmp_path: Path) -> None:
    whole = safetensors.torch.load_file(sources[family] / "model.safetensors")
    (tmp_path / "config.json").write_bytes((sources[family] / "config.json").read_bytes())
    tried = 0
    for name, tensor in whole.items():
        square = tensor.dim() < 2 or tensor.shape[0] == tensor.shape[1]
        if mutation == "transposed" and square:
            # The transpose of a square matrix is a matrix like any other: nothing in a file tells them apart.
            continue
        found = dict(whole)
        MUTATIONS[mutation](found, name)
        safetensors.torch.save_file(found, tmp_path / "model.safetensors")
        with pytest.raises(UserError) as refused:
            convert(tmp_path, tmp_path / "there", dry_run=True)
        assert name.removeprefix("transformer.") in str(refused.value)
        tried += 1
    assert tried > 3


@pytest.mark.parametrize(
    ("family", "old", "new", "said"),
    [
        ("gpt2", "transformer.h.0.attn.c_attn.weight", "transformer.h.0.attn.c_atn.weight", "c_attn.weight'"),
        (
            "bert",
            "bert.encoder.layer.0.output.dense.bias",
            "bert.encoder.layer.0.outputs.dense.bias",
            "output.dense.bias'",
        ),
        ("gpt2", "transformer.ln_f.weight", "ln_f.weight", "transformer.ln_f.weight'"),
        ("bert", "bert.embeddings.LayerNorm.weight", "bert.embeddings.LayerNorm.gama", "LayerNorm.weight'"),
    ],
)
def test_a_wrong_name_is_told_the_nearest(
    family: str, old: str, new: str, said: str, sources: dict[str, Path], tmp_path: Path
) -> None:
    found = safetensors.torch.load_file(sources[family] / "model.safetensors")
    found[new] = found.pop(old)
    safetensors.torch.save_file(found, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((sources[family] / "config.json").read_bytes())
    with pytest.raises(UserError) as refused:
        convert(tmp_path, tmp_path / "there")
    assert f"tensor '{new}' has no place" in str(refused.value) and said in str(refused.value)
    assert not (tmp_path / "there").exists()


@pytest.mark.parametrize(
    ("family", "name", "change"),
    [
        ("gpt2", "lm_head.weight", lambda found: found["transformer.wte.weight"] + 1),
        ("t5", "encoder.embed_tokens.weight", lambda found: found["shared.weight"] + 1),
        ("bert", "cls.predictions.decoder.bias", lambda found: found["cls.predictions.bias"] + 1),
        ("gpt2", "transformer.h.0.attn.bias", lambda found: torch.ones(1, 1, 48, 48)),
        ("gpt2", "transformer.h.0.attn.masked_bias", lambda found: torch.tensor(0.0)),
        ("bert", "bert.embeddings.position_ids", lambda found: torch.arange(48).flip(0)[None]),
        ("bert", "bert.embeddings.LayerNorm.gamma", lambda found: found["bert.embeddings.LayerNorm.weight"].clone()),
    ],
)
def test_a_tie_a_buffer_an_older_name_must_agree(
    family: str, name: str, change: Any, sources: dict[str, Path], tmp_path: Path
) -> None:
    found = safetensors.torch.load_file(sources[family] / "model.safetensors")
    found[name] = change(found)
    safetensors.torch.save_file(found, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((sources[family] / "config.json").read_bytes())
    with pytest.raises(UserError, match=name.replace(".", r"\.")):
        convert(tmp_path, tmp_path / "there", dry_run=True)


def test_half_of_a_spare_group_is_no_group(tmp_path: Path) -> None:
    model: Any = reference(Case("BertForMaskedLM"))
    model.save_pretrained(tmp_path)
    found = safetensors.torch.load_file(tmp_path / "model.safetensors")
    found["bert.pooler.dense.weight"] = torch.ones(24, 24)
    safetensors.torch.save_file(found, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"bert\.pooler\.dense\.bias' is missing"):
        convert(tmp_path, tmp_path / "there")


OPTIONS = [
    ("gpt2", {"n_layr": 2}, "n_layr: is no option of GPT-2 that xt knows; did you mean 'n_layer'"),
    ("gpt2", {"activation_function": "prelu"}, "activation_function: is 'prelu', which xt does not express"),
    ("gpt2", {"activation_function": "gelu_knew"}, "did you mean 'gelu_new'"),
    ("gpt2", {"n_layer": "2"}, "n_layer: is '2', not a whole number"),
    ("gpt2", {"n_layer": True}, "n_layer: is True, not a whole number"),
    ("gpt2", {"layer_norm_epsilon": "1e-5"}, "layer_norm_epsilon: is '1e-5', not a number"),
    ("gpt2", {"n_embd": 24, "hidden_size": 32}, "hidden_size 32 are one option"),
    ("gpt2", {"pruned_heads": {"0": [1]}}, "pruned_heads"),
    ("gpt2", {"is_encoder_decoder": True}, "is_encoder_decoder: is True, which xt does not express"),
    ("gpt2", {"n_head": 5}, "5 heads do not divide dim 24"),
    ("gpt2", {"resid_pdrop": 1.5}, "model.dropout"),
    ("gpt2", {"architectures": ["GPT2LMHeadModle"]}, "did you mean 'GPT2LMHeadModel'"),
    ("gpt2", {"architectures": ["A", "B"]}, "must name one class"),
    ("gpt2", {"model_type": "gpt3"}, "model_type 'gpt3' is no family that xt converts; did you mean 'gpt2'"),
    ("gpt2", {"quantization_config": {"bits": 4}}, "quantization_config: is no option"),
    ("llama", {"rope_scaling": {"rope_type": "yarm", "factor": 2.0}}, "did you mean 'yarn'"),
    ("llama", {"rope_scaling": {"rope_type": "linear"}}, "rope_scaling.factor: is missing"),
    ("llama", {"rope_scaling": {"rope_type": "linear", "factor": 2.0, "base": 1}}, "rope_scaling.base: is no option"),
    (
        "llama",
        {"rope_scaling": {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [1.0] * 4}},
        "factor",
    ),
    ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor: is 0.5, which xt does not express"),
    ("llama", {"rope_parameters": {}}, "rope_parameters: is no option"),
    ("bert", {"position_embedding_type": "relative"}, "position_embedding_type: is 'relative'"),
    ("bert", {"tie_encoder_decoder": True}, "tie_encoder_decoder"),
    ("t5", {"feed_forward_proj": "gatd-gelu"}, "feed_forward_proj"),
    ("t5", {"is_decoder": True}, "is_decoder"),
]


@pytest.mark.parametrize(("family", "changes", "said"), OPTIONS, ids=lambda value: json.dumps(value)[:50])
def test_an_option_that_is_wrong_or_not_expressed(
    family: str, changes: dict[str, Any], said: str, sources: dict[str, Path], tmp_path: Path
) -> None:
    config = json.loads((sources[family] / "config.json").read_text()) | changes
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes((sources[family] / "model.safetensors").read_bytes())
    with pytest.raises(UserError) as refused:
        convert(tmp_path, tmp_path / "there")
    assert said in str(refused.value)
    assert not (tmp_path / "there").exists()


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
        (lambda src: None, "there is no folder"),
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


def test_a_type_that_cannot_hold_the_values(sources: dict[str, Path], tmp_path: Path) -> None:
    found = safetensors.torch.load_file(sources["gpt2"] / "model.safetensors")
    found["transformer.ln_f.bias"][0] = 1e6
    safetensors.torch.save_file(found, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((sources["gpt2"] / "config.json").read_bytes())
    with pytest.raises(UserError, match=r"'stack.norm.bias' holds values beyond the range of float16"):
        convert(tmp_path, tmp_path / "there", dtype="float16")
    with pytest.raises(UserError, match="there is no type 'float17'; did you mean 'float16'"):
        convert(tmp_path, tmp_path / "there", dtype="float17")


def test_a_model_that_no_class_of_theirs_is(tmp_path: Path) -> None:
    from xtcli.config.preset import load_preset
    from xtcli.model import build, save_model

    for number, (preset, change, said) in enumerate(
        [
            (
                "gpt2-small",
                "model.stack.block.sublayers.attn.kv_heads=2",
                "attn.kv_heads is 2, their config.json can only say 4",
            ),
            ("gpt2-small", "model.stack.block.sublayers.ffn={kind: glu, hidden: 64}", "ffn: is 'glu', not 'mlp'"),
            ("llama-7b", "model.stack.position.layout=interleaved", "layout"),
            ("bert-base", "model.embed.scale=2.0", "scale"),
            ("t5-small", "model.decoder.stack.block.sublayers.cross.heads=2", "heads"),
        ]
    ):
        resolved = load_preset(preset, [change], tiny=True)
        save_model(build(resolved), tmp_path / f"ours {number}", resolved.to_yaml())
        with pytest.raises(UserError, match="cannot express this model") as refused:
            convert(tmp_path / f"ours {number}", tmp_path / "theirs", to="hf")
        assert said in str(refused.value)


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
    code, out, err = run("gtp2", src, str(tmp_path / "x"))
    listed = "auto, bert, code_llama, gpt2, llama, t5"
    assert code == 2 and err == f"xt: there is no family 'gtp2'; did you mean 'gpt2'? known: {listed}\n"
    code, out, err = run("auto", there, str(tmp_path / "back"), "--to", "hf")
    assert code == 0 and "GPT2LMHeadModel.from_pretrained" in err
