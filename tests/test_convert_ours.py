"""Our own models as checkpoints of theirs, what --verify says, and what both ways share."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import transformers
from checkpoints import opens_cleanly, same, save, tensors
from references import Case, describe, ids, reference
from torch import Tensor

from presets import DISTINCT
from xtcli.config.preset import load_preset
from xtcli.convert import convert
from xtcli.convert.exports import find_form
from xtcli.model import build, load, save_model
from xtcli.registry import part_of

PRESETS = [
    ("gpt2-small", transformers.GPT2LMHeadModel, ("model.pad=1",)),
    ("llama-7b", transformers.LlamaForCausalLM, ()),
    ("tinyllama-1.1b", transformers.LlamaForCausalLM, ()),
    ("bert-base", transformers.BertForPreTraining, ()),
    ("t5-small", transformers.T5ForConditionalGeneration, ()),
    ("t5-v1.1-base", transformers.T5ForConditionalGeneration, ()),
    ("bert-base", transformers.BertForMaskedLM, ("model.heads={mlm: {}}", "model.pooler=null", "objective=mlm")),
    (
        "bert-base",
        transformers.BertForPreTraining,
        ("model.embed.positions=none", "model.stack.position={kind: shaw, distance: 127}"),
    ),
    (
        "llama-7b",
        transformers.LlamaForCausalLM,
        ("model.stack.position.scaling={kind: yarn, factor: 4.0, original: 64}", "model.heads.lm.tied=true"),
    ),
]


@pytest.mark.parametrize(
    ("preset", "cls", "changes"), PRESETS, ids=lambda value: getattr(value, "__name__", str(value))
)
def test_a_model_of_ours_becomes_one_of_theirs(preset: str, cls: Any, changes: tuple[str, ...], tmp_path: Path) -> None:
    resolved = load_preset(preset, changes, tiny=True)
    ours = build(resolved).eval()
    save_model(ours, tmp_path / "ours", resolved.to_yaml())
    report = convert(tmp_path / "ours", tmp_path / "theirs", to="hf")
    assert report.architecture == cls.__name__ and report.bit_exact
    theirs = opens_cleanly(tmp_path / "theirs", cls)
    given = {"input_ids": ids(2, 9)} | ({"decoder_input_ids": ids(2, 5)} if cls.__name__.startswith("T5") else {})
    with torch.no_grad():
        expected, found = theirs(**given), ours(**given)
    for name in set(expected) & {"logits", "prediction_logits", "seq_relationship_logits"}:
        torch.testing.assert_close(found[name], expected[name], atol=2e-5, rtol=1e-5)
    again = convert(tmp_path / "theirs", tmp_path / "again")
    assert again.architecture == cls.__name__
    assert same(tensors(tmp_path / "ours"), tensors(tmp_path / "again"))


NO_FAMILY = {"gpt3-175b"}
"""Its logits have a bias of their own."""


@pytest.mark.parametrize("name", [name for name in DISTINCT if not name.startswith("x-") and name not in NO_FAMILY])
def test_every_preset_of_a_known_architecture_is_one_of_theirs(name: str) -> None:
    config = load_preset(name, tiny=True).preset.model
    for member, _ in part_of(config).members(config).values() or [(config, "")]:
        assert find_form(member, "auto", {}, name)


HARD = ("deberta-v2-xlarge", "long-t5-local-base", "mobilebert", "reformer-crime-and-punishment", "squeezebert")
"""Presets whose modules stand in another order, layout or chance than the reference's."""


@pytest.mark.parametrize("name", HARD)
def test_verify_sees_that_a_preset_is_the_reference(name: str, tmp_path: Path) -> None:
    resolved = load_preset(name, tiny=True)
    save_model(build(resolved), tmp_path / "ours", resolved.to_yaml())
    convert(tmp_path / "ours", tmp_path / "theirs", to="hf")
    report = convert(tmp_path / "theirs", tmp_path / "again", verify=True)
    assert report.verified is not None and report.verified["worst"] <= 1e-4


def test_what_changed_since_the_import_is_written_into_its_config(tmp_path: Path) -> None:
    source = save(reference(Case("GPT2LMHeadModel")), tmp_path / "source")
    convert(source, tmp_path / "there")
    resolved = load_preset(tmp_path / "there", ["model.dropout=0.0", "model.stack.block.wiring.dropout=0.0"])
    save_model(load(tmp_path / "there"), tmp_path / "tuned", resolved.to_yaml())
    (tmp_path / "tuned/reference").mkdir()
    (tmp_path / "tuned/reference/config.json").write_bytes((source / "config.json").read_bytes())
    convert(tmp_path / "tuned", tmp_path / "back", to="hf")
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (source, tmp_path / "back"))
    assert {key for key in before | after if after.get(key, key) != before.get(key, key)} == {"resid_pdrop"}


