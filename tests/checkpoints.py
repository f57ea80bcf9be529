"""Checkpoints of the reference on disk, for the tests of conversion."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from references import Case, reference
from torch import Tensor


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


SMALL = {
    "gpt2": Case("GPT2LMHeadModel", {"n_layer": 1, "add_cross_attention": True, "n_inner": 40}),
    "llama": Case("LlamaForCausalLM", {"num_hidden_layers": 1, "num_key_value_heads": 2, "head_dim": 8}),
    "bert": Case("BertForPreTraining", {"num_hidden_layers": 1, "position_embedding_type": "relative_key"}),
    "t5": Case("T5ForConditionalGeneration", {"num_layers": 1, "tie_word_embeddings": False, "d_kv": 5}),
}
"""One class of each family with one layer and every kind of tensor."""


def write_sources(folder: Path) -> dict[str, Path]:
    """A checkpoint of each family, `NAME` in one file and `NAME shards` in several."""
    for family, case in SMALL.items():
        save(reference(case), folder / family)
        save(reference(case), folder / f"{family} shards", max_shard_size="8KB")
    return {path.name: path for path in folder.iterdir()}
