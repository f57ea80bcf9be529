"""Tiny random models of the reference, one for each case of a table, and what to feed them.

Every weight, bias and gain is random, so that nothing that a converter forgets can hide behind a zero or a one.
"""

from __future__ import annotations

import json
import os
import warnings
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

os.environ.setdefault("HF_HUB_OFFLINE", "1")
warnings.filterwarnings("ignore", module="transformers")

import transformers  # noqa: E402

transformers.logging.set_verbosity_error()
torch.set_num_threads(1)

VOCAB = 61
PAD = 60
END = 59


@dataclass(frozen=True)
class Case:
    """One class of the reference with some options, and the lengths of the texts that it is fed."""

    name: str
    options: dict[str, Any] = field(default_factory=dict)
    note: str = ""
    lengths: tuple[int, ...] = (1, 17)

    @property
    def family(self) -> str:
        """The family's name."""
        return next(f for f in SIZES if self.name.lower().startswith(f))

    @property
    def id(self) -> str:
        """How the case is called in a test's name."""
        said = ",".join(f"{k}={json.dumps(v)}" for k, v in self.options.items() if k != "rope_scaling")
        return f"{self.name}[{self.note or said}]"


SIZES: dict[str, dict[str, Any]] = {
    "gpt2": {"vocab_size": VOCAB, "n_embd": 24, "n_layer": 2, "n_head": 4, "n_positions": 48},
    "llama": {
        "vocab_size": VOCAB,
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 32,
    },
    "bert": {
        "vocab_size": VOCAB,
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 48,
    },
    "t5": {"vocab_size": VOCAB, "d_model": 24, "d_kv": 8, "d_ff": 40, "num_layers": 2, "num_heads": 4},
}
DEFAULTS: dict[str, dict[str, Any]] = {
    "gpt2": {"pad_token_id": PAD},
    "llama": {"pad_token_id": PAD},
    "bert": {"pad_token_id": PAD},
    "t5": {"pad_token_id": PAD, "eos_token_id": END, "decoder_start_token_id": 3},
}


def reference(case: Case, seed: int = 0) -> nn.Module:
    """The case's model, in eval mode, every parameter random."""
    options = SIZES[case.family] | DEFAULTS[case.family] | json.loads(json.dumps(case.options))
    architecture = getattr(transformers, case.name)
    pooling = options.pop("add_pooling_layer", None)
    config = architecture.config_class(**options)
    config._attn_implementation = "eager"
    model = architecture(config) if pooling is None else architecture(config, add_pooling_layer=pooling)
    return randomise(model, seed)


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Every parameter drawn anew: matrices by their fan-in, gains around 1, biases around 0."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() == 1:
                parameter.copy_(0.3 * noise + ("bias" not in name))
            else:
                # T5 does not scale its scores: its queries are small instead.
                scale = 0.4 if name.endswith(".q.weight") else 1.2
                parameter.copy_(
                    noise * (0.7 if "emb" in name or "wte" in name else scale * parameter.shape[-1] ** -0.5)
                )
    return model.eval()


def describe(model: Any) -> dict[str, Any]:
    """The config.json that the model would be saved with."""
    return json.loads(model.config.to_json_string()) | {"architectures": [type(model).__name__]}


def ids(batch: int, length: int, seed: int = 1) -> Tensor:
    """Random ids, none of which is the padding or the end."""
    return torch.randint(4, END, (batch, length), generator=torch.Generator().manual_seed(seed))


