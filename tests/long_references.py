"""Tiny random models of the reference for texts longer than what one token sees, and what to feed them."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from references import describe, mask, noise, randomise
from torch import Tensor, nn

from xtcli.convert.engine import state_of
from xtcli.convert.families import by_name
from xtcli.convert.reading import read
from xtcli.model import Model, construct

logging.getLogger("transformers").setLevel(logging.CRITICAL)
VOCAB, PAD, END, SEP = 61, 1, 59, 3

ENCODER = {
    "vocab_size": VOCAB,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 120,
    "pad_token_id": PAD,
    "sep_token_id": SEP,
}
T5 = {"vocab_size": VOCAB, "d_model": 24, "d_kv": 8, "d_ff": 40, "num_layers": 2, "num_heads": 4}
SIZES: dict[str, dict[str, Any]] = {
    "roberta": ENCODER,
    "longformer": ENCODER | {"attention_window": 8},
    "bigbird": ENCODER | {"block_size": 4, "num_random_blocks": 2},
    "longt5": T5
    | {"local_radius": 3, "global_block_size": 4}
    | {"pad_token_id": PAD, "eos_token_id": END, "decoder_start_token_id": 2},
}


@dataclass(frozen=True)
class Case:
    """One class of the reference with some options; `more` are further inputs, `lengths` those of the texts."""

    name: str
    options: dict[str, Any] = field(default_factory=dict)
    lengths: tuple[int, ...] = (1, 17, 61)
    pooling: bool | None = None

    @property
    def family(self) -> str:
        """The family's sizes."""
        return next(name for name in SIZES if self.name.lower().startswith(name))

    @property
    def id(self) -> str:
        """How the case is called in a test's name."""
        return f"{self.name}{json.dumps(self.options)}{'' if self.pooling is None else self.pooling}"


def reference(case: Case, seed: int = 0) -> Any:
    """The case's model, in eval mode, every parameter random; one that shortened texts have not changed."""
    options = SIZES[case.family] | json.loads(json.dumps(case.options))
    architecture = getattr(transformers, case.name)
    config = architecture.config_class(**options)
    config._attn_implementation = "eager"
    pooling = {} if case.pooling is None else {"add_pooling_layer": case.pooling}
    return randomise(architecture(config, **pooling), seed)


def converted(theirs: Any) -> Model:
    """The reference's weights in our model, the family told by config.json."""
    state = theirs.state_dict()
    values = describe(theirs)
    plan, claims = read(by_name()[values["model_type"]], values, list(state), "memory")
    model = construct(plan.config)
    ours = state_of(plan, lambda name: state[claims.source[name]], model.state_dict())
    model.load_state_dict(ours, assign=True)
    return model.eval()


def ids(batch: int, length: int, seed: int = 1) -> Tensor:
    """Random ids, none of which is special."""
    return torch.randint(4, END, (batch, length), generator=torch.Generator().manual_seed(seed))


