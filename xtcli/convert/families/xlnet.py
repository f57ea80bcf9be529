"""XLNet: two streams, memories, waves of the distance; projections stored by head."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from xtcli.convert.families.common import LABELS, PROBLEM, TWO_OUTPUTS, activation, pad
from xtcli.convert.family import Family, Form
from xtcli.convert.options import OMIT, Code, Custom, Key, Options, Switch, table
from xtcli.convert.rules import TRANSPOSE, Chain, Heads, Rule, Unit, layer, one
from xtcli.errors import did_you_mean

DIM = Key("d_model", int, 1024, ("hidden_size",))
HEADS = Key("n_head", int, 16, ("num_attention_heads",))
DROPOUT = Key("dropout", float, 0.1)
ATTENTION = Key("attn_type", str, "bi")
EPS = Key("layer_norm_eps", float, 1e-12)


def _memory(options: Options) -> int | None:
    """Without a length, as with 0, everything is remembered."""
    if options.values.get("mem_len", 0) is None:
        options.used.add("mem_len")
        return None
    return options.get("mem_len", int, 512) or None


def _write_memory(value: Any, found: dict[str, Any]) -> None:
    found["mem_len"] = value


def _in_eval(options: Options) -> bool:
    """`use_cache` is the older name, and is stronger where it is there."""
    use = options.get("use_mems_eval", bool, True)
    return bool(options.get("use_cache", bool, use))


def _head_dim(options: Options) -> int:
    width = DIM.load(options) // HEADS.load(options)
    stated = options.get("d_head", int, width)
    if stated != width:
        options.refuse("d_head", f"is {stated}, and d_model / n_head is {width}", "state neither, or both alike")
    return int(width)


def _same(options: Options) -> bool:
    """It shapes the causal mask alone."""
    return bool(options.get("same_length", bool, False)) and ATTENTION.load(options) == "uni"


def _mask(options: Options) -> Any:
    kinds = {"bi": {"kind": "full"}, "uni": {"kind": "causal"}}
    stated = ATTENTION.load(options)
    if stated not in kinds:
        options.refuse("attn_type", f"is '{stated}'", did_you_mean(stated, kinds))
    return kinds.get(stated, kinds["bi"])


def _write_mask(value: Any, found: dict[str, Any]) -> None:
    found["attn_type"] = "uni" if value["kind"] == "causal" else "bi"


def _template(form: Form) -> dict[str, Any]:
    return {
        "kind": "encoder",
        "vocab": Key("vocab_size", int, 32000, ("n_token",)),
        "dim": DIM,
        "dropout": DROPOUT,
        "pad": pad(5),
        "norm": {"kind": "layer", "eps": EPS},
        "init": {"kind": "normal", "std": Key("initializer_range", float, 0.02)},
        "embed": {"kind": "tokens", "segments": "scores", "dropout": DROPOUT},
        "stack": {
            "kind": "two-stream",
            "layers": Key("n_layer", int, 24, ("num_hidden_layers",)),
            "norm": {"kind": "none"},
            "dropout": DROPOUT,
            "recurrence": {
                "length": Custom(_memory, _write_memory),
                "start": "empty",
                "reuse": Key(
                    "reuse_len", int, None, code=Code(lambda v: v if v is not None and v > 0 else None, lambda v: v)
                ),
                "in_eval": Custom(_in_eval, lambda value, found: found.update(use_mems_eval=value)),
                "in_training": Key("use_mems_train", bool, False),
            },
            "position": {
                "kind": "wave",
                "clamp": Key(
                    "clamp_len", int, -1, code=Code(lambda v: v if v > 0 else None, lambda v: -1 if v is None else v)
                ),
                "mirrored": Key("bi_data", bool, False),
                "dropout": DROPOUT,
            },
            "block": {
                "wiring": {"kind": "post", "dropout": DROPOUT},
                "sublayers": {
                    "attn": {
                        "kind": "two-stream",
                        "heads": HEADS,
                        "head_dim": Custom(_head_dim, lambda value, found: found.update(d_head=value)),
                        "bias": False,
                        "segments": True,
                        "dropout": DROPOUT,
                        "mask": Custom(_mask, _write_mask),
                        "same_length": Custom(_same, lambda value, found: found.update(same_length=value)),
                    },
                    "ffn": {
                        "kind": "mlp",
                        "hidden": Key("d_inner", int, 4096),
                        "act": Key("ff_activation", str, "gelu", code=activation("gelu")),
                        "dropout": DROPOUT,
                    },
                },
            },
        },
        "heads": form.heads,
    }


def _pick(words: Mapping[str, str]) -> Key:
    return Key("summary_type", str, "last", code=table(words))


def _act(options: Options) -> Any:
    """Nothing is an activation too, and not the usual one."""
    if options.values.get("summary_activation", "") is None:
        options.used.add("summary_activation")
        return "identity"
    return Key("summary_activation", str, "tanh", code=activation(None)).load(options)


def _write_act(value: Any, found: dict[str, Any]) -> None:
    found["summary_activation"] = activation(None).dump(value)


ACT = Custom(_act, _write_act)


def _narrow(options: Options) -> Any:
    """The reference reads a summary that is as wide as there are labels as if it were as wide as the model."""
    if not options.get("summary_proj_to_labels", bool, False) or not options.get("summary_use_proj", bool, True):
        return OMIT
    count, width = LABELS.load(options), DIM.load(options)
    if count not in (0, width):
        cause = f"is true, and summaries of {count} labels do not fit what reads {width} numbers: it does not run"
        options.refuse("summary_proj_to_labels", cause, "only false converts")
    return OMIT


NARROW = Custom(_narrow, lambda value, found: None)
TRANSFORM = Switch(
    Key("summary_use_proj", bool, True),
    {True: {"kind": "dense", "act": ACT, "norm": {"kind": "none"}}, False: {"kind": "activation", "act": ACT}},
)
FIRST = Key("summary_first_dropout", float, 0.0)
LAST = Key("summary_last_dropout", float, 0.1)
ROW = {"last": "row-last", "first": "first", "mean": "row-mean", "cls_index": "row-last"}
CHOICE = {"last": "last", "first": "first", "mean": "mean", "cls_index": "last"}

FORMS = (
    Form("XLNetLMHeadModel", "transformer.", {"lm": {"tied": Key("tie_word_embeddings", bool, True), "bias": True}}),
    Form("XLNetModel", "", {}),
    Form(
        "XLNetForSequenceClassification",
        "transformer.",
        {
            "sequence": {
                "labels": LABELS,
                "narrow": NARROW,
                "pick": _pick(ROW),
                "first_dropout": FIRST,
                "transform": TRANSFORM,
                "dropout": LAST,
                "problem": PROBLEM,
            }
        },
    ),
    Form(
        "XLNetForMultipleChoice",
        "transformer.",
        {
            "choice": {
                "narrow": NARROW,
                "pick": _pick(CHOICE),
                "first_dropout": FIRST,
                "transform": TRANSFORM,
                "dropout": LAST,
            }
        },
    ),
    Form("XLNetForTokenClassification", "transformer.", {"token": {"labels": LABELS, "dropout": 0.0}}),
    Form("XLNetForQuestionAnsweringSimple", "transformer.", {"span": TWO_OUTPUTS}),
    Form(
        "XLNetForQuestionAnswering",
        "transformer.",
        {"answers": {"starts": Key("start_n_top", int, 5), "ends": Key("end_n_top", int, 5)}},
    ),
)


def _trunk(config: Any) -> Sequence[Rule]:
    theirs, block = "layer.{layer}.rel_attn", "stack.blocks.{layer}"
    attn = f"{block}.attn"
    by_head = Heads(config.stack.block.sublayers["attn"].heads)
    inward = Chain((by_head, TRANSPOSE))
    return (
        one("word_embedding.weight", "embed.tokens.weight"),
        one("mask_emb", "stack.query", Unit((0, 1))),
        *(one(f"{theirs}.{name}", f"{attn}.{name}.weight", inward) for name in "qkv"),
        one(f"{theirs}.o", f"{attn}.o.weight", by_head),
        one(f"{theirs}.r", f"{attn}.relative.r.weight", inward),
        one(f"{theirs}.r_w_bias", f"{attn}.relative.biases.content"),
        one(f"{theirs}.r_r_bias", f"{attn}.relative.biases.place"),
        one(f"{theirs}.r_s_bias", f"{attn}.segments.bias"),
        one(f"{theirs}.seg_embed", f"{attn}.segments.kinds"),
        *layer(f"{theirs}.layer_norm", f"{block}.wiring.norm.attn"),
        *layer("layer.{layer}.ff.layer_1", f"{block}.ffn.up"),
        *layer("layer.{layer}.ff.layer_2", f"{block}.ffn.down"),
        *layer("layer.{layer}.ff.layer_norm", f"{block}.wiring.norm.ffn"),
    )


def _ties(config: Any, prefix: str) -> Mapping[str, str]:
    head = config.heads.get("lm")
    return {"lm_loss.weight": f"{prefix}word_embedding.weight"} if head is not None and head.tied else {}


XLNET = Family(
    name="xlnet",
    types=("xlnet",),
    title="XLNet",
    template=_template,
    forms=FORMS,
    trunk=_trunk,
    heads=(
        *layer("lm_loss", "heads.lm.decoder"),
        one("lm_loss.bias", "heads.lm.bias"),
        *(
            rule
            for head in ("sequence", "choice")
            for rule in (
                *layer("sequence_summary.summary", f"heads.{head}.transform.dense"),
                *layer("logits_proj", f"heads.{head}.classifier"),
            )
        ),
        *layer("classifier", "heads.token.classifier"),
        *layer("qa_outputs", "heads.span.classifier"),
        *layer("start_logits.dense", "heads.answers.start"),
        *layer("end_logits.dense_0", "heads.answers.end.dense"),
        *layer("end_logits.LayerNorm", "heads.answers.end.norm"),
        *layer("end_logits.dense_1", "heads.answers.end.classifier"),
        *layer("answer_class.dense_0", "heads.answers.none.dense"),
        *layer("answer_class.dense_1", "heads.answers.none.classifier"),
    ),
    ties=_ties,
    prefixes=("transformer.", ""),
    fixed={
        "is_encoder_decoder": (False,),
        "is_decoder": (False,),
        "add_cross_attention": (False,),
    },
    neutral=frozenset(
        """
        untie_r same_length tie_word_embeddings summary_type summary_use_proj summary_activation summary_last_dropout
        summary_first_dropout summary_proj_to_labels start_n_top end_n_top
        """.split()
    ),
    objectives={"encoder": "permutation"},
    time_first=True,
)
