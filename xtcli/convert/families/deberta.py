"""DeBERTa, both versions: disentangled attention over one table of distances.

The second may have buckets of distances, and a convolution beside its first layer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from xtcli.convert.families import bert
from xtcli.convert.families.common import LABELS, PROBLEM, TWO_OUTPUTS, activation, counts_up, given, pad
from xtcli.convert.family import Drop, Family, Form, Shapes
from xtcli.convert.options import Custom, Key, Options, Unexpressed
from xtcli.convert.rules import TRANSPOSE, Interleave, Rule, layer, one

DROPOUT = Key("hidden_dropout_prob", float, 0.1)
ATTENTION_DROPOUT = Key("attention_probs_dropout_prob", float, 0.1)
ACT = Key("hidden_act", str, "gelu", code=activation("gelu"))
POOLED_ACT = Key("pooler_hidden_act", str, "gelu", code=activation("gelu"))
CONTEXT = Key("max_position_embeddings", int, 512)
RELATIVE = Key("relative_attention", bool, False)
TIED = Key("tie_word_embeddings", bool, True)
TERMS = ("c2p", "p2c")


class Version:
    """What the two versions do not share; each makes a family."""

    def __init__(self, name: str, kind: str, title: str, classes: str, sizes: tuple[int, int, int, int, int]) -> None:
        self.name, self.kind, self.title, self.classes = name, kind, title, classes
        vocab, dim, layers, heads, hidden = sizes
        self.vocab = Key("vocab_size", int, vocab)
        self.dim = Key("hidden_size", int, dim)
        self.layers = Key("num_hidden_layers", int, layers)
        self.heads = Key("num_attention_heads", int, heads)
        self.hidden = Key("intermediate_size", int, hidden)
        self.second = kind.endswith("2")

    def terms(self, options: Options) -> tuple[list[str], int]:
        """The entries of `pos_att_type`, a list or a text with bars, and how many count in the scale.

        In the first version 'none' is counted as well.
        """
        stated = options.values.get("pos_att_type")
        options.used.add("pos_att_type")
        if isinstance(stated, str):
            stated = [word.strip() for word in stated.lower().split("|")]
        if stated is not None and (not isinstance(stated, list) or not set(stated) <= {*TERMS, "none"}):
            options.refuse("pos_att_type", f"is {stated!r}", "it is a list of c2p and p2c")
            stated = None
        found = [term for term in TERMS if term in (stated or [])]
        if stated and len(stated) != len(set(stated)):
            options.refuse("pos_att_type", f"names a term twice: {stated!r}", "name each once")
        return found, len(found) if self.second else len(stated or ())

    def attention(self, options: Options) -> dict[str, Any]:
        (terms, counted), relative = self.terms(options), RELATIVE.load(options)
        heads, dim = self.heads.load(options), self.dim.load(options)
        width = given(options, "attention_head_size", int, None) if self.second else None
        if width is not None and width * heads != dim:
            options.refuse("attention_head_size", f"is {width}: {heads} heads of it are not hidden_size, {dim}")
        span = options.get("max_relative_positions", int, -1)
        tree = {
            "kind": "disentangled",
            "heads": heads,
            "dropout": ATTENTION_DROPOUT.load(options),
            "distance_dropout": DROPOUT.load(options),
            "terms": terms if relative else [],
            "scale": (float(width or dim // heads) * (1 + counted)) ** -0.5,
            "span": None if not relative else span if span >= 1 else CONTEXT.load(options),
            "key_bias": self.second,
            "distance_bias": self.second,
        }
        if width is not None:
            tree |= {"head_dim": width}
        if self.second:
            tree |= self.buckets(options, tree["span"])
        elif options.get("talking_head", bool, False):
            tree["score"] = {"kind": "talking-heads"}
        return tree

    def buckets(self, options: Options, span: int | None) -> dict[str, Any]:
        buckets = options.get("position_buckets", int, -1)
        if span is not None and buckets > 0 and (buckets == 1 or span - 1 in (0, buckets // 2)):
            options.refuse("position_buckets", f"is {buckets}, of {span} distances: the reference divides by zero")
            buckets = -1
        normed = [word.strip() for word in options.get("norm_rel_ebd", str, "none").lower().split("|")]
        return {
            "buckets": buckets if span is not None and buckets > 0 else None,
            "shared": options.get("share_att_key", bool, False),
            "distance_norm": {"kind": "inherit" if "layer_norm" in normed else "none"},
        }

    def write_attention(self, value: Any, found: dict[str, Any]) -> None:
        width = value["head_dim"]
        terms = round(value["scale"] ** -2 / width) - 1 if value["scale"] else len(value["terms"])
        named = list(value["terms"]) or list(TERMS[:terms])
        relative = value["span"] is not None or bool(value["terms"])
        found |= {"relative_attention": relative, "pos_att_type": named}
        found |= {"num_attention_heads": value["heads"], "attention_probs_dropout_prob": value["dropout"]}
        found |= {"max_relative_positions": value["span"] or -1}
        if self.second:
            found |= {"position_buckets": value["buckets"] or -1, "share_att_key": value["shared"]}
            found |= {"norm_rel_ebd": "none" if value["distance_norm"]["kind"] == "none" else "layer_norm"}
            found |= {"attention_head_size": width}
        elif value["score"]["kind"] == "talking-heads":
            found["talking_head"] = True

    def embed(self, options: Options) -> dict[str, Any]:
        dim = self.dim.load(options)
        width = given(options, "embedding_size", int, dim)
        types = options.get("type_vocab_size", int, 0)
        tree: dict[str, Any] = {
            "kind": "held-tokens",
            "positions": {"kind": "learned" if options.get("position_biased_input", bool, True) else "none"},
            "segments": types if types > 0 else "unread",
            "norm": {"kind": "inherit"},
            "dropout": DROPOUT.load(options),
        }
        if width != dim:
            tree |= {"kind": "held-factorised", "width": width, "project_after": "sum", "project_bias": False}
        return tree

    def write_embed(self, value: Any, found: dict[str, Any]) -> None:
        if value["kind"] not in ("held-tokens", "held-factorised"):
            raise Unexpressed(f"embed is '{value['kind']}', not 'held-tokens' or 'held-factorised'")
        found["position_biased_input"] = value["positions"]["kind"] == "learned"
        found["type_vocab_size"] = value["segments"] if isinstance(value["segments"], int) else 0
        if value.get("width") is not None:
            found["embedding_size"] = value["width"]

    def stack(self, options: Options) -> dict[str, Any]:
        block = {
            "wiring": {"kind": "post", "dropout": DROPOUT.load(options)},
            "sublayers": {
                "attn": self.attention(options),
                "ffn": {"kind": "mlp", "hidden": self.hidden.load(options), "act": ACT.load(options)},
            },
        }
        common = {"layers": self.layers.load(options), "norm": {"kind": "none"}}
        kernel = options.get("conv_kernel_size", int, 0) if self.second else 0
        if kernel > 0 and kernel % 2 == 0:
            options.refuse("conv_kernel_size", f"is {kernel}: an even number of places has no middle")
        convolution = {
            "kind": "conv",
            "kernel": kernel,
            "groups": options.get("conv_groups", int, 1) if self.second else 1,
            "act": Key("conv_act", str, "tanh", code=activation("tanh")).load(options) if self.second else "tanh",
            "dropout": DROPOUT.load(options),
        }
        if kernel <= 0:
            return {**common, "block": block}
        first = {
            "wiring": {"kind": "post-beside", "dropout": DROPOUT.load(options)},
            "sublayers": {**block["sublayers"], "conv": convolution},
        }
        if common["layers"] == 1:
            return {**common, "block": first}
        return {**common, "blocks": {"first": first, "rest": block}, "pattern": ["first", "rest"], "lead": 1}

    def write_stack(self, value: Any, found: dict[str, Any]) -> None:
        blocks = list(value["blocks"].values()) if value.get("blocks") else [value["block"]]
        sublayers = blocks[0]["sublayers"]
        if sublayers["attn"]["kind"] != "disentangled":
            raise Unexpressed(f"attention is '{sublayers['attn']['kind']}', not 'disentangled'")
        self.write_attention(sublayers["attn"], found)
        self.layers.dump(value["layers"], found, "")
        self.hidden.dump(sublayers["ffn"]["hidden"], found, "")
        ACT.dump(sublayers["ffn"]["act"], found, "")
        conv = sublayers.get("conv")
        if conv is not None:
            found |= {"conv_kernel_size": conv["kernel"], "conv_groups": conv["groups"]}
            Key("conv_act", str, "tanh", code=activation("tanh")).dump(conv["act"], found, "")

    def template(self, form: Form) -> dict[str, Any]:
        return {
            "kind": "encoder",
            "vocab": self.vocab,
            "dim": self.dim,
            "context": CONTEXT,
            "dropout": DROPOUT,
            "pad": pad(0),
            "norm": {"kind": "layer", "eps": Key("layer_norm_eps", float, 1e-7)},
            "init": {"kind": "normal", "std": Key("initializer_range", float, 0.02)},
            "embed": Custom(self.embed, self.write_embed),
            "stack": Custom(self.stack, self.write_stack),
            "heads": form.heads,
            **form.more,
        }

    def pooled(self, options: Options) -> dict[str, Any]:
        dim = self.dim.load(options)
        if given(options, "pooler_hidden_size", int, dim) != dim:
            options.refuse("pooler_hidden_size", f"is not hidden_size, {dim}: the reference runs no such network")
        return {"act": POOLED_ACT.load(options), "dropout": float(options.get("pooler_dropout", float, 0.0))}

    def write_pooled(self, value: Any, found: dict[str, Any]) -> None:
        POOLED_ACT.dump(value["act"], found, "")
        found["pooler_dropout"] = value["dropout"]

    def family(self) -> Family:
        """The family of this version."""
        sequence = {"labels": LABELS, "pick": "pooled", "dropout": CLASSIFIER_DROPOUT, "problem": PROBLEM}
        sequence |= {"several": "shares"}
        pooler = {"pooler": Custom(self.pooled, self.write_pooled)}
        trunk = "deberta."
        forms = [
            Form(f"{self.classes}ForMaskedLM", trunk, {"mlm": {"act": ACT, "tied": TIED, "output": "logits"}}),
            Form(f"{self.classes}ForMaskedLM", trunk, {"lm": NEWER}),
            Form(f"{self.classes}Model", "", {}),
            Form(f"{self.classes}ForSequenceClassification", trunk, {"sequence": sequence}, pooler),
            Form(f"{self.classes}ForTokenClassification", trunk, {"token": {"labels": LABELS, "dropout": DROPOUT}}),
            Form(f"{self.classes}ForQuestionAnswering", trunk, {"span": TWO_OUTPUTS}),
        ]
        if self.second:
            choice = {"choice": {"dropout": CLASSIFIER_DROPOUT}}
            forms.append(Form(f"{self.classes}ForMultipleChoice", trunk, choice, pooler))
        return Family(
            name=self.name,
            types=(self.kind,),
            title=self.title,
            template=self.template,
            forms=tuple(forms),
            trunk=self.rules,
            heads=(*_older(), *layer("pooler.dense", "pooler.dense"), *_newer()),
            ties=_ties,
            dead=self.dead,
            # Theirs comes before the activation.
            rescaled=("blocks.0.conv",),
            drops=(Drop("embeddings.position_ids", "0, 1, 2 ...", counts_up),),
            prefixes=(trunk, ""),
            neutral=frozenset(
                "add_cross_attention is_decoder is_encoder_decoder tie_word_embeddings legacy padding_idx "
                "pooler_hidden_size pooler_hidden_act pooler_dropout cls_dropout conv_groups conv_act".split()
            ),
        )

    def rules(self, config: Any) -> Sequence[Rule]:
        theirs, block = "encoder.layer.{layer}", "stack.blocks.{layer}"
        attention = f"{theirs}.attention"
        return (
            one("embeddings.word_embeddings.weight", "embed.tokens.weight"),
            one("embeddings.position_embeddings.weight", "embed.positions.table.weight"),
            one("embeddings.token_type_embeddings.weight", "embed.segments.weight"),
            one("embeddings.embed_proj.weight", "embed.project.weight"),
            *layer("embeddings.LayerNorm", "embed.norm"),
            one("encoder.rel_embeddings.weight", "stack.shared.turns.0.table.weight"),
            *layer("encoder.LayerNorm", "stack.shared.turns.0.norm"),
            *(self.second_rules if self.second else self.first_rules)(f"{attention}.self", f"{block}.attn", config),
            *layer(f"{attention}.output.dense", f"{block}.attn.o"),
            *layer(f"{attention}.output.LayerNorm", f"{block}.wiring.norm.attn"),
            *layer(f"{theirs}.intermediate.dense", f"{block}.ffn.up"),
            *layer(f"{theirs}.output.dense", f"{block}.ffn.down"),
            *layer(f"{theirs}.output.LayerNorm", f"{block}.wiring.norm.ffn"),
            *layer("encoder.conv.conv", "stack.blocks.0.conv"),
            *layer("encoder.conv.LayerNorm", "stack.blocks.0.wiring.norm.conv"),
        )

    def first_rules(self, theirs: str, ours: str, config: Any) -> Sequence[Rule]:
        heads = _blocks(config)[0].sublayers["attn"].heads
        return (
            Rule((f"{theirs}.in_proj.weight",), tuple(f"{ours}.{n}.weight" for n in "qkv"), Interleave(heads)),
            one(f"{theirs}.q_bias", f"{ours}.q.bias"),
            one(f"{theirs}.v_bias", f"{ours}.v.bias"),
            one(f"{theirs}.pos_proj.weight", f"{ours}.distance_k.weight"),
            *layer(f"{theirs}.pos_q_proj", f"{ours}.distance_q"),
            one(f"{theirs}.head_logits_proj.weight", f"{ours}.score.pre", TRANSPOSE),
            one(f"{theirs}.head_weights_proj.weight", f"{ours}.score.post", TRANSPOSE),
        )

    def second_rules(self, theirs: str, ours: str, config: Any) -> Sequence[Rule]:
        return (
            *layer(f"{theirs}.query_proj", f"{ours}.q"),
            *layer(f"{theirs}.key_proj", f"{ours}.k"),
            *layer(f"{theirs}.value_proj", f"{ours}.v"),
            *layer(f"{theirs}.pos_key_proj", f"{ours}.distance_k"),
            *layer(f"{theirs}.pos_query_proj", f"{ours}.distance_q"),
        )

    def dead(self, config: Any) -> Shapes:
        """A norm that stands there without the distances that it is for."""
        attention = _blocks(config)[0].sublayers["attn"]
        if attention.span is not None or attention.terms or attention.distance_norm.kind == "none":
            return {}
        return {"encoder.LayerNorm.weight": (config.dim,), "encoder.LayerNorm.bias": (config.dim,)}


def _classifier_dropout(options: Options) -> float:
    rate = given(options, "cls_dropout", float, None)
    return float(DROPOUT.load(options) if rate is None else rate)


CLASSIFIER_DROPOUT = Custom(_classifier_dropout, lambda value, found: found.update(cls_dropout=value))
NEWER = {
    "tied": True,
    "bias": True,
    "shift": False,
    "transform": {"kind": "dense", "act": ACT, "norm": {"kind": "inherit"}},
}
"""The head of `legacy: false`, whose matrix is always the token table."""


def _older() -> tuple[Rule, ...]:
    """BERT's heads, but for its causal one."""
    return tuple(rule for rule in bert.BERT.heads if not rule.ours[0].startswith("heads.lm."))


def _newer() -> tuple[Rule, ...]:
    theirs, ours = "lm_predictions.lm_head", "heads.lm"
    return (
        *layer(f"{theirs}.dense", f"{ours}.transform.dense"),
        *layer(f"{theirs}.LayerNorm", f"{ours}.transform.norm"),
        one(f"{theirs}.bias", f"{ours}.bias"),
    )


def _blocks(config: Any) -> list[Any]:
    return list(config.stack.blocks.values()) if config.stack.blocks else [config.stack.block]


def _ties(config: Any, prefix: str) -> Mapping[str, str]:
    return {} if "lm" in config.heads else bert.ties(config, prefix)


DEBERTA = Version("deberta", "deberta", "DeBERTa", "Deberta", (50265, 768, 12, 12, 3072)).family()
DEBERTA_V2 = Version("deberta_v2", "deberta-v2", "DeBERTa-v2", "DebertaV2", (128100, 1536, 24, 24, 6144)).family()
