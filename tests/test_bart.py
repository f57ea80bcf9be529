"""BART against the reference: every class, every option; forced tokens; files there and back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from checkpoints import opens_cleanly, rewrite, same, save, tensors
from references import END, PAD, VOCAB, ids, mask, noise, randomise
from test_generate_reference import Silent, theirs
from test_parity import TOLERANCE, converted, difference
from torch import Tensor

from xtcli.config.preset import load_preset
from xtcli.convert import convert
from xtcli.convert.same import difference as difference_of_configs
from xtcli.errors import UserError
from xtcli.generate.beams import search
from xtcli.generate.decode import Row, Rules, Timing, decode
from xtcli.generate.feed import Feed
from xtcli.generate.sampling import Sampling
from xtcli.generate.stops import Text
from xtcli.model import build, load, save_model

SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "d_model": 24,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 40,
    "decoder_ffn_dim": 32,
    "max_position_embeddings": 48,
    "pad_token_id": PAD,
    "bos_token_id": 3,
    "eos_token_id": END,
    "decoder_start_token_id": END,
    "forced_eos_token_id": END,
}
GENERATION, MODEL, CAUSAL = "BartForConditionalGeneration", "BartModel", "BartForCausalLM"
SEQUENCE, ANSWERING = "BartForSequenceClassification", "BartForQuestionAnswering"
UNEVEN = {"encoder_layers": 3, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 3}


def reference(name: str, options: dict[str, Any], seed: int = 0) -> Any:
    cls = getattr(transformers, name)
    config = cls.config_class(**SIZES | json.loads(json.dumps(options)))
    config._attn_implementation = "eager"
    model = randomise(cls(config), seed)
    for buffer in (b for n, b in model.named_buffers() if n == "final_logits_bias"):
        buffer.normal_(generator=torch.Generator().manual_seed(seed))
    return model


CASES: list[tuple[str, dict[str, Any]]] = [
    (MODEL, {}),
    (MODEL, {"scale_embedding": True, **UNEVEN}),
    (GENERATION, {}),
    *((GENERATION, {"activation_function": name}) for name in ("relu", "gelu_new", "swish")),
    (GENERATION, {"scale_embedding": True}),
    (GENERATION, UNEVEN),
    (GENERATION, {"tie_word_embeddings": False}),
    (GENERATION, {"dropout": 0.2, "attention_dropout": 0.3, "activation_dropout": 0.4, "init_std": 0.1}),
    (GENERATION, {"decoder_start_token_id": 4, "is_decoder": True, "add_cross_attention": True}),
    (SEQUENCE, {}),
    (SEQUENCE, {"num_labels": 1, "classifier_dropout": 0.2}),
    (SEQUENCE, {"num_labels": 5, "problem_type": "multi_label_classification"}),
    (ANSWERING, {"num_labels": 5}),
    (CAUSAL, {}),
    (
        CAUSAL,
        {"scale_embedding": True, "tie_word_embeddings": False, "use_cache": False, **UNEVEN, "decoder_layers": 3},
    ),
]


def labels(model: Any) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    name, count = type(model).__name__, model.config.num_labels
    if name == ANSWERING:
        return {"start_positions": torch.tensor([0, 3, 8, 9]), "end_positions": torch.tensor([2, 3, 30, 1])}
    if name == SEQUENCE:
        if count == 1 or model.config.problem_type:
            return {"labels": torch.rand(4, count, generator=generator).round(decimals=0 if count > 1 else 3)}
        return {"labels": torch.randint(0, count, (4,), generator=generator)}
    words = torch.randint(0, VOCAB, (4, 9), generator=generator).masked_fill(torch.arange(9) % 4 == 1, -100)
    return {} if name == MODEL else {"labels": words}


def feeds(model: Any) -> dict[str, dict[str, Tensor]]:
    name = type(model).__name__
    found: dict[str, dict[str, Tensor]] = {}
    for length in (1, 17, 48):
        found[f"length {length}"] = {"input_ids": ids(2, length)}
    for side in ("right", "left"):
        kept = mask(3, 12, side)
        found[f"padded {side}"] = {"input_ids": ids(3, 12).masked_fill(kept == 0, PAD), "attention_mask": kept}
    found["loss"] = {"input_ids": ids(4, 9)} | labels(model)
    if name == SEQUENCE:
        for given in found.values():
            real = given["input_ids"] != PAD
            last = (torch.arange(real.shape[1]) * real).argmax(-1)
            given["input_ids"][torch.arange(len(real)), last] = END
    if name == CAUSAL:
        found["embeds"] = {"inputs_embeds": noise(2, 9, 24)}
        memory = {"encoder_hidden_states": noise(2, 7, 24), "encoder_attention_mask": mask(2, 7, "right")}
        return found | {"memory": found["length 17"] | memory}
    if name == SEQUENCE:
        return found
    for side in ("right", "left"):
        kept = mask(3, 8, side)
        given = {"decoder_input_ids": ids(3, 8, 5).masked_fill(kept == 0, PAD), "decoder_attention_mask": kept}
        found[f"decoded {side}"] = found[f"padded {side}"] | given
    vectors = {"decoder_inputs_embeds": noise(2, 6, 24)}
    found["embeds"] = vectors | {"inputs_embeds": noise(2, 9, 24)}
    return found | {"decoder embeds": vectors | {"input_ids": ids(2, 9)}}


@pytest.mark.parametrize(("name", "options"), CASES, ids=str)
def test_equals_the_reference(name: str, options: dict[str, Any]) -> None:
    model = reference(name, options)
    ours = converted(model, "bart")
    for feed, given in feeds(model).items():
        off = {name: value for name, value in difference(model, ours, given).items() if not value <= TOLERANCE}
        assert not off, (feed, off)


FILES = [(MODEL, {}), (GENERATION, {}), (GENERATION, {"num_labels": 2}), (SEQUENCE, {}), (ANSWERING, {}), (CAUSAL, {})]


@pytest.mark.parametrize(("name", "options"), FILES, ids=str)
def test_there_and_back(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    model = reference(name, options)
    source = save(model, tmp_path / "source")
    there = convert(source, tmp_path / "there", verify=True)
    assert (there.family, there.architecture, there.bit_exact) == ("bart", name, True)
    assert convert(tmp_path / "there", tmp_path / "back", to="hf").bit_exact
    for file in ("config.json", "model.safetensors"):
        assert (tmp_path / "back" / file).read_bytes() == (source / file).read_bytes()
    opens_cleanly(tmp_path / "back", type(model))


@pytest.mark.parametrize("last", ["2", "null"])
def test_a_preset_becomes_a_checkpoint_of_theirs(last: str, tmp_path: Path) -> None:
    resolved = load_preset("bart-base", [f"model.last={last}"], tiny=True)
    ours = build(resolved).eval()
    save_model(ours, tmp_path / "ours", resolved.to_yaml())
    assert convert(tmp_path / "ours", tmp_path / "theirs", to="hf").architecture == GENERATION
    opened = opens_cleanly(tmp_path / "theirs", transformers.BartForConditionalGeneration)
    with torch.no_grad():
        torch.testing.assert_close(ours(input_ids=ids(2, 9)).logits, opened(ids(2, 9)).logits, atol=2e-5, rtol=1e-5)
    convert(tmp_path / "theirs", tmp_path / "again")
    again: Any = load_preset(tmp_path / "again").preset
    before: Any = resolved.preset
    assert not difference_of_configs(again.model, before.model)
    for name in ("start", "first", "last", "copies", "pad"):
        assert getattr(again.model, name) == getattr(before.model, name)
    assert again.objective.kind == "denoising"


def test_files_without_the_bias_and_older_names(tmp_path: Path) -> None:
    """Absence of the bias is another form, versions of programs go, options of the first release are checked."""
    source = save(reference(GENERATION, {}), tmp_path / "source")

    def older(found: dict[str, Tensor]) -> dict[str, Tensor]:
        del found["final_logits_bias"]
        return found | {"model.encoder.version": torch.tensor([3.0]), "model.decoder.version": torch.tensor([3.0])}

    stated = json.loads((source / "config.json").read_text())
    early = {
        "normalize_embedding": True,
        "add_final_layer_norm": False,
        "extra_pos_embeddings": 2,
        "classif_dropout": 0.1,
    }
    (source / "config.json").write_text(json.dumps(stated | early))
    whole = tensors(source)
    report = convert(rewrite(source, older), tmp_path / "there")
    assert len(report.drops) == 2
    assert not list(load(tmp_path / "there").buffers())
    convert(tmp_path / "there", tmp_path / "back", to="hf")
    assert same(tensors(tmp_path / "back"), {n: t for n, t in whole.items() if n != "final_logits_bias"})
    opens_cleanly(tmp_path / "back", transformers.BartForConditionalGeneration)


@pytest.mark.parametrize(
    ("option", "value"),
    [("tie_encoder_decoder", True), ("normalize_before", True), ("static_position_embeddings", True)],
)
def test_options_that_we_do_not_express_are_refused_by_name(option: str, value: Any, tmp_path: Path) -> None:
    source = save(reference(GENERATION, {}), tmp_path / "source")
    stated = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(stated | {option: value}))
    with pytest.raises(UserError, match=f"{option}.*does not express"):
        convert(source, tmp_path / "there")


def test_layers_drop_in_training_alone(tmp_path: Path) -> None:
    rates = {"encoder_layerdrop": 0.6, "decoder_layerdrop": 0.5, "encoder_layers": 40, "dropout": 0.0}
    model = reference(GENERATION, rates)
    convert(save(model, tmp_path / "source"), tmp_path / "there")
    ours: Any = load(tmp_path / "there")
    given = {"input_ids": ids(2, 9), "decoder_input_ids": ids(2, 8, 5)}
    assert max(difference(model, ours.eval(), given).values()) <= TOLERANCE
    assert (ours.encoder.stack.layer_drop, ours.decoder.stack.layer_drop) == (0.6, 0.5)
    ran: list[int] = []
    for number, block in enumerate(ours.encoder.stack.blocks):
        block.register_forward_hook(lambda *_, number=number: ran.append(number))
    ours.train()
    torch.manual_seed(0)
    out = ours(**given, output_hidden_states=True)
    assert 8 <= len(ran) <= 24 and len(out.encoder_hidden_states) == 41
    save_model(ours, tmp_path / "ours", (tmp_path / "there/preset.yaml").read_text())
    convert(tmp_path / "ours", tmp_path / "back", "bart", to="hf")
    stated = json.loads((tmp_path / "back/config.json").read_text())
    assert (stated["encoder_layerdrop"], stated["decoder_layerdrop"]) == (0.6, 0.5)


def test_generation_settings_come_along(tmp_path: Path) -> None:
    model = reference(GENERATION, {})
    model.generation_config.forced_bos_token_id = 7
    convert(save(model, tmp_path / "source"), tmp_path / "there")
    config: Any = load_preset(tmp_path / "there").preset.model
    assert (config.start, config.first, config.last) == (END, 7, END)


PROMPTS = [[5, 6, 7], [9], [20, 21, 22, 23, 24, 25, 26], [3, 3, 8]]


@pytest.mark.parametrize("room", [1, 2, 5, 20])
@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize(("first", "last"), [(None, END), (7, None), (7, END)])
def test_texts_are_the_reference_s(first: int | None, last: int | None, beams: int, room: int) -> None:
    reference_model = reference(GENERATION, {})
    settings: dict[str, Any] = {"max_new_tokens": room, "num_beams": beams}
    settings |= {"forced_bos_token_id": first, "forced_eos_token_id": last, "do_sample": False, "eos_token_id": END}
    wanted = theirs(reference_model, PROMPTS, **settings)
    model = converted(reference_model, "bart")
    rules = Rules(Sampling(temperature=0), frozenset([END]), VOCAB, first=first, last=last)
    feed = Feed(model, [[END]] * len(PROMPTS), room, PROMPTS)
    with torch.no_grad():
        if beams == 1:
            rows = [Row(n, Text(Silent()), room, False) for n in range(len(PROMPTS))]
            list(decode(feed, rows, 1, rules, Timing()))
            found = [row.tokens for row in rows]
        else:
            texts = search(feed, [(room, False)] * len(PROMPTS), beams, 1.0, rules, Timing())
            found = [list(prompt[0].tokens) for prompt in texts]
    assert found == wanted
