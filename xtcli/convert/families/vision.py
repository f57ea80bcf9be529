"""An image encoder and a text decoder that reads it: config.json and the names of both stand side by side.

The encoder is saved with the pooler that it has by itself, which nothing reads. The reference measures its loss on
labels that it shifts twice, to the right for the decoder's inputs and to the left for the loss; training here does not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from xtcli.convert.families.bart import BART
from xtcli.convert.families.bert import BERT
from xtcli.convert.families.common import PAD, START, given
from xtcli.convert.families.electra import ELECTRA
from xtcli.convert.families.gpt2 import GPT2
from xtcli.convert.families.roberta import ROBERTA
from xtcli.convert.families.vit import VIT
from xtcli.convert.family import COMMON_FIXED, COMMON_NEUTRAL, AnyLength, Drop, Family, Form, Shapes
from xtcli.convert.options import Custom, Options, Unexpressed, dump, load, settle
from xtcli.convert.rules import Rule, layer
from xtcli.convert.same import difference
from xtcli.registry import Config, Slot, tree

SEES = VIT, next(form for form in VIT.forms if form.name == "ViTModel" and "pooler" not in form.more)
WRITES = {
    family.name: (family, next(form for form in family.forms if form.name == name))
    for family, name in (
        (GPT2, "GPT2LMHeadModel"),
        (BERT, "BertLMHeadModel"),
        (ROBERTA, "RobertaForCausalLM"),
        (ELECTRA, "ElectraForCausalLM"),
        (BART, "BartForCausalLM"),
    )
}
"""Encoder, and decoders by the name that config.json gives them. One network may be a model of several of these."""
Half = tuple[Family, Form]

SAVED = frozenset("is_encoder_decoder is_decoder add_cross_attention tie_word_embeddings".split())
"""Keys of a side that both kinds of models have and that its place here settles."""
READS = {"is_decoder": True, "add_cross_attention": True}
READ = "cross_attention_hidden_size"


def _side(options: Options, name: str, half: Half, known: Iterable[str], settled: dict[str, Any]) -> dict[str, Any]:
    """The tree of one side as a model of its own; `settled` are options that it must have."""
    family, form = half
    values = options.get(name, dict, {})
    kind = values.get("model_type")
    if kind not in family.types:
        options.refuse(f"{name}.model_type", f"is {kind!r}", f"xt converts {', '.join(known)}")
        values = {}
    inner = Options(values | settled, options.place)
    found: dict[str, Any] = load(family.template(form), inner)
    fixed = {**COMMON_FIXED, **family.fixed}
    for key, value in values.items():
        if key in settled and value != settled[key]:
            inner.refuse(key, f"is {value!r}", f"only {settled[key]!r} converts")
        elif key in fixed and value not in fixed[key] and key not in {*settled, READ}:
            inner.refuse(key, f"is {value!r}, which xt does not express", f"only {fixed[key][0]!r} converts")
        elif key not in {*fixed, *inner.used, *settled} and key not in family.neutral | COMMON_NEUTRAL | SAVED:
            inner.refuse(key, f"is no option of {family.title} that xt knows")
    options.problems += [replace(problem, path=f"{name}.{problem.path}") for problem in inner.problems]
    return found


def _load(options: Options, writes: Half, shift: bool | None) -> dict[str, Any]:
    encoder = _side(options, "encoder", SEES, [VIT.name], {})
    decoder = _side(options, "decoder", writes, WRITES, READS)
    widths = options.get("decoder", dict, {}).get(READ), encoder["dim"], decoder["dim"]
    if widths[0] is not None and len(set(widths)) > 1:
        cause = f"is {widths[0]}, the encoder's width {widths[1]} and the decoder's {widths[2]}"
        options.refuse(f"decoder.{READ}", cause, "the reference cannot run this unless all are one; leave it out")
    shared = ("vocab", "dim", "context", "dropout", "norm", "init", "heads")
    found: dict[str, Any] = {"kind": "encoder-decoder", "share_tokens": False} | {
        name: decoder[name] for name in shared
    }
    found["heads"] = {"lm": found["heads"]["lm"] | {"shift": shift}}
    found["encoder"] = {name: encoder[name] for name in ("dim", "dropout", "norm", "embed", "stack")}
    found["decoder"] = {name: decoder[name] for name in ("embed", "stack")}
    # The tokens that a text is padded and begun with are named by the pair; older files name them in the decoder.
    own = given(options, PAD.name, int, None)
    found["pad"] = decoder["pad"] if own is None else own
    found["decoder"]["pad"] = None if decoder["pad"] == found["pad"] else decoder["pad"]
    start = START.load(options)
    found["start"] = (options.values.get("decoder") or {}).get(START.name) if start is None else start
    found["bridge"] = encoder["dim"] != decoder["dim"]
    return found


def _dump(found: Any, values: dict[str, Any], writes: Half) -> None:
    if found.get("kind") != "encoder-decoder":
        raise Unexpressed(f"is '{found.get('kind')}', not 'encoder-decoder'")
    if found["share_tokens"]:
        raise Unexpressed("no option stands for one token table on both sides")
    encoder, decoder = _apart(found)
    values["encoder"] = _said(encoder, SEES, {})
    values["decoder"] = _said(decoder, writes, READS)
    values |= {"pad_token_id": found["pad"], "decoder_start_token_id": found["start"]}


def _apart(found: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The trees of both sides, each as a model of its own; whether labels are shifted is the pair's."""
    inner, outer = found["encoder"], found["decoder"]
    if any(outer[name] not in (None, {"kind": "inherit"}, found[name]) for name in ("dim", "dropout", "norm")):
        raise Unexpressed("decoder: it has defaults of its own; state them for the model")
    width = inner["dim"] or found["dim"]
    encoder = {
        "kind": "encoder",
        "vocab": 1,
        "dim": width,
        "dropout": found["dropout"] if inner["dropout"] is None else inner["dropout"],
        "norm": found["norm"] if inner["norm"]["kind"] == "inherit" else inner["norm"],
        "init": found["init"],
        "embed": inner["embed"],
        "stack": inner["stack"],
        "heads": {},
    }
    shared = {name: found[name] for name in ("vocab", "dim", "context", "dropout", "norm", "init")}
    decoder = {
        "kind": "decoder",
        **shared,
        "pad": found["pad"] if outer["pad"] is None else outer["pad"],
        "memory": found["dim"] if found["bridge"] else width,
        "embed": outer["embed"],
        "stack": outer["stack"],
        "heads": {"lm": found["heads"]["lm"] | {"shift": None}},
    }
    return encoder, decoder


