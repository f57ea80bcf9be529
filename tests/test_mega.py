"""Mega against the reference: every class, every option; chunks and documents against slow twins."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from checkpoints import opens_cleanly, same, save, tensors
from references import PAD, VOCAB, ids, mask, noise, randomise
from test_parity import converted, difference
from torch import Tensor

from xtcli.convert import convert
from xtcli.errors import UserError
from xtcli.model import construct
from xtcli.parts.dropouts import make_dropout
from xtcli.registry import find

SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "intermediate_size": 40,
    "ema_projection_size": 5,
    "shared_representation_size": 12,
    "nffn_hidden_size": 36,
    "max_positions": 48,
    "pad_token_id": PAD,
}
TOLERANCE = 5e-5
DECODES = {"is_decoder": True, "bidirectional": False, "use_cache": False}
CROSS = DECODES | {"add_cross_attention": True}
SIMPLE = {"relative_positional_bias": "simple"}
CHUNKED = {"use_chunking": True, "chunk_size": 8}


def reference(name: str, options: dict[str, Any]) -> Any:
    said = SIZES | json.loads(json.dumps(options))
    more = {key: said.pop(key) for key in ("add_pooling_layer",) if key in said}
    cls = getattr(transformers, name)
    model = randomise(cls(transformers.MegaConfig(**said), **more))
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm1d):
            module.running_mean, module.running_var = noise(24), 1.0 + noise(24) ** 2
            module.num_batches_tracked += 3
    return model


def labels(name: str, config: Any) -> dict[str, Tensor]:
    words = torch.randint(0, VOCAB, (4, 8), generator=torch.Generator().manual_seed(3)).masked_fill(
        torch.arange(8) % 4 == 1, -100
    )
    match name.removeprefix("Mega"):
        case "ForMaskedLM" | "ForCausalLM":
            return {"labels": words}
        case "ForTokenClassification":
            return {"labels": words.clamp(max=config.num_labels - 1)}
        case "ForMultipleChoice":
            return {"labels": torch.tensor([1, 0])}
        case "ForQuestionAnswering":
            return {"start_positions": torch.tensor([0, 3, 7, 9]), "end_positions": torch.tensor([2, 3, 30, 1])}
        case "ForSequenceClassification":
            if config.problem_type == "multi_label_classification":
                return {"labels": torch.rand(4, config.num_labels).round()}
            number = config.num_labels == 1
            return {"labels": torch.rand(4, 1) if number else torch.arange(4) % config.num_labels}
    return {}


def feeds(name: str, config: Any) -> dict[str, dict[str, Tensor]]:
    chunked = config.use_chunking
    lengths = (8, 48) if chunked and config.is_decoder else (1, 5, 8, 48) if chunked else (1, 17, 48)
    simple = config.relative_positional_bias == "simple"
    if not simple and not chunked and not config.add_token_type_embeddings:
        lengths = (*lengths, 61)
    lengths = (1, 8) if simple and config.chunk_size > 0 and not chunked else lengths
    found: dict[str, dict[str, Tensor]] = {f"length {n}": {"input_ids": ids(2, n)} for n in lengths}
    found["types"] = {"input_ids": ids(2, 8), "token_type_ids": torch.tensor([[0] * 4 + [1] * 4, [1] * 8])}
    found["embeds"] = {"inputs_embeds": noise(2, 8, 24)}
    found["loss"] = {"input_ids": ids(4, 8)} | labels(name, config)
    length = 16 if chunked else 8
    for side in ("right", "left"):
        if side == "left" and config.is_decoder and config.attention_activation == "softmax":
            continue  # A query with nothing but padding before it makes everything nan there.
        kept = mask(4, length, side)
        found[f"padded {side}"] = {"input_ids": ids(4, length).masked_fill(kept == 0, PAD), "attention_mask": kept}
    if config.add_cross_attention:
        for feed, given in found.items():
            rows = next(iter(given.values())).shape[0]
            given["encoder_hidden_states"] = noise(rows, 7, 24)
            if feed.startswith("padded"):
                given["encoder_attention_mask"] = mask(rows, 7, "right")
    if name == "MegaForMultipleChoice":
        for given in found.values():
            given |= {
                key: value.unflatten(0, (-1, 2))
                for key, value in given.items()
                if value.shape[0] > 1 and key != "labels"
            }
    return found


MLM = "MegaForMaskedLM"
CASES: list[tuple[str, dict[str, Any]]] = [
    ("MegaModel", {}),
    ("MegaModel", {"add_pooling_layer": False, "num_hidden_layers": 3}),
    ("MegaModel", DECODES | SIMPLE),
    ("MegaModel", {"bidirectional": False}),
    (MLM, {}),
    (MLM, SIMPLE),
    (MLM, {"tie_word_embeddings": False}),
    (MLM, {"add_lm_hidden_dense_layer": False}),
    (MLM, {"add_lm_hidden_dense_layer": False, "tie_word_embeddings": False}),
    (MLM, {"add_token_type_embeddings": True, "type_vocab_size": 3}),
    *((MLM, {"activation": name, "attention_activation": "laplace"}) for name in ("gelu", "relu", "tanh")),
    *((MLM, {"normalization_type": name}) for name in ("layernorm", "rmsnorm")),
    *(
        (MLM, {"normalization_type": name, "norm_affine": False, "normalize_before_ffn": False})
        for name in ("scalenorm", "rmsnorm")
    ),
    (MLM, {"normalize_before_mega": False, "normalization_type": "layernorm"}),
    (MLM, {"normalize_before_mega": False, "normalize_before_ffn": False}),
    (MLM, {"use_normalized_ffn": False}),
    (MLM, {"use_normalized_ffn": False, "normalize_before_mega": False}),
    (MLM, {"truncation": 4}),
    (MLM, {"truncation": 1, "ema_projection_size": 1}),
    (MLM, {"truncation": 30, "bidirectional": False}),
    *((MLM, {"attention_activation": name} | SIMPLE) for name in ("laplace", "relu2", "relu")),
    (MLM, CHUNKED),
    (MLM, CHUNKED | SIMPLE),
    (MLM, CHUNKED | SIMPLE | {"attention_activation": "laplace", "truncation": 5}),
    (MLM, {"chunk_size": 8}),
    (MLM, {"chunk_size": 8} | SIMPLE),
    (MLM, DECODES),
    ("MegaForCausalLM", {}),
    ("MegaForCausalLM", DECODES),
    ("MegaForCausalLM", DECODES | SIMPLE | {"tie_word_embeddings": False}),
    ("MegaForCausalLM", DECODES | {"add_lm_hidden_dense_layer": False, "truncation": 4}),
    ("MegaForCausalLM", DECODES | {"attention_activation": "laplace"}),
    ("MegaForCausalLM", DECODES | CHUNKED),
    ("MegaForCausalLM", DECODES | CHUNKED | SIMPLE | {"attention_activation": "relu2"}),
    *((MLM, {"normalization_type": "batchnorm", "norm_affine": affine}) for affine in (True, False)),
    ("MegaForCausalLM", CROSS | {"use_feature_dropout": True}),
    ("MegaForCausalLM", CROSS | SIMPLE | {"attention_activation": "laplace", "normalize_before_ffn": False}),
    ("MegaModel", CROSS | {"normalize_before_mega": False, "normalization_type": "batchnorm"}),
    ("MegaForSequenceClassification", {"num_labels": 3}),
    ("MegaForSequenceClassification", {"num_labels": 1} | CHUNKED),
    ("MegaForSequenceClassification", {"num_labels": 5, "problem_type": "multi_label_classification"}),
    ("MegaForMultipleChoice", {}),
    ("MegaForTokenClassification", {"num_labels": 4}),
    ("MegaForQuestionAnswering", {}),
]


@pytest.mark.parametrize(("name", "options"), CASES, ids=str)
def test_equals_the_reference(name: str, options: dict[str, Any]) -> None:
    theirs = reference(name, options)
    ours = converted(theirs, "mega")
    for feed, given in feeds(name, theirs.config).items():
        off = {key: value for key, value in difference(theirs, ours, given).items() if not value <= TOLERANCE}
        assert not off, (feed, off)


@pytest.mark.parametrize(("name", "options"), CASES, ids=str)
def test_files_come_back_byte_for_byte(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    theirs = reference(name, options)
    source = save(theirs, tmp_path / "source")
    convert(source, tmp_path / "ours", family="auto")
    convert(tmp_path / "ours", tmp_path / "back", to="hf")
    assert same(tensors(source), tensors(tmp_path / "back"))
    more = {key: value for key, value in options.items() if key == "add_pooling_layer"}
    back = opens_cleanly(tmp_path / "back", type(theirs), **more)
    given = {"input_ids": ids(2, 8)}
    if theirs.config.add_cross_attention:
        given["encoder_hidden_states"] = noise(2, 7, 24)
    if name != "MegaForMultipleChoice":
        torch.testing.assert_close(back(**given)[0], theirs(**given)[0], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"normalization_type": "syncbatchnorm"}, "normalization_type"),
        ({"normalization_type": "layernorm", "norm_affine": False}, "norm_affine"),
        ({"is_decoder": True}, "bidirectional"),
        ({"use_chunking": True}, "chunk_size"),
        (SIMPLE | {"chunk_size": 49}, "chunk_size"),
        ({"relative_positional_bias": "none"}, "relative_positional_bias"),
        ({"shared_representation_size": 11}, "width of 11"),
    ],
)
def test_what_is_not_expressed_is_refused(options: dict[str, Any], words: str, tmp_path: Path) -> None:
    source = save(reference("MegaModel", {}), tmp_path / "source")
    config = source / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | options))
    with pytest.raises(UserError, match=words):
        convert(source, tmp_path / "ours", family="auto")


def test_channels_are_dropped_whole() -> None:
    x = torch.ones(5, 30, 7)
    made = make_dropout(0.5, True)(x)
    assert torch.equal(made, made[:, :1].expand(-1, 30, -1)) and set(made.unique().tolist()) == {0.0, 2.0}
    assert torch.equal(make_dropout(0.5, True).eval()(x), x)


def small(causal: bool, **changes: Any) -> Any:
    """A small model with every parameter random."""
    mixer = {"kind": "ema-gated", "hidden": 40, "shared": 12, "states": 5} | changes
    graph = find("graph", "decoder" if causal else "encoder")
    tree = {
        "vocab": VOCAB,
        "dim": 24,
        "context": 48,
        "norm": "rms-scale",
        "embed": {"kind": "tokens"},
        "stack": {"layers": 2, "norm": "none", "block": {"sublayers": {"attn": mixer}}},
        "heads": {"lm" if causal else "mlm": {}},
    }
    model = construct(graph.Config.model_validate(tree)).to_empty(device="cpu")
    model.initialise(0)
    return randomise(model)


VARIANTS: list[dict[str, Any]] = [
    {},
    {"taps": 4},
    {"taps": 1},
    {"weights": "laplace"},
    {"weights": "relu2", "chunk": 6},
    {"chunk": 6},
    {"chunk": 6, "distance": "table", "taps": 7},
    {"chunk": 1},
    {"chunk": 40},
]


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
@pytest.mark.parametrize("steps", [(24,), (1,) * 24, (5, 1, 9, 6, 1, 2), (7, 17)])
def test_cached_steps_equal_one_pass(changes: dict[str, Any], steps: tuple[int, ...]) -> None:
    model, given = small(True, **changes).double(), ids(3, 24)
    with torch.no_grad():
        whole = model(input_ids=given).logits
        state = model.new_state(3, 30, dtype=torch.double)
        made, at = [], 0
        for count in steps:
            made.append(model(input_ids=given[:, at : at + count], state=state).logits)
            at += count
            if at < 24:
                state.select(torch.tensor([2, 0, 1]))
                given, whole = given[[2, 0, 1]], whole[[2, 0, 1]]
                made = [one[[2, 0, 1]] for one in made]
    torch.testing.assert_close(torch.cat(made, 1), whole, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_nothing_leaks_from_the_future(changes: dict[str, Any]) -> None:
    model, given = small(True, **changes).double(), ids(2, 24)
    other = given.clone()
    other[:, 13:] = (other[:, 13:] + 1) % VOCAB
    with torch.no_grad():
        one, two = model(input_ids=given).logits, model(input_ids=other).logits
    assert (one[:, :13] - two[:, :13]).abs().max() < 1e-12
    assert (one[:, 13:] - two[:, 13:]).abs().max() > 1e-3


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("changes", [{}, {"taps": 4}, {"weights": "laplace"}], ids=str)
def test_documents_in_one_row_are_alone(causal: bool, changes: dict[str, Any]) -> None:
    model, given = small(causal, **changes), ids(2, 48)
    cuts = (0, 3, 37, 48)
    sizes = [end - begin for begin, end in itertools.pairwise(cuts)]
    documents = torch.repeat_interleave(torch.arange(3), torch.tensor(sizes)).expand(2, -1)
    places = torch.cat([torch.arange(size) for size in sizes])[None]
    with torch.no_grad():
        packed_ = model(input_ids=given, document_ids=documents, position_ids=places).last_hidden_state
        for begin, end in itertools.pairwise(cuts):
            alone = model(input_ids=given[:, begin:end]).last_hidden_state
            torch.testing.assert_close(packed_[:, begin:end], alone, atol=2e-5, rtol=1e-5)


def test_a_broken_chunk_is_refused_with_its_length() -> None:
    model = small(False, chunk=6)
    with pytest.raises(UserError, match="13 tokens is no multiple of chunks of 6"):
        model(input_ids=ids(1, 13))


def test_a_table_refuses_texts_beyond_it() -> None:
    with pytest.raises(UserError, match="49 tokens"):
        small(False, distance="table")(input_ids=ids(1, 49))
