"""The tensors of a checkpoint with low-rank adapters, as those of the model that they make of the weights."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from xtcli.config.train import LoraConfig
from xtcli.convert.files import Entry, Source
from xtcli.train.lora import DOWN, UP, added


@dataclass(frozen=True)
class Adapted(Entry):
    """A weight that is read with its adapter added to it."""

    up: Entry
    down: Entry
    scale: float

    def read(self) -> Tensor:
        """The tensor, in memory of its own."""
        return added(super().read(), self.up.read(), self.down.read(), self.scale)


def merged(source: Source, config: LoraConfig | None) -> Source:
    """`source` without adapters, which are added to their weights when these are read."""
    if config is None:
        return source
    found = source.entries
    entries = {name: entry for name, entry in found.items() if not name.endswith((UP, DOWN))}
    scale = config.alpha / config.rank
    for name, entry in entries.items():
        layer = name.removesuffix(".weight")
        if name != layer and layer + UP in found and layer + DOWN in found:
            up, down = found[layer + UP], found[layer + DOWN]
            entries[name] = Adapted(entry.dtype, entry.shape, entry.file, entry.start, up, down, scale)
    return replace(source, entries=entries)