VERIFIED = [
    Case("GPT2DoubleHeadsModel"),
    Case("GPT2LMHeadModel", {"add_cross_attention": True, "scale_attn_weights": False}),
    Case("T5ForSequenceClassification"),
    Case("LlamaForSequenceClassification", {"pad_token_id": None}),
    Case("BertModel", {"add_pooling_layer": False}),
    Case("BertLMHeadModel", {"is_decoder": True, "position_embedding_type": "relative_key"}),
]


@pytest.mark.parametrize("case", VERIFIED, ids=lambda case: case.id)
def test_verify_compares_outputs_and_modules(case: Case, tmp_path: Path) -> None:
    source = save(reference(case), tmp_path / "source")
    report = convert(source, tmp_path / "there", verify=True)
    assert report.verified is not None and report.verified["modules"] >= 10 and report.verified["worst"] < 2e-5
    back = convert(tmp_path / "there", tmp_path / "back", to="hf", verify=True)
    assert back.verified is not None and back.verified["outputs"] == report.verified["outputs"]


def test_verify_names_the_first_module_that_differs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from xtcli.convert import imports
    from xtcli.convert.verify import Diverged

    source = save(reference(Case("LlamaForCausalLM")), tmp_path / "source")
    genuine = imports.to_ours

    def wrong(move: Any, get: Any, like: Any) -> dict[str, Tensor]:
        made = genuine(move, get, like)
        return {n: t.roll(1, 0) if "blocks.1.attn.v" in n else t for n, t in made.items()}

    monkeypatch.setattr(imports, "to_ours", wrong)
    monkeypatch.setattr(imports, "unchanged", lambda job, inside: True)
    with pytest.raises(Diverged, match=r"'stack\.blocks\.1\.attn\.v' is the first that differs"):
        convert(source, tmp_path / "there", verify=True)
    assert not (tmp_path / "there").exists()


def test_importing_the_package_costs_no_torch() -> None:
    program = (
        "import sys, xtcli; assert callable(xtcli.convert); import xtcli.convert; sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_reference_config_survives_word_for_word(tmp_path: Path) -> None:
    source = save(reference(Case("BertForMaskedLM")), tmp_path / "source")
    config = describe(reference(Case("BertForMaskedLM"))) | {"id2label": {"0": "no", "1": "yes"}, "pooler_type": "x"}
    (source / "config.json").write_text(json.dumps(config, indent=7))
    convert(source, tmp_path / "there")
    convert(tmp_path / "there", tmp_path / "back", to="hf")
    assert (tmp_path / "back/config.json").read_bytes() == (source / "config.json").read_bytes()


def test_labels_keep_their_names(tmp_path: Path) -> None:
    names = {0: "bad", 1: "fair", 2: "good"}
    model: Any = reference(Case("BertForSequenceClassification", {"num_labels": 3}))
    model.config.id2label, model.config.label2id = names, {name: number for number, name in names.items()}
    convert(save(model, tmp_path / "source"), tmp_path / "there")
    resolved = load_preset(tmp_path / "there")
    objective: Any = resolved.preset.objective
    assert objective.kind == "classify" and objective.labels == ("bad", "fair", "good")
    save_model(load(tmp_path / "there"), tmp_path / "tuned", resolved.to_yaml())
    convert(tmp_path / "tuned", tmp_path / "back", to="hf")
    assert transformers.AutoConfig.from_pretrained(tmp_path / "back").id2label == names


def test_large_checkpoints_are_written_in_shards(tmp_path: Path) -> None:
    from xtcli.convert.files import Writer, open_source
    from xtcli.runs.tensors import load_weights

    made = {f"t{n}": torch.randn(n + 1, 5).to(torch.float16 if n % 2 else torch.float32) for n in range(7)}
    made |= {"none": torch.empty(0, 3), "one": torch.tensor(3.0)}
    with Writer(tmp_path, {name: (t.dtype, tuple(t.shape)) for name, t in made.items()}, limit=100) as writer:
        for name, tensor in reversed(made.items()):
            writer.put(name, tensor)
    found = open_source(tmp_path)
    assert found is not None and len(found.files) > 3
    assert same({name: found.read(name) for name in found.entries}, made)
    assert same(load_weights(tmp_path), made) and same(tensors(tmp_path), made)


def test_adapters_are_read_as_part_of_their_weights(tmp_path: Path) -> None:
    from xtcli.config.train import LoraConfig
    from xtcli.convert.adapters import merged
    from xtcli.convert.files import open_source

    config = LoraConfig(rank=2, alpha=4)
    made = {"q.weight": torch.randn(3, 5), "q.lora.up": torch.randn(3, 2), "q.lora.down": torch.randn(2, 5)}
    safetensors.torch.save_file(made | {"k.weight": torch.ones(2)}, tmp_path / "model.safetensors")
    source = open_source(tmp_path)
    assert source is not None
    found = merged(source, config)
    assert found.map().keys() == found.entries.keys() == {"q.weight", "k.weight"}
    wanted = made["q.weight"] + 2 * made["q.lora.up"] @ made["q.lora.down"]
    torch.testing.assert_close(found.map()["q.weight"], wanted)
    assert same(found.map(), {name: found.read(name) for name in found.entries})
