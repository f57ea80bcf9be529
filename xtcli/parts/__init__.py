"""The parts of every architecture; importing this fills the registry's tables."""

from xtcli.parts import (
    attention,
    embed,
    ffn,
    graphs,
    heads,
    init,
    masks,
    norms,
    pooled,
    positions,
    rotary,
    scores,
    seq2seq,
    wiring,
)

__all__ = [
    "attention",
    "embed",
    "ffn",
    "graphs",
    "heads",
    "init",
    "masks",
    "norms",
    "pooled",
    "positions",
    "rotary",
    "scores",
    "seq2seq",
    "wiring",
]
