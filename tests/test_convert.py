"""Checkpoints through files: there and back with every bit, older files, what travels along, what is changed on demand."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import transformers
from references import PAD, Case, describe, ids, reference
from torch import Tensor

import xtcli
from xtcli.config.preset import load_preset
from xtcli.convert import convert
from xtcli.model import build, load, save_model

RELATIVE = {"position_embedding_type": "relative_key"}
FORMS = [
    Case("GPT2Model"),
    Case("GPT2LMHeadModel", {"add_cross_attention": True}),
    Case("GPT2LMHeadModel", {"tie_word_embeddings": False}),
    Case("GPT2DoubleHeadsModel"),
    Case("GPT2DoubleHeadsModel", {"summary_use_proj": False}),
    Case("GPT2ForSequenceClassification", {"num_labels": 5}),
    Case("GPT2ForTokenClassification"),
    Case("GPT2ForQuestionAnswering"),
    Case("LlamaModel"),
    Case("LlamaForCausalLM", {"num_key_value_heads": 2, "attention_bias": True, "mlp_bias": True}),
    Case("LlamaForCausalLM", {"tie_word_embeddings": True, "rope_scaling": {"rope_type": "linear", "factor": 2.0}}),
    Case("LlamaForSequenceClassification"),
    Case("LlamaForTokenClassification"),
    Case("LlamaForQuestionAnswering"),
    Case("BertModel"),
    Case("BertModel", {"add_pooling_layer": False}),
    Case("BertForPreTraining"),
    Case("BertForMaskedLM", RELATIVE),
    Case("BertForMaskedLM", {"tie_word_embeddings": False}),
    Case("BertLMHeadModel", {"is_decoder": True, "add_cross_attention": True}),
    Case("BertForNextSentencePrediction"),
    Case("BertForSequenceClassification"),
    Case("BertForMultipleChoice"),
    Case("BertForTokenClassification"),
    Case("BertForQuestionAnswering"),
    Case("T5Model"),
    Case("T5ForConditionalGeneration", {"num_decoder_layers": 1}),
    Case("T5ForConditionalGeneration", {"tie_word_embeddings": False, "feed_forward_proj": "gated-gelu"}),
    Case("T5EncoderModel"),
    Case("T5ForSequenceClassification"),
    Case("T5ForTokenClassification"),
    Case("T5ForQuestionAnswering"),
]


def save(model: Any, folder: Path, **settings: Any) -> Path:
    model.save_pretrained(folder, **settings)
    return folder


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> Path:
    """The same checkpoint with other tensors in its file."""
    file = folder / "model.safetensors"
    tensors = change(safetensors.torch.load_file(file))
    safetensors.torch.save_file(tensors, file, {"format": "pt"})
    return folder


def opens_cleanly(folder: Path, cls: Any, **settings: Any) -> Any:
    model, info = cls.from_pretrained(folder, output_loading_info=True, **settings)
    assert not any(info.values()), info
    return model.eval()


def tensors(folder: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for file in sorted(folder.glob("model*.safetensors")):
        found |= safetensors.torch.load_file(file)
    return found


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        a.dtype == other[name].dtype and torch.equal(a, other[name]) for name, a in one.items()
    )


@pytest.mark.parametrize("case", FORMS, ids=lambda case: case.id)
def test_there_and_back(case: Case, tmp_path: Path) -> None:
    model = reference(case)
    source = save(model, tmp_path / "source")
    there = convert(source, tmp_path / "there")
    assert there.bit_exact and there.architecture == case.name and there.family == case.family
    back = convert(tmp_path / "there", tmp_path / "back", to="hf")
    assert back.bit_exact and back.architecture == case.name
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "back" / name).read_bytes() == (source / name).read_bytes()
    opens_cleanly(tmp_path / "back", type(model), **{k: v for k, v in case.options.items() if k == "add_pooling_layer"})
    resolved = load_preset(tmp_path / "there")
    assert resolved.preset.tokenizer.kind == "file"
    ours = load(tmp_path / "there")
    assert sum(p.numel() for p in ours.parameters()) + sum(
        tensor.numel() for name, tensor in tensors(source).items() if name in there.kept
    ) == sum(p.numel() for p in model.parameters())
    assert json.loads((tmp_path / "there/convert.json").read_text())["bit_exact"] is True


@pytest.mark.parametrize("family", ["gpt2", "llama", "bert", "t5"])
def test_shards_are_one_file(family: str, tmp_path: Path) -> None:
    case = next(
        case for case in FORMS if case.family == family and case.name.endswith(("LMHeadModel", "LM", "Generation"))
    )
    model = reference(case)
    convert(save(model, tmp_path / "one"), tmp_path / "from one")
    shards = save(model, tmp_path / "many", max_shard_size="20KB")
    assert len(list(shards.glob("*.safetensors"))) > 2
    convert(shards, tmp_path / "from many")
    assert same(tensors(tmp_path / "from one"), tensors(tmp_path / "from many"))


def test_names_of_code_llama_mean_llama(tmp_path: Path) -> None:
    source = save(reference(Case("LlamaForCausalLM")), tmp_path / "source")
    assert convert(source, tmp_path / "there", "code_llama").family == "llama"


def test_released_gpt2_has_no_prefix_and_holds_the_masks(tmp_path: Path) -> None:
    model = reference(Case("GPT2LMHeadModel"))
    whole = tensors(save(model, tmp_path / "source"))

    def release(found: dict[str, Tensor]) -> dict[str, Tensor]:
        found = {name.removeprefix("transformer."): tensor for name, tensor in found.items()}
        for layer in range(2):
            found[f"h.{layer}.attn.bias"] = torch.ones(48, 48).tril()[None, None]
            found[f"h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
        return found

    report = convert(rewrite(tmp_path / "source", release), tmp_path / "there", verify=True)
    assert len(report.drops) == 4 and len(report.renamed) == len(whole) + 4
    convert(tmp_path / "there", tmp_path / "back", to="hf")
    assert same(tensors(tmp_path / "back"), whole)


def test_a_bare_model_may_be_saved_with_a_prefix(tmp_path: Path) -> None:
    source = save(reference(Case("BertModel")), tmp_path / "source")
    whole = tensors(source)
    rewrite(source, lambda found: {f"bert.{name}": tensor for name, tensor in found.items()})
    convert(source, tmp_path / "there")
    convert(tmp_path / "there", tmp_path / "back", to="hf")
    assert same(tensors(tmp_path / "back"), whole)


def test_older_bert_names(tmp_path: Path) -> None:
    source = save(reference(Case("BertForPreTraining")), tmp_path / "source")
    whole = tensors(source)

    def older(found: dict[str, Tensor]) -> dict[str, Tensor]:
        endings = (("LayerNorm.weight", "LayerNorm.gamma"), ("LayerNorm.bias", "LayerNorm.beta"))
        renamed = {}
        for name, tensor in found.items():
            for new, old in endings:
                name = name.removesuffix(new) + old if name.endswith(new) else name
            renamed[name] = tensor
        return renamed | {"bert.embeddings.position_ids": torch.arange(48)[None]}

    report = convert(rewrite(source, older), tmp_path / "there")
    assert report.drops == ["bert.embeddings.position_ids"] and len(report.renamed) == 12
    convert(tmp_path / "there", tmp_path / "back", to="hf")
    assert same(tensors(tmp_path / "back"), whole)


def test_what_a_form_does_not_read_is_kept_and_given_back(tmp_path: Path) -> None:
    whole = tensors(save(reference(Case("BertForPreTraining")), tmp_path / "pretraining"))
    config = json.loads((tmp_path / "pretraining/config.json").read_text()) | {"architectures": ["BertForMaskedLM"]}
    (tmp_path / "pretraining/config.json").write_text(json.dumps(config))
    report = convert(tmp_path / "pretraining", tmp_path / "there")
    assert report.architecture == "BertForMaskedLM" and len(report.kept) == 4
    assert list(load(tmp_path / "there").heads) == ["mlm"]
    convert(tmp_path / "there", tmp_path / "back", to="hf")
    assert same(tensors(tmp_path / "back"), whole)


def test_llama_frequencies_and_t5_legacy_bias(tmp_path: Path) -> None:
    source = save(reference(Case("LlamaForCausalLM")), tmp_path / "llama")
    frequencies = 1.0 / 10000 ** (torch.arange(0, 6, 2) / 6)
    rewrite(source, lambda found: found | {"model.layers.0.self_attn.rotary_emb.inv_freq": frequencies})
    assert len(convert(source, tmp_path / "a").drops) == 1
    rewrite(source, lambda found: found | {"model.layers.0.self_attn.rotary_emb.inv_freq": frequencies * 1.01})
    with pytest.raises(xtcli.errors.UserError, match="is not the rotary frequencies"):
        convert(source, tmp_path / "b")
    source = save(reference(Case("T5ForConditionalGeneration")), tmp_path / "t5")
    legacy = {"decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight": torch.ones(32, 4)}
    rewrite(source, lambda found: found | legacy)
    assert convert(source, tmp_path / "c").kept == list(legacy)


@pytest.mark.parametrize("names", ["both", "only the alias"])
def test_a_tie_may_be_stored_under_either_name(names: str, tmp_path: Path) -> None:
    source = save(reference(Case("GPT2LMHeadModel")), tmp_path / "source")
    whole = tensors(source)

    def store(found: dict[str, Tensor]) -> dict[str, Tensor]:
        table = found["transformer.wte.weight"] if names == "both" else found.pop("transformer.wte.weight")
        return found | {"lm_head.weight": table.clone()}

    report = convert(rewrite(source, store), tmp_path / "there")
    assert report.ties == ["lm_head.weight = transformer.wte.weight"]
    assert len(tensors(tmp_path / "there")) == len(load(tmp_path / "there").state_dict())
    convert(tmp_path / "there", tmp_path / "back", to="hf")
    assert same(tensors(tmp_path / "back"), whole)


@pytest.mark.parametrize("case", [Case("GPT2LMHeadModel"), Case("BertForMaskedLM"), Case("T5ForConditionalGeneration")])
def test_the_head_is_told_by_the_names_where_config_does_not(case: Case, tmp_path: Path) -> None:
    source = save(reference(case), tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    del config["architectures"]
    (source / "config.json").write_text(json.dumps(config))
    assert convert(source, tmp_path / "there").architecture == case.name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_type_stays(dtype: torch.dtype, tmp_path: Path) -> None:
    source = save(reference(Case("LlamaForCausalLM")).to(dtype), tmp_path / "source")
    report = convert(source, tmp_path / "there")
    assert (
        report.bit_exact and not report.retyped and {t.dtype for t in tensors(tmp_path / "there").values()} == {dtype}
    )
    convert(tmp_path / "there", tmp_path / "back", to="hf")
    assert same(tensors(tmp_path / "back"), tensors(source))


def test_t5_in_half_precision_may_keep_its_outputs_wide(tmp_path: Path) -> None:
    model = reference(Case("T5ForConditionalGeneration")).half()
    for name, parameter in model.named_parameters():
        if name.endswith("wo.weight"):
            parameter.data = parameter.data.float()
    source = save(model, tmp_path / "source")
    assert convert(source, tmp_path / "there").dtypes == {"float16": 43, "float32": 4}
    convert(tmp_path / "there", tmp_path / "back", to="hf")
    assert same(tensors(tmp_path / "back"), tensors(source))


def test_the_type_changes_on_demand_and_the_cost_is_told(tmp_path: Path) -> None:
    source = save(reference(Case("BertForMaskedLM", RELATIVE)), tmp_path / "source")
    report = convert(source, tmp_path / "there", dtype="bf16")
    assert report.bit_exact is False and report.retyped == {"float32 -> bfloat16": 44}
    worst = max(float((t - t.bfloat16()).abs().max()) for t in tensors(source).values())
    assert report.rounding is not None and report.rounding["error"] == pytest.approx(worst)
    assert {tensor.dtype for tensor in load(tmp_path / "there").state_dict().values()} == {torch.bfloat16}
    convert(tmp_path / "there", tmp_path / "back", to="hf")
    opens_cleanly(tmp_path / "back", transformers.BertForMaskedLM)
    assert json.loads((tmp_path / "back/config.json").read_text())["dtype"] == "bfloat16"
    wide = convert(tmp_path / "back", tmp_path / "wide", dtype="float32")
    assert wide.rounding is not None and wide.rounding["error"] == 0.0


def test_tokenizer_and_generation_settings_travel(tmp_path: Path) -> None:
    source = save(reference(Case("GPT2LMHeadModel")), tmp_path / "source")
    texts = {
        "tokenizer.json": '{"version": "1.0"}',
        "tokenizer_config.json": '{"chat_template": "{{ messages }}"}',
        "special_tokens_map.json": "{}",
        "vocab.json": "{}",
        "merges.txt": "#version: 0.2\n",
    }
    for name, text in texts.items():
        (source / name).write_text(text)
    texts["generation_config.json"] = (source / "generation_config.json").read_text()
    convert(source, tmp_path / "there")
    report = convert(tmp_path / "there", tmp_path / "back", to="hf")
    assert sorted(report.companions) == sorted(texts)
    for name, text in texts.items():
        assert (tmp_path / "there" / name).read_text() == (tmp_path / "back" / name).read_text() == text


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
    assert config["pad_token_id"] == PAD


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