def separated(given: dict[str, Tensor], separator: int) -> dict[str, Tensor]:
    """The same with three separators in every text: after a quarter of the real tokens, next to it, and at the end."""
    rows = given["input_ids"]
    kept = given.get("attention_mask", torch.ones_like(rows))
    for row, real in zip(rows, kept, strict=True):
        places = real.nonzero().flatten()
        quarter = max(len(places) // 4, 1)
        row[places[[quarter, quarter + 1, -1]]] = separator
    return given


def choices(given: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rows in groups."""
    rows = next(iter(given.values())).shape[0]
    size = 3 if rows == 3 else 2
    return {name: value if value.shape[0] != rows else value.unflatten(0, (-1, size)) for name, value in given.items()}


def feeds(case: Case, model: Any) -> dict[str, dict[str, Tensor]]:
    """The inputs to compare on, by name."""
    width = model.get_input_embeddings().weight.shape[1]
    both = case.family == "longt5" and "Encoder" not in case.name
    found: dict[str, dict[str, Tensor]] = {f"length {n}": {"input_ids": ids(2, n)} for n in case.lengths}
    long = max(case.lengths)
    for name, length, side in (("short", 12, "right"), ("long", long, "right"), ("long", long, "left")):
        kept = mask(3, length, side)
        found[f"padded {side} {name}"] = {
            "input_ids": ids(3, length).masked_fill(kept == 0, PAD),
            "attention_mask": kept,
        }
    if model.config.pad_token_id is not None:
        # Without one the reference has no vectors to fill up others with.
        found["embeds"] = {"inputs_embeds": noise(2, long, width)}
    if case.family != "longt5":
        places = torch.stack((torch.arange(9), torch.arange(9) + 5))
        found["places"] = {"input_ids": ids(2, 9), "position_ids": places}
    if model.config.to_dict().get("type_vocab_size", 0) > 1:
        found["types"] = {"input_ids": ids(2, 40), "token_type_ids": (torch.arange(40) > 13).long().expand(2, -1)}
    found["loss"] = {"input_ids": ids(4, 40)} | labels(case, model, 4, 40)
    if case.family == "longformer":
        found |= marked(found, case.name)
    if getattr(model.config, "add_cross_attention", False):
        for given in found.values():
            rows = next(iter(given.values())).shape[0]
            given |= {"encoder_hidden_states": noise(rows, 7, width), "encoder_attention_mask": mask(rows, 7, "right")}
    if case.name.endswith(("QuestionAnswering", "MultipleChoice")):
        for given in found.values():
            if "input_ids" in given and "global_attention_mask" not in given and given["input_ids"].shape[1] > 4:
                separated(given, model.config.sep_token_id)
        if case.family == "longformer":
            del found["length 1"]
    if case.name == "BigBirdForQuestionAnswering":
        found["question lengths"] = {"input_ids": ids(2, 40), "question_lengths": torch.tensor([[7], [3]])}
        found["no question"] = {"input_ids": ids(2, 40)}
    if case.name == "LongformerForSequenceClassification":
        # The reference asks the ids how many tokens there are.
        found["embeds"]["global_attention_mask"] = torch.zeros(2, long, dtype=torch.long)
    if case.name.endswith("MultipleChoice"):
        found = {name: choices(given) for name, given in found.items()}
    if both:
        for name, given in found.items():
            rows = next(iter(given.values())).shape[0]
            if name != "loss" or case.name == "LongT5Model":
                given["decoder_input_ids"] = ids(rows, 8, 5)
    if getattr(model.config, "is_decoder", False):
        # The places that padding precedes see nothing, and heads of the first state read one.
        found = {name: given for name, given in found.items() if "left" not in name}
    return found


def marked(found: dict[str, dict[str, Tensor]], name: str) -> dict[str, dict[str, Tensor]]:
    """The same feeds with some tokens global, as many in each row, not as many, or none."""
    more = {}
    for feed in ("length 17", "length 61", "padded right long", "padded left long", "loss", "padded right short"):
        if feed in found:
            shape = found[feed]["input_ids"].shape
            chosen = torch.rand(shape, generator=torch.Generator().manual_seed(4)) < 0.15
            chosen[0] = False
            more[f"{feed} global"] = {key: value.clone() for key, value in found[feed].items()} | {
                "global_attention_mask": chosen.long()
            }
    shape = found["length 17"]["input_ids"].shape
    none = {"global_attention_mask": torch.zeros(shape, dtype=torch.long)}
    if "QuestionAnswering" not in name:
        doubled = found["padded right long"]["attention_mask"] * (1 + (torch.arange(61) % 11 == 4))
        more["mask of two"] = {"input_ids": found["padded right long"]["input_ids"].clone(), "attention_mask": doubled}
    return more | {"none global": {"input_ids": found["length 17"]["input_ids"].clone()} | none}


def labels(case: Case, model: Any, rows: int, length: int) -> dict[str, Tensor]:
    """What the case's loss is measured against."""
    generator = torch.Generator().manual_seed(3)
    name, count = case.name, model.config.num_labels
    words = torch.randint(0, VOCAB, (rows, length), generator=generator)
    words = words.masked_fill(torch.arange(length) % 4 == 1, -100)
    if name.endswith("QuestionAnswering"):
        return {"start_positions": torch.tensor([20, 13, 18, 40]), "end_positions": torch.tensor([22, 13, 90, 21])}
    if name.endswith("MultipleChoice"):
        return {"labels": torch.tensor([1, 0])}
    if name.endswith("PreTraining"):
        return {"labels": words, "next_sentence_label": torch.tensor([0, 1, 1, 0])}
    if name.endswith("TokenClassification"):
        return {"labels": words.clamp(max=count - 1)}
    if name.endswith("SequenceClassification"):
        many = model.config.problem_type == "multi_label_classification"
        if count == 1 or many or model.config.problem_type == "regression":
            return {"labels": torch.rand(rows, count, generator=generator).round(decimals=0 if many else 3)}
        return {"labels": torch.randint(0, count, (rows,), generator=generator)}
    return {"labels": words} if name.endswith(("CausalLM", "MaskedLM", "Generation")) else {}


def compared(given: dict[str, Tensor], output: Any, lengths: dict[str, int]) -> dict[str, Tensor]:
    """The outputs of a run by name, padding set to 0; hidden states without what the reference fills texts up with."""
    found: dict[str, Tensor] = {}
    for name, value in output.items():
        for number, tensor in enumerate(value if isinstance(value, tuple) else (value,)):
            if isinstance(tensor, Tensor) and not name.startswith("past_key_values"):
                found[f"{name}.{number}" if isinstance(value, tuple) else name] = tensor
    for name, tensor in found.items():
        if "hidden_state" in name:
            side = (
                "decoder" if name.startswith("decoder") or (lengths["decoder"] and name == "last_hidden_state") else ""
            )
            tensor = tensor.flatten(0, -3)[:, : lengths[side]]
        kept = given.get("attention_mask")
        kept = None if kept is None else kept.clamp(max=1)
        if kept is not None and "logits" not in name:
            kept = kept.flatten(0, -2)
        if kept is not None and tensor.shape[: kept.dim()] == kept.shape:
            tensor = tensor * kept.reshape(*kept.shape, *[1] * (tensor.dim() - kept.dim()))
        found[name] = tensor
    return found


def difference(theirs: nn.Module, ours: Model, given: dict[str, Tensor]) -> dict[str, float]:
    """The largest difference of each output of the reference, measured against its size beyond 10; inf where ours
    lacks it."""
    source = given["input_ids"] if "input_ids" in given else given["inputs_embeds"][..., 0]
    decoded = given.get("decoder_input_ids", given.get("labels"))
    both = bool(getattr(theirs.config, "is_encoder_decoder", False))
    lengths = {"": source.shape[-1], "decoder": decoded.shape[-1] if both and decoded is not None else 0}
    with torch.no_grad():
        expected = compared(given, theirs(**given, output_hidden_states=True), lengths)
        found = compared(given, ours(**given, output_hidden_states=True), lengths)
    return {
        name: float((found[name] - value).abs().max() / max(1.0, float(value.abs().max()) / 10))
        if name in found and found[name].shape == value.shape
        else float("inf")
        for name, value in expected.items()
    }
