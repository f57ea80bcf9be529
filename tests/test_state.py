"""Trainer state: a resumed run is the uninterrupted one bit for bit, and no part of the state is idle."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from small import Tokens
from torch import nn

from xtcli.errors import UserError
from xtcli.runs.checkpoint import load_checkpoint, newest, save_checkpoint
from xtcli.runs.state import Progress, Stateful, TrainerState, collect, restore, stateful


class Toy:
    """A run in small: every kind of state is used by the step after it."""

    def __init__(self, folder: Path) -> None:
        torch.manual_seed(0)
        random.seed(0)
        numpy.random.seed(0)
        self.folder = folder
        self.model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Linear(8, 1))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.05)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=2)
        self.progress = Progress()
        self.data = torch.sin(torch.arange(60.0)).reshape(10, 6)

    def parts(self) -> tuple[Stateful, ...]:
        return stateful(self.model, self.optimizer, self.progress, self.scaler)

    def step(self) -> float:
        rows = (torch.arange(4) + self.progress.cursor) % 10
        noise = random.gauss(0, 0.1) + numpy.random.standard_normal() * 0.1
        loss = (self.model(self.data[rows]) - noise).square().mean()
        self.optimizer.zero_grad()
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        progress = self.progress
        progress.step, progress.cursor, progress.tokens = progress.step + 1, progress.cursor + 4, progress.tokens + 4
        if progress.step == 2:
            progress.best, progress.best_step = loss.item(), progress.step
        return float(loss.detach())

    def save(self) -> Path:
        return save_checkpoint(
            self.folder,
            self.progress.step,
            preset_yaml="version: 1\n",
            model=self.model,
            tokenizer=Tokens(),
            trainer=collect(self.parts()),
        )

    @classmethod
    def load(cls, folder: Path, forget: str | None = None) -> Toy:
        toy = cls(folder)
        saved = load_checkpoint(newest(folder, trainer=True), trainer=True)
        assert saved.trainer is not None
        toy.model.load_state_dict(saved.weights)
        if forget is not None:
            del saved.trainer.values[forget]
        restore([part for part in toy.parts() if part.name != forget], saved.trainer)
        return toy

    def state(self) -> dict[str, Any]:
        """Everything that must be equal, as comparable values."""
        now = collect(self.parts())
        bits = {name: tensor.numpy().tobytes() for name, tensor in (now.tensors | self.model.state_dict()).items()}
        return now.values | bits


def reference(folder: Path, steps: int) -> tuple[list[float], dict[str, Any]]:
    toy = Toy(folder)
    return [toy.step() for _ in range(steps)], toy.state()


@pytest.mark.parametrize("stops", [[1], [2], [3], [4], [5], [6], [7], [2, 3], [1, 2, 4, 5, 7]], ids=str)
def test_resume_is_bit_exact(tmp_path: Path, stops: list[int]) -> None:
    losses, state = reference(tmp_path, 8)
    toy = Toy(tmp_path)
    found = []
    for step in range(8):
        if step in stops:
            toy.save()
            toy = Toy.load(tmp_path)
        found.append(toy.step())
    assert found == losses
    assert toy.state() == state


NAMES = [part.name for part in Toy(Path()).parts()]


def test_the_list_of_state_is_what_is_known() -> None:
    machine = ("rng.cuda", "rng.mps")
    assert [name for name in NAMES if not name.startswith(machine)] == [
        "progress", "optimizer", "rng.python", "rng.numpy", "rng.torch", "scaler",
    ]  # fmt: skip


@pytest.mark.parametrize("name", [name for name in NAMES if not name.startswith(("rng.cuda", "rng.mps"))])
def test_forgetting_a_part_is_noticed(tmp_path: Path, name: str) -> None:
    _, state = reference(tmp_path, 8)
    toy = Toy(tmp_path)
    for _ in range(3):
        toy.step()
    toy.save()
    toy = Toy.load(tmp_path, forget=name)
    for _ in range(5):
        toy.step()
    assert toy.state() != state


def leaves(state: TrainerState) -> list[str]:
    """Paths of all single values and tensors of a state, long lists of random words by their first."""

    def walk(tree: Any, path: str) -> Iterator[str]:
        if isinstance(tree, dict) and tree.keys() != {"$tensor"}:
            for key, value in tree.items():
                yield from walk(value, f"{path}/{key}")
        elif not isinstance(tree, dict):
            yield path

    return [*(path for name, tree in state.values.items() for path in walk(tree, name)), *state.tensors]


LABELS = ("rng.python/version", "rng.numpy/generator")
"""The format and the kind of generator: another one is refused or unknown, not another number."""


def test_every_saved_value_matters(tmp_path: Path) -> None:
    _, state = reference(tmp_path, 8)
    toy = Toy(tmp_path)
    for _ in range(3):
        toy.step()
    path = toy.save()
    loaded = load_checkpoint(path, trainer=True).trainer
    assert loaded is not None
    for leaf in leaves(loaded):
        if leaf in LABELS:
            continue
        saved = load_checkpoint(path, trainer=True)
        assert saved.trainer is not None
        if leaf in saved.trainer.tensors:
            tensor = saved.trainer.tensors[leaf]
            tensor.view(-1).view(torch.uint8)[200 if leaf == "rng.torch" else -2] ^= 1
        else:
            *parents, last = leaf.split("/")
            node: Any = saved.trainer.values
            for parent in parents:
                node = node[parent]
            if isinstance(node[last], list):
                node[last][-1] += 1
            elif last == "has_gauss":
                node[last] = 1 - node[last]
            else:
                node[last] = node[last] * 2 + 1
        again = Toy(tmp_path)
        again.model.load_state_dict(saved.weights)
        try:
            restore(again.parts(), saved.trainer)
        except UserError:
            continue
        for _ in range(5):
            again.step()
        assert again.state() != state, leaf


def test_state_of_another_machine_is_noted_and_of_another_run_refused(tmp_path: Path) -> None:
    toy = Toy(tmp_path)
    toy.step()
    state = collect(toy.parts())
    state.values["rng.cuda.7"] = []
    assert restore(toy.parts(), state) == [
        "rng.cuda.7 exists only on the machine that saved it: random numbers will differ from the saved run's"
    ]
    with pytest.raises(UserError, match="trainer state 'scaler' is only in the checkpoint; resume with the settings"):
        restore([part for part in toy.parts() if part.name != "scaler"], state)
    del state.values["progress"]
    with pytest.raises(UserError, match="trainer state 'progress' is only in the run"):
        restore(toy.parts(), state)
    other = nn.Linear(2, 2)
    with pytest.raises(UserError, match=r"this model trains no '0.bias'"):
        restore(stateful(other, torch.optim.AdamW(other.parameters()), Progress(), toy.scaler), collect(toy.parts()))
