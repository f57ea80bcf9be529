"""Checkpoints through files: there and back with every bit, older files, what travels along, what is changed on demand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from checkpoints import opens_cleanly, rewrite, same, save, tensors
from references import Case, reference
from torch import Tensor

import xtcli
from xtcli.config.preset import load_preset
from xtcli.convert import convert
from xtcli.data.tokenizers import Bytes
from xtcli.data.train_tokenizer import train
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


def test_a_new_config_says_how_texts_begin_and_end(tmp_path: Path) -> None:
    for preset, wanted in (
        ("gpt2-nano", {"bos_token_id": None, "eos_token_id": 256}),
        ("t5-small", {"eos_token_id": 256, "decoder_start_token_id": 511, "pad_token_id": 511}),
    ):
        resolved = load_preset(preset, ["model.pad=511"] if preset == "t5-small" else [], tiny=True)
        tokenizer = train(Bytes.Config(), [])
        save_model(build(resolved), tmp_path / preset, resolved.to_yaml(), tokenizer)
        convert(tmp_path / preset, tmp_path / f"{preset} theirs", to="hf")
        values = json.loads((tmp_path / f"{preset} theirs/config.json").read_text())
        assert {key: values.get(key, "absent") for key in wanted} == wanted
