"""An image encoder and a text decoder that reads it: config.json and the names of both stand side by side.

The encoder is saved with the pooler that it has by itself, which nothing reads. The reference measures its loss on
labels that it shifts twice, to the right for the decoder's inputs and to the left for the loss; training here does not.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from xtcli.convert.families.bert import BERT
from xtcli.convert.families.common import given
from xtcli.convert.families.gpt2 import GPT2
from xtcli.convert.families.vit import VIT
from xtcli.convert.family import COMMON_FIXED, COMMON_NEUTRAL, Drop, Family, Form, Shapes
from xtcli.convert.options import Custom, Options, Unexpressed, dump, load
from xtcli.convert.rules import Rule, layer
from xtcli.registry import Config, Slot, tree

ENCODERS = {"vit": (VIT, next(form for form in VIT.forms if form.name == "ViTModel" and "pooler" not in form.more))}
DECODERS = {
    family.name: (family, next(form for form in family.forms if form.name == name))
    for family, name in ((GPT2, "GPT2LMHeadModel"), (BERT, "BertLMHeadModel"))
}
Sides = Mapping[str, tuple[Family, Form]]

SAVED = frozenset("is_encoder_decoder is_decoder add_cross_attention tie_word_embeddings".split())
"""Keys of a side that both kinds of models have and that its place here settles."""
READS = {"is_decoder": True, "add_cross_attention": True}


def _side(options: Options, name: str, sides: Sides, settled: dict[str, Any]) -> dict[str, Any]:
    """The tree of one side as a model of its own; `settled` are options that it must have."""
    values = options.get(name, dict, {})
    kind = values.get("model_type")
    if kind not in sides:
        options.refuse(f"{name}.model_type", f"is {kind!r}", f"xt converts {', '.join(sides)}")
        kind = next(iter(sides))
        values = {}
    family, form = sides[kind]
    inner = Options(values | settled, options.place)
    found: dict[str, Any] = load(family.template(form), inner)
    fixed = {**COMMON_FIXED, **family.fixed}
    for key, value in values.items():
        if key in settled and value != settled[key]:
            inner.refuse(key, f"is {value!r}", f"only {settled[key]!r} converts")
        elif key in fixed and value not in fixed[key] and key not in settled:
            inner.refuse(key, f"is {value!r}, which xt does not express", f"only {fixed[key][0]!r} converts")
        elif key not in {*fixed, *inner.used, *settled} and key not in family.neutral | COMMON_NEUTRAL | SAVED:
            inner.refuse(key, f"is no option of {family.title} that xt knows")
    options.problems += [replace(problem, path=f"{name}.{problem.path}") for problem in inner.problems]
    return found


def _load(options: Options, shift: bool | None) -> dict[str, Any]:
    encoder = _side(options, "encoder", ENCODERS, {})
    decoder = _side(options, "decoder", DECODERS, READS)
    shared = ("vocab", "dim", "context", "dropout", "norm", "init", "heads")
    found: dict[str, Any] = {"kind": "encoder-decoder", "share_tokens": False} | {
        name: decoder[name] for name in shared
    }
    found["heads"] = {"lm": found["heads"]["lm"] | {"shift": shift}}
    found["encoder"] = {name: encoder[name] for name in ("dim", "dropout", "norm", "embed", "stack")}
    found["decoder"] = {name: decoder[name] for name in ("embed", "stack")}
    # The tokens that a text is padded and begun with are named by the pair; older files name them in the decoder.
    inner = options.values.get("decoder") or {}
    for ours, theirs in (("pad", "pad_token_id"), ("start", "decoder_start_token_id")):
        own = given(options, theirs, int, None)
        found[ours] = inner.get(theirs) if own is None else own
    found["bridge"] = encoder["dim"] != decoder["dim"]
    return found


def _dump(found: Any, values: dict[str, Any]) -> None:
    if found.get("kind") != "encoder-decoder":
        raise Unexpressed(f"is '{found.get('kind')}', not 'encoder-decoder'")
    if found["share_tokens"]:
        raise Unexpressed("no option stands for one token table on both sides")
    encoder, decoder = _apart(found)
    values["encoder"] = _written(encoder, ENCODERS, {})
    values["decoder"] = _written(decoder, DECODERS, READS)
    values |= {"pad_token_id": found["pad"], "decoder_start_token_id": found["start"]}


def _apart(found: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The trees of both sides, each as a model of its own."""
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
    shared = {name: found[name] for name in ("vocab", "dim", "context", "dropout", "norm", "init", "pad", "heads")}
    memory = found["dim"] if found["bridge"] else width
    decoder = {"kind": "decoder", **shared, "memory": memory, "embed": outer["embed"], "stack": outer["stack"]}
    return encoder, decoder


