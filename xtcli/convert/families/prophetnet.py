"""ProphetNet: post-norms, learned positions from behind the padding's row on, a decoder that predicts several tokens at
each place."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from xtcli.convert.families.common import PAD, activation, pad, starts
from xtcli.convert.family import Family, Form
from xtcli.convert.options import Custom, Key, Options, Part, Switch, Unexpressed, table
from xtcli.convert.rules import Rule, layer, one
from xtcli.registry import Config

DIM = Key("hidden_size", int, 1024)
DROPOUT = Key("dropout", float, 0.1)
TIED = Key("tie_word_embeddings", bool, True)
ROWS = Key("max_position_embeddings", int, 512)
CROSS = Key("add_cross_attention", bool, True)
PADDING = pad(0)


def _first(options: Options) -> int:
    """The row of the first place: the one behind the padding's."""
    padding = PADDING.load(options)
    if padding is None:
        options.refuse(PAD.name, "is none, and positions are counted from it", "name a padding token")
        return 1
    return int(padding) + 1


def _write_first(value: Any, found: dict[str, Any]) -> None:
    if found.get(PAD.name) is None or value != found[PAD.name] + 1:
        raise Unexpressed("the first place must have the row behind that of the padding token")


def _context(options: Options) -> int:
    rows, first = ROWS.load(options), _first(options)
    if rows - first < 2:
        options.refuse(ROWS.name, f"is {rows}, and text begins at row {first}", "give it more rows")
        return 2
    return int(rows - first)


def _write_context(value: Any, found: dict[str, Any]) -> None:
    if value is None or found.get(PAD.name) is None:
        raise Unexpressed("the places are counted from the padding token, and have an end")
    found[ROWS.name] = value + found[PAD.name] + 1


def _embed(clamp: bool) -> dict[str, Any]:
    return {
        "kind": "tokens",
        "positions": {"kind": "learned", "offset": Custom(_first, _write_first), "clamp": clamp},
        "norm": {"kind": "inherit"},
        "dropout": DROPOUT,
    }


READ, WRITTEN = _embed(clamp=True), _embed(clamp=False)


def _stack(side: str, attention: str, alias: tuple[str, ...] = ()) -> dict[str, Any]:
    heads = {
        "heads": Key(f"num_{side}_attention_heads", int, 16, alias),
        "dropout": Key("attention_dropout", float, 0.1),
    }
    ahead = {"buckets": Key("num_buckets", int, 32), "furthest": Key("relative_max_distance", int, 128)}
    decodes = side == "decoder"
    return {
        **({"kind": "n-gram", "streams": Key("ngram", int, 2)} if decodes else {}),
        "layers": Key(f"num_{side}_layers", int, 12),
        "norm": {"kind": "none"},
        "block": {
            "wiring": {"kind": "post", "dropout": DROPOUT},
            "sublayers": {
                "attn": {"kind": attention, **heads, **(ahead if decodes else {})},
                **({"cross": Part(CROSS, {"kind": "cross-attention", **heads})} if decodes else {}),
                "ffn": {
                    "kind": "mlp",
                    "hidden": Key(f"{side}_ffn_dim", int, 4096),
                    "act": Key("activation_function", str, "gelu", code=activation("gelu")),
                    "dropout": Key("activation_dropout", float, 0.1),
                },
            },
        },
    }


ENCODER = _stack("encoder", "attention", ("num_attention_heads",))
DECODER = _stack("decoder", "n-gram")


def _template(form: Form) -> dict[str, Any]:
    return {
        # The padding must be known before the places that are counted from it.
        "pad": PADDING,
        "vocab": Key("vocab_size", int, 30522),
        "dim": DIM,
        "context": Custom(_context, _write_context),
        "dropout": DROPOUT,
        "norm": {"kind": "layer", "eps": 1e-5},
        "init": {"kind": "normal", "std": Key("init_std", float, 0.02)},
        "heads": form.heads,
        **form.more,
    }


BOTH = {
    "kind": "encoder-decoder",
    "start": starts(0),
    "encoder": {"embed": READ, "stack": ENCODER},
    "decoder": {"embed": WRITTEN, "stack": DECODER},
}
READS = {"kind": "encoder", "embed": READ, "stack": ENCODER}
WRITES = {
    "kind": "decoder",
    "memory": Switch(CROSS, {False: None, True: DIM}, silent=True),
    "embed": WRITTEN,
    "stack": DECODER,
}
LM = {
    "tied": TIED,
    "smoothing": Key("eps", float, 0.0),
    "further": Key("disable_ngram_loss", bool, False, code=table({False: 1.0, True: 0.0})),
}

FORMS = (
    Form("ProphetNetForConditionalGeneration", "prophetnet.", {"lm": LM}, BOTH),
    Form("ProphetNetModel", "", {}, BOTH),
    Form("ProphetNetForCausalLM", "prophetnet.", {"lm": {**LM, "shift": False}}, WRITES),
    Form("ProphetNetEncoder", "", {}, READS),
    Form("ProphetNetDecoder", "", {}, WRITES),
)


