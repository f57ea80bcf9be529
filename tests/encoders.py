"""Encoders of the reference with a token table narrower than their states: what they are fed, and their labels."""

from __future__ import annotations

import json
from typing import Any

import torch
import transformers
from references import PAD, VOCAB, ids, mask, noise, randomise
from torch import Tensor

SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "embedding_size": 12,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 48,
    "pad_token_id": PAD,
}


def reference(name: str, options: dict[str, Any], seed: int = 0) -> Any:
    """A class of the reference, every parameter random; `add_pooling_layer` is no option of its config."""
    said = SIZES | json.loads(json.dumps(options))
    more = {key: said.pop(key) for key in ("add_pooling_layer",) if key in said}
    cls = getattr(transformers, name)
    config = cls.config_class(**said)
    config._attn_implementation = "eager"
    return randomise(cls(config, **more), seed)


def labels(model: Any) -> dict[str, Tensor]:
    """What the loss is measured against, for four texts of nine tokens."""
    generator = torch.Generator().manual_seed(3)
    name, config = type(model).__name__, model.config
    words = torch.randint(0, VOCAB, (4, 9), generator=generator).masked_fill(torch.arange(9) % 4 == 1, -100)
    order = torch.tensor([0, 1, 1, 0])
    if name.endswith("QuestionAnswering"):
        return {"start_positions": torch.tensor([0, 3, 8, 9]), "end_positions": torch.tensor([2, 3, 8, 1])}
    if name.endswith("MultipleChoice"):
        return {"labels": torch.tensor([1, 0])}
    if name == "AlbertForPreTraining":
        return {"labels": words, "sentence_order_label": order} if config.num_labels == 2 else {}
    if name == "ElectraForPreTraining":
        return {"labels": words.clamp(min=0) % 2}
    if name.endswith("TokenClassification"):
        return {"labels": words.clamp(max=config.num_labels - 1)}
    if name.endswith("SequenceClassification"):
        many = config.problem_type == "multi_label_classification"
        if config.num_labels == 1 or many or config.problem_type == "regression":
            return {"labels": torch.rand(4, config.num_labels, generator=generator).round(decimals=0 if many else 3)}
        return {"labels": torch.randint(0, config.num_labels, (4,), generator=generator)}
    return {"labels": words} if name.endswith("LM") else {}


def feeds(model: Any, lengths: tuple[int, ...] = (1, 17, 48)) -> dict[str, dict[str, Tensor]]:
    """The inputs to compare on, by name."""
    name, width = type(model).__name__, model.config.embedding_size
    found: dict[str, dict[str, Tensor]] = {}
    for length in lengths:
        found[f"length {length}"] = {"input_ids": ids(2, length)}
    # A pooler would read a place that sees nothing in a decoder padded on the left, but none of these has one.
    for side in ("right", "left"):
        kept = mask(4, 12, side)
        found[f"padded {side}"] = {"input_ids": ids(4, 12).masked_fill(kept == 0, PAD), "attention_mask": kept}
    found["embeds"] = {"inputs_embeds": noise(2, 9, width)}
    found["places"] = {"input_ids": ids(2, 9), "position_ids": torch.stack((torch.arange(9), torch.arange(9) + 5))}
    found["types"] = {"input_ids": ids(2, 9), "token_type_ids": torch.tensor([[0] * 4 + [1] * 5, [1] * 9])}
    found["loss"] = {"input_ids": ids(4, 9)} | labels(model)
    if name.endswith(("ForPreTraining", "LM", "TokenClassification")) and "labels" in found["loss"]:
        kept = mask(4, 9, "right")
        hidden = -100 if name.endswith("LM") else 0
        targets = {
            k: v.masked_fill(kept == 0, hidden) if v.shape == kept.shape else v for k, v in labels(model).items()
        }
        if name.endswith(("LM", "ElectraForPreTraining")):
            found["padded loss"] = {
                "input_ids": ids(4, 9).masked_fill(kept == 0, PAD),
                "attention_mask": kept,
            } | targets
    if getattr(model.config, "add_cross_attention", False):
        for given in list(found.values()):
            rows = next(iter(given.values())).shape[0]
            given |= {"encoder_hidden_states": noise(rows, 7, 24), "encoder_attention_mask": mask(rows, 7, "right")}
        found["alone"] = {"input_ids": ids(2, 9)}
    if name.endswith("MultipleChoice"):
        found = {feed: grouped(given) for feed, given in found.items()}
    return found


def grouped(given: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rows in pairs to choose from."""
    return {name: value if name == "labels" else value.unflatten(0, (-1, 2)) for name, value in given.items()}
