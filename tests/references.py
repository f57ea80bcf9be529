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

import transformers

transformers.logging.set_verbosity_error()

VOCAB = 61
PAD = 60
END = 59


@dataclass(frozen=True)
class Case:
    """One class of the reference with some options; `feeds` names the ways in which it is fed."""

    name: str
    options: dict[str, Any] = field(default_factory=dict)
    feeds: tuple[str, ...] = ()
    note: str = ""

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
                parameter.copy_(noise * (0.7 if "emb" in name or "wte" in name else 1.2 * parameter.shape[-1] ** -0.5))
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
    found: dict[str, dict[str, Tensor]] = {}
    for length in (1, 17, 33):
        found[f"length {length}"] = {"input_ids": ids(2, length)}
    for side in ("right", "left"):
        kept = mask(3, 12, side)
        found[f"padded {side}"] = {"input_ids": ids(3, 12).masked_fill(kept == 0, PAD), "attention_mask": kept}
    width = model.get_input_embeddings().weight.shape[1]
    found["embeds"] = {"inputs_embeds": torch.randn(2, 9, width, generator=torch.Generator().manual_seed(2))}
    found["places"] = {"input_ids": ids(2, 9), "position_ids": torch.stack((torch.arange(9), torch.arange(9) + 5))}
    types = torch.tensor([[0] * 4 + [1] * 5, [1] * 9])
    found["types"] = {"input_ids": ids(2, 9), "token_type_ids": types}
    return {name: given for name, given in found.items() if not case.feeds or name in case.feeds}


def compared(given: dict[str, Tensor], output: Any) -> dict[str, Tensor]:
    """The outputs of a run by name, with the places that are padding set to 0: what stands there means nothing."""
    found: dict[str, Tensor] = {}
    for name, value in output.items():
        for number, tensor in enumerate(value if isinstance(value, tuple) else (value,)):
            if isinstance(tensor, Tensor):
                found[f"{name}.{number}" if isinstance(value, tuple) else name] = tensor
    kept = {"": given.get("attention_mask"), "decoder_": given.get("decoder_attention_mask")}
    for name, tensor in found.items():
        decodes = "decoder_input_ids" in given or "decoder_inputs_embeds" in given
        which = kept["decoder_" if decodes and not name.startswith("encoder") else ""]
        if which is not None and tensor.dim() >= which.dim() and tensor.shape[: which.dim()] == which.shape:
            found[name] = tensor * which.reshape(*which.shape, *[1] * (tensor.dim() - which.dim()))
    return found
