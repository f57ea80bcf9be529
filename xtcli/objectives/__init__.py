"""Objectives: how tokens become samples (slot "objective").

An objective cuts a split of the token store into samples, and says what the model reads and what it must answer.
A sample is a pure function of (seed, epoch, index). The import of this package enters every kind in its table, and
needs no torch.
"""

from xtcli.objectives.base import Objective
from xtcli.objectives.classify import Classify
from xtcli.objectives.clm import CausalLM
from xtcli.objectives.extract import Extract
from xtcli.objectives.mlm import MaskedLM
from xtcli.objectives.pairs import Pairs
from xtcli.objectives.spans import SpanCorruption

__all__ = ["CausalLM", "Classify", "Extract", "MaskedLM", "Objective", "Pairs", "SpanCorruption"]