def _attention(theirs: str, ours: str, norm: str) -> tuple[Rule, ...]:
    names = {"query_proj": "q", "key_proj": "k", "value_proj": "v", "out_proj": "o"}
    return (
        *(rule for name, short in names.items() for rule in layer(f"{theirs}.{name}", f"{ours}.{short}")),
        *layer(f"{theirs}_layer_norm", norm),
    )


def _side(side: str, ours: str) -> tuple[Rule, ...]:
    theirs, block = f"{side}layers.{{layer}}", f"{ours}stack.blocks.{{layer}}"
    return (
        one(f"{side}position_embeddings.weight", f"{ours}embed.positions.table.weight"),
        one(f"{side}ngram_embeddings.weight", f"{ours}stack.starts"),
        *layer(f"{side}embeddings_layer_norm", f"{ours}embed.norm"),
        *_attention(f"{theirs}.self_attn", f"{block}.attn", f"{block}.wiring.norm.attn"),
        *layer(f"{theirs}.self_attn.relative_pos_embeddings", f"{block}.attn.relative"),
        *_attention(f"{theirs}.cross_attn", f"{block}.cross", f"{block}.wiring.norm.cross"),
        *layer(f"{theirs}.feed_forward.intermediate", f"{block}.ffn.up"),
        *layer(f"{theirs}.feed_forward.output", f"{block}.ffn.down"),
        *layer(f"{theirs}.feed_forward_layer_norm", f"{block}.wiring.norm.ffn"),
    )


def _within(config: Any) -> str:
    """What precedes the names of a model of one stack: a decoder with a head is part of something, others are alone."""
    return "decoder." if config.heads else ""


def _trunk(config: Config) -> Sequence[Rule]:
    if config.kind == "encoder-decoder":
        return (
            one("word_embeddings.weight", "tokens.weight"),
            *_side("encoder.", "encoder."),
            *_side("decoder.", "decoder."),
        )
    return one("word_embeddings.weight", "embed.tokens.weight"), *_side(_within(config), "")


def _ties(config: Any, prefix: str) -> Mapping[str, str]:
    main = f"{prefix}word_embeddings.weight"
    sides = ("encoder.", "decoder.") if config.kind == "encoder-decoder" else (_within(config),)
    ties = {f"{prefix}{side}word_embeddings.weight": main for side in sides if side}
    lm = config.heads.get("lm")
    return ties | ({"lm_head.weight": main} if lm is not None and lm.tied else {})


def _gathered(self: Any, hidden: Tensor, scores: Tensor, places: Tensor, buckets: Tensor | None) -> Tensor:
    """hidden (B, T, n, D), buckets (B, T, S) -> what is added to scores (B, n, H, T, S).

    A cached step has no buckets: they are those of its keys, which lie side by side up to its own.
    """
    if buckets is None:
        return self.uncorrected(hidden, scores, places, buckets)  # type: ignore[no-any-return]
    values = self.relative_pos_embeddings(hidden.transpose(1, 2))
    values = values.unflatten(-1, (self.num_buckets, self.num_attn_heads)).permute(0, 1, 4, 2, 3)
    added: Tensor = values.gather(-1, buckets[:, None, None].expand(*values.shape[:-1], -1).long())
    return added


@contextmanager
def _corrected() -> Iterator[None]:
    """The reference with the relative scores of its predict streams in the right order.

    Where more than one place is decoded at once it lays them out as (place, stream, head) and reads them as (stream,
    head, place), so that an answer depends on how many places follow. Its cached steps of one token, in which both are
    the same, are what the weights were trained for, and what this gives for any length.
    """
    from transformers.models.prophetnet.modeling_prophetnet import ProphetNetNgramSelfAttention as Mixer

    mixer: Any = Mixer
    mixer.uncorrected = mixer.get_predict_relative_pos_embeddings
    mixer.get_predict_relative_pos_embeddings = _gathered
    try:
        yield
    finally:
        mixer.get_predict_relative_pos_embeddings = mixer.uncorrected
        del mixer.uncorrected


PROPHETNET = Family(
    name="prophetnet",
    types=("prophetnet",),
    title="ProphetNet",
    template=_template,
    forms=FORMS,
    trunk=_trunk,
    heads=(one("lm_head.weight", "heads.lm.decoder.weight"),),
    ties=_ties,
    prefixes=("prophetnet.", ""),
    objectives={"encoder-decoder": "masked-spans"},
    runnable=_corrected,
    neutral=frozenset(
        """
        is_encoder_decoder is_decoder add_cross_attention tie_word_embeddings disable_ngram_loss eps ngram num_buckets
        relative_max_distance num_hidden_layers num_attention_heads
        num_encoder_layers encoder_ffn_dim num_encoder_attention_heads
        num_decoder_layers decoder_ffn_dim num_decoder_attention_heads
        """.split()
    ),
)