def mask(batch: int, length: int, side: str) -> Tensor:
    """A mask that hides a growing number of places of each row on one side."""
    kept = torch.ones(batch, length, dtype=torch.long)
    for row in range(1, batch):
        hidden = min(row * length // 4 + 1, length - 1)
        kept[row, slice(0, hidden) if side == "left" else slice(length - hidden, length)] = 0
    return kept


def feeds(case: Case, model: Any) -> dict[str, dict[str, Tensor]]:
    """The inputs to compare on, by name; padding comes as ids and mask alike."""
    width = model.get_input_embeddings().weight.shape[1]
    found: dict[str, dict[str, Tensor]] = {}
    for length in case.lengths:
        found[f"length {length}"] = {"input_ids": ids(2, length)}
    for side in ("right", "left"):
        kept = mask(3, 12, side)
        found[f"padded {side}"] = {"input_ids": ids(3, 12).masked_fill(kept == 0, PAD), "attention_mask": kept}
    found["embeds"] = {"inputs_embeds": noise(2, 9, width)}
    if case.family != "t5":
        found["places"] = {"input_ids": ids(2, 9), "position_ids": torch.stack((torch.arange(9), torch.arange(9) + 5))}
    if case.family in ("gpt2", "bert"):
        found["types"] = {"input_ids": ids(2, 9), "token_type_ids": torch.tensor([[0] * 4 + [1] * 5, [1] * 9])}
    found["loss"] = {"input_ids": ids(4, 9)} | labels(case, model)
    if model.config.add_cross_attention:
        for given in list(found.values()):
            rows = next(iter(given.values())).shape[0]
            given |= {"encoder_hidden_states": noise(rows, 7, width), "encoder_attention_mask": mask(rows, 7, "right")}
        found["alone"] = {"input_ids": ids(2, 9)}
    if case.name in ("BertForMultipleChoice", "GPT2DoubleHeadsModel"):
        found = {name: grouped(given) for name, given in found.items()}
    if case.name == "GPT2DoubleHeadsModel":
        # The reference cannot take either of these in groups, nor measure scores that are not one a choice.
        del found["places"], found["embeds"]
        if any(option in case.options for option in ("summary_type", "summary_use_proj", "summary_proj_to_labels")):
            del found["loss"]["mc_labels"]
        if "summary_type" in case.options:
            # It would read places that see nothing.
            del found["padded left"]
        found["picked"] = {
            "input_ids": ids(6, 9).reshape(2, 3, 9),
            "mc_token_ids": torch.tensor([[1, 8, 4], [0, 2, 7]]),
        }
        found["one text"] = {"input_ids": ids(2, 9), "mc_token_ids": torch.tensor([5, 3])}
    if case.name == "BertModel" and model.config.is_decoder:
        # The pooler would read a place that sees nothing.
        del found["padded left"]
    if case.name in ("T5Model", "T5ForConditionalGeneration", "T5ForSequenceClassification", "T5ForQuestionAnswering"):
        found = decoded(case, found, width)
    return found


def decoded(case: Case, found: dict[str, dict[str, Tensor]], width: int) -> dict[str, dict[str, Tensor]]:
    """The same with something to decode, which the classes that label texts make of the source where it is absent."""
    if case.name == "T5ForSequenceClassification":
        for given in found.values():
            source = given.get("input_ids")
            if source is not None:
                real = source != PAD
                source[torch.arange(len(source)), (torch.arange(source.shape[1]) * real).argmax(-1)] = END
        del found["embeds"]
        return found | {"given": found["length 17"] | {"decoder_input_ids": ids(2, 17, 5)}}
    if case.name == "T5ForQuestionAnswering":
        del found["embeds"]
        return found | {"given": found["length 17"] | {"decoder_input_ids": ids(2, 8, 5)}}
    for name, given in found.items():
        rows = next(iter(given.values())).shape[0]
        if name != "loss" or case.name == "T5Model":
            given["decoder_input_ids"] = ids(rows, 8, 5)
        if name.startswith("padded"):
            kept = mask(rows, 8, name.split()[1])
            given |= {"decoder_input_ids": ids(rows, 8, 5).masked_fill(kept == 0, PAD), "decoder_attention_mask": kept}
    return found | {"decoder embeds": {"input_ids": ids(2, 9), "decoder_inputs_embeds": noise(2, 6, width)}}


def labels(case: Case, model: Any) -> dict[str, Tensor]:
    """What the case's loss is measured against, for four texts of nine tokens."""
    generator = torch.Generator().manual_seed(3)
    name, count = case.name, model.config.num_labels
    words = torch.randint(0, VOCAB, (4, 9), generator=generator).masked_fill(torch.arange(9) % 4 == 1, -100)
    if name.endswith("QuestionAnswering"):
        return {"start_positions": torch.tensor([0, 3, 8, 9]), "end_positions": torch.tensor([2, 3, 8, 1])}
    if name.endswith("MultipleChoice"):
        return {"labels": torch.tensor([1, 0])}
    if name.endswith("DoubleHeadsModel"):
        return {"labels": words, "mc_labels": torch.tensor([1, 0])}
    if name.endswith("NextSentencePrediction"):
        return {"labels": torch.tensor([0, 1, 1, 0])}
    if name.endswith("PreTraining"):
        return {"labels": words, "next_sentence_label": torch.tensor([0, 1, 1, 0])}
    if name.endswith("TokenClassification"):
        return {"labels": words.clamp(max=count - 1)}
    if name.endswith("SequenceClassification"):
        many = model.config.problem_type == "multi_label_classification"
        if count == 1 or many or model.config.problem_type == "regression":
            return {"labels": torch.rand(4, count, generator=generator).round(decimals=0 if many else 3)}
        return {"labels": torch.randint(0, count, (4,), generator=generator)}
    return {"labels": words} if name.endswith(("LMHeadModel", "CausalLM", "MaskedLM", "Generation")) else {}


def grouped(given: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rows in groups of two (three where there are three) choices."""
    rows = next(iter(given.values())).shape[0]
    size = 3 if rows == 3 else 2
    alone = ("mc_labels", "encoder_hidden_states", "encoder_attention_mask")
    return {
        name: value if name in alone or value.shape[0] != rows else value.unflatten(0, (-1, size))
        for name, value in given.items()
    }


def noise(*shape: int) -> Tensor:
    """Random vectors."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(2))


def compared(given: dict[str, Tensor], output: Any) -> dict[str, Tensor]:
    """The outputs of a run by name, with the places that are padding set to 0: what stands there means nothing."""
    found: dict[str, Tensor] = {}
    for name, value in output.items():
        for number, tensor in enumerate(value if isinstance(value, tuple) else (value,)):
            if isinstance(tensor, Tensor):
                # The reference groups only the last of the hidden states by choices.
                flat = tensor.flatten(0, -3) if name == "hidden_states" else tensor
                found[f"{name}.{number}" if isinstance(value, tuple) else name] = flat
    decodes = any(name.startswith("decoder_") for name in given)
    for name, tensor in found.items():
        kept = given.get("decoder_attention_mask" if decodes and not name.startswith("encoder") else "attention_mask")
        if kept is not None and name.startswith("hidden_states"):
            kept = kept.flatten(0, -2)
        if kept is not None and tensor.shape[: kept.dim()] == kept.shape:
            found[name] = tensor * kept.reshape(*kept.shape, *[1] * (tensor.dim() - kept.dim()))
    return found