def _written(side: Mapping[str, Any], sides: Sides, settled: dict[str, Any]) -> dict[str, Any]:
    """The config.json of the first family that says what a side is."""
    reasons = []
    for kind, (family, form) in sides.items():
        found: dict[str, Any] = {}
        try:
            dump(family.template(form), side, found, str(side["kind"]))
            Slot("graph").validate(load(family.template(form), Options(found | settled, kind)))
            return {**found, **settled, "model_type": kind, "architectures": [form.name]}
        except Unexpressed as reason:
            reasons.append(f"{family.title}: {reason}")
    raise Unexpressed("; ".join(reasons))


def _sides(config: Config) -> tuple[tuple[Family, Form, Any], tuple[Family, Form, Any]]:
    """Family, form and config of each side of a pair."""
    encoder, decoder = (Slot("graph").validate(side) for side in _apart(tree(config)))
    for family, form in DECODERS.values():
        try:
            dump(family.template(form), tree(decoder), {})
        except Unexpressed:
            continue
        return (*ENCODERS["vit"], encoder), (family, form, decoder)
    raise AssertionError("a config was made that no family says")


def _placed(rules: Sequence[Rule], theirs: Callable[[str], str], ours: Callable[[str], str]) -> list[Rule]:
    return [replace(rule, theirs=tuple(map(theirs, rule.theirs)), ours=tuple(map(ours, rule.ours))) for rule in rules]


def _trunk(config: Config) -> Sequence[Rule]:
    """The rules of both sides, each below its name; a language model's head stands beside the towers."""
    (seeing, _, encoder), (writing, form, decoder) = _sides(config)
    return (
        *_placed(seeing.trunk(encoder), lambda name: f"encoder.{name}", lambda name: f"encoder.{name}"),
        *_placed(writing.trunk(decoder), lambda name: f"decoder.{form.prefix}{name}", lambda name: f"decoder.{name}"),
        *_placed(
            [rule for rule in writing.heads if rule.ours[0].startswith("heads.lm.")],
            lambda name: f"decoder.{name}",
            lambda name: name,
        ),
        *layer("enc_to_dec_proj", "bridge"),
    )


def _ties(config: Config, prefix: str) -> Mapping[str, str]:
    _, (family, form, decoder) = _sides(config)
    return {f"decoder.{name}": f"decoder.{main}" for name, main in family.ties(decoder, form.prefix).items()}


def _dead(config: Any) -> Shapes:
    (_, _, encoder), (family, form, decoder) = _sides(config)
    pooler = {
        "encoder.pooler.dense.weight": (encoder.dim, encoder.dim),
        "encoder.pooler.dense.bias": (encoder.dim,),
    }
    return pooler | {f"decoder.{form.prefix}{name}": shape for name, shape in family.dead(decoder).items()}


def _template(form: Form) -> Any:
    shift = form.heads["lm"]["shift"]
    return Custom(lambda options: _load(options, shift), _dump)


VISION = Family(
    name="vision-encoder-decoder",
    types=("vision-encoder-decoder",),
    title="VisionEncoderDecoder",
    template=_template,
    forms=(
        Form("VisionEncoderDecoderModel", "", {"lm": {"shift": True}}),
        Form("VisionEncoderDecoderModel", "", {"lm": {"shift": None}}),
    ),
    trunk=_trunk,
    heads=(),
    ties=_ties,
    dead=_dead,
    drops=tuple(
        Drop(f"decoder.{form.prefix}{drop.template}", drop.holds, drop.check)
        for family, form in DECODERS.values()
        for drop in family.drops
    ),
    fixed={"is_encoder_decoder": (True,)},
    neutral=frozenset({"tie_word_embeddings", "vocab_size"}),
    rescaled=VIT.rescaled,
    objectives={"encoder-decoder": "captions"},
)
