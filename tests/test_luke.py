"""LUKE against the reference: every class, every option, with and without entities; files there and back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from checkpoints import opens_cleanly, same, save, tensors
from references import VOCAB, ids, mask, noise, randomise
from test_parity import converted, difference
from torch import Tensor

from xtcli.convert import convert
from xtcli.errors import UserError

PAD, ENTITIES = 1, 23
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "entity_vocab_size": ENTITIES,
    "hidden_size": 24,
    "entity_emb_size": 10,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 50,
    "pad_token_id": PAD,
}
TOLERANCE = 2e-5


def reference(name: str, options: dict[str, Any]) -> Any:
    said = SIZES | json.loads(json.dumps(options))
    more = {key: said.pop(key) for key in ("add_pooling_layer",) if key in said}
    cls = getattr(transformers, name)
    return randomise(cls(cls.config_class(**said), **more))


def whole(high: int, *shape: int, seed: int = 4) -> Tensor:
    return torch.randint(0, high, shape, generator=torch.Generator().manual_seed(seed))


def mentions(rows: int, count: int, width: int, length: int) -> dict[str, Tensor]:
    """Entities at some places; the last mention of each row is empty, others are shorter than `width`."""
    places = whole(length, rows, count, width)
    places[:, ::2, width - 1 :] = -1
    if count > 1:
        places[:, -1] = -1
    return {"entity_ids": whole(ENTITIES, rows, count), "entity_position_ids": places}


def labels(name: str, config: Any, entities: int) -> dict[str, Tensor]:
    """For four texts of nine tokens."""
    words = whole(VOCAB, 4, 9).masked_fill(torch.arange(9) % 4 == 1, -100)
    match name.removeprefix("Luke"):
        case "ForMaskedLM":
            hidden = whole(ENTITIES, 4, entities).masked_fill(torch.arange(entities) % 3 == 1, -100)
            return {"labels": words} | ({"entity_labels": hidden} if entities else {})
        case "ForEntityClassification" | "ForEntityPairClassification":
            return {"labels": whole(config.num_labels, 4)}
        case "ForEntitySpanClassification":
            return {"labels": whole(config.num_labels, 4, entities)}
        case "ForTokenClassification":
            return {"labels": words.clamp(max=config.num_labels - 1)}
        case "ForMultipleChoice":
            return {"labels": torch.tensor([1, 0])}
        case "ForQuestionAnswering":
            return {"start_positions": torch.tensor([0, 3, 8, 9]), "end_positions": torch.tensor([2, 3, 30, 1])}
        case "ForSequenceClassification":
            if config.problem_type == "multi_label_classification":
                return {"labels": whole(2, 4, config.num_labels).float()}
            number = config.num_labels == 1 or config.problem_type == "regression"
            shape = (4, config.num_labels)
            return {"labels": noise(*shape) if number else whole(config.num_labels, 4)}
    return {}


def feeds(name: str, config: Any) -> dict[str, dict[str, Tensor]]:
    reads = "Entity" in name
    found: dict[str, dict[str, Tensor]] = {}
    for length, count in ((1, 2), (17, 5), (48, 2)):
        found[f"length {length}"] = {"input_ids": ids(2, length)} | mentions(2, count, 3, length)
    found["types"] = {
        "input_ids": ids(2, 9),
        "token_type_ids": torch.tensor([[0] * 4 + [1] * 5, [1] * 9]),
        "entity_token_type_ids": whole(2, 2, 4),
    } | mentions(2, 4, 2, 9)
    found["places"] = {"input_ids": ids(2, 9), "position_ids": torch.arange(9)[None].expand(2, -1) + 5}
    found["places"] |= mentions(2, 3, 1, 50)
    found["embeds"] = {"inputs_embeds": noise(2, 9, 24)} | mentions(2, 3, 4, 9)
    found["loss"] = {"input_ids": ids(4, 9)} | mentions(4, 3, 4, 9) | labels(name, config, 3)
    for side in ("right", "left"):
        kept = mask(4, 12, side)
        found[f"padded {side}"] = {"input_ids": ids(4, 12).masked_fill(kept == 0, PAD), "attention_mask": kept}
        found[f"padded {side}"] |= mentions(4, 5, 3, 12)
        found[f"both padded {side}"] = found[f"padded {side}"] | {"entity_attention_mask": mask(4, 5, side)}
    found["padded entities"] = {"input_ids": ids(4, 9), "entity_attention_mask": mask(4, 5, "right")}
    found["padded entities"] |= mentions(4, 5, 3, 9)
    for given in found.values():
        if name.endswith("SpanClassification"):
            shape = given["entity_ids"].shape
            length = given.get("input_ids", given.get("inputs_embeds")).shape[1]  # type: ignore[union-attr]
            given["entity_start_positions"] = whole(length, *shape, seed=5)
            given["entity_end_positions"] = whole(length, *shape, seed=6)
    if name.endswith(("EntityClassification", "PairClassification")):
        shape = (4, config.num_labels)
        found["several labels"] = found["loss"] | {"labels": whole(2, *shape)}
    if name.endswith("SpanClassification"):
        found["several labels"] = found["loss"] | {"labels": whole(2, 4, 3, config.num_labels)}
    if not reads:
        kept = mask(4, 12, "right")
        found["no entities"] = {"input_ids": ids(2, 17)}
        found["none, padded"] = {"input_ids": ids(4, 12).masked_fill(kept == 0, PAD), "attention_mask": kept}
        found["none, loss"] = {"input_ids": ids(4, 9)} | labels(name, config, 0)
    if name.endswith("MultipleChoice"):
        found = {
            feed: {key: value if key == "labels" else value.unflatten(0, (-1, 2)) for key, value in given.items()}
            for feed, given in found.items()
        }
    return found


def compare(name: str, theirs: Any, ours: Any) -> float:
    """The largest difference over all feeds; outputs at padded entities mean nothing."""
    worst = 0.0
    for feed, given in feeds(name, theirs.config).items():
        given = {key: value.clone() for key, value in given.items()}
        off = difference(theirs, ours, given)
        assert all(value <= TOLERANCE for value in off.values()), (feed, off)
        worst = max(worst, *off.values())
    return worst


ACTIVATIONS = ("gelu_new", "relu", "silu", "tanh")
CASES: list[tuple[str, dict[str, Any]]] = [
    ("LukeModel", {}),
    ("LukeModel", {"add_pooling_layer": False}),
    ("LukeModel", {"use_entity_aware_attention": False}),
    ("LukeModel", {"entity_emb_size": 24, "num_attention_heads": 3}),
    ("LukeModel", {"entity_emb_size": 40, "num_hidden_layers": 1}),
    ("LukeForMaskedLM", {}),
    ("LukeForMaskedLM", {"use_entity_aware_attention": False}),
    ("LukeForMaskedLM", {"tie_word_embeddings": False}),
    ("LukeForMaskedLM", {"entity_emb_size": 24, "type_vocab_size": 3, "chunk_size_feed_forward": 1}),
    ("LukeForMaskedLM", {"layer_norm_eps": 0.01, "num_hidden_layers": 3, "initializer_range": 0.1}),
    *(("LukeForMaskedLM", {"hidden_act": name}) for name in ACTIVATIONS),
    ("LukeForEntityClassification", {}),
    ("LukeForEntityClassification", {"num_labels": 5, "use_entity_aware_attention": False}),
    ("LukeForEntityPairClassification", {"num_labels": 4}),
    ("LukeForEntityPairClassification", {"hidden_dropout_prob": 0.2, "attention_probs_dropout_prob": 0.3}),
    ("LukeForEntitySpanClassification", {}),
    ("LukeForEntitySpanClassification", {"num_labels": 5, "entity_emb_size": 24}),
    ("LukeForSequenceClassification", {"num_labels": 3, "classifier_dropout": 0.3}),
    ("LukeForSequenceClassification", {"num_labels": 1}),
    ("LukeForSequenceClassification", {"num_labels": 3, "problem_type": "regression"}),
    ("LukeForSequenceClassification", {"num_labels": 5, "problem_type": "multi_label_classification"}),
    ("LukeForTokenClassification", {"num_labels": 4}),
    ("LukeForQuestionAnswering", {}),
    ("LukeForMultipleChoice", {}),
    ("LukeForMultipleChoice", {"use_entity_aware_attention": False, "classifier_dropout": 0.0}),
]


@pytest.mark.parametrize(("name", "options"), CASES, ids=str)
def test_equals_the_reference(name: str, options: dict[str, Any]) -> None:
    theirs = reference(name, options)
    compare(name, theirs, converted(theirs, "luke"))


@pytest.mark.parametrize(("name", "options"), CASES, ids=str)
def test_files_come_back_byte_for_byte(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    theirs = reference(name, options)
    source = save(theirs, tmp_path / "source")
    convert(source, tmp_path / "ours", family="auto")
    convert(tmp_path / "ours", tmp_path / "back", to="hf")
    assert same(tensors(source), tensors(tmp_path / "back"))
    more = {key: value for key, value in options.items() if key == "add_pooling_layer"}
    opens_cleanly(tmp_path / "back", type(theirs), **more)
