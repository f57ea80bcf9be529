"""A small checkpoint with every file of a large one."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from xtcli.runs.checkpoint import save_checkpoint
from xtcli.runs.state import TrainerState


class Tokens:
    """A tokenizer, as far as a checkpoint knows one."""

    def save(self, folder: Path) -> None:
        (folder / "tokenizer.json").write_text('{"model": "bytes"}')


def small(folder: Path, step: int, value: float) -> Path:
    """A checkpoint of a few files whose weights all have `value`; the largest spans several 4 KiB pages."""
    model = nn.Linear(60, 60)
    nn.init.constant_(model.weight, value)
    trainer = TrainerState({"m": torch.full((100,), value)}, {"progress": {"step": step}, "m": {"$tensor": "m"}})
    return save_checkpoint(
        folder, step, preset_yaml="version: 1\n", model=model, tokenizer=Tokens(), trainer=trainer
    )  # fmt: skip
