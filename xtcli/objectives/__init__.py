"""Objectives: how tokens become samples (slot "objective").

An objective cuts a split of the token store into samples, and says what the model reads and what it must answer.
A sample is a pure function of (seed, epoch, index). The import of this package enters every kind in its table, and
needs no torch.
"""

from xtcli.objectives.base import Objective
from xtcli.objectives.captions import Captions
from xtcli.objectives.classify import Classify
from xtcli.objectives.clm import CausalLM
from xtcli.objectives.denoise import Denoising
from xtcli.objectives.entities import MaskedEntities
from xtcli.objectives.extract import Extract
from xtcli.objectives.frames import Frames
from xtcli.objectives.gaps import GapSentences
from xtcli.objectives.hidden import MaskedSpans
from xtcli.objectives.images import ImageLabels, MaskedPatches
from xtcli.objectives.mlm import MaskedLM
from xtcli.objectives.pairs import Pairs
from xtcli.objectives.permutation import Permutation
from xtcli.objectives.replacing import ReplacedTokens
from xtcli.objectives.spans import SpanCorruption

__all__ = [
    "Captions",
    "CausalLM",
    "Classify",
    "Denoising",
    "Extract",
    "Frames",
    "GapSentences",
    "ImageLabels",
    "MaskedEntities",
    "MaskedLM",
    "MaskedPatches",
    "MaskedSpans",
    "Objective",
    "Pairs",
    "Permutation",
    "ReplacedTokens",
    "SpanCorruption",
]
