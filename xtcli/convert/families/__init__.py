"""The families that conversion knows, by name and by the `model_type` of config.json."""

from __future__ import annotations

from xtcli.convert.families.albert import ALBERT
from xtcli.convert.families.bart import BART
from xtcli.convert.families.bert import BERT
from xtcli.convert.families.big_bird import BIG_BIRD
from xtcli.convert.families.bloom import BLOOM
from xtcli.convert.families.deberta import DEBERTA, DEBERTA_V2
from xtcli.convert.families.electra import ELECTRA
from xtcli.convert.families.falcon import FALCON
from xtcli.convert.families.fnet import FNET
from xtcli.convert.families.gpt2 import GPT2
from xtcli.convert.families.llama import LLAMA
from xtcli.convert.families.longformer import LONGFORMER
from xtcli.convert.families.longt5 import LONGT5
from xtcli.convert.families.luke import LUKE
from xtcli.convert.families.mamba import MAMBA
from xtcli.convert.families.mega import MEGA
from xtcli.convert.families.mixtral import MIXTRAL
from xtcli.convert.families.mobilebert import MOBILEBERT
from xtcli.convert.families.prophetnet import PROPHETNET
from xtcli.convert.families.reformer import REFORMER
from xtcli.convert.families.roberta import ROBERTA
from xtcli.convert.families.rwkv import RWKV
from xtcli.convert.families.squeezebert import SQUEEZEBERT
from xtcli.convert.families.switch import SWITCH
from xtcli.convert.families.t5 import T5
from xtcli.convert.families.transfo_xl import TRANSFO_XL
from xtcli.convert.families.vision import VISION
from xtcli.convert.families.vit import VIT
from xtcli.convert.families.xlnet import XLNET
from xtcli.convert.family import Family

FAMILIES: tuple[Family, ...] = (
    GPT2,
    LLAMA,
    BERT,
    T5,
    BLOOM,
    FALCON,
    MIXTRAL,
    SWITCH,
    BART,
    MAMBA,
    RWKV,
    ALBERT,
    FNET,
    SQUEEZEBERT,
    MOBILEBERT,
    MEGA,
    DEBERTA,
    DEBERTA_V2,
    REFORMER,
    ELECTRA,
    TRANSFO_XL,
    XLNET,
    ROBERTA,
    LONGFORMER,
    LUKE,
    BIG_BIRD,
    LONGT5,
    PROPHETNET,
    VIT,
    VISION,
)


def by_name() -> dict[str, Family]:
    """Every name that means a family."""
    return {name: family for family in FAMILIES for name in (family.name, *family.types)}
