"""The families that conversion knows, by name and by the `model_type` of config.json."""

from __future__ import annotations

from xtcli.convert.families.bert import BERT
from xtcli.convert.families.gpt2 import GPT2
from xtcli.convert.families.llama import LLAMA
from xtcli.convert.families.t5 import T5
from xtcli.convert.family import Family

FAMILIES: tuple[Family, ...] = (GPT2, LLAMA, BERT, T5)


def by_name() -> dict[str, Family]:
    """Every name that means a family."""
    return {name: family for family in FAMILIES for name in (family.name, *family.types)}