def _said(side: Mapping[str, Any], half: Half, settled: dict[str, Any]) -> dict[str, Any]:
    """The config.json that says what a side is; raises Unexpressed where there is none."""
    family, form = half
    found: dict[str, Any] = {}
    config = Slot("graph").validate(side)
    dump(family.template(form), settle(tree(config)), found, str(side["kind"]))
    meant = load(family.template(form), Options(found | settled, family.title))
    if "lm" in meant["heads"]:
        meant["heads"]["lm"]["shift"] = None
    off = difference(config, Slot("graph").validate(meant))
    if off:
        raise Unexpressed(off)
    return {**found, **settled, "model_type": family.types[0], "architectures": [form.name]}


def _halves(config: Config) -> tuple[Any, Any]:
    """The configs of both sides, each as a model of its own."""
    encoder, decoder = (Slot("graph").validate(side) for side in _apart(tree(config)))
    return encoder, decoder


def _placed(rules: Sequence[Rule], theirs: Callable[[str], str], ours: Callable[[str], str]) -> list[Rule]:
    return [replace(rule, theirs=tuple(map(theirs, rule.theirs)), ours=tuple(map(ours, rule.ours))) for rule in rules]


def _trunk(writes: Half, config: Config) -> Sequence[Rule]:
    """The rules of both sides, each below its name; a language model's head stands beside the towers."""
    encoder, decoder = _halves(config)
    family, form = writes
    return (
        *_placed(VIT.trunk(encoder), lambda name: f"encoder.{name}", lambda name: f"encoder.{name}"),
        *_placed(family.trunk(decoder), lambda name: f"decoder.{form.prefix}{name}", lambda name: f"decoder.{name}"),
        *_placed(
            [rule for rule in family.heads if rule.ours[0].startswith("heads.lm.")],
            lambda name: f"decoder.{name}",
            lambda name: name,
        ),
        *layer("enc_to_dec_proj", "bridge"),
    )


def _ties(writes: Half, config: Config, prefix: str) -> Mapping[str, str]:
    family, form = writes
    found = family.ties(_halves(config)[1], form.prefix)
    return {f"decoder.{name}": f"decoder.{main}" for name, main in found.items()}


def _dead(writes: Half, config: Config) -> Shapes:
    encoder, decoder = _halves(config)
    family, form = writes
    rows = AnyLength(encoder.dim)  # pooler_output_size
    pooler = {"encoder.pooler.dense.weight": (rows, encoder.dim), "encoder.pooler.dense.bias": (rows,)}
    return pooler | {f"decoder.{form.prefix}{name}": shape for name, shape in family.dead(decoder).items()}


def _template(form: Form) -> Any:
    writes, shift = WRITES[form.more["decoder"]], form.heads["lm"]["shift"]
    return Custom(lambda options: _load(options, writes, shift), lambda found, values: _dump(found, values, writes))


def _form(writes: Half, shift: bool | None) -> Form:
    family, _ = writes

    def fits(values: Mapping[str, Any]) -> bool:
        decoder = values.get("decoder")
        return isinstance(decoder, Mapping) and decoder.get("model_type") in family.types

    return Form(
        "VisionEncoderDecoderModel",
        "",
        {"lm": {"shift": shift}},
        {"decoder": family.name},
        fits=fits,
        trunk=partial(_trunk, writes),
        ties=partial(_ties, writes),
        dead=partial(_dead, writes),
    )


VISION = Family(
    name="vision-encoder-decoder",
    types=("vision-encoder-decoder",),
    title="VisionEncoderDecoder",
    template=_template,
    forms=tuple(_form(writes, shift) for writes in WRITES.values() for shift in (True, None)),
    trunk=partial(_trunk, WRITES[GPT2.name]),
    heads=(),
    drops=tuple(
        Drop(f"decoder.{form.prefix}{drop.template}", drop.holds, drop.check)
        for family, form in WRITES.values()
        for drop in family.drops
    ),
    aliases=tuple({alias: None for family, _ in WRITES.values() for alias in family.aliases}),
    fixed={"is_encoder_decoder": (True,)},
    neutral=frozenset({"tie_word_embeddings", "vocab_size"}),
    rescaled=VIT.rescaled,
    objectives={"encoder-decoder": "captions"},
)
